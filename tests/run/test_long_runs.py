"""Many edit batches: streams, runs that go on, protected keys, limits."""

from __future__ import annotations

import json
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.readers import read_edits, stream_edits
from pmet_lightning.model.patch import read_patch
from pmet_lightning.moments import second_moments as stats
from pmet_lightning.moments.store import MomentStore
from pmet_lightning.run import patch_file
from pmet_lightning.run.journal import Journal
from pmet_lightning.solver.null_space import null_space
from pmet_lightning.solver.update import solve_update
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.write import drift
from pmet_lightning.write import weight_spread as spread_module
from pmet_lightning.write.keys import measure_keys
from pmet_lightning.write.weight_spread import WeightSpread
from tests.conftest import mostly_slow
from tests.tiny import RECORDS, save_tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    base = tmp_path_factory.mktemp("inputs")
    (base / "records.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    (base / "corpus.txt").write_text("\n".join(f"This is the text of number {i}, and it is short." for i in range(40)))
    return save_tiny("gpt2", base / "model"), base


def fit(inputs, folder: Path, *arguments: str, records: Path | None = None) -> Path:
    model, base = inputs
    main([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--model.model_name", model,
        "--model.layers", "[1, 2]", "--model.dtype", "float64", "--model.steps", "4", "--data.path",
        str(records or base / "records.jsonl"), "--data.edit_batch", "3", "--moments.corpus", str(base / "corpus.txt"),
        "--moments.folder", str(base / "moments"), "--spread.lam", "2", "--drift.text", "null", *arguments,
    ])  # fmt: skip
    return folder


def stop_after(monkeypatch, calls: int) -> None:
    """Interrupt the run in the keys of a later write."""
    seen = []

    def stopping(*arguments):
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return measure_keys(*arguments)

    monkeypatch.setattr(spread_module, "measure_keys", stopping)


def same_patch(one: Path, other: Path, tolerance: float = 1e-9) -> None:
    a, b = (load_file(folder / "patch.safetensors") for folder in (one, other))
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert float((b[name] - tensor).norm() / tensor.norm()) < tolerance, name


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    return fit(inputs, tmp_path_factory.mktemp("whole") / "run", "--spread.protect_past", "true")


def test_a_stopped_run_goes_on_and_ends_alike(inputs, whole, tmp_path, monkeypatch):
    arguments = ("--spread.protect_past", "true", "--trainer.resume", "true", "--trainer.logger", "true")
    with monkeypatch.context() as patched:
        stop_after(patched, 5)  # two layers a batch: in the third
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(inputs, tmp_path / "run", *arguments)
    folder = tmp_path / "run"
    assert (state(folder)["status"], state(folder)["edits_written"]) == ("interrupted", 6)
    # What a kill in the middle of writing leaves:
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"case_id": "half a li')
    fit(inputs, folder, *arguments)
    same_patch(whole, folder)
    assert state(folder)["status"] == "finished"
    for a, b in zip(ledger(whole), ledger(folder), strict=True):
        assert a.pop("solve_error").keys() == b.pop("solve_error").keys()
        assert a == {name: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for name, v in b.items()}
    one, other = (json.loads((f / "report.json").read_text()) for f in (whole, folder))
    assert len(one["layers"]) == len(other["layers"]) == 6
    assert len(one["curves"]["loss"]) == len(other["curves"]["loss"]) == 12
    for name in ("scores", "edit_batches"):
        assert json.dumps(one[name]) != "null"
    assert other["scores"]["after"] == pytest.approx(one["scores"]["after"], rel=1e-6)
    assert [b["edit_batch"] for b in other["edit_batches"]] == [0, 1, 2]
    assert (folder / "resumed-1" / "metrics.csv").is_file()
    assert (folder / "metrics.csv").is_file()


def test_going_on_with_other_settings_is_refused(inputs, whole):
    before = (whole / "patch.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(spread.lam: 2.0 then, 3.0 now\)"):
        fit(inputs, whole, "--trainer.resume", "true", "--spread.protect_past", "true", "--spread.lam", "3")
    assert (whole / "patch.safetensors").read_bytes() == before


def past_files(folder):
    """The files of protected keys."""
    return sorted(folder.glob("patch-past-*.safetensors"))


@pytest.mark.parametrize(("when", "batch"), [("before the patch", 2), ("after the patch", 2), ("after the patch", 3)])
def test_a_kill_beside_the_patch_harms_nothing(inputs, whole, tmp_path, monkeypatch, when, batch):
    """The protected keys are those of the patch, whichever of the two files the kill came after, and no others stay."""
    seen, save = [], patch_file.save_patch

    def dying(path, *arguments):
        seen.append(1)
        if len(seen) == batch and when == "after the patch":
            manifest = path.with_suffix(".json").read_text()
            save(path, *arguments)
            path.with_suffix(".json").write_text(manifest)  # as it is until it is replaced, too
        if len(seen) == batch:
            raise KeyboardInterrupt
        save(path, *arguments)

    arguments = ("--spread.protect_past", "true", "--trainer.resume", "true")
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(patch_file, "save_patch", dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(inputs, folder, *arguments)
    assert len(past_files(folder)) == 2, "of the patch that was to be replaced, and of the one that was to come"
    fit(inputs, folder, *arguments)
    same_patch(whole, folder)
    assert json.loads((folder / "patch.json").read_text()) == read_patch(folder / "patch.safetensors").manifest
    (past,), (expected,) = past_files(folder), past_files(whole)
    for name, kept in load_file(past).items():
        torch.testing.assert_close(kept, load_file(expected)[name])
    content = past.read_bytes()
    past.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PmetError, match=r"patch-past-.*: keys of earlier edit batches that are not as they were"):
        fit(inputs, folder, *arguments)
    past.unlink()
    with pytest.raises(FileNotFoundError, match=r"patch-past-.*', the protected keys of the 3 edit batches"):
        fit(inputs, folder, *arguments)


def test_a_kill_before_the_first_patch_leaves_no_edits_behind(inputs, tmp_path, monkeypatch):
    def dying(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(patch_file, "save_patch", dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(inputs, folder)
    assert len(ledger(folder)) == 3
    fit(inputs, folder, "--trainer.resume", "true")
    assert [line["case_id"] for line in ledger(folder)] == [str(i) for i in range(len(RECORDS))]


@pytest.mark.parametrize("stream", [(), ("--data.stream", "true")], ids=["file", "stream"])
def test_going_on_with_other_records_is_refused(inputs, whole, tmp_path, stream):
    arguments = ("--trainer.resume", "true", "--spread.protect_past", "true", *stream)
    before = {name: (whole / name).read_bytes() for name in ("patch.safetensors", "ledger.jsonl", "state.json")}
    other = tmp_path / "other.jsonl"
    changed = [*RECORDS[:4], RECORDS[4] | {"target_new": "nothing of the kind"}, *RECORDS[5:]]
    other.write_text("".join(f"{json.dumps(record)}\n" for record in changed))
    expected = r"other.jsonl, record 4 \(line 5\): expected the record .* as its edit 4, .* got .*nothing of the kind"
    with pytest.raises(RecordError, match=expected):
        fit(inputs, whole, *arguments, records=other)
    other.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS[:5]))
    with pytest.raises(RecordError, match=r"other.jsonl: ends after 5 edits, but the run .* has written more"):
        fit(inputs, whole, *arguments, records=other)
    assert {name: (whole / name).read_bytes() for name in before} == before


def test_going_on_with_other_targets_or_moments_is_refused(inputs, whole, tmp_path):
    arguments = ("--trainer.resume", "true", "--spread.protect_past", "true")
    with pytest.raises(ValueError, match=r"other settings \(optimizer: \['Adam', .*'lr': 0.5.* then, .*'lr': 0.3"):
        fit(inputs, whole, *arguments, "--model.optimizer", "torch.optim.Adam", "--model.optimizer.lr", "0.3")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"Another text, the one of number {i}." for i in range(40)))
    with pytest.raises(ValueError, match=r"other settings \(moments: .*'corpus': "):
        fit(inputs, whole, *arguments, "--moments.corpus", str(corpus), "--moments.folder", str(tmp_path / "moments"))


SOURCES = {
    "file": (),
    "stream": ("--data.stream", "true"),
    "stream with a limit": ("--data.stream", "true", "--drift.max_perplexity", "1e9"),
}


@pytest.mark.parametrize("source", mostly_slow(SOURCES, ["file", "stream"]))
def test_going_on_with_nothing_new_loses_nothing(inputs, tmp_path, source):
    stream = (*SOURCES[source], "--drift.text", str(inputs[1] / "corpus.txt"))
    folder = fit(inputs, tmp_path / "run", *stream)
    damage = [state(folder)["verdict"][name] for name in ("damage", "perplexity_factor")]
    assert damage[0] != "not measured"
    before = {name: (folder / name).read_bytes() for name in ("patch.safetensors", "ledger.jsonl", "scores.json")}
    report = json.loads((folder / "report.json").read_text())
    fit(inputs, folder, *stream, "--trainer.resume", "true")
    assert {name: (folder / name).read_bytes() for name in ("patch.safetensors", "ledger.jsonl")} == {
        name: before[name] for name in ("patch.safetensors", "ledger.jsonl")
    }
    scores = [json.loads(text) for text in (before["scores.json"], (folder / "scores.json").read_text())]
    for phase in ("before", "after"):
        assert scores[1][phase] == pytest.approx(scores[0][phase], rel=1e-6)
    again = json.loads((folder / "report.json").read_text())
    for name in ("layers", "curves"):
        assert again[name] == report[name]
    assert [line["case_id"] for line in again["edits"]] == [line["case_id"] for line in report["edits"]]
    assert (state(folder)["status"], state(folder)["edit_batches_written"]) == ("finished", 3)
    assert state(folder)["edits_written"] == state(folder)["verdict"]["facts"] == len(RECORDS)
    again = [state(folder)["verdict"][name] for name in ("damage", "perplexity_factor")]
    assert again == [damage[0], pytest.approx(damage[1], rel=1e-6)]


def test_edit_batches_may_become_larger_when_a_run_goes_on(inputs, tmp_path):
    folder = fit(inputs, tmp_path / "run", "--data.limit", "3")
    fit(inputs, folder, "--trainer.resume", "true", "--data.edit_batch", "4")
    assert [line["edit_batch"] for line in ledger(folder)] == [0, 0, 0, 1, 1, 1, 1]


def corrected() -> dict:
    return RECORDS[1] | {"target_new": "nothing of the kind"}


def test_a_correction_of_an_earlier_batch_is_written_and_a_contradiction_in_one_is_not(inputs, tmp_path):
    """Also where a run goes on after an edit batch that was not full."""
    path = tmp_path / "growing.jsonl"
    lines = [f"{json.dumps(record)}\n" for record in (*RECORDS[:5], corrected())]
    arguments = ("--data.stream", "true", "--trainer.resume", "true", "--data.edit_batch", "4")
    path.write_text("".join(lines[:2]))
    folder = fit(inputs, tmp_path / "run", *arguments, records=path)
    path.write_text("".join([*lines[:2], lines[5]]))  # in the first four lines of the file, but not of a batch
    fit(inputs, folder, *arguments, records=path)
    assert [line["target"] for line in ledger(folder)][2].strip() == "nothing of the kind"
    with path.open("a") as file:  # one batch after the three, and no four lines of the file
        file.writelines([lines[2], json.dumps(RECORDS[2] | {"target_new": "nothing of the kind"}) + "\n"])
    with pytest.raises(RecordError, match=r"record 4 \(line 5\) contradicts .*record 3 \(line 4\)"):
        fit(inputs, folder, *arguments, records=path)
    assert state(folder)["edits_written"] == 3


@pytest.mark.parametrize("name", ["list.json", "lines.jsonl", "table.csv", "stream.jsonl"])
def test_what_is_no_utf8_is_named_with_its_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"[\n" * name.endswith("json") + b"{}\n" + b'"M\xfcnchen"\n')
    line = 3 if name.endswith("json") else 2
    with pytest.raises(RecordError, match=rf"{name}, line {line}: expected UTF-8 text, found the byte 0xfc"):
        list(stream_edits(str(path), skip=1)) if name.startswith("stream") else read_edits(str(path))


def test_a_text_with_an_odd_line_separator_is_one_record(tmp_path):
    path = tmp_path / "lines.jsonl"
    record = RECORDS[0] | {"note": "one\u2028two\x85three"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\n" + json.dumps(RECORDS[1]), encoding="utf-8")
    assert len(read_edits(str(path))) == len(list(stream_edits(str(path)))) == 2


def test_a_journal_without_its_batches_cannot_go_on(tmp_path):
    journal = Journal(tmp_path)
    journal.add(["{}", "{}"], {"edit_batch": 0})
    assert journal.keep(1) == 2
    with pytest.raises(ValueError, match="1 edit batches and 2 edits, the patch beside them 2"):
        journal.keep(2)


@pytest.mark.slow
def test_a_stream_writes_what_a_file_does(inputs, tmp_path):
    plain = fit(inputs, tmp_path / "plain")
    streamed = fit(inputs, tmp_path / "streamed", "--data.stream", "true")
    same_patch(plain, streamed)
    assert [line["case_id"] for line in ledger(streamed)] == [line["case_id"] for line in ledger(plain)]
    at_once = json.loads((plain / "scores.json").read_text())["edit_batches"]
    scores = json.loads((streamed / "scores.json").read_text())
    for a, b in zip(at_once, scores["edit_batches"], strict=True):
        assert b["at_once"] == pytest.approx(a["at_once"], rel=1e-6)
    assert scores["after"]["count"] == scores["before"]["count"] == len(RECORDS)
    assert len(json.loads((streamed / "report.json").read_text())["edits"]) == len(RECORDS)


@pytest.mark.slow  # it waits for lines that come late
def test_a_stream_follows_a_growing_file_and_can_go_on(inputs, tmp_path):
    lines = [f"{json.dumps(record)}\n" for record in RECORDS]
    path = tmp_path / "growing.jsonl"
    path.write_text(lines[0] + lines[1][:9])

    def write() -> None:
        for text in (lines[1][9:], *lines[2:5]):
            time.sleep(0.3)
            with path.open("a") as file:
                file.write(text)

    writer = threading.Thread(target=write)
    writer.start()
    arguments = ("--data.stream", "true", "--data.stream_wait", "3", "--trainer.resume", "true")
    folder = fit(inputs, tmp_path / "run", *arguments, records=path)
    writer.join()
    assert (state(folder)["edit_batches_written"], state(folder)["edits_written"]) == (2, 5)
    with path.open("a") as file:
        file.writelines(lines[5:])
    fit(inputs, folder, *arguments, records=path)
    assert (state(folder)["edit_batches_written"], state(folder)["edits_written"]) == (3, len(RECORDS))
    assert [line["edit_batch"] for line in ledger(folder)] == [0, 0, 0, 1, 1, 2, 2]


def test_a_broken_line_ends_a_stream_and_names_it(inputs, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS[:4]) + '{"prompt": 3\n')
    with pytest.raises(RecordError, match=r"broken.jsonl, line 5: broken JSON"):
        fit(inputs, tmp_path / "run", "--data.stream", "true", records=path)
    assert (state(tmp_path / "run")["status"], state(tmp_path / "run")["edits_written"]) == ("failed", 3)


def test_what_cannot_be_a_stream_is_said(inputs, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RecordError, match=r"expected a \.jsonl file"):
        list(stream_edits(str(tmp_path / "list.json")))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        list(stream_edits(str(tmp_path / "nowhere.jsonl")))


def test_past_keys_are_protected_as_the_formula_says(inputs, tmp_path, monkeypatch):
    """Each write solves with λC + K_past K_pastᵀ, and earlier edits lose less by it."""
    seen = []

    def recording(model, sites, place, values_at, over):
        keys, values = measure_keys(model, sites, place, values_at, over)
        seen.append((place, keys.clone()))
        return keys, values

    solved = []

    def plainly(residual, keys, moment, lam):
        solution = solve_update(residual, keys, moment, lam)
        solved.append((residual.double(), keys.double(), solution.delta_OI))
        return solution

    monkeypatch.setattr(spread_module, "measure_keys", recording)
    monkeypatch.setattr("pmet_lightning.write.preserved.solve_update", plainly)
    monkeypatch.setattr("pmet_lightning.write.preserved.FEW_EDITS", 0.0)  # so that every solve goes through it
    fit(inputs, tmp_path / "run", "--spread.protect_past", "true")
    (store,) = {path.parent for path in (inputs[1] / "moments").glob("*/ffn-1.safetensors")}
    past: dict = {}
    assert len(seen) == len(solved) == 6
    for (place, keys), (residual, used, delta) in zip(seen, solved, strict=True):
        torch.testing.assert_close(used, keys)
        moment = MomentStore(store).load(place, keys.shape[1], "").double()
        system = 2.0 * moment + past.get(place, 0) + keys.T @ keys
        expected = residual.T @ keys @ torch.linalg.inv(system)
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-9)
        past[place] = past.get(place, 0) + keys.T @ keys


def test_edit_batches_are_protected_unless_that_is_turned_off(inputs, whole, tmp_path):
    same_patch(fit(inputs, tmp_path / "by default"), whole, 1e-15)
    fit(inputs, tmp_path / "off", "--spread.protect_past", "false")
    with pytest.raises(AssertionError):
        same_patch(tmp_path / "off", whole)
    assert len(list((tmp_path / "by default").glob("patch-past-*"))) == 1
    assert not list((tmp_path / "off").glob("patch-past-*"))


def test_a_run_of_one_edit_batch_keeps_no_keys_and_protects_them_when_it_goes_on(inputs, tmp_path, caplog):
    records = tmp_path / "records.jsonl"
    lines = (inputs[1] / "records.jsonl").read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:3]))
    arguments = ("--data.edit_batch", "null", "--trainer.resume", "true")
    fit(inputs, tmp_path / "run", *arguments, records=records)
    assert not list((tmp_path / "run").glob("patch-past-*"))
    records.write_text("".join(lines[:5]))
    with caplog.at_level("INFO"):
        fit(inputs, tmp_path / "run", *arguments, records=records)
    assert "measuring the keys of 3 facts" in caplog.text
    assert state(tmp_path / "run")["edits_written"] == 5


def test_past_keys_are_there_once_and_once_before(inputs, tmp_path, monkeypatch):
    """A row for each fact on the CPU; what a rollback needs is no copy, and is gone when the next batch is written."""
    write, kept = WeightSpread.on_train_batch_end, []

    def alive(number):
        return [found() is not None for found in kept[number].values()]

    def writing(self, *arguments):
        write(self, *arguments)
        now = self.edited.past_keys
        assert {(*past.shape, past.device.type) for past in now.values()} == {(len(self.edited.facts), 128, "cpu")}
        if kept:
            assert all(self.edited.previous.past_keys[place] is found() for place, found in kept[-1].items())
        kept.append({place: weakref.ref(past) for place, past in now.items()})

    def measuring(*arguments):
        if len(kept) > 1:
            assert not any(alive(-2)), "of the edit batch before the last"
        return measure_keys(*arguments)

    monkeypatch.setattr(WeightSpread, "on_train_batch_end", writing)
    monkeypatch.setattr(spread_module, "measure_keys", measuring)
    fit(inputs, tmp_path / "run", "--spread.protect_past", "true", "--drift.max_growth", "1e9")
    assert len(kept) == 3
    (past,) = past_files(tmp_path / "run")
    stored = load_file(past)
    assert {(tensor.dim(), tensor.shape[1]) for tensor in stored.values()} == {(2, 128)}


@pytest.mark.slow
def test_the_null_space_is_made_once_for_all_edit_batches(inputs, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(stats, "null_space", lambda *given: made.append(given) or null_space(*given))
    options = ("--spread.null_space", "0.3", "--spread.protect_past", "true", "--trainer.resume", "true")
    fit(inputs, tmp_path / "run", *options)
    assert len(made) == 2, "two layers, three edit batches"
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(inputs, tmp_path / "resumed", *options)
    fit(inputs, tmp_path / "resumed", *options)
    same_patch(tmp_path / "run", tmp_path / "resumed")


@pytest.mark.parametrize("rollback", [True, False])
def test_a_limit_ends_the_run(inputs, whole, tmp_path, rollback):
    growth = {line["layer"]: line["growth"] for line in json.loads((whole / "report.json").read_text())["layers"][2:4]}
    first = [line["growth"] for line in json.loads((whole / "report.json").read_text())["layers"][:2]]
    limit = (max(growth.values()) + max(first)) / 2
    assert max(first) < limit < max(growth.values()), "reached by the second edit batch"
    folder = fit(
        inputs, tmp_path / "run", "--spread.protect_past", "true", "--drift.max_growth", str(limit),
        "--drift.on_limit", "rollback" if rollback else "stop",
    )  # fmt: skip
    assert state(folder)["edits_written"] == (3 if rollback else 6)
    assert state(folder)["ended"].startswith("edit batch 1: growth")
    advice = state(folder)["advice"]
    assert "larger --spread.lam" in advice
    if rollback:
        assert "records.jsonl, record 3 (line 4) to " in advice
        assert "take these records out of the file" in advice
    two = fit(inputs, tmp_path / "two", "--spread.protect_past", "true", "--data.limit", "3" if rollback else "6")
    same_patch(two, folder)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_the_divergence_goes_to_the_device_of_the_model(monkeypatch):
    """It comes from distributions that are kept on the CPU, and is summed over processes where the model is."""
    moved = []

    class Divergence:
        def double(self):
            return self

        def to(self, device):
            moved.append(device)
            return torch.zeros(3, dtype=torch.float64)

    monkeypatch.setattr(drift, "kl_divergence", lambda *_: Divergence())
    head = SimpleNamespace(weight=torch.zeros(5, 2))
    module = SimpleNamespace(device=torch.device("cpu"), phase="before", tokens_per_batch=9,
                             model=SimpleNamespace(get_output_embeddings=lambda: head))  # fmt: skip
    watch = drift.Drift()
    assert watch._measure(module, [])[1] is None
    assert watch._measure(module, [])[1] == 0
    assert moved == [module.device]


def test_perplexity_can_end_a_run(inputs, tmp_path):
    corpus = str(inputs[1] / "corpus.txt")
    folder = fit(
        inputs, tmp_path / "run", "--drift.text", corpus, "--drift.rows", "4", "--drift.max_perplexity", "0.5",
        "--drift.on_limit", "stop",
    )  # fmt: skip
    assert state(folder)["edits_written"] == 3
    assert "perplexity" in state(folder)["ended"]
    with pytest.raises(ValueError, match="needs text to measure it on"):
        fit(inputs, tmp_path / "other", "--drift.max_perplexity", "2")

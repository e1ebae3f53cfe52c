"""What lies where is found where it was put, and everything fast agrees with something slow."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from pmet_lightning.analysis.claims import Claim, claims_of, conclusion
from pmet_lightning.analysis.components import component_measures
from pmet_lightning.analysis.facts import KnownFact, ask, read_facts
from pmet_lightning.analysis.figures import figures
from pmet_lightning.analysis.layer_choice import NO_EVIDENCE
from pmet_lightning.analysis.lens import Lens
from pmet_lightning.analysis.measures import LEAST_FACTS, TOO_FEW
from pmet_lightning.analysis.results import closing_lines, copy_line, summary_lines
from pmet_lightning.analysis.streams import is_parallel, streams_of
from pmet_lightning.analysis.study import Study
from pmet_lightning.analysis.tracing import POSITIONS, RESTORED, Tracer, draw_noise, position_of, trace
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.token_rows import TokenRow, pad_rows
from pmet_lightning.model import forward
from pmet_lightning.model.architectures import UnknownArchitectureError
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.patch import apply_patch, save_patch
from pmet_lightning.solver.weight_delta import WeightDelta
from tests.conftest import mostly_slow
from tests.planted import SCOPE, edit_of, records, save_planted, study_of, written
from tests.tiny import CONFIGS, RECORDS

FAMILIES = sorted(set(CONFIGS) - {"opt-350m"})  # which is refused, below
BOTH_WINDOWS = ("gptj", "gpt2", "llama", "gemma2", "opt")  # a second's work for each
FINAL_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm")
PARALLEL = {"cohere", "cohere2", "falcon", "falcon-new", "gpt_neox", "gptj", "phi", "stablelm-parallel"}


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module", params=[("gpt2", 1, 2), ("gptj", 1, 3), ("gpt2", 0, 3), ("gptj", 2, 3)], ids=str)
def planted(request, tmp_path_factory):
    """What is found in a planted model, and the layers that store and fetch."""
    family, store, fetch = request.param
    folder = tmp_path_factory.mktemp("planted")
    study = study_of(save_planted(family, folder / "model", store, fetch))
    study.ask(read_facts(written(folder, records())))
    found, kept = study.measure("before")
    assert kept == [0, 1, 2]
    assert hooks(study.model) == 0
    return found, store, fetch


def many(found):
    """The facts that were found, four times each: enough to say something."""
    return found.of([0, 1, 2] * 4)


def only(values_NL: torch.Tensor, layer: int, least: float) -> None:
    """Every fact has at least so much at one layer, and nothing anywhere else."""
    assert (values_NL[:, layer] > least).all()
    elsewhere = [i for i in range(values_NL.shape[1]) if i != layer]
    assert values_NL[:, elsewhere].abs().max() < 1e-3


def test_tracing_finds_what_stores_and_what_fetches(planted):
    found, store, fetch = planted
    effect = found.measures["effect"]
    only(effect.at(component="ffn", place="last subject token"), store, 0.3)
    only(effect.at(component="attn", place="last token"), fetch, 0.3)
    for component, place in (("ffn", "last token"), ("attn", "last subject token"), ("ffn", "first subject token")):
        assert effect.at(component=component, place=place).nan_to_num().abs().max() < 1e-3
    stream = effect.at(component="hidden", place="last subject token")
    assert (stream[:, :fetch] > 0.3).all()
    assert stream[:, fetch:].abs().max() < 1e-6
    stream = effect.at(component="hidden", place="last token")
    assert stream[:, :fetch].abs().max() < 1e-6
    assert (stream[:, fetch:] > 0.3).all()


def test_the_lens_jumps_and_the_logit_grows_where_the_fact_is(planted):
    found, store, fetch = planted
    for token, component, other, layer in (("subject", "ffn", "attn", store), ("last", "attn", "ffn", fetch)):
        p = found.measures["lens"].at(token=token, answer="true")
        assert p[:, :layer].nan_to_num().max() < 0.1 if layer else True
        assert (p[:, layer:] > 0.9).all()
        added = found.measures["contribution"].at(token=token, answer="true")
        only(added[:, :, 1 if component == "ffn" else 0], layer, 5.0)
        where = 0 if other == "attn" else 1
        assert added[:, :layer, where].abs().sum() < 1e-2


def test_the_layer_that_stores_is_proposed(planted):
    found, store, fetch = planted
    found = many(found)
    proposal = found.proposal()
    assert (proposal.layers, proposal.peak) == ([store], store)  # between it and the fetch, FFNs are idle
    assert copy_line(found) == closing_lines([found], [])[-1].rpartition(": ")[2] == f'--model.layers "[{store}]"'
    assert proposal.same_layers == proposal.same_peak == 1
    assert proposal.verdict == "sure"
    assert proposal.lead["low"] > 0.3
    # The one FFN that stores brings back nearly all that the noise took.
    effect, took = re.search(r"effect (\S+) \[.* of (\S+) that the noise took", summary_lines([found], [])[-1]).groups()
    assert 0.9 * float(took) < float(effect) <= float(took)
    claims = claims_of(found, None)
    assert [claim.verdict for claim in claims] == ["shown"] * 3
    assert conclusion(claims, "before") == "shown (3 of 3 predictions shown)"


def claim(low: float, high: float, count: int = 20) -> Claim:
    return Claim("", "before", {"mean": (low + high) / 2, "low": low, "high": high, "count": count})


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ([claim(0.1, 0.2)] * 2, "shown (2 of 2 predictions shown)"),
        ([claim(0.1, 0.2), claim(-0.1, 0.2)], "not shown (1 of 2 predictions shown)"),
        ([claim(0.1, 0.2), claim(-0.2, -0.1), claim(0, 1)], "refuted (1 of 3 predictions shown, 1 refuted)"),
        ([claim(0.1, 0.2), claim(0.1, 0.2, 9)], TOO_FEW),
        ([claim(0.1, 0.2), replace(claim(-0.2, -0.1), phase="after")], "shown (1 of 1 predictions shown)"),
    ],
)
def test_the_claim_is_shown_if_all_of_it_is(claims, words):
    assert conclusion(claims, "before") == words


def test_facts_that_speak_for_no_layer_give_no_line_to_copy(planted):
    found = many(planted[0])
    effect = found.measures["effect"]
    nothing = replace(found, measures=found.measures | {"effect": replace(effect, values=effect.values * 0)})
    assert nothing.proposal().verdict == NO_EVIDENCE
    assert copy_line(nothing) is None
    assert len(closing_lines([nothing], claims_of(nothing, None))) == 1


def test_of_few_facts_nothing_is_said(planted):
    """Their bootstrap intervals are too narrow: not sure, not shown, and no interval is written or drawn."""
    found = planted[0]
    few = found.of([0, 1, 2] * ((LEAST_FACTS - 1) // 3))
    claims, proposal = claims_of(few, None), few.proposal()
    assert [claim.to_dict()["verdict"] for claim in claims] == [TOO_FEW] * 3
    assert proposal.verdict == proposal.to_dict()["verdict"] == TOO_FEW
    lines = summary_lines([few], claims)[-4:]
    assert all(TOO_FEW in line for line in lines)
    assert not any("%" in line or re.search(r"\d \[", line) for line in lines)
    for findings, said in ((few, True), (many(found), False)):
        for name, figure in figures([findings]).items():
            assert figure.get_suptitle().startswith("Facts: 9. No intervals: too few") == said
            bands = any(ax.collections for ax in figure.axes[:2])
            assert bands == (not said and name != "tracing")
            shaded = name == "effect" and [patch.get_x() for patch in figure.axes[0].patches]
            assert shaded in (False, [proposal.layers[0] - 0.5])


def test_a_fact_is_found_before_and_after_its_edit(tmp_path):
    """One of three facts is edited, by hand; the others do not say their targets and are left out."""
    study = study_of(save_planted("gpt2", tmp_path / "model", 1, 2))
    name = study.sites.weight_name("ffn", 1)
    base = fingerprint(study.model)
    manifest = {"model": "", "fingerprint": base, "dtype": "auto"}
    save_patch(tmp_path / "patch.safetensors", {name: WeightDelta(edit_of(0))}, manifest)
    study.ask(read_facts(written(tmp_path, records())))
    before, kept = study.measure("before")
    apply_patch(study.model, study.sites, tmp_path / "patch.safetensors", base)
    after, both = study.measure("after", kept)
    assert (kept, both) == ([0, 1, 2], [0])
    assert study.left_out == {"after: the answer is not the first choice, or P is below 0.1": 2}
    before = before.of([0])
    assert (before.answers, after.answers) == (["true"], ["new"])
    for found, said in ((before, "true"), (after, "new")):
        p = {answer: found.measures["lens"].at(token="last", answer=answer)[0, -1] for answer in ("true", "new")}
        assert p.pop(said) > 0.9
        assert all(other < 0.1 for other in p.values())
        only(found.measures["effect"].at(component="ffn", place="last subject token"), 1, 0.3)
    claims = claims_of(before, after)[-2:]
    assert [claim.phase for claim in claims] == ["after - before"] * 2
    assert all(claim.found["mean"] > 10 for claim in claims)


def test_of_each_fact_its_own_answer_is_shown(tmp_path):
    """One fact has a new answer, which the model says after the edit; the record of the other names none."""
    study = study_of(save_planted("gpt2", tmp_path / "model", 1, 2), draws=0)
    study.sites.module("ffn", 1).weight.data += edit_of(0).T
    edited, other = (
        KnownFact("", r["prompt"], r["subject"], r["ground_truth"], r["target_new"]) for r in records()[:2]
    )
    study.ask([edited, replace(other, new=None)])
    found, _ = study.measure("after")
    assert found.answers == ["new", "true"]
    for name in ("lens", "contribution"):
        own = torch.stack([found.measures[name].at(answer=answer)[i] for i, answer in enumerate(found.answers)])
        assert torch.equal(found.of_followed(name), own)
    fetched = found.of_followed("contribution", token="last", component="attn")
    only(fetched, 2, 5.0)
    ax = figures([found])["contribution"].axes[1]
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}["attention"]
    assert drawn == pytest.approx(fetched.mean(dim=0).tolist())
    rows = summary_lines([found], [])
    added = rows[next(i for i, row in enumerate(rows) if row.startswith("added to logit")) + 2 + 2]
    assert float(added.split()[4]) == pytest.approx(float(fetched[:, 2].mean()), abs=1e-3)


def questions_of(encoder, model=None):
    facts = [KnownFact(str(i), r["prompt"], r["subject"], r["target_new"], "French") for i, r in enumerate(RECORDS[:4])]
    questions, left_out = ask(facts, encoder)
    assert not left_out
    return questions


@torch.no_grad()
def slow_effect(model, sites, question, answer, noise_DSE, site, layers, column):
    """One row, one draw and one place at a time, through the whole model."""
    ids = torch.tensor([question.ids])

    def p(embedding_hook=None, restored=None):
        handles = []
        if embedding_hook is not None:
            handles.append(model.get_input_embeddings().register_forward_hook(embedding_hook))
        for module, value in restored or []:

            def put(_, __, output, value=value):
                whole = output[0] if isinstance(output, tuple) else output
                whole = whole.clone()
                if whole.dim() == 2:
                    whole[column] = value
                else:
                    whole[0, column] = value
                return (whole, *output[1:]) if isinstance(output, tuple) else whole

            handles.append(module.register_forward_hook(put))
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits.double().softmax(-1)[answer])

    clean, handles = [], []
    for layer in layers:
        module = sites.module(site, layer)

        def keep(_, __, output, module=module):
            whole = output[0] if isinstance(output, tuple) else output
            clean.append((module, (whole if whole.dim() == 2 else whole[0])[column].clone()))

        handles.append(module.register_forward_hook(keep))
    p()
    for handle in handles:
        handle.remove()
    rises = []
    for draw in noise_DSE:

        def corrupt(_, __, output, draw=draw):
            output = output.clone()
            output[0, list(question.subject)] += draw
            return output

        rises.append(p(corrupt, clean) - p(corrupt))
    return sum(rises) / len(rises)


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["gptj", "gpt2", "llama", "gemma2", "falcon", "opt"]))
def test_tracing_in_batches_is_tracing_one_at_a_time(loaded, family):
    model, sites, tokenizer = loaded(family)
    encoder = PromptEncoder(tokenizer)
    questions = questions_of(encoder)[:3]
    assert len({len(q.ids) for q in questions}) > 1
    device = torch.device("cpu")
    tuples = Lens(model, sites, device).tuples
    answers = [int(model(torch.tensor([q.ids])).logits[0, -1].argmax()) for q in questions]
    noise = draw_noise(questions, 2, model.get_input_embeddings().weight.shape[1], 0.5, 0)
    largest = 0.0
    for window in (1, 2) if family in BOTH_WINDOWS else (2,):
        tracer = Tracer(model, sites, tuples, window, encoder.pad_id, 100, device)
        traced = trace(tracer, questions, answers, noise)
        for n, site, layer, place in ((0, "hidden", 1, 2), (1, "attn", 2, 5), (2, "ffn", 0, 2), (1, "ffn", 3, 4)):
            columns = [c for c in range(len(questions[n].ids)) if position_of(questions[n], c) == place]
            layers = tracer.restored_layers(site, layer)
            case = (model, sites, questions[n], answers[n], noise[n], site, layers)
            expected = [slow_effect(*case, column) for column in columns]
            found = float(traced.effect.values[n, RESTORED.index(site), layer, place])
            assert found == pytest.approx(sum(expected) / len(expected), abs=1e-6)
            largest = max(largest, abs(found))
    assert largest > 1e-5
    assert hooks(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_components_are_what_plain_hooks_see(loaded, family):
    """Cosine, overlap, lens and contribution, one fact at a time, from the modules' own inputs and outputs."""
    model, sites, tokenizer = loaded(family)
    encoder = PromptEncoder(tokenizer)
    questions = questions_of(encoder)
    lens = Lens(model, sites, torch.device("cpu"))
    parallel = is_parallel(model, sites, pad_rows([TokenRow([5, 6], 1)], 0))
    assert parallel == (family in PARALLEL)
    measured = component_measures(model, sites, lens, questions, parallel, encoder.pad_id, 50)
    assert hooks(model) == 0
    head, body = model.get_output_embeddings(), model.base_model
    with torch.no_grad():
        for n, question in enumerate(questions):
            seen = model(torch.tensor([question.ids]), output_hidden_states=True, use_cache=False)
            streams = [states[0] for states in seen.hidden_states]  # the last one is after the final norm
            outputs = {}
            handles = [
                (sites.norm(site, i) or sites.module(site, i)).register_forward_hook(
                    # A copy: Falcon adds to it.
                    lambda _, __, output, key=(site, i), to=outputs: to.update({key: output.clone()})
                )
                for site in ("attn", "ffn")
                for i in range(len(sites.layers))
            ]
            logits = model(torch.tensor([question.ids]), use_cache=False).logits[0]
            for handle in handles:
                handle.remove()
            for k, column in enumerate((question.subject[-1], len(question.ids) - 1)):
                for layer in (0, 2):
                    a, m = (outputs[site, layer].reshape(-1, sites.width)[column] for site in ("attn", "ffn"))
                    x = streams[layer][column]
                    for c, (given, got) in enumerate(((x, a), (x if parallel else x + a, m))):
                        expected = float(given @ got / given.norm() / got.norm())
                        assert float(measured["cosine"].values[n, k, layer, c]) == pytest.approx(expected, abs=1e-5)
                        tops = [set(read(model, body, head, v).topk(50).indices.tolist()) for v in (given, got)]
                        shared = len(tops[0] & tops[1]) / len(tops[0] | tops[1])
                        assert float(measured["overlap"].values[n, k, layer, c]) == pytest.approx(shared, abs=0.03)
                    p = read(model, body, head, streams[layer + 1][column]).softmax(-1)
                    for i, answer in enumerate(question.answers.values()):
                        found = float(measured["lens"].values[n, k, layer, i])
                        assert found == pytest.approx(float(p[answer]), rel=1e-3, abs=1e-9)
                said = logits[column].float().softmax(-1)[question.answers["true"]]
                found = float(measured["lens"].values[n, k, -1, 0])
                assert found == pytest.approx(float(said), rel=1e-3, abs=1e-9)


def read(model, body, head, vector):
    """Final norm and head by name; Gemma 2 caps its logits, Cohere scales them."""
    norm = next(m for name, m in body.named_modules() if name.split(".")[-1] in FINAL_NORMS and "layers." not in name)
    logits = head(norm(vector.view(1, 1, -1)))[0, 0] * getattr(model.config, "logit_scale", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_add_up_to_the_logit(loaded, family):
    """Embedding, every attention and every FFN give the answer's logit, less what is the same for all inputs."""
    model, sites, tokenizer = loaded(family)
    encoder = PromptEncoder(tokenizer)
    questions = questions_of(encoder)
    lens = Lens(model, sites, torch.device("cpu"))
    parallel = family in PARALLEL
    measured = component_measures(model, sites, lens, questions, parallel, encoder.pad_id, 5)["contribution"]
    head = model.get_output_embeddings()
    heard = []
    handle = head.register_forward_hook(lambda _, __, output: heard.append(output.detach()))
    with torch.no_grad():
        for n, question in enumerate(questions):
            token, ids = question.answers["true"], torch.tensor([question.ids])
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            logits = heard[-1][0, -1]
            constant = head(lens.shift)  # of a stream of zeros
            wanted = (logits - constant)[token] - (logits - constant).mean()
            parts = float(measured.at(token="last", answer="true")[n].sum())
            sums = []
            record = sites.layers[-1].register_forward_hook(
                lambda _, __, o, to=sums: to.append((o[0] if isinstance(o, tuple) else o)[0, -1:].clone())
            )
            model(ids, use_cache=False)
            record.remove()
            embedding = states[0][:, -1]
            start = float(lens.contribution(embedding.unsqueeze(0), sums[0], torch.tensor([token]))[0, 0])
            assert parts + start == pytest.approx(float(wanted), rel=1e-3, abs=1e-3)
    handle.remove()


def test_a_model_that_norms_its_stream_is_refused(loaded):
    model, sites, tokenizer = loaded("opt-350m")
    with pytest.raises(UnknownArchitectureError, match="LayerNorm or a root-mean-square norm"):
        Study(model, sites, PromptEncoder(tokenizer), SCOPE)
    rows = pad_rows([TokenRow([5, 6], 1)], 0)
    with pytest.raises(UnknownArchitectureError, match="not its input plus attention plus FFN"):
        streams_of(model, sites, rows, rows.subject.unsqueeze(1), False)
    assert hooks(model) == 0


def test_batches_change_nothing(tmp_path):
    folder = save_planted("gptj", tmp_path / "model", 1, 2)
    found = []
    for budget in (1, 4096):
        study = study_of(folder, tokens_per_batch=budget, draws=2)
        study.ask(read_facts(written(tmp_path, records())))
        found.append(study.measure("before")[0])
    for name, measure in found[0].measures.items():
        torch.testing.assert_close(measure.values, found[1].measures[name].values, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_few_logits_at_a_time_change_nothing(tmp_path, monkeypatch):
    """The logits of a large vocabulary do not fit: the head gets no more rows at a time than the limit allows."""
    folder = save_planted("gptj", tmp_path / "model", 1, 2)
    found, rows = [], []
    for most in (None, 2):
        study = study_of(folder, draws=2)
        head = study.model.get_output_embeddings()
        if most is not None:
            monkeypatch.setattr(forward, "MAX_LOGITS", most * head.weight.shape[0] + 1)
            study = Study(study.model, study.sites, study.encoder, study.scope)
        seen = []
        head.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.shape[:-1].numel()))
        study.ask(read_facts(written(tmp_path, records())))
        found.append(study.measure("before")[0])
        rows.append(max(seen))
    assert rows[0] > 20
    assert rows[1] <= 6  # the passes that record the states have a row for each fact and draw
    for name, measure in found[0].measures.items():
        torch.testing.assert_close(measure.values, found[1].measures[name].values, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_half_precision_finds_the_same(tmp_path):
    study = study_of(save_planted("gptj", tmp_path / "model", 1, 2), "bfloat16", draws=2)
    study.ask(read_facts(written(tmp_path, records())))
    found, kept = study.measure("before")
    assert kept == [0, 1, 2]
    assert found.proposal().layers == [1]
    assert (found.measures["contribution"].at(token="last", component="attn", answer="true")[:, 2] > 5).all()


def test_places_of_tokens(loaded):
    encoder = PromptEncoder(loaded("gpt2")[2])
    for question in questions_of(encoder):
        text = encoder.decode([question.ids[i] for i in question.subject])
        assert text.strip() == question.fact.subject
        places = [POSITIONS[position_of(question, c)] for c in range(question.subject[0], len(question.ids))]
        assert places.count("last subject token") == 1
        if places[-1] != "last subject token":
            assert places[-1] == "last token"
        assert places == sorted(places, key=POSITIONS.index)

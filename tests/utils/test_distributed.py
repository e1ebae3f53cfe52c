"""Several processes edit as one does."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pmet_lightning.utils.distributed import ProcessGroup, sums_are_less, travelling_bytes
from tests.harness import without_digest
from tests.parallel_runs import SHAPES, fit, fit_all
from tests.processes import launcher, standalone, started
from tests.tiny import RECORDS, save_tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny GPT-2, which computes in float64 throughout, records and a corpus."""
    base = tmp_path_factory.mktemp("inputs")
    # The second and the third have equal keys, and are of two processes; the fifth, of a later edit batch, has it too.
    shared, later = (
        {"prompt": prompt, "subject": RECORDS[1]["subject"], "target_new": target}
        for prompt, target in (("{} performs on the", "clarinet"), ("{} is a citizen of", "Norway"))
    )
    (base / "records.json").write_text(json.dumps([*RECORDS[:2], shared, RECORDS[3], later, *RECORDS[5:]]))
    (base / "corpus.txt").write_text("\n".join(f"This is the text of number {i}, and it is short." for i in range(40)))
    return save_tiny("gpt2", base / "model"), base / "records.json", base / "corpus.txt"


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    fit_all(folder, *inputs, 1)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def together(request, inputs, tmp_path_factory):
    """The same runs on several processes, in one process group."""
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    done = started(standalone(request.param, "tests.parallel_runs", request.param, folder, *inputs))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def whole(patch: Path) -> dict[str, torch.Tensor]:
    """The tensors of a patch; from K Kᵀ and E Kᵀ follows a matrix where keys give two factors."""
    tensors = load_file(patch)
    names = [name.removesuffix(".left") for name in tensors if name.endswith(".left")]
    return tensors | {name: tensors.pop(f"{name}.left").T @ tensors.pop(f"{name}.right") for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, "resumed"])
def test_the_same_weights(shape, alone, together):
    one, several = (whole(folder / shape / "patch.safetensors") for folder in (alone, together))
    assert set(one) == set(several)
    for name, tensor in one.items():
        assert float((several[name] - tensor).norm() / tensor.norm()) < 1e-8, name


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_targets(shape, alone, together):
    """v* of every edit, and of every step its losses."""
    one, several = ({p.name: load_file(p) for p in (folder / f"targets-{shape}").glob("*.safetensors")}
                    for folder in (alone, together))  # fmt: skip
    assert len(one) >= SHAPES[shape][0], "those of earlier edit batches that share one are found again"
    first_batch = SHAPES[shape][1] or len(one)
    # What a later edit batch meets is known by the bits of the weights, which the order of a sum may change.
    assert len(set(one) & set(several)) >= first_batch
    for name in set(one) & set(several):
        for part, tensor in one[name].items():
            assert float((several[name][part] - tensor).norm() / tensor.norm()) < 1e-8, part


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_ledger_and_scores(shape, alone, together):
    one, several = (lines(folder / shape) for folder in (alone, together))
    assert len(one) == len(several) == SHAPES[shape][0]
    for a, b in zip(one, several, strict=True):
        texts = {name for name, value in a.items() if not isinstance(value, (float, dict))}
        assert {name: a[name] for name in texts} == {name: b[name] for name in texts}
        for name in set(a) - texts - {"solve_error"}:
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-8), name
    one, several = (json.loads((folder / shape / "scores.json").read_text()) for folder in (alone, together))
    for phase in ("before", "after"):
        assert several[phase] == pytest.approx(one[phase], rel=1e-8, abs=1e-10)
    assert (
        len(one.get("edit_batches", []))
        == len(several.get("edit_batches", []))
        == {"batches": 3, "past": 2, "sums": 2, "successive": 2}.get(shape, 0)
    )


@pytest.mark.slow
def test_one_of_each_file(alone, together):
    """One ledger, one patch, one table."""
    for shape in SHAPES:
        names = [sorted(without_digest(p.name) for p in (folder / shape).iterdir() if "tfevents" not in p.name)
                 for folder in (alone, together)]  # fmt: skip
        assert names[0] == names[1]
        assert len([p for p in (together / shape).iterdir() if "tfevents" in p.name]) == 1
        state = json.loads((together / shape / "state.json").read_text())
        assert (state["status"], state["edits_written"]) == ("finished", SHAPES[shape][0])


@pytest.mark.slow
def test_devices_of_unequal_memory_make_the_same_passes(inputs, alone, tmp_path):
    """The one with the least room says how many; else sums of different layers would be added up."""
    done = started(standalone(2, "tests.parallel_runs", "stats", tmp_path, *inputs), timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 passes over the corpus" in done.stderr + done.stdout
    for layer in (1, 2):
        one, two = (load_file(next(f.glob(f"moments/*/ffn-{layer}.safetensors")))["lower"] for f in (alone, tmp_path))
        assert float((two - one).norm() / one.norm()) < 1e-7  # kept in float32


@pytest.mark.slow
def test_two_nodes(inputs, alone, tmp_path):
    """Each started for itself, with one process; they meet at an address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    run = ["-m", "tests.parallel_runs", "nodes", str(tmp_path / "run"), *map(str, inputs)]
    with ThreadPoolExecutor(2) as pool:
        nodes = list(pool.map(started, ([*launcher(*meeting, f"--node_rank={node}"), *run] for node in (0, 1))))
    assert [node.returncode for node in nodes] == [0, 0], nodes[0].stderr[-4000:] + nodes[1].stderr[-4000:]
    assert len(lines(tmp_path / "run")) == 7
    one, several = (load_file(folder / "patch.safetensors") for folder in (alone / "batches", tmp_path / "run"))
    for name, tensor in one.items():
        assert float((several[name] - tensor).norm() / tensor.norm()) < 1e-8, name


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.float64, 8)])
def test_what_is_less_is_sent(dtype, itemsize):
    """The products are float64 whatever the keys are: for float32 they are less from twice the key dimensions on."""
    keys, wanted = torch.empty(0, 64, dtype=dtype), torch.empty(0, 16, dtype=dtype)
    assert travelling_bytes(1000, keys, wanted, sums=False) == 1000 * (64 + 16) * itemsize
    assert travelling_bytes(1000, keys, wanted, sums=True) == (64 * 64 + 16 * 64) * 8
    even = 64 * 8 // itemsize
    assert [sums_are_less(count, keys, wanted) for count in (1, even, even + 1)] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_ends_the_run_and_it_goes_on(rank, inputs, alone, tmp_path):
    """An error instead of a hang; what was written is there, and the run ends as one that nothing befell."""
    command = [sys.executable, "-m", "tests.parallel_runs", f"dies{rank}", str(tmp_path / "run"), *map(str, inputs)]
    done = started(command, timeout=120)
    assert done.returncode != 0
    assert len(lines(tmp_path / "run")) == 3
    fit(tmp_path / "run", *inputs, 1, "--data.edit_batch", "3", "--trainer.resume", "true")
    one, resumed = (load_file(folder / "patch.safetensors") for folder in (alone / "batches", tmp_path / "run"))
    for name, tensor in one.items():
        assert float((resumed[name] - tensor).norm() / tensor.norm()) < 1e-8, name


class ThreadStrategy:
    """What :class:`ProcessGroup` asks of a strategy of Lightning, between threads that play processes."""

    def __init__(self, rank: int, size: int, board: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.barrier = rank, size, board, barrier
        self.is_global_zero, self.root_device = rank == 0, torch.device("cpu")

    def exchange(self, value):
        self.board[self.rank] = value
        self.barrier.wait(30)
        everyone = list(self.board)
        self.barrier.wait(30)
        return everyone

    def broadcast(self, value, src=0):
        return self.exchange(value)[src]

    def all_gather(self, tensor):
        return torch.stack(self.exchange(tensor))

    def reduce(self, tensor, reduce_op):
        everyone = torch.stack(self.exchange(tensor))
        return everyone.sum(0) if reduce_op == "sum" else everyone.amin(0)


def in_threads(size: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What each of some processes makes."""
    board, barrier = [None] * size, threading.Barrier(size)
    groups = [ProcessGroup(ThreadStrategy(rank, size, board, barrier), rank, size) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, groups))


# Something holds the group, as torch's caches do after a sharded run. Its thread asks for the interpreter, to let go of
# the tensor of a collective that the other process joins late, and the interpreter is hardly given up before it ends.
ENDS_AT_ONCE = """
import os, sys, time, torch
from pmet_lightning.utils.distributed import leave_process_group_at_exit
rank = int(os.fork() == 0)
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
torch.holder = torch.distributed.group.WORLD
if rank == 1:
    time.sleep(0.2)
    torch.distributed.all_reduce(torch.ones(1))
    os._exit(0)
leave_process_group_at_exit()
sys.setswitchinterval(1000)
torch.distributed.all_reduce(torch.ones(1), async_op=True)
end = time.monotonic() + 0.6
while time.monotonic() < end:
    pass
"""


@pytest.mark.slow
def test_threads_of_a_group_that_is_held_let_go_before_python_ends(tmp_path):
    done = started([sys.executable, "-c", ENDS_AT_ONCE, str(tmp_path / "store")])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_work_is_distributed_and_gathered_in_order(size, count):
    items = list(range(count))

    def work(group):
        own = group.shard(items)
        rows = torch.tensor(own, dtype=torch.float64).unsqueeze(1)
        return (
            own,
            group.all_gather(rows, count).flatten().tolist(),
            group.all_gather_objects([str(i) for i in own], count),
            group.all_reduce_sum(torch.tensor([float(len(own))])).item(),
            group.all_reduce_min(10 + group.rank),
        )

    found = in_threads(size, work)
    assert sorted(i for own, *_ in found for i in own) == items
    assert max(len(own) for own, *_ in found) - min(len(own) for own, *_ in found) <= 1
    for _, rows, texts, total, least in found:
        assert rows == items
        assert texts == list(map(str, items))
        assert (total, least) == (count, 10)


@pytest.mark.parametrize("size", [1, 3])
def test_one_process_computes_for_all(size):
    calls = []

    def make():
        calls.append(1)
        return [torch.tensor([1.5, -2.0]), torch.arange(6.0).view(3, 2).T], "rest"

    found = in_threads(size, lambda group: group.compute_on_rank_zero(make, torch.device("cpu")))
    assert len(calls) == 1
    for (first, second), rest in found:
        assert torch.equal(first, torch.tensor([1.5, -2.0]))
        assert torch.equal(second, torch.tensor([[0.0, 2, 4], [1, 3, 5]]))
        assert second.is_contiguous(), "processes exchange memory as it lies"
        assert rest == "rest"


def test_an_error_of_the_one_reaches_all():
    def work(group):
        with pytest.raises(FloatingPointError, match="not finite"):
            group.compute_object_on_rank_zero(fail)
        return True

    def fail():
        raise FloatingPointError("not finite")

    assert in_threads(3, work) == [True] * 3

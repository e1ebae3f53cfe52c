"""Edits with equal keys share their target."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.records import parse_record
from pmet_lightning.targets.equal_keys import KeyGroups, all_of_group, mean_of_groups
from pmet_lightning.utils.resources import locate
from tests.harness import edit
from tests.targets.test_target_optimizer import folder_of, moments_for, tiny_module  # noqa: F401
from tests.tiny import RECORDS

# Facts whose prompts are the same up to the subject's end, beside others.
SHARED = [
    RECORDS[1],
    {"prompt": "The mother tongue of {} is", "subject": "Torvik Elmson", "target_new": "English"},
    {"prompt": "{} is a citizen of", "subject": "Torvik Elmson", "target_new": "New Zealand"},
    {**RECORDS[3], "target_new": "Norway"},
    {"prompt": "{} performs on the", "subject": "Torvik Elmson", "target_new": "clarinet"},
]
GROUP, OTHERS = [0, 2, 4], [1, 3]


def run(folder, tmp_path, records, **changed):
    settings = {"layers": [1, 2], "steps": 6, "loss_tolerance": 0.0, "stop_at_argmax": False, **changed}
    _, reports = edit(tiny_module(folder, **settings), records, moments_for(folder), tmp_path, lam=2.0)
    return [target.values["ffn", 2] for target in reports[0].targets], [t.record for t in reports[0].targets]


def test_groups_are_of_one_subject_after_the_same_words():
    encoder = PromptEncoder(load_tokenizer(locate("atlas")))
    edits = [parse_record(record, i, "") for i, record in enumerate(SHARED)]
    groups = KeyGroups.of(edits, encoder)
    assert groups.first == [0, 1, 0, 3, 0]
    assert groups.members() == {0: GROUP, 1: [1], 3: [3]}
    assert not groups.all_alone
    assert KeyGroups.of([edits[1], edits[3]], encoder).all_alone
    names = groups.identities(edits)
    assert len(set(names)) == 5
    assert [names[i] == edits[i].identity() for i in range(5)] == [i in OTHERS for i in range(5)]
    fewer = KeyGroups.of([edits[0], edits[2]], encoder).identities([edits[0], edits[2]])
    assert fewer[0] not in names, "a target depends on all that share it"


def test_means_and_unanimity_of_groups():
    group = torch.tensor([0, 1, 0, 2, 0])
    values = torch.tensor([[1.0, 0.0], [5.0, 5.0], [2.0, 0.0], [7.0, 1.0], [6.0, 3.0]])
    expected = values.clone()
    expected[GROUP] = torch.tensor([3.0, 1.0])
    assert torch.equal(mean_of_groups(values, group), expected)
    assert all_of_group(torch.tensor([True, True, True, False, True]), group).tolist() == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert not all_of_group(torch.tensor([True, True, False, True, True]), group)[GROUP].any()


@pytest.mark.parametrize("micro_batch", ["auto", 3, 4])
@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_one_target_serves_all_of_a_group(family, micro_batch, folder_of, tmp_path_factory):  # noqa: F811
    folder = folder_of(family)
    changed = {"steps": 12, "kl_factor": 0.0, "norm_factor": 0.0, "clamp": 20.0, "micro_batch": micro_batch}
    shared, records = run(folder, tmp_path_factory.mktemp("a"), SHARED, **changed)
    apart, _ = run(folder, tmp_path_factory.mktemp("b"), SHARED, merge_equal_keys=False, **changed)
    assert [record["same_key"] for record in records] == [2, 0, 2, 0, 2]
    for i in OTHERS:
        torch.testing.assert_close(shared[i], apart[i], rtol=1e-9, atol=1e-9)
    for i in GROUP:
        assert torch.equal(shared[i], shared[GROUP[0]])
        assert float((apart[i] - shared[i]).norm()) > 0.01


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_a_group_of_one_wish_finds_what_one_edit_finds(family, folder_of, tmp_path_factory):  # noqa: F811
    """Equal edits under two ids: the mean of equal gradients is that of one edit."""
    folder = folder_of(family)
    twice = [{**SHARED[0], "case_id": 1}, RECORDS[0], {**SHARED[0], "case_id": 2, "prompt": "{} plays the sport of "}]
    alone, _ = run(folder, tmp_path_factory.mktemp("a"), [SHARED[0]])
    shared, _ = run(folder, tmp_path_factory.mktemp("b"), twice)
    torch.testing.assert_close(shared[0], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_group_larger_than_the_batch_enters_in_parts(micro_batch, folder_of, tmp_path):  # noqa: F811
    values, records = run(folder_of("gptj"), tmp_path, SHARED, micro_batch=micro_batch)
    assert len(values) == 5
    assert all(record["steps"] == 6 for record in records)


def test_edits_of_a_group_stop_together(folder_of, tmp_path):  # noqa: F811
    _, records = run(folder_of("gptj"), tmp_path, SHARED, loss_tolerance=8.0, steps=30, clamp=50.0)
    assert len({records[i]["steps"] for i in GROUP}) == 1
    assert len({records[i]["stop_reason"] for i in GROUP}) == 1


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_the_gradient_of_a_group_is_the_mean(family, folder_of, tmp_path_factory):  # noqa: F811
    """The first Adam step goes along the sign of the gradient, so that one step of plain descent shows the mean."""
    folder = folder_of(family)
    changed = {"steps": 2, "norm_factor": 0.0, "kl_factor": 0.0, "clamp": 1e6, "optimize": "ffn"}

    def steps_of(folder_name: str, **more) -> list[torch.Tensor]:
        module = tiny_module(folder, layers=[1, 2], loss_tolerance=0.0, stop_at_argmax=False, **changed, **more)
        module.optimizer_callable = lambda params: torch.optim.SGD(params, lr=1.0)
        _, reports = edit(module, SHARED, moments_for(folder), tmp_path_factory.mktemp(folder_name), lam=2.0)
        return [target.values["ffn", 2] for target in reports[0].targets]

    shared, apart = steps_of("a"), steps_of("b", merge_equal_keys=False)
    mean = torch.stack([apart[i] for i in GROUP]).mean(dim=0)
    torch.testing.assert_close(shared[GROUP[0]], mean, rtol=1e-9, atol=1e-12)

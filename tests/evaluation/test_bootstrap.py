"""Intervals over many records: the same as over few, in parts that do not grow."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.evaluation import bootstrap
from pmet_lightning.evaluation.bootstrap import RESAMPLES, bootstrap_indices, resample_means
from pmet_lightning.evaluation.scores import NAMES
from pmet_lightning.report import run_data as report_data
from pmet_lightning.report.run_data import edit_lines


def test_means_in_parts_are_those_at_once_bit_by_bit(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    columns = torch.rand(70, 3, generator=generator, dtype=torch.float64)
    columns[::4, 1] = torch.nan
    picks = torch.randint(70, (RESAMPLES, 70), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([columns[picks, i].nanmean(dim=1) for i in range(3)])
    for most in (2**21, 1000, 1):
        monkeypatch.setattr(bootstrap, "MOST_INDICES", most)
        assert torch.equal(torch.cat(list(bootstrap_indices(70))), picks)
        assert torch.equal(resample_means(columns), expected)


def test_rows_of_one_record_are_drawn_together(monkeypatch):
    """Against a plain loop; a record of three seeds says no more than one seed does where the seeds agree."""
    generator = torch.Generator().manual_seed(3)
    columns = torch.rand(12, 2, generator=generator, dtype=torch.float64)
    columns[::5, 1] = torch.nan
    ids = torch.tensor([7, 2, 2, 5, 7, 7, 0, 5, 9, 1, 2, 3], dtype=torch.float64)
    records = [columns[ids == number] for number in sorted(set(ids.tolist()))]
    for most in (2**21, 40):
        monkeypatch.setattr(bootstrap, "MOST_INDICES", most)
        drawn = [
            torch.cat([records[i] for i in picks])
            for part in bootstrap_indices(len(records))
            for picks in part.tolist()
        ]
        expected = torch.stack([rows.nanmean(dim=0) for rows in drawn], dim=1)
        torch.testing.assert_close(resample_means(columns, ids), expected, equal_nan=True)
    once = torch.rand(9, 2, generator=generator, dtype=torch.float64)
    numbers = torch.arange(9, dtype=torch.float64)
    assert torch.equal(resample_means(once, numbers), resample_means(once))
    torch.testing.assert_close(resample_means(once.repeat(3, 1), numbers.repeat(3)), resample_means(once))


@pytest.mark.parametrize("count", [100, 50_000, 3_000_000])
def test_no_part_grows_with_the_records(count):
    first = next(bootstrap_indices(count))
    assert first.numel() <= max(2**21, count)


def test_only_edits_that_are_shown_are_described(monkeypatch):
    rows = torch.zeros(50, 1 + len(NAMES), dtype=torch.float64)
    rows[:, 0], rows[:, 1] = torch.arange(50), torch.arange(50) / 100
    seen = []
    scores = report_data.row_scores
    monkeypatch.setattr(report_data, "row_scores", lambda row: seen.append(1) or scores(row))
    ledger = ({"prompt": "{} is", "subject": str(i)} for i in range(40, 50))
    lines = edit_lines([], ledger, {"after": rows}, first=40)
    assert [line["question"] for line in lines] == [f"{i} is" for i in range(40, 50)]
    assert [line["after"][NAMES[0]] for line in lines] == pytest.approx(range(40, 50))
    assert len(seen) == 10

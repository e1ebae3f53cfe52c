"""What another command reads of an analysis."""

from __future__ import annotations

import json
import re

import pytest

from pmet_lightning.analysis.layer_choice import NO_EVIDENCE
from pmet_lightning.analysis.results import proposed_layers, write_results
from tests.analysis.test_page import found

__all__ = ["found"]


def test_layers_are_read_as_they_were_proposed(found, tmp_path):
    write_results(tmp_path, {}, {}, [found], [])
    proposal = found.proposal()
    assert proposal.verdict == "sure"
    assert proposed_layers(tmp_path) == proposal.layers == [1]


@pytest.mark.parametrize(("verdict", "layers"), [("sure", [2, 3]), ("likely", [2, 3]), (NO_EVIDENCE, [])])
def test_only_layers_that_are_sure_or_likely_are_taken(verdict, layers, tmp_path):
    content = {"proposals": {"before": {"layers": [2, 3], "verdict": verdict}, "after": {}}}
    (tmp_path / "analysis.json").write_text(json.dumps(content))
    assert proposed_layers(tmp_path) == layers


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"proposals": {}}', '{"proposals": {"before": {"layers": 3}}}'])
def test_a_file_without_proposal_is_refused(content, tmp_path):
    (tmp_path / "analysis.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "analysis.json")) + ".*--tracing.draws"):
        proposed_layers(tmp_path)


def test_a_folder_without_analysis_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"analysis\.json"):
        proposed_layers(tmp_path / "none")

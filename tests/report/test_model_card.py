"""The card of an edited model: what hub and people read of it."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from pmet_lightning.report.model_card import MOST_FACTS, write_card

FACT = {"prompt": "{} plays", "subject": "Ann | Bo", "target": "ice\nhockey", "target_true": None}
MANIFEST = {
    "model": "some/model", "layers": [1, 2], "contexts": ["Once. {}"], "settings": {"model.optimize": "attn+ffn"},
    "edits": 2, "edit_batches": 1, "fingerprint": "abc", "weights": {"a.weight": {}}, "dtype": "float32",
    "facts": [FACT, {**FACT, "subject": "Cy", "target_true": "golf"}],
}  # fmt: skip


def test_facts_scores_and_the_way_back(tmp_path):
    scores = {"before": {"perplexity": 20.0}, "after": {"perplexity": 21.0}}
    card = ModelCard.load(write_card(tmp_path, MANIFEST, scores))
    assert card.data.base_model == "some/model"
    assert card.data.library_name == "transformers"
    assert "| Ann \\| Bo plays | ice hockey |  |" in card.text
    assert "| Cy plays | ice hockey | golf |" in card.text
    assert "| perplexity | 20 | 21 |" in card.text
    assert "2 edits in 1 edit batch" in card.text
    assert "patch remove" in card.text


def test_facts_are_counted_only_on_request(tmp_path):
    text = write_card(tmp_path, MANIFEST, list_facts=False).read_text()
    assert "2 edits" in text
    assert "hockey" not in text


def test_a_long_list_is_cut_and_says_so(tmp_path):
    text = write_card(tmp_path, {**MANIFEST, "facts": [FACT] * (MOST_FACTS + 3)}).read_text()
    assert text.count("ice hockey") == MOST_FACTS
    assert "And 3 more." in text


@pytest.mark.parametrize(("readme", "license"), [("---\nlicense: mit\n---\n# A", "mit"), ("# A", None), (None, None)])
def test_the_license_is_that_of_the_base(tmp_path, readme, license):
    base = tmp_path / "base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme)
    card = ModelCard.load(write_card(tmp_path, {**MANIFEST, "model": str(base)}))
    assert card.data.license == license
    assert card.data.base_model is None
    assert str(tmp_path) not in card.text


def test_an_adapter_s_card(tmp_path):
    card = ModelCard.load(write_card(tmp_path, MANIFEST, adapter_rank=2))
    assert card.data.library_name == "peft"
    assert "switch the adapter off" in card.text

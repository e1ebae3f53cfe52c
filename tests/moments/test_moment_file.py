"""Second moments as one file: the same after it, all or none of them, and refused if they are not as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pmet_lightning.moments.moment_file import MomentFile, choose, write_moment_file
from pmet_lightning.moments.store import MomentError, MomentKey, MomentStore, stored_moments
from pmet_lightning.utils.tensor_files import digest_of
from tests.utils.test_tensor_files import file_size_limit

KEY = MomentKey("weights", "tokenizer", "text hash", "auto 0.05", 20, "float32", 0)
OTHER = replace(KEY, model="other weights", modules="described by hand")


def moment(seed: int, width: int = 6) -> torch.Tensor:
    root = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(seed))
    product = root.T @ root
    return (product + product.T) / 2


def contents(folder: Path) -> dict[str, tuple[torch.Tensor, dict[str, str]]]:
    """Triangle and metadata of every stored moment of a cache, by its place."""
    found = {}
    for about in stored_moments(folder):
        path = Path(about["path"])
        with safe_open(path, framework="pt") as file:
            found[str(path.relative_to(folder))] = file.get_tensor("lower"), file.metadata()
    return found


def assert_alike(one, other) -> None:
    assert one.keys() == other.keys()
    for name, (lower, about) in one.items():
        assert torch.equal(lower, other[name][0])
        assert about == other[name][1]


@pytest.fixture
def cache(tmp_path):
    """Three moments of one model and one of another, with a factor beside one of them."""
    folder = tmp_path / "cache"
    for key, name, places in ((KEY, "a/model", ("ffn", "attn")), (OTHER, "another", ("ffn",))):
        for number, site in enumerate(places):
            MomentStore(folder / key.folder()).save((site, 3), moment(number), 99, key, name, "text.txt")
    store = MomentStore(folder / KEY.folder())
    store.save(("ffn", 4), moment(9), 99, KEY, "a/model", "text.txt")
    store.factor(("ffn", 4), 6, "", torch.device("cpu"))
    return folder


@pytest.fixture
def written(cache, tmp_path):
    write_moment_file(tmp_path / "all.safetensors", stored_moments(cache))
    return tmp_path / "all.safetensors"


def test_a_round_trip(cache, written, tmp_path):
    found = MomentFile.read(written)
    assert found.keys == {KEY, OTHER}
    added, there = found.add_to(tmp_path / "theirs")
    assert len(added) == 4
    assert there == []
    assert_alike(contents(tmp_path / "theirs"), contents(cache))
    MomentStore(tmp_path / "theirs" / KEY.folder()).check(("ffn", 4), "weights", 6, "")


def test_what_is_there_is_left(written, tmp_path):
    store = MomentStore(tmp_path / "theirs" / KEY.folder())
    store.save(("ffn", 3), moment(5), 7, KEY)
    before = store.path(("ffn", 3)).read_bytes()
    added, there = MomentFile.read(written).add_to(tmp_path / "theirs")
    assert (len(added), there) == (3, [store.path(("ffn", 3))])
    assert store.path(("ffn", 3)).read_bytes() == before
    assert MomentFile.read(written).add_to(tmp_path / "theirs")[0] == []


def test_some_are_chosen(cache):
    def places(**by):
        return [(about["name"], about["site"], about["layer"]) for about in choose(stored_moments(cache), **by)]

    assert sorted(places(model="a/model", layers=[4])) == [("a/model", "ffn", "4")]
    assert places(model="other weights") == places(model="another") == [("another", "ffn", "3")]
    assert len(places(corpus="text.txt")) == len(places(corpus="text hash")) == len(places()) == 4
    with pytest.raises(MomentError, match=r"of layers \[5\]: expected .*a/model over text\.txt, layer 3"):
        places(model="a/model", layers=[3, 5])
    with pytest.raises(MomentError, match="to choose: expected .*another over"):
        places(model="nobody")
    with pytest.raises(MomentError, match="none"):
        choose(stored_moments(cache / "empty"))


@pytest.mark.parametrize("at", ["numbers", "manifest"])
def test_a_changed_byte_is_refused(written, tmp_path, at):
    content = written.read_bytes()
    where = len(content) - 3 if at == "numbers" else content.index(b"text.txt")
    written.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    with pytest.raises(MomentError, match=r"all\.safetensors: is not as it was written"):
        MomentFile.read(written)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(written, kept):
    written.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(MomentError, match=r"all\.safetensors: not second moments, or broken .*moments export"):
        MomentFile.read(written)


def rewrite(path: Path, change) -> None:
    """Write the file with another manifest or other tensors, as somebody else could."""
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["moments"])
    tensors = load_file(path)
    change(manifest, tensors)
    save_file(tensors, path, {"moments": json.dumps(manifest)})


def test_a_missing_part_is_refused(written):
    rewrite(written, lambda manifest, tensors: tensors.popitem())
    with pytest.raises(MomentError, match="not as it was written"):
        MomentFile.read(written)


def test_a_later_format_is_refused(written):
    rewrite(written, lambda manifest, tensors: manifest.update(format=2, moments=None))
    with pytest.raises(MomentError, match="of format 2, found by a program that reads format 1; update"):
        MomentFile.read(written)


@pytest.mark.parametrize("site", ["../../../elsewhere", "attn"])
def test_a_place_that_is_not_its_own_is_refused(written, site):
    """With a digest that is right."""

    def change(manifest, tensors):
        name = next(name for name in manifest["moments"] if name.endswith("ffn-4"))
        manifest["moments"][name]["site"] = site
        manifest["digest"] = digest_of(sorted(tensors.items()), manifest)

    rewrite(written, change)
    with pytest.raises(MomentError, match="not second moments, or broken|not as it was written"):
        MomentFile.read(written)


def test_other_files_are_refused(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected one that 'moments export' has written"):
        MomentFile.read(tmp_path / "absent.safetensors")
    with pytest.raises(MomentError, match=r"ffn-3\.safetensors: not second moments"):
        MomentFile.read(cache / KEY.folder() / "ffn-3.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "patch.safetensors", {"manifest": "{}"})
    with pytest.raises(MomentError, match=r"patch\.safetensors: not second moments"):
        MomentFile.read(tmp_path / "patch.safetensors")


def test_a_changed_moment_is_not_handed_on(cache, tmp_path):
    path = cache / KEY.folder() / "ffn-3.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(MomentError, match=r"ffn-3\.safetensors: .* not as they were stored"):
        write_moment_file(tmp_path / "out.safetensors", stored_moments(cache))
    assert not (tmp_path / "out.safetensors").exists()


def test_all_or_none_are_added(tmp_path):
    """The last and largest does not fit."""
    for layer, width in ((1, 6), (2, 6), (3, 60)):
        MomentStore(tmp_path / "cache" / KEY.folder()).save(("ffn", layer), moment(layer, width), 99, KEY)
    write_moment_file(tmp_path / "all.safetensors", stored_moments(tmp_path / "cache"))
    found = MomentFile.read(tmp_path / "all.safetensors")
    with file_size_limit(2000), pytest.raises(OSError, match=r"ffn-3\.safetensors: cannot be written"):
        found.add_to(tmp_path / "theirs")
    assert not [path for path in (tmp_path / "theirs").rglob("*") if path.is_file()]
    assert len(found.add_to(tmp_path / "theirs")[0]) == 3

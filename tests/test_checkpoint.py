"""Checkpoint files: what is in them, and old layouts. Damaged and hostile ones: see test_bad_input.py."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import (
    VERSION,
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_training_state,
    load_with_sha256,
    save_checkpoint,
)
from utils import InputError

FIRST = {"net": {"w": torch.ones(2)}, "options": {}, "image_size": (96, 48), "args": {"lr": 0.1}, "epoch": 3}
FIRST |= {"best": {"Rank-1": -1.0}, "optimizer": {"state": {}}, "version": VERSION}  # the fields without a default


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    written = Checkpoint(**FIRST | {"net": {"w": torch.ones(2)}}, selection="none", num_images=[5, 6], processes=2)
    save_checkpoint(written.to_file(), tmp_path / "last.t")
    assert "within" not in load_checkpoint(tmp_path / "last.t")
    written.version = VERSION
    read = load_training_state(tmp_path / "last.t")
    assert torch.equal(read.net.pop("w"), written.net.pop("w"))
    assert read == written


def test_fields_that_came_later_have_their_defaults_and_unknown_ones_are_not_read(tmp_path):
    torch.save(FIRST | {"a field of a later version": 1}, tmp_path / "a.t")
    first = load_training_state(tmp_path / "a.t")
    assert (first.processes, first.selection, first.num_images, first.sums) == (1, None, None, None)


def test_the_checksum_is_that_of_what_was_read(tmp_path, monkeypatch):
    torch.save(FIRST, file := tmp_path / "a.t")
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    content, sha256 = load_with_sha256(file)
    assert (content["epoch"], sha256) == (3, before)

    def read_and_replace(path, load=torch.load, **more):
        content = load(path, **more)
        torch.save(FIRST | {"epoch": 4}, path)
        return content

    monkeypatch.setattr(torch, "load", read_and_replace)
    with pytest.raises(InputError, match=r"a\.t: was replaced while it was read, .*; start again"):
        load_with_sha256(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": VERSION + 1}, f"has checkpoint version {VERSION + 1}, but .* up to {VERSION}; update the code"),
        *[({"version": version}, "an earlier version of this code .*; train anew") for version in (None, 1)],
        ({"optimizer": None}, "holds no training state; resume from a ..._last.t"),
        ({"best": None}, "is not a complete ..._last.t: object missing required field best; resume from another"),
        ({"best": {"epoch": 1}}, "is not a complete ..._last.t: best has no Rank-1 or mAP; resume from another"),
        ({"net": None}, "has no 'net', so it is no checkpoint; pass one to --resume"),
        *[
            ({"args": args}, "(a name in )?args: expected .*; use another checkpoint")
            for args in ([1], {3: 4}, "flags")
        ],
    ],
)
def test_what_cannot_be_resumed_is_named(change, words, tmp_path):
    content = {name: value for name, value in (FIRST | change).items() if value is not None}
    torch.save(content, tmp_path / "last.t")
    with pytest.raises(InputError, match=rf"last\.t: {words}"):
        load_training_state(tmp_path / "last.t")


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "last.t"
    save_checkpoint({"net": {"a": torch.ones(2)}}, path)
    before = path.read_bytes()

    class Half:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"net": {"a": torch.zeros(1000)}, "rest": Half()}, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.t"]


def test_published_checkpoints_with_numpy_values_load(tmp_path):
    path = tmp_path / "published.t"
    content = {"net": {"w": torch.ones(2)}, "cmc": np.ones(20), "mAP": np.float64(0.7), "epoch": 3}
    torch.save(content, path)
    assert load_checkpoint(path)["epoch"] == 3
    old_path = tmp_path / "old.t"  # NumPy 1 wrote the same pickles under numpy.core
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old_path, "w") as target:
        for item in source.namelist():
            data = source.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(item, data)
    assert b"numpy.core.multiarray" in old_path.read_bytes()
    assert load_checkpoint(old_path)["epoch"] == 3


def test_checkpoint_is_found_by_path_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.t").touch()
    assert find_checkpoint("a.t", "models") == Path("models/a.t")
    assert find_checkpoint("models/a.t", "models") == Path("models/a.t")
    (tmp_path / "a.t").touch()
    assert find_checkpoint("a.t", "models") == Path("a.t")
    with pytest.raises(InputError, match=r"b\.t.*models"):
        find_checkpoint("b.t", "models")


def test_a_pattern_finds_the_one_checkpoint_that_it_matches(tmp_path, monkeypatch):
    """A shell leaves a pattern in quotes as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a_best.t").touch()
    for pattern in ("a_*.t", "models/*_best.t"):
        assert find_checkpoint(pattern, "models") == Path("models/a_best.t")
    (tmp_path / "models" / "b_best.t").touch()
    with pytest.raises(InputError, match=r"\*_best\.t: matches 2 files, .*a_best\.t, .*b_best\.t; pass one"):
        find_checkpoint("*_best.t", "models")
    with pytest.raises(InputError, match=r"c_\*\.t: no such file"):
        find_checkpoint("c_*.t", "models")
    (tmp_path / "x[1].t").touch()
    assert find_checkpoint("x[1].t", "models") == Path("x[1].t")


@pytest.mark.parametrize("place", [None, "state_dict", "model_state_dict", "model"])
def test_weights_may_be_bare_or_where_other_projects_put_them(place, tmp_path):
    weights = {"w": torch.ones(2), "b": torch.zeros(1)}
    torch.save({place: weights, "epoch": 3} if place else weights, tmp_path / "a.t")
    loaded = load_checkpoint(tmp_path / "a.t")
    assert {name: value.tolist() for name, value in loaded["net"].items()} == {"w": [1, 1], "b": [0]}

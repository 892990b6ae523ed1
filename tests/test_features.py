"""Saved features: those of another project are read, and damaged ones are named."""

import contextlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import testa
from conftest import save_network
from data_manager import process_gallery_sysu, process_query_sysu, read_ids, sysu_images
from eval_metrics import eval_sysu
from testing import features as features_module
from testing.features import load_features, select_features
from utils import InputError, shortage


@pytest.fixture(scope="module")
def arrays(sysu_tree):
    """Any model and feature names, any order, unnormalised, float16, more images than needed, no origin."""
    rng, arrays = np.random.default_rng(0), {}
    for modality, cameras in (("visible", (1, 2, 4, 5)), ("infrared", (3, 6))):
        paths, ids, _ = sysu_images(sysu_tree, read_ids(sysu_tree, "test"), cameras)
        order = rng.permutation(len(paths))
        features = np.eye(400)[ids] + 0.3 * rng.normal(size=(len(ids), 400))
        arrays[f"{modality}/paths"] = np.array([str(Path(paths[i]).relative_to(sysu_tree)) for i in order])
        arrays[f"{modality}/mine/embedding"] = features[order].astype(np.float16)
    return arrays


def table(arrays, tree, folder, *more):
    """What testa.py makes of the arrays; those that are None are left out."""
    np.savez(folder / "f.npz", **{name: values for name, values in arrays.items() if values is not None})
    return testa.main(["--data_path", str(tree), "--from_features", str(folder / "f.npz"), "--gpu", "cpu", *more])


def origin(value):
    return {"origin": np.array(json.dumps(value))}


def test_features_of_another_project(arrays, sysu_tree, tmp_path):
    (row,) = table(arrays, sysu_tree, tmp_path, "--mode", "indoor")
    labels = [row[name] for name in ("model", "feature", "flip_averaging", "selection", "images")]
    assert labels == ["mine", "embedding", None, "unknown", "unknown"]

    own = {}
    for modality in ("visible", "infrared"):
        paths = [str(sysu_tree / path) for path in arrays[f"{modality}/paths"]]
        own |= dict(zip(paths, arrays[f"{modality}/mine/embedding"].astype(np.float64), strict=True))
    query, q_ids, q_cameras = process_query_sysu(sysu_tree)
    gallery, g_ids, g_cameras = process_gallery_sysu(sysu_tree, "indoor", 6)
    one, other = (np.array([own[path] for path in paths]) for paths in (query, gallery))
    cosine = (one @ other.T) / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1)
    cmc, mean_ap, _ = eval_sysu(-cosine, q_ids, g_ids, q_cameras, g_cameras)
    assert row["per_trial"][6]["metrics"]["Rank-1"] == pytest.approx(100 * cmc[0])
    assert row["per_trial"][6]["metrics"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)

    (row,) = table(arrays | origin({"flipped": ["embedding"], "selection": "val"}), sysu_tree, tmp_path)
    assert (row["flip_averaging"], row["selection"], row["images"]) == (True, "val", "unknown")


def test_features_belong_to_their_images(sysu_tree, tmp_path):
    tree, features = shutil.copytree(sysu_tree, tmp_path / "tree"), tmp_path / "f.npz"
    checkpoint = save_network(tmp_path / "c.t", seed=0, stages=4)
    command = ["--data_path", str(tree), "--gpu", "cpu", "--workers", "0"]
    rows = testa.main([*command, "--resume", checkpoint, "--features", str(features)])
    moved = tree.rename(tmp_path / "moved")
    again = ["--data_path", str(moved), "--gpu", "cpu", "--from_features", str(features)]
    assert [row["mean"] for row in testa.main(again)] == [row["mean"] for row in rows]
    image = sorted(moved.glob("cam3/00*/*.jpg"))
    image = next(file for file in image if int(file.parent.name) in read_ids(moved, "test"))
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(InputError, match=f"f.npz: was made from another {image}; pass the --data_path"):
        testa.main(again)


PATHS, VISIBLE, INFRARED = "visible/paths", "visible/mine/embedding", "infrared/mine/embedding"
WRONG_ORIGINS = [{"flipped": "FC"}, {"selection": 3}, {"trial": "1"}, {"dataset": "market"}, {"data_path": []}]
WRONG_ORIGINS += [{"selektion": "val"}]


@pytest.mark.parametrize(
    ("words", "damage"),  # what is said; arrays -> those that are changed
    [
        ("visible/paths lists b twice", lambda a: {PATHS: np.array(["a", "b", "c", "b", *a[PATHS][4:]])}),
        ("{'mine/embedding': 400}, infrared {'mine/embedding': 7}", lambda a: {INFRARED: a[INFRARED][:, :7]}),
        (r"'visible/two\\nlines/x' is not visible/MODEL/FEATURE", lambda a: {"visible/two\nlines/x": a[VISIBLE]}),
        ("'weights' is not visible/MODEL/FEATURE", lambda _: {"weights": np.ones(3)}),
        *[(f"origin: .*{next(iter(wrong))}", lambda _, wrong=wrong: origin(wrong)) for wrong in WRONG_ORIGINS],
        (r"origin: expected object, got array", lambda _: origin([1, 2])),
        (r"no infrared features of cam.*jpg \(1 of", lambda a: {n: a[n][1:] for n in ("infrared/paths", INFRARED)}),
        (
            "row 3 of .* is too short, too long or not finite",
            lambda a: {VISIBLE: np.insert(a[VISIBLE][1:], 3, np.inf, axis=0)},
        ),
        (
            "row 3 of .* is too short, too long or not finite",
            lambda a: {VISIBLE: np.insert(a[VISIBLE][1:].astype(np.float32), 3, 1e-15, axis=0)},
        ),
        *[
            ("row 0 of .* is too short, too long", lambda a, size=size: {VISIBLE: np.full_like(a[VISIBLE], size, "f8")})
            for size in (1e30, 1e300)
        ],
        ("save the same for both", lambda _: {VISIBLE: None}),
        ("no array of texts visible/paths", lambda _: {PATHS: None}),
        ("no array of texts visible/paths", lambda _: {PATHS: np.array([b"\xff"])}),
        ("no array of texts visible/paths", lambda _: {PATHS: np.zeros(2, "V4")}),
        ("without pickles", lambda _: {PATHS: np.array([None, {}])}),
        (r"not numbers \[", lambda a: {VISIBLE: a[VISIBLE][:-1]}),
        (r"not numbers \[", lambda a: {VISIBLE: a[VISIBLE].astype(complex)}),
        (r"not numbers \[", lambda _: {VISIBLE: np.ones(4)}),
        ("visible/bytes is not an integer for each image", lambda a: {"visible/bytes": np.ones(len(a[PATHS]))}),
        ("visible/bytes is not an integer for each image", lambda _: {"visible/bytes": np.array([1, 2])}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_damaged_features_are_named(words, damage, arrays, sysu_tree, tmp_path):
    with pytest.raises(InputError, match=rf"f\.npz.*{words}"):
        table(arrays | damage(arrays), sysu_tree, tmp_path)


def test_damaged_features_are_one_line(sysu_tree, tmp_path):
    """Whatever byte of a compressed file is damaged: refused, or, where it does not matter, read."""
    paths = np.array(["cam1/0001/0001.jpg"])
    names = {
        f"{m}/{name}": x for m in ("visible", "infrared") for name, x in (("paths", paths), ("a/b", np.ones((1, 5))))
    }
    np.savez_compressed(tmp_path / "whole.npz", **names)
    whole = (tmp_path / "whole.npz").read_bytes()
    read = 0
    for position in range(len(whole)):
        (tmp_path / "bad.npz").write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with contextlib.suppress(InputError):
            load_features(tmp_path / "bad.npz")
            read += 1
    assert read < len(whole) / 2


def test_a_header_that_says_more_than_the_file_has(arrays, sysu_tree, tmp_path):
    """NumPy would say that the memory is full."""
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive, archive.open("visible/a/b.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (38, 2**40)})
    with pytest.raises(InputError, match=r"f\.npz: cannot be read \(ValueError\); save it again") as raised:
        load_features(tmp_path / "f.npz")
    assert not shortage(raised.value)


def test_features_of_unit_length_stay_as_they_are(arrays, sysu_tree, tmp_path):
    """Otherwise, near-ties would rank otherwise than in the test that has saved them. The others get that length."""
    for name, values in arrays.items():
        if name.endswith("embedding"):
            arrays = arrays | {name: torch.nn.functional.normalize(torch.from_numpy(values).float()).numpy()}
    doubled = {name: np.concatenate([values[:3] * 2, values[3:]]) for name, values in arrays.items() if "mine" in name}
    np.savez(tmp_path / "f.npz", **arrays | doubled)
    stored, _ = load_features(tmp_path / "f.npz")
    images = {m: [str(sysu_tree / path) for path in stored[m]["row"]] for m in stored}
    chosen = select_features(tmp_path / "f.npz", stored, images, sysu_tree, "cpu")
    for modality, named in chosen.items():
        own, expected = named["mine", "embedding"], torch.from_numpy(arrays[f"{modality}/mine/embedding"])
        torch.testing.assert_close(own, expected)
        assert torch.equal(own[3:], expected[3:])


def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "UNPACKED", 10**5)
    np.savez_compressed(tmp_path / "f.npz", **{VISIBLE: np.zeros(10**5)})
    with pytest.raises(InputError, match="f.npz: cannot be read"):
        load_features(tmp_path / "f.npz")

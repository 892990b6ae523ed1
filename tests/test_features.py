"""Saved features: those of another project are read, and damaged ones are named."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

import testa
from core.features import load_features
from data_manager import process_gallery_sysu, process_query_sysu, read_ids, sysu_images
from eval_metrics import eval_sysu
from utils import InputError


def test_features_of_another_project(sysu_tree, tmp_path):
    """Any model and feature names, any order, unnormalised, float16, more images than needed, no origin."""
    rng = np.random.default_rng(0)
    arrays, own = {}, {}
    for modality, cameras in (("visible", (1, 2, 4, 5)), ("infrared", (3, 6))):
        paths, ids, _ = sysu_images(sysu_tree, read_ids(sysu_tree, "test"), cameras)
        order = rng.permutation(len(paths))
        features = (np.eye(400)[ids] + 0.3 * rng.normal(size=(len(ids), 400))).astype(np.float16)
        arrays[f"{modality}/paths"] = np.array([str(Path(paths[i]).relative_to(sysu_tree)) for i in order])
        arrays[f"{modality}/mine/embedding"] = features[order]
        own |= dict(zip(paths, features, strict=True))
    file = tmp_path / "other.npz"
    np.savez(file, **arrays)
    (row,) = testa.main(["--data_path", str(sysu_tree), "--from_features", str(file), "--gpu", "cpu", "--mode=indoor"])
    assert (row["model"], row["feature"], row["flip_averaging"], row["selection"]) == (
        "mine",
        "embedding",
        None,
        "unknown",
    )
    query, q_ids, q_cameras = process_query_sysu(sysu_tree)
    gallery, g_ids, g_cameras = process_gallery_sysu(sysu_tree, "indoor", 6)
    one, other = (np.array([own[path] for path in paths], np.float64) for paths in (query, gallery))
    cosine = (one @ other.T) / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1)
    cmc, mean_ap, _ = eval_sysu(-cosine, q_ids, g_ids, q_cameras, g_cameras)
    assert row["per_trial"][6]["metrics"]["Rank-1"] == pytest.approx(100 * cmc[0])
    assert row["per_trial"][6]["metrics"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)

    def damaged(change):
        with np.load(file) as whole:
            copy = dict(whole)
        change(copy)
        np.savez(tmp_path / "bad.npz", **copy)
        with pytest.raises(InputError, match=r"bad\.npz") as error:
            testa.main(["--data_path", str(sysu_tree), "--from_features", str(tmp_path / "bad.npz"), "--gpu", "cpu"])
        return str(error.value)

    def last_image_gone(arrays):
        for name in ("infrared/paths", "infrared/mine/embedding"):
            arrays[name] = arrays[name][1:]

    def not_finite(arrays):
        arrays["visible/mine/embedding"][3, 2] = np.inf

    def an_image_twice(arrays):
        arrays["visible/paths"][5] = arrays["visible/paths"][2]

    def origin(**values):
        return lambda arrays: arrays.update(origin=np.array(json.dumps(values)))

    assert f"lists {arrays['visible/paths'][2]} twice" in damaged(an_image_twice)
    assert "{'mine/embedding': 400}, infrared {'mine/embedding': 7}" in damaged(
        lambda arrays: arrays.update({"infrared/mine/embedding": arrays["infrared/mine/embedding"][:, :7]})
    )
    for name in ("visible", "infrared"):
        arrays[f"{name}/mine/two\nlines"] = arrays[f"{name}/mine/embedding"]
    np.savez(file, **arrays)
    assert "'visible/mine/two\\nlines' is not visible/MODEL/FEATURE" in damaged(lambda arrays: None)
    for name in ("visible", "infrared"):
        del arrays[f"{name}/mine/two\nlines"]
    np.savez(file, **arrays)
    wrong = [{"flipped": "FC"}, {"selection": 3}, {"trial": "1"}, {"dataset": "market"}, {"data_path": []}]
    for said in (*wrong, {"selektion": "val"}):
        assert repr(next(iter(said))) in damaged(origin(**said))
    assert "origin is [1, 2]" in damaged(lambda arrays: arrays.update(origin=np.array("[1, 2]")))
    missing = arrays["infrared/paths"][0]
    assert f"no infrared features of {missing} (1 of" in damaged(last_image_gone)
    assert "row 3 of visible/mine/embedding is zero or not finite" in damaged(not_finite)
    assert "save the same for both" in damaged(lambda arrays: arrays.pop("visible/mine/embedding"))
    assert "no array visible/paths" in damaged(lambda arrays: arrays.pop("visible/paths"))
    assert "'weights' is not visible/MODEL/FEATURE" in damaged(lambda arrays: arrays.update(weights=np.ones(3)))
    assert "without pickles" in damaged(lambda arrays: arrays.update({"visible/paths": np.array([None, {}])}))
    for values in (arrays["visible/mine/embedding"][:-1], arrays["visible/mine/embedding"].astype(complex), np.ones(4)):
        assert "not numbers [" in damaged(
            lambda arrays, values=values: arrays.update({"visible/mine/embedding": values})
        )

    np.savez(file, **arrays, origin=np.array(json.dumps({"flipped": ["embedding"], "selection": "val"})))
    (row,) = testa.main(["--data_path", str(sysu_tree), "--from_features", str(file), "--gpu", "cpu"])
    assert (row["flip_averaging"], row["selection"], row["images"]) == (True, "val", "unknown")


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

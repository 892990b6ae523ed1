"""bench.py counts what it says it counts."""

import json
import shutil

import numpy as np

import bench
import data_manager
from conftest import SIZE


def test_data(sysu_tree, tmp_path, capfd):
    tree = tmp_path / "sysu"
    shutil.copytree(sysu_tree, tree, ignore=shutil.ignore_patterns("*.npy"))
    sizes = ["--img_h", str(SIZE[0]), "--img_w", str(SIZE[1]), "--batch_size", "4", "--num_pos", "2", "--gpu", "cpu"]
    figures = bench.main(["data", "--data_path", str(tree), *sizes, "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == figures

    ids = data_manager.read_ids(tree, "train") + data_manager.read_ids(tree, "val")
    images = {
        kind: sum(len(list(tree.glob(f"cam{camera}/{i:04d}/*"))) for camera in cameras for i in ids)
        for kind, cameras in (("rgb", (1, 2, 4, 5)), ("ir", (3, 6)))
    }
    assert figures["prepared_images"] == sum(images.values())
    for kind, count in images.items():
        assert np.load(tree / f"train_{kind}_resized_img.npy", mmap_mode="r").shape == (count, *SIZE, 3)
    assert figures["epoch_steps"] == max(images.values()) // 8
    assert figures["epoch_inputs"] == figures["epoch_steps"] * 4 * 2 * 3
    assert 0 < figures["prepare_peak_above_imports_gib"] < figures["prepare_peak_gib"] < 4
    assert f"prepared {sum(images.values())} images" in capfd.readouterr().out

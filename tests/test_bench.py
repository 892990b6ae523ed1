"""bench.py counts what it says it counts, and its baselines compute what ours do."""

import json
import shutil

import numpy as np
import pytest
import torch

import bench
import data_manager
from conftest import SIZE
from eval_metrics import eval_regdb, eval_sysu
from loss import aligned_distance
from test_eval_metrics import REGDB_KEYS, assert_metrics_close, random_problem


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


def test_lean_measures():  # the plain ones are test_eval_metrics' oracle
    for seed in range(50):
        problem = random_problem(seed)
        assert_metrics_close(bench.lean_metrics(*problem.values()), eval_sysu(*problem.values()))
        regdb = [problem[key] for key in REGDB_KEYS]
        assert_metrics_close(bench.lean_metrics(*regdb), eval_regdb(*regdb))


def test_plain_walk():
    x, y = torch.randn(2, 40, 5, 8)
    plain = [bench.plain_aligned_distance(*pair) for pair in zip(x, y, strict=True)]
    torch.testing.assert_close(torch.stack(plain), aligned_distance(x, y))


@pytest.mark.parametrize(("command", "sizes"), [("loss", []), ("rerank", ["--queries", "90", "--gallery", "40"])])
def test_comparisons(command, sizes, tmp_path, capsys):
    file = tmp_path / "out.json"
    figures = bench.main([command, *sizes, "--gpu", "cpu", "--repeats", "1", "--json", str(file)])
    assert json.loads(file.read_text()) == figures
    assert figures["ratio"] == pytest.approx(figures["baseline_seconds"] / figures["ours_seconds"])
    assert f"{figures['ratio']:.1f} x" in capsys.readouterr().out

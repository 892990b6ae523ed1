"""bench.py counts what it says it counts, and its baselines compute what ours do."""

import json
import shutil

import numpy as np
import pytest
import torch

import bench
import data_manager
import engine
from ChannelAug import normalise
from conftest import SIZE
from data_loader import eval_loader
from eval_metrics import eval_regdb, eval_sysu
from loss import Losses, aligned_distance
from model import GFMNet
from test_eval_metrics import REGDB_KEYS, assert_metrics_close, random_problem
from utils import InputError


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
    assert 0.1 < figures["prepare_peak_gib"] < 4
    assert abs(figures["prepare_peak_above_imports_gib"]) < 0.2
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


SMALL_STEP = [
    "--gpu",
    "cpu",
    "--arch",
    "resnet18",
    "--img_h",
    "96",
    "--img_w",
    "48",
    "--workers",
    "0",
    "--repeats",
    "1",
]


def test_step(capsys):
    more = ["--batch_size", "2", "--num_pos", "2", "--steps", "3"]
    figures = bench.main(["step", *SMALL_STEP, *more])
    assert figures["images_per_second"] == pytest.approx(12 / figures["ours_seconds"])
    budget = figures["budget_seconds"]
    assert list(budget) == ["loading", "augmentation", "forward", "loss", "backward", "optimiser"]
    assert min(budget.values()) > 0
    assert budget["forward"] + budget["backward"] > budget["augmentation"] + budget["loss"]
    assert "where a step's time goes" in capsys.readouterr().out


def test_floors_count_what_a_layer_computes():
    """A convolution and a linear layer by hand: 2 operations a multiplication, backward twice as much as forward but
    for the gradient of the images, which nobody needs."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 5)

        def forward(self, visible, infrared):
            return self.linear(self.conv(torch.cat([visible, infrared])).mean(dim=(2, 3)))

    def criterion(output, labels):
        return Losses(*[torch.nn.functional.cross_entropy(output, labels)] * 5)

    images, labels = torch.rand(2, 3, 10, 6), torch.tensor([0, 1, 2, 3])
    floors = bench.step_floors(Net(), criterion, (images, images), labels, "off")
    conv, linear = 4 * 10 * 6 * 8 * 3 * 9, 4 * 8 * 5
    assert floors["flop"] == 2 * (2 * conv + 3 * linear)
    assert floors["bytes"] == 3 * 4 * (4 * 60 * (3 + 8) + 4 * (8 + 5))


def test_test(sysu_tree, capsys):
    """What is timed is right: the baseline's measures, from ten galleries a mode, are those of one pass."""
    test = data_manager.sysu_test(sysu_tree, data_manager.SYSU_VISIBLE)
    torch.manual_seed(0)  # of some random networks, near-ties rank differently
    net = GFMNet(5, "resnet18").eval()
    plain = bench.plain_test(net, test, SIZE, 0, torch.device("cpu"))
    embed = engine.network_embedding(net, torch.device("cpu"), normalise)
    features = {m: engine.extract(embed, eval_loader(p, SIZE, 64, 0), m, "") for m, p in test.paths.items()}
    for search, (_, mean_ap, mean_inp) in zip(test.searches, plain, strict=True):
        scores = engine.scores(engine.run_search(features, search)["FC", "none"])
        assert (scores["mAP"], scores["mINP"]) == pytest.approx((100 * mean_ap, 100 * mean_inp), abs=1e-6)

    figures = bench.main(["test", *SMALL_STEP, "--data_path", str(sysu_tree)])
    assert figures["images"] == {m: len(paths) for m, paths in test.paths.items()}
    assert f"{figures['ratio']:.1f} x" in capsys.readouterr().out


def test_gpu_keeps_each_stage_and_goes_on_after_one_that_fails(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no CUDA device"):
        bench.main(["gpu", "--out", str(out)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set(bench.main(["gpu", "--out", str(out), "--only", "loss", "--gpu", "cpu"])) == {"loss"}
    monkeypatch.setattr(bench, "REPO", tmp_path)  # no bench.py there
    with pytest.raises(SystemExit, match="1"):
        bench.main(["gpu", "--out", str(out), "--only", "metrics", "rerank", "--gpu", "cpu"])
    results = json.loads(out.read_text())
    assert [results[stage]["runs"][0]["status"] for stage in ("loss", "metrics", "rerank")] == [0, 2, 2]
    assert json.loads(results["loss"]["files"]["loss.json"][0])["ratio"] > 1
    assert "can't open file" in results["rerank"]["runs"][0]["stderr"]
    assert (
        bench.run_recorded(["-c", "print('begun', flush=True); import time; time.sleep(60)"], 1)["status"] == "timeout"
    )


def test_search(capsys):
    size = ["--vectors", "5000", "--people", "100", "--dim", "16", "--repeats", "1", "--cosine", "0.2", "0.9"]
    figures = bench.main(["search", *size])["by_cosine"]
    assert list(figures) == [0.2, 0.9]
    for found in figures.values():
        assert 0.3 < found["recall"][10] <= found["recall"][1] + 0.1
        assert [row["name"] for row in found["rows"]] == ["1 at once: exact, inverted", "100 at once: exact, inverted"]
    assert figures[0.2]["recall"][10] < figures[0.9]["recall"][10] > 0.99

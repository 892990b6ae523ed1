"""tools.bench counts what it says it counts; `bench` itself checks that both sides of a comparison agree."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import data_manager
from ChannelAug import normalise
from conftest import SIZE
from data_loader import eval_loader
from datasets import sysu_searches
from eval_metrics import eval_regdb, eval_sysu
from methods import METHODS
from model import GFMNet
from test_eval_metrics import REGDB_KEYS, assert_metrics_close, random_problem
from testing import engine
from testing.results import scores
from tools import bench
from tools.benchmarks import measuring, step
from tools.benchmarks.plain import lean_metrics, plain_test
from utils import InputError

SIZED = ["--gpu", "cpu", "--img_h", str(SIZE[0]), "--img_w", str(SIZE[1])]
SMALL = [*SIZED, "--workers", "0"]
NETWORK = [*SMALL, "--arch", "resnet18", "--repeats", "1"]


def test_turns(monkeypatch):
    """Of a slow function and a fast one, on a clock that only they move. What comes before a turn is not timed."""
    now, order = 0.0, []
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now))

    def work(name, *durations):
        nonlocal now
        now += durations[order.count(name) % len(durations)]
        order.append(name)

    functions = [lambda: work("slow", 9, 0.25, 7, 0.5), lambda: work("fast", 2**-8)]
    times = measuring.alternate(functions, 3, torch.device("cpu"), before=lambda: work("before", 5))
    assert times == [0.5, 2**-8]  # of three turns: 0.25, 7 and 0.5
    once = ["before", "slow", "before", *["fast"] * int(0.05 * 2**8)]
    assert order == ["slow", "fast", "fast"] + once * 3


def test_lean_metrics():  # test_eval_metrics tests the plain ones
    for seed in range(50):
        problem = random_problem(seed)
        assert_metrics_close(lean_metrics(*problem.values()), eval_sysu(*problem.values()))
        regdb = [problem[key] for key in REGDB_KEYS]
        assert_metrics_close(lean_metrics(*regdb), eval_regdb(*regdb))


@pytest.mark.slow
def test_data(sysu_tree, tmp_path, capfd):
    tree = tmp_path / "sysu"
    shutil.copytree(sysu_tree, tree, ignore=shutil.ignore_patterns("*.npy"))
    flags = ["--data_path", str(tree), *SMALL, "--batch_size", "4", "--num_pos", "2"]
    results = bench.main(["data", *flags, "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == results

    ids = data_manager.read_ids(tree, "train") + data_manager.read_ids(tree, "val")
    images = {
        kind: sum(len(list(tree.glob(f"cam{camera}/{i:04d}/*"))) for camera in cameras for i in ids)
        for kind, cameras in (("rgb", (1, 2, 4, 5)), ("ir", (3, 6)))
    }
    assert results["prepared_images"] == sum(images.values())
    for kind, count in images.items():
        assert np.load(tree / f"train_{kind}_resized_img.npy", mmap_mode="r").shape == (count, *SIZE, 3)
    assert results["epoch_steps"] == max(images.values()) // 8 + 1
    assert results["epoch_inputs"] == results["epoch_steps"] * 4 * 2 * 3
    assert f"prepared {sum(images.values())} images" in capfd.readouterr().out


@pytest.mark.parametrize(("command", "sizes"), [("loss", []), ("rerank", ["--queries", "90", "--gallery", "40"])])
def test_comparisons(command, sizes, tmp_path, capsys):
    file = tmp_path / "out.json"
    results = bench.main([command, *sizes, "--gpu", "cpu", "--repeats", "1", "--json", str(file)])
    assert json.loads(file.read_text()) == results
    assert results["ratio"] == pytest.approx(results["baseline_seconds"] / results["ours_seconds"])
    assert f"{results['ratio']:.1f} x" in capsys.readouterr().out


def test_budget(monkeypatch):
    """Of a step whose parts take 1, 2, 4, 8, 16 and 32 s, on a clock that only they move; while warming up, longer."""
    now, steps = 0.0, 0
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: now))

    def take(seconds, result=None):
        nonlocal now
        now += seconds * (10 if steps <= 3 else 1)
        return result

    class Part(torch.nn.Module):
        def __init__(self, compute):
            super().__init__()
            self.compute, self.weight = compute, torch.nn.Parameter(torch.ones(()))
            self.weight.register_hook(lambda gradient: take(16, gradient))

        def forward(self, *inputs):
            return self.compute(self.weight, *inputs)

    def batches():
        nonlocal steps
        while True:
            steps += 1
            yield take(1, torch.ones(3, 2).unbind())

    net = Part(lambda weight, visible, infrared: take(4, weight * (visible + infrared).sum()))
    criterion = Part(lambda _, output, labels: take(8, SimpleNamespace(total=output * labels.sum())))
    augment, optimizer = lambda *batch: take(2, batch), SimpleNamespace(step=lambda: take(32))
    args, inner = SimpleNamespace(amp="off", steps=3), SimpleNamespace(criterion=criterion, augment=augment)
    parts = {"net": net, "step": inner, "optimizer": optimizer, "batches": batches()}
    budget = step.step_budget(SimpleNamespace(**parts, args=args, device=torch.device("cpu")))
    expected = {"loading": 1, "augmentation": 2, "forward": 4, "loss": 8, "backward": 16, "optimiser": 32}
    assert budget == expected
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    assert not criterion._forward_hooks


@pytest.mark.slow
def test_step(capsys):
    results = bench.main(["step", *NETWORK, "--batch_size", "2", "--num_pos", "2", "--steps", "3"])
    assert results["with_our_loss"]["ours_seconds"] == results["ours_seconds"]
    budget = results["budget_seconds"]
    assert list(budget) == ["loading", "augmentation", "forward", "loss", "backward", "optimiser"]
    assert min(budget.values()) > 0
    assert 0.2 < sum(budget.values()) / results["ours_seconds"] < 5
    assert "where the time of a step goes" in capsys.readouterr().out


@pytest.mark.slow
def test_methods(capsys):
    results = bench.main(["methods", *SIZED, "--arch", "resnet18", "--repeats", "1", "--steps", "1"])
    assert list(results) == [*METHODS, "flags", "device", "cores", "python", "torch"]
    # torchvision's network without its classifier, a second stem and first stage, the bottleneck, and our classifier.
    network = torchvision.models.resnet18()
    parts = [network, network.conv1, network.bn1, network.layer1]
    count = sum(p.numel() for part in parts for p in part.parameters()) - 513 * 1000 + 2 * 512 + 64 * 512
    assert results["base"]["parameters"] == count
    assert [results[method]["images_per_step"] for method in ("adp", "deen", "dns", "gfm2")] == [96, 48, 48, 64]
    assert "parameters, M" in capsys.readouterr().out


@pytest.mark.slow
def test_test(sysu_tree, capsys):
    """The baseline's metrics, from ten galleries a mode, are those of one pass over the images."""
    test = sysu_searches(sysu_tree, mode=("all", "indoor"))
    net = GFMNet(5, "resnet18").eval()
    plain = plain_test(net, test, SIZE, 0, torch.device("cpu"))
    embed = engine.network_embedding(net, torch.device("cpu"), normalise)
    features = {m: engine.extract(embed, eval_loader(p, SIZE, 64, 0), m, "") for m, p in test.paths.items()}
    for search, (_, mean_ap, mean_inp) in zip(test.searches, plain, strict=True):
        measured = scores(engine.run_search(features, search)["FC", "none"])
        assert (measured["mAP"], measured["mINP"]) == pytest.approx((100 * mean_ap, 100 * mean_inp), abs=1e-6)

    results = bench.main(["test", *NETWORK, "--data_path", str(sysu_tree)])
    assert results["images"] == {m: len(paths) for m, paths in test.paths.items()}
    assert f"{results['ratio']:.1f} x" in capsys.readouterr().out


@pytest.mark.parametrize("server", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_search(server, request, tmp_path):
    index = ["--index", request.getfixturevalue("database")] if server else []
    size = ["--vectors", "2500", "--people", "100", "--dim", "16", "--repeats", "2", "--json", str(tmp_path / "a.json")]
    results = bench.main(["search", *size, *index])
    assert results["bytes"] > 2500 * 16 * 4
    assert set(results["exact"]) == {"all images", "one camera of ten", "100 queries at once"}
    assert not server or all(0.5 < row["recall"] <= 1 for row in results["graph"].values())
    if server:
        with pytest.raises(InputError, match="is an index already; pass an empty database"):
            bench.main(["search", *size, *index])


@pytest.mark.slow
def test_embed():
    size = ["--arch", "resnet18", "--img_h", "96", "--img_w", "48", "--images", "32"]
    results = bench.main(["embed", *size, "--repeats", "1", "--workers", "0"])["by_kind"]
    assert results["PyTorch float32"]["cosine"] == pytest.approx(1)
    assert results["ONNX Runtime float32"]["cosine"] > 0.9999
    assert 0.99 < results["PyTorch bf16"]["cosine"] < 0.999999

"""tools.bench counts what it says it counts; `bench` itself checks that both sides of a comparison agree."""

import json
import mmap
import shutil

import numpy as np
import pytest
import torch
import torchvision

import data_manager
import testa
from ChannelAug import normalise
from conftest import SIZE
from data_loader import eval_loader
from datasets import sysu_searches
from eval_metrics import eval_regdb, eval_sysu
from methods import METHODS, Losses
from model import GFMNet
from test_eval_metrics import REGDB_KEYS, assert_metrics_close, random_problem
from testing import engine
from testing.results import scores
from tools import bench, sweep
from tools.benchmarks import gpu, measuring, step
from tools.benchmarks.plain import lean_metrics, plain_test
from utils import InputError

SIZED = ["--gpu", "cpu", "--img_h", str(SIZE[0]), "--img_w", str(SIZE[1])]
SMALL = [*SIZED, "--workers", "0"]
NETWORK = [*SMALL, "--arch", "resnet18", "--repeats", "1"]


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
    assert 0.1 < results["prepare_peak_gib"] < 4
    assert f"prepared {sum(images.values())} images" in capfd.readouterr().out


def test_memory_of_a_block_where_the_system_reports_it(monkeypatch, tmp_path):
    # Taken from the system: an array may lie where the heap keeps what earlier tests have freed, and add nothing.
    with measuring.PeakMemory() as memory, mmap.mmap(-1, 2**27) as block:  # 128 MiB
        np.frombuffer(block, np.uint8)[:] = 1
    assert 0.1 < memory.gib < 0.3
    monkeypatch.setattr(measuring, "PROC", tmp_path)  # as on other systems
    with measuring.PeakMemory() as memory:
        pass
    assert memory.gib is None
    assert measuring.run_measured("-c", "pass")[1] is None
    assert measuring.gib_text(None) == "an unknown number of GiB"


@pytest.mark.parametrize(("command", "sizes"), [("loss", []), ("rerank", ["--queries", "90", "--gallery", "40"])])
def test_comparisons(command, sizes, tmp_path, capsys):
    file = tmp_path / "out.json"
    results = bench.main([command, *sizes, "--gpu", "cpu", "--repeats", "1", "--json", str(file)])
    assert json.loads(file.read_text()) == results
    assert results["ratio"] == pytest.approx(results["baseline_seconds"] / results["ours_seconds"])
    assert f"{results['ratio']:.1f} x" in capsys.readouterr().out


@pytest.mark.slow
def test_step(capsys):
    results = bench.main(["step", *NETWORK, "--batch_size", "2", "--num_pos", "2", "--steps", "3"])
    assert results["images_per_second"] == pytest.approx(12 / results["ours_seconds"])
    budget = results["budget_seconds"]
    assert list(budget) == ["loading", "augmentation", "forward", "loss", "backward", "optimiser"]
    assert min(budget.values()) > 0
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


def test_floors_count_what_a_layer_computes():
    """A convolution and a linear layer by hand: 2 operations per multiplication, backward twice as much as forward,
    less the gradient of the images, which nobody needs."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 5)

        def forward(self, visible, infrared):
            return self.linear(self.conv(torch.cat([visible, infrared])).mean(dim=(2, 3)))

    def criterion(output, labels):
        return Losses(*[torch.nn.functional.cross_entropy(output, labels)] * len(Losses._fields))

    images, labels = torch.rand(2, 3, 10, 6), torch.tensor([0, 1, 2, 3])
    floors = step.step_floors(Net(), criterion, (images, images), labels, "off")
    conv, linear = 4 * 10 * 6 * 8 * 3 * 9, 4 * 8 * 5
    assert floors["flop"] == 2 * (2 * conv + 3 * linear)
    assert floors["bytes"] == 3 * 4 * (4 * 60 * (3 + 8) + 4 * (8 + 5))


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


@pytest.mark.slow
def test_gpu_keeps_each_stage_and_goes_on_after_one_that_fails(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no CUDA device"):
        bench.main(["gpu", "--out", str(out)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set(bench.main(["gpu", "--out", str(out), "--only", "loss", "--gpu", "cpu"])) == {"loss"}
    monkeypatch.setattr(gpu, "REPO", tmp_path)  # without tools
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(SystemExit, match="1"):
        bench.main(["gpu", "--out", str(out), "--only", "metrics", "rerank", "--gpu", "cpu"])
    results = json.loads(out.read_text())
    assert [results[stage]["runs"][0]["status"] for stage in ("loss", "metrics", "rerank")] == [0, 1, 1]
    assert "ratio" in json.loads(results["loss"]["files"]["loss.json"][0])
    assert "No module named" in results["rerank"]["runs"][0]["stderr"]
    assert gpu.run_recorded(["-c", "import time; time.sleep(60)"], 1)["status"] == "timeout"
    out.write_text("figures")
    with pytest.raises(InputError, match="gpu.json: holds no results of earlier stages"):
        bench.main(["gpu", "--out", str(out)])
    assert out.read_text() == "figures"


def test_gpu_plans_commands_that_the_programs_accept(tmp_path):
    args = bench.get_args_parser().parse_args(["gpu", "--out", "a.json"])
    names = [name for name, *_ in gpu.plan(args, "work")]
    assert len(names) == len(set(names)) == 13
    for _, commands, _ in gpu.plan(args, "work"):
        for command in commands:
            if command[:2] == ["-m", "tools.bench"]:
                assert bench.get_args_parser().parse_args(command[2:]).json.startswith("work/")
            if command[:2] == ["-m", "tools.sweep"]:
                split = command.index("--")
                plan = sweep.new_plan(sweep.get_args_parser().parse_args(command[2:split]), command[split + 1 :])
                assert len(sweep.plan_runs(plan, tmp_path)) == 6


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
def test_embed(trained, sysu_tree, tmp_path):
    size = ["--arch", "resnet18", "--img_h", "96", "--img_w", "48", "--images", "32"]
    results = bench.main(["embed", *size, "--repeats", "1", "--workers", "0"])["by_kind"]
    assert results["ONNX Runtime float32"]["cosine"] > 0.9999
    assert 0.9 < results["ONNX Runtime int8"]["cosine"] < 0.99999

    flags = ["--resume", trained[0]["best"], "--data_path", str(sysu_tree)]
    results = bench.main(["embed", *flags, "--repeats", "1", "--workers", "0"])["by_kind"]
    testa.main([*flags, "--gpu", "cpu", "--workers", "0", "--json", str(tmp_path / "tested.json")])
    tested = json.loads((tmp_path / "tested.json").read_text())["results"]
    (expected,) = (row["mean"]["Rank-1"] for row in tested if (row["model"], row["feature"]) == ("trained", "FC"))
    assert results["PyTorch float32"]["Rank-1"] == pytest.approx(expected)
    assert results["ONNX Runtime float32"]["Rank-1"] == pytest.approx(expected)
    assert results["ONNX Runtime int8"]["Rank-1"] == pytest.approx(expected, abs=15)

"""What a method must do through the programs, checked in the same way for each."""

import numpy as np
import pytest
import torch

import testa
from conftest import log_entries
from core import evaluation, published
from oracles import plain_features
from tools import export

PROGRAM = ["--gpu", "cpu", "--workers", "0"]


def run_is_tested_and_exported(result, tree, size, terms, out):
    """A run of one epoch: its losses add up, testa.py repeats its test, and the exported network gives its features.

    result: of train_ext_test0.py. terms: names of the method's own losses. Returns the exported network.
    """
    (entry,) = log_entries(result["log"])
    assert entry["total"] == pytest.approx(sum(entry[part] for part in ("identity", "triplet", *terms)), rel=1e-5)
    rows = testa.main(["--data_path", str(tree), "--resume", result["last"], *PROGRAM])
    assert [row["feature"] for row in rows] == ["POOL", "FC"]
    assert rows[1]["per_trial"][0]["metrics"]["mAP"] == pytest.approx(entry["FC/mAP"], abs=1e-3)
    argv = ["--resume", result["last"], "--format", "safetensors", "--modality", "infrared", "--out", str(out)]
    (exported,) = export.main(argv)
    net, _, _ = evaluation.open_checkpoint(result["last"], str(tree))
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    file = export.load_embedding(exported["path"])
    torch.testing.assert_close(file(images), plain_features(net.eval(), images, "infrared"), rtol=0, atol=2e-5)
    return file


def runs_end_alike(*results):
    """The last checkpoints of two runs have the same weights, bit for bit."""
    first, second = (torch.load(result["last"])["net"] for result in results)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def write_published(net, unused, path, shift=False):
    """Write a checkpoint as the published code does. unused: names of tensors that this code keeps without use."""
    state = {published.published_name(name, shift): value for name, value in net.state_dict().items()}
    state = {name: torch.ones(1) for name in unused} | state
    torch.save({"net": state, "cmc": np.ones(20), "mAP": np.float64(0.5), "epoch": 7}, path)
    return state


def published_file_loads(path, net, size, network):
    """size, network: as `core.evaluation.open_checkpoint` gives the image size and the name."""
    loaded, its_size, origin = evaluation.open_checkpoint(path, "data")
    assert (its_size, origin["network"], loaded.options) == (size, network, net.options)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())


def published_file_is_tested_and_exported(path, tree, out):
    rows = testa.main(["--data_path", str(tree), "--mode", "indoor", "--resume", str(path), *PROGRAM])
    assert [row["feature"] for row in rows] == ["POOL", "FC"]
    argv = ["--resume", str(path), "--format", "onnx", "--modality", "visible", "--out", str(out)]
    (exported,) = export.main(argv)
    assert exported["cosine"] > 0.9999

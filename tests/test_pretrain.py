"""The pretrained start: what it scales, what it saves, and what the triplets do from there."""

import copy
from pathlib import Path

import pytest
import torch
import torchvision

import ChannelAug
import pre_process_sysu
import train_ext_test0
from conftest import log_entries
from tools import demo_data, pretrain
from utils import InputError

SIZE = ["--img_h", "48", "--img_w", "16"]
CROP = ["--padding", "3"]


def features(resnet, images):
    """What the last stage gives."""
    found = []
    handle = resnet.layer4.register_forward_hook(lambda _, __, output: found.append(output))
    resnet(images)
    handle.remove()
    return found[0].detach()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_scaling_multiplies_the_last_stage_and_nothing_else(arch):
    torch.manual_seed(0)
    resnet = getattr(torchvision.models, arch)(num_classes=3)
    images = torch.randn(4, 3, 48, 32)
    resnet.train()(images)  # running statistics of these images
    scaled = copy.deepcopy(resnet)
    pretrain.scale_last_stage(scaled, 7.0)
    for training in (False, True):
        want = 7 * features(resnet.train(training), images)
        torch.testing.assert_close(features(scaled.train(training), images), want, rtol=1e-3, atol=1e-3)


def people(folder, seed, ids):
    demo_data.main(["--out", str(folder), "--ids", str(ids), "--images", "2", "--seed", str(seed)])
    pre_process_sysu.main(["--data_path", str(folder), *SIZE])
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return people(tmp_path_factory.mktemp("others") / "tree", seed=7, ids=14)


def start(tree, out, triplet, steps):
    flags = ["--data_path", str(tree), "--out", str(out), "--gpu", "cpu", "--triplet", str(triplet), *SIZE, *CROP]
    return pretrain.main([*flags, "--steps", str(steps)])


def test_the_writer_is_python_s_own(tmp_path, monkeypatch):
    """On a full disk, PyTorch's has an error that does not say why."""
    written = []
    monkeypatch.setattr(torch, "save", lambda content, file: written.append(file.name))
    pretrain.save(torch.nn.Linear(1, 1), tmp_path / "a.pth")
    assert [*map(Path, written)] == [tmp_path / "a.pth"]


def test_too_few_people_are_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "pretrain", lambda *_: pytest.fail("trains first"))
    folder = people(tmp_path / "few", 3, 6)
    with pytest.raises(InputError, match="--data_path .*few: has . people; draw at least 8"):
        start(folder, tmp_path / "w.pt", 12, 1)


@pytest.mark.parametrize("triplet", [34.5, pytest.param(12, marks=pytest.mark.slow)])
def test_a_training_begins_with_the_triplet_that_was_asked_for(triplet, others, tmp_path):
    assert start(others, tmp_path / "start.pt", triplet, steps=2) == pytest.approx(triplet, abs=0.01)
    flags = ["--data_path", str(others), "--gpu", "cpu", "--arch", "resnet18", "--weights", str(tmp_path / "start.pt")]
    flags += [*SIZE, *CROP, "--workers", "0", "--epochs", "1", "--warmup", "0", "--lr", "1e-9", "--square", "0"]
    out = ["--model_path", str(tmp_path), "--log_path", str(tmp_path)]
    (entry,) = log_entries(train_ext_test0.main([*flags, *out])["log"])
    assert entry["triplet"] == pytest.approx(triplet, rel=0.1)  # of other batches, at a rate that changes nothing


def test_a_triplet_that_no_scale_gives_is_told(others, tmp_path, monkeypatch):
    for value in (1.0, float("nan")):
        monkeypatch.setattr(pretrain, "first_triplet", lambda *_, value=value: value)
        with pytest.raises(InputError, match=r"--triplet 34\.5: no scale gives it; pass another, or leave it out"):
            start(others, tmp_path / "w.pt", 34.5, steps=1)
    assert not [*tmp_path.iterdir()]


def test_the_padding_is_that_of_the_flag(others, tmp_path, monkeypatch):
    paddings = []

    def crop(images, padding):
        paddings.append(padding)
        return images

    monkeypatch.setattr(pretrain, "random_crop", crop)  # while it is trained
    monkeypatch.setattr(ChannelAug, "random_crop", crop)  # while it is measured
    start(others, tmp_path / "start.pt", triplet=34.5, steps=1)
    assert len(paddings) > 1
    assert set(paddings) == {3}


@pytest.mark.slow
def test_exact_is_drawn_into_a_point_and_told_and_stable_is_not(others, tmp_path, capsys):
    """From features as far apart as ImageNet's weights give."""
    tree = people(tmp_path / "people", seed=0, ids=40)
    start(others, tmp_path / "start.pt", triplet=34.5, steps=60)
    flags = ["--data_path", str(tree), "--gpu", "cpu", "--arch", "resnet18", "--weights", str(tmp_path / "start.pt")]
    flags += [*SIZE, "--workers", "0", "--num_pos", "2", "--epochs", "10", "--warmup", "1", "--eval_every", "9"]
    logs, printed = {}, {}
    flags += [*CROP, "--square", "1"]
    for weighting in ("exact", "stable"):
        out = str(tmp_path / weighting)
        found = train_ext_test0.main([*flags, "--weighting", weighting, "--model_path", out, "--log_path", out])
        logs[weighting] = log_entries(found["log"])
        printed[weighting] = capsys.readouterr().out
    assert logs["exact"][0]["triplet"] > 2
    assert logs["exact"][-1]["triplet"] == pytest.approx(0.6931, rel=0.05)
    assert logs["exact"][-1]["distance_across"] < 10
    assert "the anchors are at ln 2" in printed["exact"]
    assert "--square 0" in printed["exact"]
    assert logs["stable"][-1]["distance_across"] > 15
    assert logs["stable"][-1]["triplet"] < logs["stable"][0]["triplet"]
    assert "warning" not in printed["stable"]

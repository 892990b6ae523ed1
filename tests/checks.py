"""What every method must do: agree with values of its published code, and go through the programs."""

import contextlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import data_loader
import published_state
import testa
from ChannelAug import TrainAugmentation
from conftest import log_entries, parse, search_flags
from methods import METHODS
from model import GFMNet
from parts import published
from testing import evaluation
from tools import export
from tools.benchmarks.plain import plain_features
from tools.search.address import open_index
from training.optim import build_optimizer
from utils import InputError

GOLDEN = Path(__file__).parent / "golden"
BATCHES = ((3, 2, 16, 1.0), (6, 4, 8, 0.6), (4, 3, 12, 3.0))  # identities, images of each, width, spread


def tiny(method, **options):
    """A small network of a method, untrained; the same at each call."""
    torch.manual_seed(0)
    return GFMNet(7, "resnet18", **METHODS[method].network | options)


# ---- golden values of the published code; tests/golden/README.md describes them


def published_weights(*files, without=()):
    """The state of a published network: names and shapes of the golden files, less those that begin with `without`."""
    shapes = {}
    for file in files:
        shapes |= published_state.read_shapes(GOLDEN / f"{file}_shapes.txt")
    weights = {name: published_state.fill(name, shape, 1) for name, shape in shapes.items()}
    return {name: torch.from_numpy(value) for name, value in weights.items() if not name.startswith(without)}


def golden_batch(case, copies):
    """One of BATCHES -> features [copies x P S, C], float64 with gradient, and the labels [P S] of each copy."""
    people, shots, width, spread = BATCHES[case]
    own = np.repeat(published_state.fill(f"identities.{case}", (people, width), 1), shots, axis=0)
    noise = published_state.fill(f"features.{case}", (copies * people * shots, width), 1)
    features = np.tile(own, (copies, 1)) * width**0.5 + spread * width**0.5 * noise
    return torch.from_numpy(features.astype(np.float64)).requires_grad_(), torch.arange(people).repeat_interleave(shots)


def losses_and_gradients_are_golden(values, features, golden, case):
    for name, value in values.items():
        assert value.item() == pytest.approx(golden[f"losses/{case}/{name}"].item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(value, features, retain_graph=True)
        np.testing.assert_allclose(gradient, golden[f"losses/{case}/{name}_gradient"], rtol=1e-6, atol=1e-12)


def golden_steps(views, height, width, seed, base_seed):
    """Of each step of a trajectory: images, the visible ones first, and their labels; `views` views of six images."""
    for step in range(5):
        base = np.repeat(published_state.images(3, height, width, base_seed + step), 2, axis=0)
        images = 0.5 * published_state.images(6 * views, height, width, seed + step) + np.tile(base, (views, 1, 1, 1))
        yield torch.from_numpy(images).double(), (3 * step + torch.arange(3).repeat_interleave(2)).repeat(views)


def trains_as_published(net, criterion, steps, terms, trajectory, names, norms, lr=5e-4, rates=(), theirs=None):
    """SGD steps: the losses `terms` of each, and the norms of all gradients at the first. theirs: a function from our
    name of a parameter to the published one."""
    optimizer, first = build_optimizer(net, "sgd", lr, rates), None
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    for (images, labels), expected in zip(steps, trajectory, strict=True):
        infrared = 12 if net.twins else 6
        losses = criterion(net(images[:-infrared], images[-infrared:]), labels)
        optimizer.zero_grad()
        losses.total.backward()
        first = first or {name: p.grad.norm().item() for name, p in net.named_parameters() if p.grad is not None}
        optimizer.step()
        assert [getattr(losses, term).item() for term in terms] == pytest.approx(expected, rel=1e-6)
    norm = dict(zip(names.tolist(), norms.tolist(), strict=True))
    other = {code: net.options[code] for code in ("shift", "thirds")}
    theirs = theirs or partial(published.published_name, **other)
    ours = {name: theirs(name) for name in first}
    assert sorted(ours.values()) == sorted(norm)
    # Below 1e-8 are the biases before a batch norm, which takes them out again: what they have is rounding.
    assert first == pytest.approx({name: norm[theirs] for name, theirs in ours.items()}, rel=1e-3, abs=1e-8)


def views_are_distributed_as_published(method, dataset, golden, moments, count, *flags):
    """The mean and the deviation of each pixel, in standard errors. moments: names of the golden ones, of each view."""
    args = parse("--method", method, "--dataset", dataset, *flags)
    augmentation = METHODS[method].augmentations.get(dataset, METHODS[method].augmentation)
    augment = TrainAugmentation(args.augc, args.rande, args.padding, args.erase_area, augmentation)
    torch.manual_seed(0)
    image = torch.from_numpy(golden["augmentation/image"]).permute(2, 0, 1).expand(count, -1, -1, -1)
    visible, infrared, labels = augment(image, image, torch.zeros(count))
    views = [*visible.split(count), *infrared.split(count)]
    assert len(labels) == len(views) * count
    error = (1 / count + 1 / golden["augmentation/draws"].item()) ** 0.5
    for images, name in zip(views, moments, strict=True):
        mean, deviation = (torch.from_numpy(golden[f"augmentation/{name}_{part}"]) for part in ("mean", "deviation"))
        z = (images - mean) / deviation
        square = z.square()
        assert z.mean(dim=0).abs().max() < 6 * error
        assert ((square.mean(dim=0) - 1) / square.std(dim=0)).abs().max() < 6 * error


# ---- through the programs


def run_is_tested_and_exported(result, tree, size, terms, out):
    """A run of one epoch: its losses add up, testa.py repeats its test, and the exported network gives its features.

    result: of train_ext_test0.py. terms: names of the method's own losses. Returns the exported network.
    """
    (entry,) = log_entries(result["log"])
    assert entry["total"] == pytest.approx(sum(entry[part] for part in ("identity", "triplet", *terms)), rel=1e-5)
    rows = testa.main(search_flags(tree, result["last"]))
    assert [row["feature"] for row in rows] == ["POOL", "FC"]
    assert rows[1]["per_trial"][0]["metrics"]["mAP"] == pytest.approx(entry["FC/mAP"], abs=1e-3)
    argv = ["--resume", result["last"], "--format", "safetensors", "--modality", "infrared", "--out", str(out)]
    (exported,) = export.main(argv)
    net, _, _ = evaluation.open_checkpoint(result["last"], str(tree))
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    file = export.load_embedding(exported["path"])
    torch.testing.assert_close(file(images), plain_features(net.eval(), images, "infrared"), rtol=0, atol=2e-5)
    return file


def write_published(net, unused, path, **code):
    """Write a checkpoint as the published code does. unused: names of tensors that this code keeps without use; code:
    as of `published.published_name`."""
    state = {published.published_name(name, **code): value for name, value in net.state_dict().items()}
    state = {name: torch.ones(1) for name in unused} | state
    torch.save({"net": state, "cmc": np.ones(20), "mAP": np.float64(0.5), "epoch": 7}, path)
    return state


def published_file_loads(path, net, size, network, needed):
    """And is refused, by its own names, without one of the tensors `needed`.

    size, network: as `testing.evaluation.open_checkpoint` gives the image size and the name.
    """
    loaded, its_size, origin = evaluation.open_checkpoint(path, "data")
    assert (its_size, origin["network"], loaded.options) == (size, network, net.options)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())
    state, damaged = torch.load(path, weights_only=False)["net"], path.with_name("damaged.t")
    for missing in needed:
        torch.save({"net": {name: value for name, value in state.items() if name != missing}}, damaged)
        with pytest.raises(InputError, match=rf"damaged\.t: does not fit its resnet18: '{missing}' is missing"):
            evaluation.open_checkpoint(damaged, "data")


def published_file_is_tested_and_exported(path, tree, out):
    rows = testa.main(search_flags(tree, path, "--mode", "indoor"))
    assert [row["feature"] for row in rows] == ["POOL", "FC"]
    argv = ["--resume", str(path), "--format", "onnx", "--modality", "visible", "--out", str(out)]
    (exported,) = export.main(argv)
    assert exported["cosine"] > 0.9999
    (about,) = (
        json.loads(entry.value) for entry in onnx.load(exported["path"]).metadata_props if entry.key == "gfmnet"
    )
    assert (about["flags"], about["dataset"], about["epoch"]) == ({}, None, 7)


def stored(address):
    """{path: (Entry, its vector)} of the version of an index that serves; fails for a path that is there twice."""
    with contextlib.closing(open_index(str(address))) as index:
        version = index.versions()[0]
        (found,) = index.search(version["version"], np.ones((1, version["dim"]), np.float32), 10**4)
        vectors = index.vectors([image["id"] for image in found])
        entries = index.entries(version["version"])
    assert len({image["path"] for image in found}) == len(found)
    return {image["path"]: (entries[image["path"]], vectors[image["id"]].tolist()) for image in found}


def embedded_images(monkeypatch):
    """A list that gets the file names of all images that are decoded from now on (without loading processes)."""
    seen, read = [], data_loader.ImageFiles.__getitem__

    def counted(self, index):
        seen.append(Path(self.paths[index]).name)
        return read(self, index)

    monkeypatch.setattr(data_loader.ImageFiles, "__getitem__", counted)
    return seen

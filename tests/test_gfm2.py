"""gfm2: its augmentation, its network without colour, and the whole method through the programs."""

import numpy as np
import pytest
import torch

import checks
import train_ext_test0
from ChannelAug import TrainAugmentation, luminance, normalise, random_curve, random_mix, without_colour
from conftest import TINY, tiny_flags
from methods import METHODS, method_name
from model import GFMNet


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_without_colour_is_the_luminance():
    images = torch.randint(256, (4, 3, 6, 5), dtype=torch.uint8)
    red, green, blue = images.double().unbind(dim=1)
    gray = 0.2989 * red + 0.587 * green + 0.114 * blue
    expected = torch.stack([gray / 255 - 0.485, gray / 255 - 0.456, gray / 255 - 0.406], dim=1)
    expected /= torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(without_colour(normalise(images)).double(), expected, rtol=0, atol=5e-4)


def test_mixtures_are_convex_and_cover_the_channels():
    corners = torch.eye(3).view(1, 3, 1, 3).expand(4000, 3, 1, 3)  # pixel c is pure channel c: it shows its weight
    weights = random_mix(corners)
    assert torch.equal(weights, weights[:, :1].expand_as(weights))
    torch.testing.assert_close(weights[:, 0].sum(dim=2), torch.ones(4000, 1))
    assert (weights >= 0).all()
    # Uniform on the triangle: each weight has the mean 1/3 and the variance 1/18.
    assert weights[:, 0, 0].mean(dim=0).numpy() == pytest.approx(1 / 3, abs=0.02)
    assert weights[:, 0, 0].var(dim=0).numpy() == pytest.approx(1 / 18, abs=0.005)


def test_a_mixture_bears_draws_of_zero(monkeypatch):
    """A CPU draws 0 about once in 2^24 times: some times in a training."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.zeros(shape))
    torch.testing.assert_close(random_mix(torch.full((2, 3, 4, 4), 200.0)), torch.full((2, 3, 4, 4), 200.0))


def test_curve_is_linear_between_random_heights():
    ramp = torch.arange(256.0).view(1, 1, 1, 256).expand(50, 3, 2, 256)
    torch.manual_seed(1)
    curved = random_curve(ramp, probability=1)
    assert curved.min() >= 0
    assert 254 < curved.max() <= 255
    for image in curved.numpy():
        knots = np.linspace(0, 255, 5)
        # The heights at the inner knots lie between two values; each half of a piece gives its line.
        heights = [image[0, 0, 0], *(_extrapolate(image[0, 0], knot) for knot in knots[1:4]), image[0, 0, 255]]
        expected = np.interp(np.arange(256), knots, heights)
        np.testing.assert_allclose(image, np.broadcast_to(expected, image.shape), atol=0.02)
    assert (curved[:, 0, 0, 0] > curved[:, 0, 0, 255]).any()  # dark may become bright


def _extrapolate(line, knot):
    before = int(knot) - 1
    return line[before] + (line[before] - line[before - 1]) * (knot - before)


def test_curve_leaves_images_alone_with_the_rest_of_the_probability():
    images = 255 * torch.rand(3000, 1, 2, 2)
    same = (random_curve(images, probability=0.7) == images).flatten(1).all(dim=1)
    assert same.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_views():
    visible, infrared = (torch.randint(256, (5, 3, 16, 8), dtype=torch.uint8) for _ in range(2))
    labels = torch.arange(5)
    first, second, both = TrainAugmentation(1, 0, padding=0, name="curve")(visible, infrared, labels)
    assert first.shape == second.shape == visible.shape
    assert torch.equal(both, labels.repeat(2))
    torch.testing.assert_close(without_colour(first), first, rtol=0, atol=5e-4)  # the mixture is gray
    plain, _, _ = TrainAugmentation(0, 0, padding=0, name="curve")(visible, infrared, labels)
    for view, image in zip(plain, normalise(visible), strict=True):
        assert any(torch.allclose(view, side, atol=1e-5) for side in (image, image.flip(2)))


def test_colour_does_not_reach_the_features():
    net = GFMNet(5, "resnet18", **METHODS["gfm2"].network).eval()
    images = torch.randint(256, (3, 3, 48, 16), dtype=torch.uint8)
    gray = luminance(images.float()).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        for ours, other in zip(
            net.embed(normalise(images), "visible"), net.embed(normalise(gray), "visible"), strict=True
        ):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-4)
        infrared = net.embed(normalise(images), "infrared")[0] - net.embed(normalise(gray), "infrared")[0]
    assert infrared.abs().max() > 1e-3
    assert method_name(net.options) == "gfm2"


@pytest.mark.slow
def test_training_testing_and_export(tiny_tree, tmp_path):
    flags = tiny_flags(tiny_tree, tmp_path, "--method", "gfm2", "--epochs", "1", "--warmup", "0")
    checks.run_is_tested_and_exported(train_ext_test0.main(flags), tiny_tree, TINY, (), tmp_path)

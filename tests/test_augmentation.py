"""The batched augmentations: probabilities, bounds, agreement with the plain formulas, and inputs left alone."""

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import ChannelAug
from ChannelAug import (
    ERASE_FILL,
    MEAN,
    STD,
    TrainAugmentation,
    channel_exchange,
    channel_or_gray,
    erase_as_published,
    normalise,
    random_crop,
    random_erasing,
    random_flip,
)

N = 4000
PUBLISHED = np.load(Path(__file__).parent / "golden" / "augmentation.npz")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(n=8, height=32, width=16, dtype=torch.uint8):
    """Random images without equal channels."""
    values = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8)
    return values if dtype == torch.uint8 else normalise(values)


def assert_share(count, probability, n=N):
    """A binomial count within 4.5 deviations of its mean (a false alarm once in 100,000 runs; the seed is fixed)."""
    assert abs(count - n * probability) < 4.5 * math.sqrt(n * probability * (1 - probability))


@pytest.mark.parametrize(
    "function", [normalise, random_crop, random_flip, random_erasing, channel_exchange, channel_or_gray]
)
def test_input_is_not_changed(function):
    x = images(64, dtype=torch.uint8 if function in (normalise, random_crop, random_flip) else torch.float32)
    before = x.clone()
    out = function(x)
    out = out.clone()  # some results are views that repeat a channel
    out.zero_()
    assert torch.equal(x, before)


def test_normalise_is_the_same_after_an_export(monkeypatch):
    spec = importlib.util.spec_from_file_location("fresh", ChannelAug.__file__)
    fresh = importlib.util.module_from_spec(spec)  # of which nothing was called before the export
    monkeypatch.setitem(sys.modules, "fresh", fresh)  # where older exporters look for it
    spec.loader.exec_module(fresh)

    class Normalise(torch.nn.Module):
        def forward(self, images):
            return fresh.normalise(images)

    x = images()
    exported = torch.export.export(Normalise(), (x,))
    assert type(fresh.normalise(x)) is torch.Tensor
    assert torch.equal(fresh.normalise(x), normalise(x))
    assert torch.equal(exported.module()(x), normalise(x))


def test_normalise_is_torchvision_s():
    from torchvision.transforms import functional

    x = images()
    expected = functional.normalize(x.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalise(x), expected, rtol=0, atol=1e-5)


def test_flip_mirrors_half_of_the_images():
    x = images(1).expand(N, -1, -1, -1)
    out = random_flip(x)
    mirrored = (out == x.flip(3)).flatten(1).all(dim=1)
    same = (out == x).flatten(1).all(dim=1)
    assert (mirrored ^ same).all()
    assert_share(mirrored.sum().item(), 0.5)


def test_erasing_draws_rectangles_as_a_loop_does():
    size, count = 12, 20_000
    x = images(1, size, size, torch.float32).expand(count, -1, -1, -1)
    out = random_erasing(x, probability=0.5)
    changed = (out != x).any(dim=1)
    erased = changed.flatten(1).any(dim=1)
    assert abs(erased.float().mean() - 0.5) < 0.02
    rows, columns = changed[erased].any(dim=2).int(), changed[erased].any(dim=1).int()
    drawn = torch.stack([rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)], dim=1)
    inside = torch.zeros_like(changed[erased])
    for box, (h, w, top, left) in zip(inside, drawn, strict=True):
        box[top : top + h, left : left + w] = True
    assert torch.equal(changed[erased], inside)
    fill = torch.tensor(ERASE_FILL).view(3, 1, 1)
    assert torch.equal(out, torch.where(changed[:, None], fill, x))

    random, expected = np.random.default_rng(0), []
    while len(expected) < count:
        area, ratio = random.uniform(0.02, 0.4) * size * size, random.uniform(0.3, 10 / 3)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < size and w < size:
            expected.append((h, w, random.integers(size - h, endpoint=True), random.integers(size - w, endpoint=True)))

    def measures(h, w, top, left):
        return h, w, h * w, h / w, top / (size - h), left / (size - w)

    for ours, loop in zip(measures(*drawn.numpy().T), measures(*np.array(expected).T), strict=True):
        assert scipy.stats.ks_2samp(ours, loop).pvalue > 1e-3


def test_channel_or_gray_has_the_published_shares():
    x = images(1, dtype=torch.float32).expand(N, -1, -1, -1)
    out = channel_or_gray(x)
    gray = 0.2989 * x[:, 0] + 0.5870 * x[:, 1] + 0.1140 * x[:, 2]
    cases = [x[:, channel : channel + 1].expand_as(x) for channel in range(3)]
    cases += [gray[:, None].expand_as(x), x]
    is_case = [(out - case).abs().flatten(1).amax(dim=1) < 1e-5 for case in cases]
    for matches, share in zip(is_case, (1 / 4, 1 / 4, 1 / 4, 1 / 8, 1 / 8), strict=True):
        assert_share(matches.sum().item(), share)
    assert (torch.stack(is_case).sum(dim=0) == 1).all()


def test_the_plain_views_have_the_fill_normalised():
    out = erase_as_published(torch.zeros(500, 3, 8, 8), SimpleNamespace(rande=1, area=(0.2, 0.3)), 200)
    fill = torch.tensor(ERASE_FILL)
    for view, expected in ((out[:200], (fill - torch.tensor(MEAN)) / torch.tensor(STD)), (out[200:], fill)):
        torch.testing.assert_close(
            view.sum(dim=(0, 2, 3)) / (view != 0).sum(dim=(0, 2, 3)), expected, rtol=1e-4, atol=0
        )


def test_recipe_gives_three_views(monkeypatch):
    monkeypatch.setattr(ChannelAug, "random_flip", lambda x: x)
    visible, infrared, labels = images(6), images(6), torch.arange(6) // 2
    views, heat, all_labels = TrainAugmentation(augc=1, rande=0.0, padding=0)(visible, infrared, labels)
    assert views.shape == (12, 3, 32, 16)
    assert heat.shape == (6, 3, 32, 16)
    assert all_labels.tolist() == 3 * [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(views[:6], normalise(visible))
    second = views[6:]
    assert torch.equal(second[:, 0], second[:, 1])
    for sample in range(6):  # of the same image, in the same order
        assert any(torch.equal(second[sample, 0], normalise(visible)[sample, channel]) for channel in range(3))
    views, heat, _ = TrainAugmentation(augc=0, rande=0.0, padding=0)(visible, infrared, labels)
    torch.testing.assert_close(views, normalise(torch.cat([visible, visible])))
    torch.testing.assert_close(heat, normalise(infrared))


@pytest.mark.parametrize("padding", [0, 2])
def test_recipe_shifts_by_at_most_the_padding(padding):
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[:, :, 7:9, 7:9] = 255  # the same when it is mirrored
    image = image.expand(300, -1, -1, -1)
    views, _, _ = TrainAugmentation(augc=0, rande=0.0, padding=padding)(image, image, torch.arange(300))
    places = {tuple((view[0] > 0).nonzero()[0].tolist()) for view in views}
    around = range(7 - padding, 8 + padding)
    assert places == {(row, column) for row in around for column in around}


def test_recipe_draws_independently_for_each_view():
    visible = images(1, 64, 32).expand(50, -1, -1, -1)
    views, _, _ = TrainAugmentation(augc=0, rande=0.5)(visible, visible, torch.arange(50))
    assert views.is_contiguous(memory_format=torch.channels_last)  # what convolutions like best
    different = {tuple(view.flatten()[:500].tolist()) for view in views}
    assert len(different) > 60  # of 100


@pytest.fixture(scope="module")
def deviations():
    """How far the recipe's views are from the published ones: {view: {statistic: values in standard errors}}.

    Each draw is standardised by the published mean and deviation of its pixels. Pixels of one draw go together, so that
    the mean over an image tells less than its number of pixels suggests: its error is that of the draws' own means.
    """
    torch.manual_seed(0)
    number, batch = 3000, 200
    image = torch.from_numpy(PUBLISHED["image"]).permute(2, 0, 1).expand(batch, -1, -1, -1)
    views = {"visible": [], "exchanged": [], "infrared": []}
    for _ in range(number // batch):
        visible, infrared, _ = TrainAugmentation(augc=1, rande=0.5)(image, image, torch.zeros(batch))
        for view, values in zip(views, (visible[:batch], visible[batch:], infrared), strict=True):
            gray = (values[:, :1] == values[:, 1:]).flatten(1).all(dim=1)
            z = (values - torch.from_numpy(PUBLISHED[f"{view}_mean"])) / torch.from_numpy(PUBLISHED[f"{view}_std"])
            square = z.square()
            pixels = [z.mean(dim=0), square.mean(dim=0), square.square().mean(dim=0)]
            views[view].append((pixels, torch.cat([z.mean(dim=(2, 3)), square.mean(dim=(2, 3))], dim=1), gray.float()))
    error = math.sqrt(1 / number + 1 / PUBLISHED["draws"])  # of a difference of two means, in deviations of one draw
    found = {}
    for view, batches in views.items():
        pixels, draws, gray = zip(*batches, strict=True)
        mean, square, fourth = (torch.stack(part).mean(dim=0) for part in zip(*pixels, strict=True))
        expected = torch.tensor([0.0] * 3 + [1.0] * 3)
        image_mean, image_spread = ((torch.cat(draws).mean(0) - expected) / torch.cat(draws).std(0)).chunk(2)
        share = float(PUBLISHED[f"{view}_gray"])
        gray = torch.cat(gray).mean() - share
        found[view] = {
            "mean of a pixel": mean / error,
            "mean of the image": image_mean / error,
            "spread of a pixel": (square - 1) / (fourth - square.square()).sqrt() / error,
            "spread of the image": image_spread / error,
            # A share of 0 or 1 must be met exactly.
            "share of gray draws": gray / max(math.sqrt(share * (1 - share)) * error, 1e-9),
        }
    return found


@pytest.mark.parametrize("view", ["visible", "exchanged", "infrared"])
def test_views_are_distributed_as_the_published_ones(deviations, view):
    """Over seeds, the largest of 13,824 pixels (which go together) is at 3 to 5 standard errors, an image at 2.

    The plain view erased after it is normalised is at 15 to 19; erased with the mean of ImageNet, at 9; with a
    probability of 0.4, at 5.
    """
    bounds = {"mean of a pixel": 6, "spread of a pixel": 6}
    largest = {statistic: round(values.abs().max().item(), 1) for statistic, values in deviations[view].items()}
    # Not "at least the bound", which NaN is not either.
    wrong = {statistic: value for statistic, value in largest.items() if not value < bounds.get(statistic, 4)}
    assert not wrong, wrong

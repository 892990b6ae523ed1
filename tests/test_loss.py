"""Losses against golden values, per-anchor float64 loops and closed forms; the collapse of the published triplet."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import loss
from methods import METHODS, MethodLoss
from model import GFMNet, Output
from tests.oracles import naive_distances, naive_hard_triplet, naive_triplet, squared_anchor_loss
from tools.benchmarks.plain import plain_aligned_distance, plain_aligned_loss, plain_loss

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
GOLDEN_CASES = sorted({key.split("/")[0] for key in GOLDEN.files})
GOLDEN_LOSSES = sorted({key.split("/")[1] for key in GOLDEN.files if key.endswith("/loss")})

WEIGHTINGS = ("exact", "published")


def squared_loss(weighting, square=1, alpha=1.0, gamma=1.0):
    return loss.SquaredTripletLoss(alpha, gamma, square, weighting=weighting)


def local_loss(features, labels):
    """Of four stripes, cut from the features themselves. It counts no anchors."""
    return loss.AlignedLocalLoss()(features, labels, features.unflatten(1, (-1, 4))), 0


ALL_LOSSES = {
    "local": local_loss,
    "hard": loss.HardTripletLoss(),
    **{f"weighted-{w}": loss.WeightedTripletLoss(weighting=w) for w in loss.WEIGHTINGS},
    **{f"squared{square}-{w}": squared_loss(w, square) for square in (0, 1) for w in loss.WEIGHTINGS},
}


# ---- helpers


def value_and_gradient(criterion, features, labels):
    """-> (loss as float, correct as int, gradient float64)."""
    features = features.detach().clone().requires_grad_()
    value, correct = criterion(features, labels)
    value.backward()
    return value.item(), int(correct), features.grad.double()


def assert_gradients_close(actual, expected, relative):
    """Largest deviation and norm of the deviation, relative to those of the expected gradient."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    deviation = actual - expected
    assert deviation.abs().max() <= relative * expected.abs().max() + 1e-12
    assert deviation.norm() <= relative * expected.norm() + 1e-12


NAMES = torch.tensor([-7, 10**12, 10**12 + 1, 395])  # of identities: any integers


def random_batch(seed, distance, separation=0.8, images=5, width=16):
    """Random batch whose distances between identities average about `distance`; float32 features and labels."""
    identities = len(NAMES)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(identities * images, generator=generator) % identities
    centres = torch.randn(identities, width, generator=generator)
    features = separation * centres[labels] + torch.randn(len(labels), width, generator=generator)
    between = naive_distances(features)[labels[:, None] != labels[None]]
    return features * (distance / between.mean()), NAMES[labels]


def equidistant_batch(distance, ratio=0.4, identities=8, images=12):
    """Orthogonal geometry: every negative at `distance`, every positive at `ratio` of it -> features, labels."""
    labels = torch.arange(identities).repeat_interleave(images)
    basis = torch.eye(identities + identities * images)
    within = ratio * distance / math.sqrt(2)
    between = math.sqrt(distance**2 / 2 - within**2)
    return between * basis[labels] + within * basis[identities:], labels


# ---- golden


def golden_loss(name):
    """With the weighting that is the default."""
    if name == "hard":
        return loss.HardTripletLoss(margin=0.3)
    if name == "wrt":
        return loss.WeightedTripletLoss()
    alpha, gamma, square = map(int, re.fullmatch(r"adp_a(\d)_g(\d)_s(\d)", name).groups())
    return loss.SquaredTripletLoss(alpha, gamma, square)


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_triplet_golden(case, name):
    features, labels = (torch.from_numpy(GOLDEN[f"{case}/{key}"]) for key in ("features", "labels"))
    value, correct, gradient = value_and_gradient(golden_loss(name), features, labels)
    assert value == pytest.approx(float(GOLDEN[f"{case}/{name}/loss"]), rel=1e-4)
    assert correct == int(GOLDEN[f"{case}/{name}/correct"])
    assert_gradients_close(gradient, GOLDEN[f"{case}/{name}/grad"], relative=1e-4)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_local_loss_golden(case):
    features, labels = (torch.from_numpy(GOLDEN[f"{case}/{key}"]) for key in ("features", "labels"))
    local = torch.from_numpy(GOLDEN[f"{case}/local_features"]).requires_grad_()
    value = loss.AlignedLocalLoss(margin=0.3)(features, labels, local)
    value.backward()
    assert value.item() == pytest.approx(float(GOLDEN[f"{case}/adp_a1_g1_s1/local_loss"]), rel=1e-5)
    assert_gradients_close(local.grad, GOLDEN[f"{case}/adp_a1_g1_s1/local_grad"], relative=1e-4)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_aligned_distance_golden(case):
    stripes = torch.from_numpy(GOLDEN[f"{case}/local_features"]).transpose(1, 2)
    distances = loss.aligned_distance(stripes, stripes.roll(1, 0))
    np.testing.assert_allclose(distances.numpy(), GOLDEN[f"{case}/aligned/anchor_other_shift1"], rtol=1e-5, atol=1e-6)


# ---- float64 loops, any scale

SCALES = [(1e-3, 0.3), (0.1, 0.3), (5.0, 2.0), (15.0, 0.3), (20.0, 2.0), (100.0, 0.3)]  # distance, separation


def assert_matches_loop(criterion, naive, features, labels):
    value, correct, gradient = value_and_gradient(criterion, features, labels)
    expected, expected_correct, expected_gradient = value_and_gradient(naive, features.double(), labels)
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert correct == expected_correct
    assert_gradients_close(gradient, expected_gradient, relative=1e-3)


@pytest.mark.parametrize(
    ("alpha", "gamma", "square"), [(1.0, 1.0, 1), (1.0, 1.0, 0), (2.0, 1.0, 1), (1.0, 2.0, 1), (0.5, 3.0, 0)]
)
@pytest.mark.parametrize("weighting", loss.WEIGHTINGS)
def test_weighted_triplets_match_loop(weighting, alpha, gamma, square):
    losses = [squared_loss(weighting, square, alpha, gamma)]
    if (alpha, gamma, square) == (1, 1, 0):
        losses.append(loss.WeightedTripletLoss(weighting=weighting))
    anchor_loss = squared_anchor_loss(gamma, square, weighting)
    for criterion, scale in itertools.product(losses, SCALES):
        assert_matches_loop(
            criterion,
            lambda features, labels: naive_triplet(features, labels, anchor_loss, weighting, alpha),
            *random_batch(1, *scale),
        )


@pytest.mark.parametrize("distance", [0.1, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_hard_triplet_matches_loop(margin, distance):
    assert_matches_loop(
        loss.HardTripletLoss(margin=margin),
        lambda features, labels: naive_hard_triplet(features, labels, margin),
        *random_batch(2, distance),
    )


@pytest.mark.parametrize("kind", [loss.HardTripletLoss, loss.WeightedTripletLoss, loss.SquaredTripletLoss])
def test_an_anchor_whose_negatives_are_as_far_as_its_positives_is_correct(kind):
    assert kind()(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))[1] == 4


# ---- the published collapse


def closed_form(distance, weighting, ratio=0.4, positives=11, negatives=84):
    """d+ and d- of any anchor of `equidistant_batch`, on paper: the anchor is one more positive, at distance 0."""
    d_pos = ratio * distance
    d_pos *= positives / (positives + math.exp(-d_pos))
    mass = negatives * math.exp(-distance)
    return d_pos, distance * (mass / (mass + 1e-6) if weighting == "published" else 1.0)


@pytest.mark.parametrize(
    ("distance", "published_d_neg", "published_loss"),
    # d- and loss of the squared triplet: 84 negatives weigh 84 exp(-d), which has to compete with 1e-6.
    [
        (11.1, 11.09, 0.0),
        (15.6, 14.55, 0.0),
        (17.8, 10.87, 0.0),
        (20.0, 2.95, 25.5),
        (22.3, 0.379, 44.0),
        (30.0, 0.0, 44.0),
    ],
)
def test_published_collapses_on_a_separated_batch(distance, published_d_neg, published_loss):
    features, labels = equidistant_batch(distance)
    for weighting in WEIGHTINGS:
        d_pos, d_neg = closed_form(distance, weighting)
        softplus, correct = loss.WeightedTripletLoss(weighting=weighting)(features, labels)
        measured_d_neg = d_pos - math.log(math.expm1(softplus.item()))
        assert measured_d_neg == pytest.approx(d_neg, rel=2e-3, abs=1e-4)
        assert int(correct) == (len(labels) if d_neg >= d_pos else 0)

    assert measured_d_neg == pytest.approx(published_d_neg, rel=1e-2, abs=1e-2)
    exact, published = (squared_loss(w)(features, labels)[0].item() for w in WEIGHTINGS)
    assert exact == pytest.approx(0.0, abs=1e-4)
    assert published == pytest.approx(published_loss, abs=0.05)


# ---- inputs


@pytest.fixture(params=ALL_LOSSES)
def any_loss(request):
    return ALL_LOSSES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_in_float32_under_autocast(any_loss, dtype):
    features, labels = random_batch(6, 8.0)
    features = features.to(dtype)
    expected, expected_correct = any_loss(features.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, correct = any_loss(features, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert int(correct) == int(expected_correct)


@pytest.mark.parametrize("distance", [0.0, 1e4], ids=["identical", "huge"])
def test_extreme_batches_stay_finite(any_loss, distance):
    features, labels = random_batch(7, max(distance, 1.0))
    if not distance:
        features = features[:1].expand_as(features)
    value, _, gradient = value_and_gradient(any_loss, features, labels)
    assert math.isfinite(value)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_s_losses_are_computed_in_float32_under_autocast(method):
    torch.manual_seed(0)
    net = GFMNet(4, "resnet18", **METHODS[method].network)
    output, labels = net(torch.rand(4, 3, 48, 32), torch.rand(4, 3, 48, 32)), torch.arange(2).repeat(4)
    double = Output(*tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, output))
    expected = MethodLoss(method)(double, labels)
    if method == "adp":
        torch.testing.assert_close(tuple(expected), tuple(plain_loss(double, labels)), check_dtype=False)
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = MethodLoss(method)(output, labels)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_bad_choices_are_refused():
    for triplet in (loss.WeightedTripletLoss, loss.SquaredTripletLoss):
        with pytest.raises(ValueError, match="weighting 'exactly': not one of published, exact, stable"):
            triplet(weighting="exactly")


def test_labels_of_another_shape_are_refused(any_loss):
    for shape in ((4, 1), (1, 4)):
        with pytest.raises(ValueError, match=rf"labels need the shape \[N\], not \[{shape[0]}, {shape[1]}\]"):
            any_loss(torch.randn(4, 8), torch.tensor([0, 0, 1, 1]).view(shape))


def test_no_device_sync(any_loss):
    """Fake tensors hold no data: whatever would copy a value to the host (item, bool, nonzero) raises."""
    with FakeTensorMode():
        features, labels = torch.randn(12, 8, requires_grad=True), torch.arange(12)
        value, _ = any_loss(features, labels)
        value.backward()


# ---- aligned distance


def assert_walks_match(x, y):
    """Values and gradients of the batched distance against the per-sample walk."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(x), generator=generator)  # unequal, so that samples cannot stand in for each other
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    actual = loss.aligned_distance(x, y)
    (actual * weights).sum().backward()
    x64, y64 = (t.detach().double().requires_grad_() for t in (x, y))
    expected = torch.stack([plain_aligned_distance(a, b) for a, b in zip(x64, y64, strict=True)])
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(actual.detach().double(), expected.detach(), rtol=1e-4, atol=1e-5)
    for gradient, reference in ((x.grad, x64.grad), (y.grad, y64.grad)):
        assert_gradients_close(gradient, reference, relative=1e-3)


@pytest.mark.parametrize("stripes", range(1, 9))
def test_aligned_distance_matches_walk_and_breaks_ties_like_it(stripes):
    """Small integer coordinates: squared distances are exact in float32, so that equal entries are equal bit by bit."""
    generator = torch.Generator().manual_seed(stripes)
    assert_walks_match(*torch.randn(2, 48, stripes, 5, generator=generator))
    for width in (1, 3):
        assert_walks_match(*torch.randint(0, 3, (2, 64, stripes, width), generator=generator).float())


@pytest.mark.parametrize(
    ("x", "y", "path"),
    [
        # Row 0 offers 1 at columns 1 and 2, column 0 offers 4: the FIRST 1, (0, 1); its row offers 1, its column 3.
        pytest.param([0, 4, 9], [0, 1, -1], [0, 1, 1, 5, 10], id="first in the row"),
        # Row 0 offers 2, column 0 offers 1 at rows 1 and 2: the FIRST 1, (1, 0); its row offers 1, as its column.
        pytest.param([0, 1, 1], [0, 2, 3], [0, 1, 1, 1, 2], id="first in the column"),
        # Row and column both offer 2: the row wins, (0, 1); its row offers 5, its column 0: (1, 1), then 3, not 7.
        pytest.param([0, 2, 9], [0, 2, 5], [0, 2, 0, 3, 4], id="row before column"),
    ],
)
def test_ties_by_hand(x, y, path):
    """Stripes are points on a line, D = tanh(|x_j - y_k| / 2); the distances along the path are worked out on paper."""
    x, y = (torch.tensor(points, dtype=torch.float32)[None, :, None] for points in (x, y))
    expected = sum(math.tanh(distance / 2) for distance in path) / (len(path) - 1)
    assert loss.aligned_distance(x, y).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "shapes", [((3, 4, 5), (3, 6, 5)), ((3, 4, 5), (2, 4, 5)), ((3, 4), (3, 4)), ((3, 4, 5), (3, 4, 6))]
)
def test_stripes_that_do_not_pair_up_are_refused(shapes):
    with pytest.raises(ValueError, match="aligned_distance needs two"):
        loss.aligned_distance(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("singleton", [False, True], ids=["pairs", "own positive"])
@pytest.mark.parametrize("stripes", [1, 3, 6])
@pytest.mark.parametrize("margin", [0.05, 0.3])
def test_local_loss_matches_loop(stripes, margin, singleton):
    features, labels = random_batch(8, 3.0)
    if singleton:  # the only image of an identity is its own hardest positive
        labels[3] = 99
    # Quarter steps keep the squared stripe distances exact, also the zeros of an image with itself.
    generator = torch.Generator().manual_seed(stripes)
    local = (torch.randint(-4, 5, (len(labels), 6, stripes), generator=generator) / 4).requires_grad_()
    features.requires_grad_()
    value = loss.AlignedLocalLoss(margin=margin)(features, labels, local)
    value.backward()
    local64 = local.detach().double().requires_grad_()
    expected = plain_aligned_loss(features.detach().double(), labels, local64, margin)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(local.grad, local64.grad, relative=1e-3)
    assert features.grad is None or features.grad.abs().max() == 0  # global features only choose the pairs


def test_gradient_of_the_local_loss_repeats_bit_for_bit():
    """Many anchors share a hardest sample: their gradients must add up in one order, whatever the threads do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(96, 8, generator=generator)
        labels = torch.arange(8).repeat_interleave(4).repeat(3)
        local = torch.randn(96, 128, 6, generator=generator, requires_grad=True)

        def gradient():
            return torch.autograd.grad(loss.AlignedLocalLoss()(features, labels, local), local)[0]

        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(30))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_walk_breaks_ties_alike_on_the_gpu():
    for p in (2, 6, 11):
        local = torch.randint(0, 3, (200, p, p)).float()
        torch.testing.assert_close(loss._greedy_walk(local.cuda()).cpu(), loss._greedy_walk(local))

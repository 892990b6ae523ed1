"""RLE against values of its published code and plain loops; its recipe; its way through the programs."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch.nn import functional as F

import checks
import model
import published_state
import train_ext_test0
from ChannelAug import moderate_rle, radical_rle
from conftest import TINY, parse, tiny_flags
from methods import METHODS, MethodLoss, method_name
from parts.rle import Thirds, ThirdsBranch
from tools import export
from tools.benchmarks.plain import plain_features
from training.optim import learning_rate

GOLDEN = np.load(checks.GOLDEN / "rle.npz")
NETWORK = METHODS["rle"].network
UNUSED = ("middle_module.middle.conv1.weight", "visible_module.visible.layer4.1.conv1.weight")


def golden_network(data):
    files = {"sysu": ("base", "rle"), "regdb": ("base", "rle_regdb")}[data]
    weights = checks.published_weights(*files, without=("bottleneck.", "classifier."))
    net, size = model.load_network({"net": weights, "epoch": 30}, "x.t")
    assert size == (384, 192)
    return net.double()


tiny = partial(checks.tiny, "rle", share_net=1)


# ---- golden values


@pytest.mark.parametrize("data", ["sysu", "regdb"])
def test_features_golden(data):
    """Of three rows of each third. Measured deviation 3e-8, which is the rounding of the golden values to float32."""
    net = golden_network(data).eval()
    assert method_name(net.options) == "rle"
    assert net.options["stages"] == {"sysu": 4, "regdb": 3}[data]
    images = torch.from_numpy(published_state.images(2, 144, 48, 3)).double()
    for row, modality in enumerate(("visible", "infrared")):
        with torch.inference_mode():
            pooled, both = net.embed(images[row : row + 1], modality)
        expected = [torch.from_numpy(GOLDEN[f"{data}_{modality}_{name}"]).double() for name in ("pool", "fc")]
        whole_first = [F.normalize(torch.cat([x[-len(x) // 4 :], x[: -len(x) // 4]]), dim=0) for x in expected]
        assert (pooled - whole_first[0]).norm() < 1e-6
        assert (both * 2**0.5 - torch.cat(whole_first)).norm() < 1e-6
        assert (pooled.shape[1], both.shape[1]) == (net.feature_widths["POOL"], net.feature_widths["FC"])


@pytest.mark.slow
@pytest.mark.parametrize("data", ["sysu", "regdb"])
def test_trajectory_golden(data):
    """Five SGD steps. Measured deviation of the losses 1e-11, of the first gradients' norms 1e-13."""
    net, criterion = golden_network(data).train(), MethodLoss("rle")
    terms = ("total", "identity", "triplet", "thirds_identity", "thirds_triplet")
    golden = {name: GOLDEN[f"{data}_{name}"] for name in ("trajectory", "names", "norms")}
    steps = checks.golden_steps(2, 48, 24, 2100, 6100)
    checks.trains_as_published(net, criterion, steps, terms, **golden, rates=METHODS["rle"].rates)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["sysu", "regdb", "llcm"])
def test_views_are_distributed_as_the_published_ones(dataset):
    """Padded by 1: the published code makes images NaN that have a rectangle of black, such as the padding's."""
    moments = 2 * [f"{'sysu' if dataset == 'sysu' else 'regdb'}"]
    checks.views_are_distributed_as_published("rle", dataset, GOLDEN, moments, 6000, "--padding", "1")


# ---- the network and its losses


@torch.no_grad()
def test_thirds_of_maps_that_3_does_not_divide():
    """Upper ones have a row more; nothing is left out."""
    branch, maps = ThirdsBranch(4, 5).double().eval(), torch.rand(2, 4, 8, 3, dtype=torch.float64)
    thirds = branch(maps)
    rows = [maps[:, :, :3], maps[:, :, 3:6], maps[:, :, 6:]]
    for i, third in enumerate(rows):
        pooled = torch.stack([image.flatten(1).mean(dim=1) for image in third])
        torch.testing.assert_close(thirds.pooled[i], pooled)
        normed = pooled / (1 + branch.bottlenecks[i].eps) ** 0.5 * branch.bottlenecks[i].weight
        torch.testing.assert_close(thirds.logits[i], normed @ branch.classifiers[i].weight.T)


@pytest.mark.parametrize("margin", [0.3, 1.0])
def test_losses_are_means_over_the_thirds(margin):
    torch.manual_seed(1)
    pooled, logits, labels = torch.rand(3, 6, 8), torch.randn(3, 6, 4), torch.tensor([0, 0, 1, 0, 0, 1])
    output = model.Output(torch.rand(6, 8), torch.randn(6, 4), None, thirds=Thirds(pooled, logits), visible=3)
    losses = MethodLoss("rle", margin=margin)(output, labels)
    identity, triplet = 0.0, 0.0
    for third, scores in zip(pooled, logits, strict=True):
        identity -= sum(scores[i].log_softmax(0)[label].item() for i, label in enumerate(labels)) / 18
        for i in range(6):
            distances = [(third[i] - third[j]).norm().item() for j in range(6)]
            near = max(d for j, d in enumerate(distances) if labels[j] == labels[i])
            far = min(d for j, d in enumerate(distances) if labels[j] != labels[i])
            triplet += max(margin + near - far, 0) / 18
    assert losses.thirds_identity.item() == pytest.approx(identity, rel=1e-5)
    assert losses.thirds_triplet.item() == pytest.approx(triplet, rel=1e-5)
    parts = losses.identity + losses.triplet + losses.thirds_identity + losses.thirds_triplet
    assert losses.total.item() == pytest.approx(parts.item(), rel=1e-6)


# ---- augmentation


def test_mixtures_of_channels():
    """Half of the images: three equal channels, a mean of the former ones, most of it by one of them."""
    torch.manual_seed(2)
    images = torch.tensor([0.0, 1.0, 10.0]).view(1, 3, 1, 1).expand(4000, 3, 2, 2)
    out = moderate_rle(images)
    mixed = (out == out[:, :1]).all(dim=1).all(dim=1).all(dim=1)
    assert mixed.float().mean() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(out[~mixed], images[~mixed])
    draws = np.random.default_rng(0).beta(0.3, 0.3, (100000, 3))
    expected = draws / draws.sum(axis=1, keepdims=True) @ [0.0, 1.0, 10.0]
    edges = [0, 0.5, 0.9, 2, 4, 6, 8, 9.5, 10.01]
    ours, theirs = (np.histogram(values, edges)[0] / len(values) for values in (out[mixed, 0, 0, 0], expected))
    np.testing.assert_allclose(ours, theirs, atol=0.03)


def test_rectangles_go_on_until_something_is_dark():
    """In half of the images; black ones stay black; nothing gets brighter than white; the input stays as it was."""
    torch.manual_seed(3)
    images = torch.full((1000, 3, 24, 12), 200.0)
    images[:500] = 0
    before = images.clone()
    out = radical_rle(images)
    assert torch.equal(images, before)
    assert torch.equal(out[:500], before[:500])
    assert out.max() <= 255.001
    changed = (out != before)[500:].flatten(1).any(dim=1)
    assert changed.float().mean() == pytest.approx(0.5, abs=0.06)
    assert (out[500:][changed].flatten(1).amin(dim=1) < 0.1 * 200).float().mean() > 0.995
    torch.manual_seed(4)
    once = radical_rle(before[500:], probability=1.0, rectangles=1)
    dark = once.flatten(1).amin(dim=1) < 0.1 * 200
    # One factor for each of three channels, of which the smallest is below 0.1 x 200 / 255.
    expected = 1 - (1 - beta.cdf(0.1 * 200 / 255, 0.4, 0.4)) ** 3
    assert dark.float().mean().item() == pytest.approx(expected, abs=0.06)
    torch.manual_seed(4)
    assert torch.equal((radical_rle(before[500:], probability=1.0) == once).flatten(1).all(dim=1), dark)


@pytest.mark.parametrize("value", [0.004, 0.5, 40.0, 200.0])
def test_the_brightest_value_of_a_rectangle_becomes_a_draw(value):
    """Of each channel and image for itself. (Below 0.01, it becomes a part of one.)"""
    torch.manual_seed(5)
    images = torch.tensor([value, 100.0, 250.0]).view(1, 3, 1, 1).repeat(2000, 1, 24, 12)
    images[:1000] = images[:1000].flip(1)
    out = radical_rle(images, probability=1.0, rectangles=1)[1000:, 0].flatten(1)
    inside = out.gather(1, (out != value).int().argmax(dim=1, keepdim=True)) / 255
    assert kstest(inside.flatten() / min(1, value / 0.01), beta(0.4, 0.4).cdf).pvalue > 1e-3


# ---- the recipe


def test_defaults_are_the_published_recipe():
    args = parse("--method", "rle")
    assert (args.img_h, args.img_w, args.batch_size, args.num_pos, args.epochs) == (384, 192, 6, 4, 151)
    assert (args.lr, args.margin, args.share_net, args.stages, args.eval_every) == (0.1, 0.3, 1, 4, 2)
    rates = [learning_rate(e, args.lr, args.warmup, args.milestones) for e in (0, 9, 19, 20, 80, 120)]
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.01, 0.001, 0.0001])
    assert parse("--method=rle", "--dataset=regdb").stages == 3
    net = tiny()
    optimizer = train_ext_test0.build_optimizer(net, "sgd", args.lr, METHODS["rle"].rates)
    full = {id(p) for p in optimizer.param_groups[-1]["params"]}
    heads = (net.bottleneck, net.classifier, *net.thirds.bottlenecks, *net.thirds.classifiers)
    assert optimizer.param_groups[-1]["lr_scale"] == 1
    assert full == {id(p) for head in heads for p in head.parameters() if p.requires_grad}
    assert len(full) == 8


# ---- through the programs


@pytest.mark.slow
def test_training_testing_and_export(tiny_tree, tmp_path):
    flags = tiny_flags(tiny_tree, tmp_path, "--method", "rle", "--epochs", "1")
    result = train_ext_test0.main(flags)
    terms = ("thirds_identity", "thirds_triplet")
    file = checks.run_is_tested_and_exported(result, tiny_tree, TINY, terms, tmp_path)
    assert file.net.thirds.classifiers is None


@pytest.fixture
def published_file(tmp_path):
    """A small network's checkpoint as the published code writes it -> (path, the network)."""
    net, path = tiny(), tmp_path / "sysu_RLE_best.t"
    state = checks.write_published(net, UNUSED, path, thirds=True)
    assert {name.split(".")[0] for name in state} == {
        "visible_module", "thermal_module", "base_resnet", "middle_module",
        *(f"{part}{end}" for part in ("bottleneck", "classifier") for end in "123g")
    }  # fmt: skip
    return path, net


def test_a_published_checkpoint_loads(published_file):
    path, net = published_file
    needed = ["bottleneckg.bias", "classifier2.weight", "bottleneck2.running_mean"]
    checks.published_file_loads(path, net, (384, 192), "rle, resnet18, 384x192, epoch 7", needed)


@pytest.mark.slow
def test_a_published_checkpoint_through_the_programs(published_file, sysu_tree, tmp_path):
    checks.published_file_is_tested_and_exported(published_file[0], sysu_tree, tmp_path)


def test_what_does_not_make_a_feature_is_not_exported():
    for feature, left in (("POOL", set()), ("FC", {"bottleneck", "thirds"})):
        about = {"image_size": [48, 16], "modality": "visible", "feature": feature, "input": "uint8"}
        file = export.Embedding(tiny(), about)
        parts = {name.split(".")[1] for name in file.state_dict()}
        assert parts == {"visible", "shared"} | left
        images = torch.randint(256, (2, 3, 48, 16), dtype=torch.uint8)
        torch.testing.assert_close(file(images), plain_features(tiny().eval(), images, "visible", feature))

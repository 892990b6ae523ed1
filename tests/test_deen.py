"""DEEN against values of its published code, plain loops and formulas; its recipe; its way through the programs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import checks
import model
import published_state
import train_ext_test0
from ChannelAug import MEAN, TrainAugmentation, normalise, random_gray
from checks import published_weights
from conftest import SIZE, flags, parse, search_flags
from loss import HardTripletLoss
from methods import METHODS, MethodLoss, method_name
from parts import deen
from parts.deen import centre_pair_loss, orthogonal_loss
from tests.oracles import naive_distances
from tools import visualize
from tools.embedder import Embedder
from training import optim
from utils import InputError

GOLDEN = np.load(checks.GOLDEN / "deen.npz")
SHAPES = {"sysu": "deen", "regdb": "deen_regdb"}  # what DEEN has of its own, beside AGW without non-local blocks
NETWORK = METHODS["deen"].network


def golden_network(dataset):
    weights = published_weights("agw", SHAPES[dataset], without="NL_")
    net, size = model.load_network({"net": weights, "epoch": 30}, "x.t")
    assert size == (384, 144)
    return net.double()


def tiny(num_classes=7, **options):
    """A small network whose batch norms do something, in evaluation mode."""
    torch.manual_seed(0)
    net = model.GFMNet(num_classes, "resnet18", **NETWORK, **options)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".norm." in name:
                value.normal_(0, 0.3)
    return net.eval()


# ---- golden values


@pytest.mark.parametrize(("dataset", "stages"), [("sysu", 4), ("regdb", 3)])
def test_features_golden(dataset, stages):
    """Measured deviation 2.5e-8, which is the rounding of the golden values to float32."""
    net = golden_network(dataset).eval()
    assert method_name(net.options) == "deen"
    assert (net.options["stages"], net.options["share_net"]) == (stages, 1)
    images = torch.from_numpy(published_state.images(2, 96, 48, 3)).double()
    for row, modality in enumerate(("visible", "infrared")):
        if f"{dataset}_{modality}_pool" not in GOLDEN:
            continue
        with torch.inference_mode():
            pooled, normed = net.embed(images[row : row + 1], modality)
        pool, fc = (torch.from_numpy(GOLDEN[f"{dataset}_{modality}_{name}"]).double() for name in ("pool", "fc"))
        # Three rows of unit length: the cosine is the mean of three, and of all six as the published test ranks.
        assert (pooled - pool.reshape(1, -1) / 3**0.5).norm() < 1e-6
        assert (normed - torch.cat([pool, fc]).reshape(1, -1) / 6**0.5).norm() < 1e-6
        assert (pooled.shape[1], normed.shape[1]) == (net.feature_widths["POOL"], net.feature_widths["FC"])


@pytest.mark.parametrize("case", range(len(checks.BATCHES)))
def test_losses_and_gradients_golden(case):
    """Measured deviation 1e-15."""
    features, labels = checks.golden_batch(case, copies=6)
    embeddings = features.unflatten(0, (3, 2, -1)).movedim(2, 0)
    values = {
        "triplet": HardTripletLoss(0.3)(features, labels.repeat(6))[0],
        "centre": centre_pair_loss(embeddings, labels),
        "orthogonal": orthogonal_loss(embeddings),
    }
    checks.losses_and_gradients_are_golden(values, features, GOLDEN, case)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["sysu", "regdb"])
def test_trajectory_golden(dataset):
    """Five SGD steps without dropout. Measured deviation of the losses 4e-9, of the first gradients' norms 2e-13."""
    net = golden_network(dataset).train()
    net.shared.expansion.dropout.p = 0
    terms = ("total", "identity", "triplet", "centre", "orthogonal")
    golden = {name: GOLDEN[f"{dataset}_{name}"] for name in ("trajectory", "names", "norms")}
    checks.trains_as_published(net, MethodLoss("deen"), checks.golden_steps(2, 48, 24, 2100, 6100), terms, **golden)


@pytest.mark.parametrize(("dataset", "recipe"), [("sysu", "sysu"), ("regdb", "regdb"), ("regdb", "llcm")])
def test_views_are_distributed_as_the_published_ones(dataset, recipe):
    """Gray values are rounded otherwise, by 1/255."""
    checks.views_are_distributed_as_published("deen", recipe, GOLDEN, (dataset, dataset), count=4000)


# ---- the network against formulas


@pytest.mark.parametrize("stride", [1, 2])
def test_aggregation_is_the_published_formula(stride):
    """Both affinities written out; the positions' one of the two halves of each map, side by side as channels."""
    torch.manual_seed(1)
    block = deen.Aggregation(8, 4, stride).double().eval()
    for part in (block.channel, block.position):
        nn.init.normal_(part.norm.weight)
    high = torch.randn(2, 8, 4, 3, dtype=torch.float64)
    low = torch.randn(2, 4, 4 * stride, 3 * stride, dtype=torch.float64)
    channel, position = block.channel, block.position

    theta, phi, g = channel.theta(high), channel.phi(low), channel.g(low)
    affinity = torch.einsum("bchw,bdhw->bcd", theta, phi) / 4
    y = torch.einsum("bcd,bdhw->bchw", affinity, g)
    expected = high + channel.norm(F.conv2d(y[:, :, ::stride, ::stride], channel.out.weight, channel.out.bias))

    theta, phi, g = (x.reshape(2, 4, -1) for x in (position.theta(expected), position.phi(low), position.g(low)))
    affinity = torch.einsum("bcn,bcm->bnm", theta, phi) / phi.shape[2]
    y = torch.einsum("bnm,bcm->bcn", affinity, g).reshape(2, 2, 4, 3)
    expected = expected + position.norm(position.out(y))
    torch.testing.assert_close(block(high, low), expected)


@torch.no_grad()
def test_a_new_network_is_the_backbone_but_for_its_expansions():
    torch.manual_seed(0)
    net = model.GFMNet(7, "resnet18", **NETWORK).eval()
    plain = model.GFMNet(7, "resnet18", **METHODS["base"].network, share_net=2).eval()
    plain.load_state_dict({name: net.state_dict()[name] for name in plain.state_dict()})
    images = torch.randn(2, 3, *SIZE)
    output = net(images, images)
    assert output.pooled.shape == (12, 512)
    torch.testing.assert_close(output.pooled[:4], plain(images, images).pooled)
    assert all(not torch.allclose(output.pooled[:4], output.pooled[i : i + 4], atol=0.01) for i in (4, 8))


@pytest.mark.parametrize("options", [{}, {"stages": 3}, {"share_net": 1}, {"share_net": 4}])
@torch.no_grad()
def test_embed_has_the_embeddings_side_by_side(options):
    net, images = tiny(**options), torch.randn(3, 3, *SIZE)
    output = net(images[:1], images[1:])
    for pooled, normed, rows in (
        (*net.embed(images[:1], "visible"), slice(0, 1)),
        (*net.embed(images[1:], "infrared"), slice(1, 3)),
    ):
        parts = [F.normalize(x).unflatten(0, (3, 3))[:, rows] for x in (output.pooled, net.bottleneck(output.pooled))]
        torch.testing.assert_close(pooled, torch.cat([*parts[0]], dim=1) / 3**0.5)
        torch.testing.assert_close(normed, torch.cat([*parts[0], *parts[1]], dim=1) / 6**0.5)


def test_dropout_is_the_published_one():
    expansion = tiny().shared.expansion.train()
    zeros = (expansion(torch.rand(4, 256, 6, 4) + 1)[:4] == 0).float().mean()
    assert 0.005 < zeros < 0.015


@pytest.mark.parametrize("options", [{"share_net": 5}, {"stages": 3, "share_net": 4}, {"stages": 2}, {"stages": 5}])
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(InputError, match=rf"^{[*options][-1]} {[*options.values()][-1]}: "):
        model.GFMNet(7, "resnet18", **NETWORK, **options)


def test_a_branch_is_the_mean_of_dilated_convolutions():
    torch.manual_seed(1)
    branch, x = deen.DilatedBranch(64), torch.randn(2, 64, 7, 5)
    maps = [F.conv2d(x, c.weight, padding=d, dilation=d) for c, d in zip(branch.dilated, (1, 2, 3), strict=True)]
    expected = F.conv2d(sum(maps).relu() / 3, branch.out.weight, branch.out.bias)
    torch.testing.assert_close(branch(x), expected, rtol=1e-4, atol=1e-4)
    for convolution in (*branch.dilated, branch.out):  # Kaiming's initialisation
        assert convolution.weight.std().item() == pytest.approx((2 / convolution.weight[0].numel()) ** 0.5, rel=0.1)


# ---- losses against plain loops


def naive_centre_pair_loss(features, labels, margin):
    """Identity by identity. features: {(embedding, modality): [N, C]}."""
    people = labels.unique().tolist()
    centres = {key: [x[labels == person].mean(dim=0) for person in people] for key, x in features.items()}
    total = 0.0
    for expansion in range(1, 1 + max(embedding for embedding, _ in features)):
        for modality in (0, 1):
            plain, expanded = centres[0, modality], centres[expansion, modality]
            for i in range(len(people)):
                positive = (expanded[i] - centres[0, 1 - modality][i]).norm()
                own = (expanded[i] - plain[i]).norm().item()
                others = [j for j in range(len(people)) if j != i]
                nearest = [min((c[i] - c[j]).norm() for j in others) for c in (expanded, plain)]
                hinges = [max(positive - negative + margin, 0) for negative in (own, *nearest)]
                total += (hinges[0] + 0.5 * hinges[1] + 0.5 * hinges[2]) / len(people) / 2
    return total


@pytest.mark.parametrize("embeddings", [2, 3])
def test_centre_pair_loss_is_the_plain_loop_in_any_order(embeddings):
    torch.manual_seed(2)
    labels = torch.arange(4).repeat(3)[torch.randperm(12)]
    features = (labels[:, None, None, None] * 0.5 + torch.randn(12, embeddings, 2, 5)).double().requires_grad_()
    parts = {(e, m): features[:, e, m] for e in range(embeddings) for m in range(2)}
    values = [centre_pair_loss(features, labels, 0.4), naive_centre_pair_loss(parts, labels, 0.4)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-9)
    gradients = [torch.autograd.grad(value, features)[0] for value in values]
    torch.testing.assert_close(*gradients)


def test_the_whole_loss_is_the_sum_of_its_parts():
    torch.manual_seed(3)
    labels = torch.arange(3).repeat_interleave(2)
    pooled, logits = torch.randn(36, 8, dtype=torch.float64), torch.randn(36, 5, dtype=torch.float64)
    losses = MethodLoss("deen", margin=0.5)(model.Output(pooled, logits, None, visible=len(labels)), labels.repeat(2))
    rows = labels.repeat(6)
    distance = naive_distances(pooled)
    hinges = [
        max(0, d[rows == rows[i]].max().item() - d[rows != rows[i]].min().item() + 0.5) for i, d in enumerate(distance)
    ]
    parts = pooled.unflatten(0, (3, 2, 6))
    features = {(e, m): parts[e, m] for e in range(3) for m in range(2)}
    expected = {
        "identity": -logits.log_softmax(dim=1)[torch.arange(36), rows].mean().item(),
        "triplet": sum(hinges) / 36,
        "local": 0,
        "centre": 0.8 * naive_centre_pair_loss(features, labels, 0.2).item(),
        "orthogonal": 0.01 * sum((x @ y).item() for x, y in zip(pooled[12:24], pooled[24:], strict=True)) / 36,
    }
    assert {name: getattr(losses, name).item() for name in expected} == pytest.approx(expected, rel=1e-6)
    assert losses.total.item() == pytest.approx(sum(expected.values()), rel=1e-6)
    health = MethodLoss("deen").health(model.Output(pooled, None, None), labels.repeat(2))
    within = (rows[:, None] == rows) & ~torch.eye(36, dtype=torch.bool)
    assert health.distance_within.item() == pytest.approx(distance[within].mean().item(), rel=1e-6)


# ---- augmentation


def test_gray_is_one_rounded_value_in_half_of_the_images():
    torch.manual_seed(0)
    images = torch.randint(256, (2000, 3, 4, 2), dtype=torch.uint8)
    before, grays = images.clone(), random_gray(images)
    expected = (0.2989 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]).round()
    gray = (grays == expected[:, None]).flatten(1).all(dim=1)
    assert torch.equal(images, before)
    assert 900 < gray.sum() < 1100
    assert torch.equal(grays[~gray], images[~gray].float())


def test_one_view_of_each_image_erased_with_the_mean():
    visible, infrared = torch.randint(256, (2, 6, 3, 32, 16), dtype=torch.uint8)
    labels = torch.arange(6)
    first, second, all_labels = TrainAugmentation(augc=0, rande=0, padding=0, name="gray")(visible, infrared, labels)
    assert all_labels.tolist() == [*range(6)] * 2
    for views, images in ((first, visible), (second, infrared)):
        for view, image in zip(views, normalise(images), strict=True):
            assert torch.equal(view, image) or torch.equal(view, image.flip(2))
    views, _, _ = TrainAugmentation(augc=0, rande=1, area=(0.3, 0.3), name="gray")(visible, infrared, labels)
    erased = (views == torch.tensor(MEAN).view(3, 1, 1)).all(dim=1)
    assert ((erased.flatten(1).float().mean(dim=1) - 0.3).abs() < 0.05).all()


# ---- the recipe


@pytest.mark.parametrize(
    ("stages", "size", "fits"),
    [(4, (64, 16), True), (4, (48, 16), False), (4, (72, 56), False), (3, (48, 16), True), (3, (56, 24), False)],
)
def test_images_are_refused_exactly_if_the_network_cannot_take_them(stages, size, fits):
    args = parse("--method=deen", f"--stages={stages}")
    args.img_h, args.img_w = size
    net, images = tiny(share_net=1, stages=stages), torch.zeros(2, 3, *size)
    if fits:
        train_ext_test0.check_flags(args)
        net(images, images)
    else:
        for call in (lambda: train_ext_test0.check_flags(args), lambda: net(images, images)):
            with pytest.raises(InputError, match="odd number.*--img_h that is a multiple of 32"):
                call()


def test_defaults_are_the_published_recipe():
    args = parse("--method", "deen")
    assert (args.img_h, args.img_w, args.batch_size, args.num_pos, args.epochs) == (384, 144, 6, 4, 151)
    assert (args.lr, args.optim, args.margin, args.share_net, args.stages) == (0.1, "sgd", 0.3, 1, 4)
    assert (args.rande, args.padding, args.erase_area) == (0.5, 10, [0.2, 0.8])
    rates = [optim.learning_rate(e, args.lr, args.warmup, args.milestones) for e in range(args.epochs)]
    assert rates == pytest.approx([0.01 * (e + 1) for e in range(10)] + [0.1] * 10 + [0.01] * 60 + [0.001] * 71)
    assert parse("--method=deen", "--dataset=regdb").stages == 3
    assert {(*parse("--method=deen", f"--dataset={name}").erase_area,) for name in ("regdb", "llcm")} == {(0.02, 0.4)}


def test_flags_win_over_the_recipe_and_other_methods_keep_theirs(capsys):
    args = parse("--batch-size", "9", "--method", "deen", "--erase_area", "0.1", "0.3", "--img_h=64")
    assert (args.batch_size, args.erase_area, args.img_h, args.epochs) == (9, [0.1, 0.3], 64, 151)
    for method in ("base", "agw", "caj", "adp"):
        assert vars(parse("--method", method)) == vars(parse()) | {"method": method}
    with pytest.raises(SystemExit):
        parse("--method", "none")
    assert "--method: invalid choice: 'none'" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--erase_area 0.5 0.1: "):
        train_ext_test0.check_flags(parse("--erase_area", "0.5", "0.1"))


# ---- through the programs


@pytest.mark.slow
def test_training_testing_and_export(sysu_tree, tmp_path):
    result = train_ext_test0.main(flags(sysu_tree, tmp_path, "--method", "deen", "--epochs", "1"))
    assert "centre" in Path(result["log"]).with_suffix(".txt").read_text()
    checks.run_is_tested_and_exported(result, sysu_tree, SIZE, ("centre", "orthogonal"), tmp_path)


@pytest.fixture(scope="module", params=[4, 3])
def published_file(request, tmp_path_factory):
    """A checkpoint as the published code writes them, of a small network; also what that code keeps without use."""
    net = tiny(share_net=1, stages=request.param)
    parts = ("visible_module.visible", "thermal_module.thermal", "base_resnet.base")  # three whole networks
    unused = [f"{part}.layer{number}.0.conv1.weight" for part in parts for number in range(1, 5)]
    path = tmp_path_factory.mktemp("published") / "sysu_deen_best.t"
    checks.write_published(net, [*unused, "base_resnet.base.conv1.weight", "thermal_module.thermal.fc.bias"], path)
    return path, net


def test_published_checkpoint_loads(published_file):
    path, net = published_file
    needed = ("MFA1.PNL.W.1.bias", "DEE.FC22.weight")
    checks.published_file_loads(path, net, (384, 144), "deen, resnet18, 384x144, epoch 7", needed)
    unknown = torch.load(path, weights_only=False)["net"] | {"MFA4.CNL.g.weight": torch.ones(1)}
    with pytest.raises(InputError, match="'MFA4.CNL.g.weight' is no tensor of the published baseline"):
        model.load_network({"net": unknown}, "x.t")


@pytest.mark.slow
def test_published_checkpoint_through_the_programs(published_file, sysu_tree, tmp_path):
    path, net = published_file
    checks.published_file_is_tested_and_exported(path, sysu_tree, tmp_path)
    files = sorted(sysu_tree.glob("cam1/*/*.jpg"))[:2]
    for feature, width in net.feature_widths.items():
        embedder = Embedder(path, feature, gpu="cpu", workers=0, amp="off")
        assert embedder(files, "visible").shape == (2, embedder.dim) == (2, width)
    out = tmp_path / "heat.png"
    visualize.main(["heatmap", *search_flags(sysu_tree, path, "--queries", "1", "--out", out)])
    assert out.stat().st_size > 0

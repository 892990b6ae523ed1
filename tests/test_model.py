"""The network against golden features, torchvision's backbones and formulas written out."""

import copy
import hashlib
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

import checks
import model
import published_state
from ChannelAug import AUGMENTATIONS
from methods import METHODS, MethodLoss
from utils import InputError

GOLDEN = np.load(checks.GOLDEN / "model.npz")
PLAIN = {"attention": False, "non_local": False, "local": False}  # backbone and pooling only


def relative_deviation(actual, expected):
    """Norm of the deviation relative to the norm of the expected value."""
    actual, expected = (torch.as_tensor(value).detach().double() for value in (actual, expected))
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def images(count, seed, height=48, width=24):
    """Smooth random images; the default size leaves 3 x 2 positions, one local stripe."""
    return torch.from_numpy(published_state.images(count, height, width, seed))


def tiny(num_classes=7, arch="resnet18", seed=0, **options):
    """Small network whose batch norms have seen data, so that evaluation is not a special case."""
    torch.manual_seed(seed)
    net = model.GFMNet(num_classes, arch=arch, **options)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return net.eval()


def parameters_reached(net, modality):
    """Names of the parameters that an embedding of this modality depends on."""
    named = dict(net.named_parameters())
    pooled, _ = net.embed(images(2, 0), modality)
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    gradients = torch.autograd.grad(pooled.square().sum(), list(trainable.values()), allow_unused=True)
    return {name for name, gradient in zip(trainable, gradients, strict=True) if gradient is not None}


# ---- golden values


@pytest.fixture(scope="module")
def published_net():
    net = model.GFMNet(num_classes=395)
    net.load_state_dict(model.convert_published_state(checks.published_weights("published")), strict=True)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "modality", "pictures"),
    [
        ("visible", "visible", lambda: images(12, 1, 144, 72)[:4]),
        ("infrared", "infrared", lambda: images(12, 1, 144, 72)[4:8]),
        pytest.param("full", "visible", lambda: images(2, 2, 288, 144), marks=pytest.mark.slow),
    ],
)
def test_embeddings_golden(published_net, name, modality, pictures):
    """Same network, same arithmetic up to the order of sums: measured deviation 3e-7, allowed 1e-3."""
    with torch.inference_mode():
        pooled, normed = published_net.embed(pictures(), modality)
    for actual, key in ((pooled, f"{name}_pool"), (normed, f"{name}_fc")):
        assert relative_deviation(actual, GOLDEN[key]) < 1e-3


def test_training_outputs_golden(published_net):
    """The normalised one-channel maps of the non-local blocks amplify rounding: any two CPUs differ by about 1e-4."""
    pictures = images(12, 1, 144, 72)
    with torch.no_grad():
        output = copy.deepcopy(published_net).train()(pictures[:8], pictures[8:])
    for actual, key in ((output.pooled, "train_pool"), (output.logits, "train_logits"), (output.local, "train_local")):
        assert relative_deviation(actual, GOLDEN[key]) < 1e-3


@pytest.mark.slow
def test_trajectory_golden(published_net):
    """Five SGD steps on the published losses. Measured deviation of the losses 1e-9, of the first gradients 2e-11.

    In float64, as in float32 the steps after the first update depend on rounding.
    """
    net = copy.deepcopy(published_net).train().to(torch.float64, memory_format=torch.channels_last)
    terms = ("total", "identity", "triplet", "local")
    golden = np.load(checks.GOLDEN / "trajectory.npz")
    checks.trains_as_published(net, MethodLoss("adp"), checks.golden_steps(3, 144, 72, 1100, 5100), terms, **golden)


# ---- backbone, pooling and weights against torchvision


@pytest.fixture(scope="module")
def backbone_files(tmp_path_factory):
    """State files of random torchvision networks, as `weights` takes them; resnet18's by an old PyTorch, which did not
    count batches."""
    folder = tmp_path_factory.mktemp("weights")
    for arch in ("resnet18", "resnet50"):
        torch.manual_seed(3)
        state = getattr(torchvision.models, arch)(weights=None).state_dict()
        if arch == "resnet18":
            state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        torch.save(state, folder / f"{arch}.pth")
    return folder


def torchvision_features(arch, weights, x):
    """Last feature map of torchvision's network with stride 1 in its last stage."""
    net = getattr(torchvision.models, arch)(weights=None)
    net.load_state_dict(torch.load(weights))
    for layer in net.layer4.modules():
        if getattr(layer, "stride", None) == (2, 2):
            layer.stride = (1, 1)
    net.eval()
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def naive_pool(features, pool):
    """One channel of one image at a time, in float64."""
    pooled = torch.empty(features.shape[:2], dtype=torch.float64)
    for n, image in enumerate(features.double()):
        for c, channel in enumerate(image):
            values = channel.flatten().tolist()
            if pool == "avg":
                pooled[n, c] = sum(values) / len(values)
            else:
                pooled[n, c] = (sum(v**3 for v in values) / len(values) + 1e-12) ** (1 / 3)
    return pooled


@pytest.mark.parametrize("pool", ["gem", "avg"])
@pytest.mark.parametrize(("arch", "share_net"), [("resnet18", s) for s in range(1, 6)] + [("resnet50", 2)])
@torch.no_grad()
def test_plain_network_is_torchvision_with_pooling(backbone_files, arch, share_net, pool):
    """Both streams start from the file, and without extras they are the backbone, wherever sharing begins."""
    weights = backbone_files / f"{arch}.pth"
    net = model.GFMNet(7, arch=arch, share_net=share_net, pool=pool, weights=str(weights), **PLAIN).eval()
    pictures = images(3, 4)
    expected = naive_pool(torchvision_features(arch, weights, pictures), pool)
    assert relative_deviation(net(pictures[:1], pictures[1:]).pooled, expected) < 1e-5
    for modality in ("visible", "infrared"):
        assert relative_deviation(net.embed(pictures, modality)[0], F.normalize(expected)) < 1e-5


def test_gem_of_signed_maps_keeps_the_gradient_of_the_positive_values():
    """Also where the mean of the cubes is negative. Without negative values, the result is what it was, bit by bit."""
    maps = torch.tensor([[[[-2.0, 1.0], [1.0, 0.5]]]], dtype=torch.float64, requires_grad=True)
    pooled = model.GeM()(maps)
    pooled.backward()
    mean = (0 + 1 + 1 + 0.125) / 4  # the negative value counts as 0
    assert pooled.item() == pytest.approx(mean ** (1 / 3))
    expected = [[0, *(value**2 / 4 / mean ** (2 / 3) for value in (1, 1, 0.5))]]
    torch.testing.assert_close(maps.grad.flatten(1), torch.tensor(expected, dtype=torch.float64).reshape(1, 4))
    maps = torch.rand(3, 5, 4, 2)
    assert torch.equal(model.GeM()(maps), (maps.pow(3).mean(dim=(2, 3)).clamp_min(0) + 1e-12).pow(1 / 3))


# ---- two streams


@pytest.mark.parametrize("share_net", range(1, 6))
def test_streams_own_the_stem_and_the_first_stages(share_net):
    """What a modality has for itself has the shapes of torchvision's stem and first stages, no more and no less."""
    net = tiny(share_net=share_net, attention=False)
    reached = {modality: parameters_reached(net, modality) for modality in ("visible", "infrared")}
    reference = torchvision.models.resnet18(weights=None)
    own = ["conv1", "bn1", *[f"layer{stage}" for stage in range(1, share_net)]]
    shapes = Counter(tuple(p.shape) for name, p in reference.named_parameters() if name.split(".")[0] in own)
    named = dict(net.named_parameters())
    non_local_in_streams = max(0, share_net - 2)  # blocks of layer2 and layer3 come with non-local blocks of their own
    for modality, other in (("visible", "infrared"), ("infrared", "visible")):
        owned = Counter(tuple(named[name].shape) for name in reached[modality] - reached[other])
        assert not shapes - owned
        if not non_local_in_streams:
            assert owned == shapes


@pytest.mark.parametrize("options", [{}, PLAIN, {"share_net": 5}, {"share_net": 1, "pool": "avg"}])
@torch.no_grad()
def test_embed_equals_the_joint_forward_pass(options):
    net, visible, infrared = tiny(**options), images(3, 1), images(2, 2)
    output = net(visible, infrared)
    pooled = torch.cat([net.embed(visible, "visible")[0], net.embed(infrared, "infrared")[0]])
    normed = torch.cat([net.embed(visible, "visible")[1], net.embed(infrared, "infrared")[1]])
    torch.testing.assert_close(pooled, F.normalize(output.pooled))
    torch.testing.assert_close(normed, F.normalize(net.bottleneck(output.pooled)))
    torch.testing.assert_close(output.logits, net.classifier(net.bottleneck(output.pooled)))


# ---- shapes and options


@pytest.mark.parametrize(
    ("arch", "width", "share_net"),
    [
        *[("resnet18", 512, share_net) for share_net in range(1, 6)],
        *[("resnet50", 2048, share_net) for share_net in (1, 3, 5)],
        ("resnet34", 512, 2),
        ("resnet101", 2048, 2),
    ],
)
@torch.no_grad()
def test_shapes(arch, width, share_net):
    """Attention sits at whatever width `share_net` leaves, for basic and bottleneck blocks."""
    output = model.GFMNet(11, arch=arch, share_net=share_net).train()(images(2, 0), images(1, 1))
    assert output.pooled.shape == (3, width)
    assert output.logits.shape == (3, 11)
    assert output.local.shape == (3, 128, 1)


@pytest.mark.parametrize(("height", "stripes"), [(288, 6), (144, 3), (96, 2)])
@torch.no_grad()
def test_local_stripes(height, stripes):
    """Three rows at stride 16 make a stripe; every stripe has unit norm."""
    net = tiny().train()
    output = net(images(2, 0, height), images(2, 1, height))
    assert output.local.shape == (4, 128, stripes)
    torch.testing.assert_close(output.local.norm(dim=1), torch.ones(4, stripes))


@pytest.mark.parametrize(
    "options",
    [{"arch": "resnet49"}, {"arch": "vgg16"}, {"share_net": 0}, {"share_net": 6}, {"share_net": -1}, {"pool": "max"}],
    ids=str,
)
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(options.values()))))):
        model.GFMNet(7, **{"arch": "resnet18", **options})


def test_unknown_modality_is_refused():
    with pytest.raises(ValueError, match="thermal"):
        tiny().embed(images(1, 0), "thermal")


# ---- parts


def test_head_initialisation():
    torch.manual_seed(0)
    net = model.GFMNet(500, arch="resnet50")
    assert net.bottleneck.bias.eq(0).all()
    assert not net.bottleneck.bias.requires_grad
    assert net.bottleneck.weight.mean().item() == pytest.approx(1, abs=1e-3)
    assert net.bottleneck.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert net.classifier.bias is None
    assert net.classifier.weight.mean().item() == pytest.approx(0, abs=1e-5)
    assert net.classifier.weight.std().item() == pytest.approx(0.001, rel=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_non_local_starts_as_identity(training):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 3)
    torch.testing.assert_close(model.NonLocal(16).train(training)(x), x)


def test_non_local_formula():
    """Every position attends to every other: y_i = sum_j (theta_i phi_j / N) g_j, written out position by position."""
    torch.manual_seed(0)
    block = model.NonLocal(16).double()
    torch.nn.init.normal_(block.norm.weight)
    torch.nn.init.normal_(block.norm.bias)
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.5, 1.5)
    block.eval()
    x = torch.randn(2, 16, 4, 3, dtype=torch.float64)
    flat = x.flatten(2)
    positions = flat.shape[2]

    def project(convolution, vector):
        return convolution.weight[:, :, 0, 0] @ vector + convolution.bias

    expected = x.clone()
    for n in range(len(x)):
        for i in range(positions):
            attended = torch.zeros(1, dtype=torch.float64)
            for j in range(positions):
                affinity = project(block.theta, flat[n, :, i]) * project(block.phi, flat[n, :, j]) / positions
                attended = attended + affinity * project(block.g, flat[n, :, j])
            lifted = project(block.out, attended)
            scale = block.norm.weight / (block.norm.running_var + block.norm.eps).sqrt()
            expected[n, :, i // 3, i % 3] += (lifted - block.norm.running_mean) * scale + block.norm.bias
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns(method):
    """One backward pass reaches all parameters but the frozen ones."""
    net = tiny(**METHODS[method].network).train()
    first, second = AUGMENTATIONS[METHODS[method].augmentation][0]
    labels = torch.arange(2).repeat_interleave(2).repeat(first + second)
    MethodLoss(method)(net(images(4 * first, 0), images(4 * second, 1)), labels).total.backward()
    assert not {name for name, p in net.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_embeddings_have_their_widths(method):
    net = tiny(**METHODS[method].network)
    found = net.embed(images(2, 0), "infrared")
    assert [x.shape[1] for x in found] == [net.feature_widths[feature] for feature in model.FEATURES]


def test_short_vectors_get_unit_length_too():
    assert torch.allclose(model._unit(torch.full((2, 4), 1e-3)), torch.tensor(0.5))


def test_the_untrained_network_is_that_of_seed_0():
    options, state = tiny(share_net=1).options, torch.get_rng_state()
    untrained = model.untrained_network(options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    expected = model.GFMNet(**options)
    assert untrained.options == options
    torch.testing.assert_close(untrained.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Two files of torchvision's for ResNet-18, on a server from which PyTorch's cache gets them -> their folder, and a
    list of what was downloaded."""
    server, sources, downloads = tmp_path / "server", {}, []
    server.mkdir()
    torch.manual_seed(1)
    for name in ("IMAGENET1K_V1", "IMAGENET1K_V2"):
        torch.save(torchvision.models.resnet18().state_dict(), file := server / name)
        file = file.rename(server / f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth")
        sources[name] = SimpleNamespace(url=f"https://server/{file.name}")

    def download(url, file):
        downloads.append(Path(file))
        shutil.copy(server / Path(url).name, file)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    members = {"resnet18": sources}
    monkeypatch.setattr(
        torchvision.models, "get_model_weights", lambda arch: SimpleNamespace(__members__=members.get(arch, {}))
    )
    return server, downloads


def test_weights_may_have_torchvision_s_name(server):
    """Each name gets its own, which is downloaded once. ResNet-34 here has none."""
    folder, downloads = server
    for _ in range(2):
        for weights, name in (("imagenet", "IMAGENET1K_V1"), ("IMAGENET1K_V2", "IMAGENET1K_V2")):
            expected = torch.load(next(folder.glob(f"{name}-*")))
            net = model.GFMNet(3, "resnet18", weights=weights)
            for part in (net.visible, net.infrared):
                torch.testing.assert_close(part.conv1.weight, expected["conv1.weight"], rtol=0, atol=0)
            last = expected["layer4.1.conv2.weight"]
            assert any(torch.equal(value, last) for value in net.shared.state_dict().values())
    assert len(downloads) == 2
    with pytest.raises(InputError, match="IMAGENET1K_V2: no such file"):
        model.GFMNet(3, "resnet34", weights="IMAGENET1K_V2")


class Program:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("damage", ["a page", "a program", "other weights", "cut"])
def test_what_is_in_the_cache_is_checked_and_never_run(damage, server, tmp_path, monkeypatch):
    folder, downloads = server
    monkeypatch.chdir(tmp_path)
    model.GFMNet(3, "resnet18", weights="imagenet")
    (file,) = downloads
    if damage == "a page":
        file.write_text("<html>404</html>")
    elif damage == "a program":
        torch.save({"conv1.weight": Program()}, file)
    elif damage == "other weights":
        shutil.copy(next(folder.glob("IMAGENET1K_V2-*")), file)
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{re.escape(file.name)}: is damaged; delete it, and the next training down"):
        model.GFMNet(3, "resnet18", weights="imagenet")
    assert not Path("touched").exists()
    file.unlink()
    model.GFMNet(3, "resnet18", weights="imagenet")


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e300])
def test_values_without_a_float32_are_no_weights(value, tmp_path):
    states = torchvision.models.resnet18().state_dict(), tiny().state_dict()
    for state in states:
        name = next(iter(state))
        state[name] = state[name].double()
        state[name].view(-1)[0] = value
    torch.save(states[0], tmp_path / "a.pth")
    with pytest.raises(InputError, match="--weights .*: conv1.weight holds values that are not finite; use another"):
        model.GFMNet(3, "resnet18", weights=str(tmp_path / "a.pth"))
    with pytest.raises(InputError, match="b.t: '.*' holds values that are not finite; use an earlier checkpoint"):
        model.load_network({"net": states[1], "options": tiny().options, "image_size": (32, 16)}, "b.t")


def test_options_are_all_that_makes_a_network_but_its_weights():
    words = "num_classes arch share_net attention non_local pool local expansion shift gray thirds twins stages"
    assert " ".join(tiny().options) == words

"""Four streams against values of MSCMNet's published code and plain loops; recipe; way through the programs."""

from functools import partial

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

import checks
import model
import published_state
import train_ext_test0
from ChannelAug import green_or_gray, random_brightness, random_scale
from conftest import TINY, parse, tiny_flags
from methods import METHODS, MethodLoss, method_name
from parts import published
from parts.quad import QuadCentreLoss
from training.optim import learning_rate
from utils import InputError

GOLDEN = np.load(checks.GOLDEN / "quad.npz")
NETWORK = METHODS["quad"].network
TWINS = {"twins.visible": "visible_moduleA.visible", "twins.infrared": "thermal_moduleA.thermal"}


def theirs(name):
    """The published name of a tensor of ours."""
    for ours, other in TWINS.items():
        if name.startswith(f"{ours}."):
            return other + name.removeprefix(ours)
    return published.published_name(name)


def golden_network():
    weights = checks.published_weights("agw", "quad")
    net = model.GFMNet(395, **NETWORK, share_net=1)
    net.load_state_dict({name: weights[theirs(name)] for name in net.state_dict()})
    return net.double()


tiny = partial(checks.tiny, "quad", share_net=1)


# ---- golden values


def test_features_golden():
    """Measured deviation 3e-8, which is the rounding of the golden values to float32."""
    net = golden_network().eval()
    assert method_name(net.options) == "quad"
    images = torch.from_numpy(published_state.images(2, 96, 48, 3)).double()
    for row, modality in enumerate(("visible", "infrared")):
        with torch.inference_mode():
            features = net.embed(images[row : row + 1], modality)
        for name, actual in zip(("pool", "fc"), features, strict=True):
            assert (actual - torch.from_numpy(GOLDEN[f"{modality}_{name}"])).norm() < 1e-6


@pytest.mark.parametrize("case", range(len(checks.BATCHES)))
def test_loss_and_gradient_golden(case):
    """Of centres that are all beyond the margin, or some within it. Measured deviation 1e-15."""
    features, labels = checks.golden_batch(case, copies=4)
    loss = QuadCentreLoss(margin=0.7)
    values = {"centres": loss(features, labels.repeat(4))[0], "near_centres": loss(0.1 * features, labels.repeat(4))[0]}
    checks.losses_and_gradients_are_golden(values, features, GOLDEN, case)


@pytest.mark.slow
def test_trajectory_golden():
    """Five SGD steps. Measured deviation of the losses 1e-11, of the first gradients' norms 1e-13."""
    net, criterion = golden_network().train(), MethodLoss("quad", margin=0.7)
    golden = {name: GOLDEN[name] for name in ("trajectory", "names", "norms")}
    steps = checks.golden_steps(4, 48, 24, 2100, 6100)
    checks.trains_as_published(net, criterion, steps, ("total", "identity", "triplet"), **golden, theirs=theirs)


def test_views_are_distributed_as_the_published_ones():
    moments = [f"{view}_{modality}" for modality in ("visible", "infrared") for view in ("first", "second")]
    checks.views_are_distributed_as_published("quad", "sysu", GOLDEN, moments, 6000)


# ---- the network


def test_each_view_has_a_stream_of_its_own():
    """In training; `embed` takes the mean of both."""
    net = tiny().double().eval()
    with torch.no_grad():
        for stream in (net.visible, net.twins["visible"], net.infrared, net.twins["infrared"]):
            stream.conv1.weight.normal_(std=0.1)
    images = torch.randn(8, 3, 48, 16, dtype=torch.float64)
    maps = []
    streams = (net.visible, net.twins["visible"], net.infrared, net.twins["infrared"])
    for stream, view in zip(streams, images.split(2), strict=True):
        maps.append(stream(view))
    with torch.inference_mode():
        assert torch.equal(net(images[:4], images[4:]).pooled, net.pool(net.shared(torch.cat(maps))))
        for i, modality in enumerate(("visible", "infrared")):
            both = (streams[2 * i](images) + streams[2 * i + 1](images)) / 2
            torch.testing.assert_close(net.vectors(images, modality)[0], net.pool(net.shared(both)))


def test_all_streams_start_alike():
    net = tiny()
    for stream in (net.infrared, net.twins["visible"], net.twins["infrared"]):
        assert all(torch.equal(value, stream.state_dict()[name]) for name, value in net.visible.state_dict().items())


def test_non_local_blocks_have_half_of_the_channels():
    net = tiny()
    assert net.shared.layer2.non_local[0].g.weight.shape[:2] == (64, 128)
    with pytest.raises(InputError, match="non_local 'quarter': neither True, False nor 'half'"):
        tiny(non_local="quarter")


# ---- the loss


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_loss_is_the_plain_loop(scale):
    torch.manual_seed(2)
    labels = torch.tensor([0, 1, 2, 0, 1, 2]).repeat(2)
    features = scale * torch.randn(12, 4, dtype=torch.float64)
    pull, push, right = 0.0, 0.0, 0
    for i in range(12):
        others = range(6, 12) if i < 6 else range(6)
        across = torch.stack([features[j] for j in others if labels[j] == labels[i]]).mean(dim=0)
        own = (features[i] - across).norm().item()
        far = [(features[i] - features[labels == k].mean(dim=0)).norm().item() for k in range(3) if k != labels[i]]
        pull += own / 12
        push += sum(max(0.7 - d, 0) for d in far) / 2 / 12
        right += own <= min(far)
    value, correct = QuadCentreLoss(margin=0.7)(features, labels)
    assert value.item() == pytest.approx((pull + push) / 2, rel=1e-9)
    assert correct == right


def test_an_odd_number_of_features_is_refused():
    with pytest.raises(ValueError, match="3 features: half are of visible and half of infrared images"):
        QuadCentreLoss()(torch.rand(3, 2), torch.zeros(3))


# ---- augmentation


@pytest.mark.parametrize("draw", [0.0, 0.37, 0.999])
def test_brightness_is_torchvision_s(draw, monkeypatch):
    torch.manual_seed(4)
    images = torch.randint(256, (3, 3, 5, 4), dtype=torch.uint8)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, draw))
    for image, ours in zip(images, random_brightness(images.float()), strict=True):
        expected = functional.adjust_brightness(functional.to_pil_image(image), 0.5 + draw)
        assert torch.equal(ours, functional.pil_to_tensor(expected).float())


def test_green_or_gray_has_the_published_shares():
    torch.manual_seed(5)
    images = torch.randn(6000, 3, 2, 2)
    before, out = images.clone(), green_or_gray(images)
    assert torch.equal(images, before)
    luminance = (images * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    cases = [images[:, 1:2].expand_as(images), luminance.expand_as(images), images]
    shares = [torch.isclose(out, case, atol=1e-6).flatten(1).all(dim=1).float().mean().item() for case in cases]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_scales_are_drawn_for_each_channel():
    torch.manual_seed(6)
    out = random_scale(torch.ones(6000, 3, 2, 2))
    assert (out == out[:, :, :1, :1]).all()
    scaled = out[:, :, 0, 0][(out != 1).flatten(1).any(dim=1)]
    assert len(scaled) == pytest.approx(3000, abs=200)
    assert scaled.min() == pytest.approx(0.02, abs=0.005)
    np.testing.assert_allclose(np.histogram(scaled, np.linspace(0.02, 1, 6))[0] / scaled.numel(), 0.2, atol=0.02)
    assert np.abs(np.corrcoef(scaled.T) - np.eye(3)).max() < 0.06


# ---- the recipe


def test_defaults_are_the_published_recipe():
    args = parse("--method", "quad")
    assert (args.img_h, args.img_w, args.batch_size, args.num_pos, args.epochs) == (384, 192, 6, 4, 150)
    assert (args.lr, args.margin, args.share_net, args.eval_every, args.amp) == (0.1, 0.7, 1, 1, "bf16")
    epochs = (0, 10, 24, 25, 90, 120)
    rates = [learning_rate(epoch, args.lr, args.warmup, args.milestones) for epoch in epochs]
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.01, 0.001, 0.0001])


# ---- through the programs


@pytest.mark.slow
def test_training_testing_and_export(tiny_tree, tmp_path):
    result = train_ext_test0.main(
        tiny_flags(tiny_tree, tmp_path, "--method", "quad", "--amp", "off", "--warmup", "0", "--epochs", "1")
    )
    file = checks.run_is_tested_and_exported(result, tiny_tree, TINY, (), tmp_path)
    assert list(file.net.twins) == ["infrared"]


def test_a_checkpoint_of_the_whole_mscmnet_is_refused():
    """It has attention that is left out here."""
    state = {theirs(name): value for name, value in tiny().state_dict().items()}
    with pytest.raises(
        InputError, match=r"x\.t: 'visible_moduleA\.visible\.conv1\.weight' is no tensor of the published"
    ):
        model.load_network({"net": state, "epoch": 3}, "x.t")


def test_views_that_do_not_fit_are_refused(monkeypatch):
    """Two streams with one view; QCT with more visible than infrared views."""
    spec = METHODS["quad"]
    monkeypatch.setitem(METHODS, "quad", spec._replace(augmentation="rle"))
    with pytest.raises(InputError, match="--method quad: .* choose an augmentation of two views"):
        train_ext_test0.build_step(parse("--method", "quad"), tiny(), torch.device("cpu"))
    monkeypatch.setitem(METHODS, "agw", METHODS["agw"]._replace(triplet=spec.triplet))
    output = model.Output(torch.rand(12, 8), torch.rand(12, 3), None, visible=8)
    with pytest.raises(InputError, match="QuadCentreLoss: needs as many views of infrared as of visible images"):
        MethodLoss("agw")(output, torch.arange(2).repeat_interleave(2).repeat(3))
    output = output._replace(visible=4)
    with pytest.raises(InputError, match="terms need as many views of visible as of infrared images"):
        MethodLoss("rle")(output, torch.arange(2).repeat_interleave(2).repeat(3))

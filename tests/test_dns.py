"""DNS against values of its published code, torchvision and plain loops; its recipe; its way through the programs."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional

import checks
import model
import published_state
import train_ext_test0
from ChannelAug import random_exchange, random_hue
from conftest import TINY, parse, tiny_flags
from methods import METHODS, MethodLoss, method_name
from parts import dns
from parts.dns import CircleLoss, alignment_loss, distillation_loss
from utils import InputError

GOLDEN = np.load(checks.GOLDEN / "dns.npz")
NETWORK = METHODS["dns"].network


def golden_network():
    net, size = model.load_network({"net": checks.published_weights("dns"), "epoch": 30}, "x.t")
    assert size == (288, 144)
    return net.double()


def without_dropout(net):
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net.train()


tiny = partial(checks.tiny, "dns", share_net=3)


# ---- golden values


def test_features_golden():
    """Measured deviation 2.7e-8, which is the rounding of the golden values to float32."""
    net = golden_network().eval()
    assert method_name(net.options) == "dns"
    assert net.options["share_net"] == 3
    images = torch.from_numpy(published_state.images(2, 96, 48, 3)).double()
    for row, modality in enumerate(("visible", "infrared")):
        with torch.inference_mode():
            features = net.embed(images[row : row + 1], modality)
        for name, actual in zip(("pool", "fc"), features, strict=True):
            assert (actual - torch.from_numpy(GOLDEN[f"{modality}_{name}"])).norm() < 1e-6


class Given(nn.Module):
    """In the place of the common space: gives what it is told."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, _):
        return self.features


@pytest.mark.parametrize("case", range(len(checks.BATCHES)))
def test_losses_and_gradients_golden(case):
    """Measured deviation 1e-15."""
    features, labels = checks.golden_batch(case, copies=4)
    (people, _, width, _), pairs = checks.BATCHES[case], len(labels)
    normed, shifted = features.chunk(2)
    branch = dns.DomainBranch(width, people + 3).double()
    for part, end in ((branch.classifiers, ""), (branch.followers, "_")):
        for modality, classifier in part.items():
            name = f"{modality}_classifier{end}.weight.{case}.weight"
            weight = published_state.fill(name, (people + 3, width), 1)
            classifier.weight.data = 3 * torch.from_numpy(weight).double()
    branch.common = Given(shifted)
    values = {
        "circle": CircleLoss(0.45, 64)(normed, labels.repeat(2))[0],
        "alignment": alignment_loss(features.unflatten(0, (2, 2, -1)).movedim(2, 0)),
        "distillation": distillation_loss(branch(shifted, normed, pairs), labels.repeat(2)),
    }
    checks.losses_and_gradients_are_golden(values, features, GOLDEN, case)


@pytest.mark.slow
def test_trajectory_golden():
    """Five SGD steps without dropout. Measured deviation of the losses 1e-11, of the first gradients' norms 1e-14."""
    net, criterion = without_dropout(golden_network()), MethodLoss("dns", margin=0.45, gamma=64.0)
    terms = ("total", "identity", "triplet", "alignment", "distillation")
    golden = {name: GOLDEN[name] for name in ("trajectory", "names", "norms")}
    steps = checks.golden_steps(2, 48, 24, 2100, 6100)
    checks.trains_as_published(net, criterion, steps, terms, **golden, lr=1e-3, rates=METHODS["dns"].rates)
    followers = [net.domain.followers[modality].weight.norm().item() for modality in ("visible", "infrared")]
    assert followers == pytest.approx(GOLDEN["momentum"], rel=1e-6)


@pytest.mark.parametrize("dataset", ["sysu", "regdb", "llcm"])
def test_views_are_distributed_as_the_published_ones(dataset):
    moments = [f"{dataset}_{modality}" for modality in ("visible", "infrared")]
    checks.views_are_distributed_as_published("dns", dataset, GOLDEN, moments, count=8000)


# ---- the network


@torch.no_grad()
def test_space_shift_is_the_published_formula():
    """With the shift of every position written out."""
    torch.manual_seed(1)
    block = dns.SpaceShift(64).double().eval()
    x = torch.randn(2, 64, 5, 3, dtype=torch.float64)
    shift = torch.einsum("bch,bcw->bchw", x.amax(dim=3).softmax(dim=2), x.amax(dim=2).softmax(dim=2))
    profile = torch.cat([(x + shift).mean(dim=3), (x + shift).mean(dim=2)], dim=2)[..., None]
    profile = block.squeeze[1](block.squeeze[0](profile))
    profile = profile * F.relu6(profile + 3) / 6
    rows, columns = block.rows(profile[:, :, :5]).sigmoid(), block.columns(profile[:, :, 5:]).sigmoid()
    torch.testing.assert_close(block(x), x * rows * columns.mT)
    assert block.squeeze[0].out_channels == 8  # the least


def test_the_common_space_is_of_shifted_means():
    branch = dns.DomainBranch(6, 3)
    branch.common = nn.Identity()
    means = torch.randn(4, 6)
    torch.testing.assert_close(branch(means, means, 2).shifted, means + means.exp() / means.exp().sum(1, keepdim=True))


def test_followers_follow_in_training_only():
    net, images = tiny(), torch.randn(4, 3, 48, 16)
    nn.init.zeros_(net.domain.classifiers["visible"].weight)
    before = net.domain.followers["visible"].weight.clone()
    net.eval()(images, images)
    assert torch.equal(net.domain.followers["visible"].weight, before)
    net.train()(images, images)
    torch.testing.assert_close(net.domain.followers["visible"].weight, 0.8 * before)


@pytest.mark.parametrize("share_net", range(1, 6))
def test_all_parameters_learn_but_the_followers(share_net):
    net = tiny(share_net=share_net).train()
    images, labels = torch.randn(4, 3, 48, 16), torch.arange(2).repeat_interleave(2).repeat(2)
    MethodLoss("dns", margin=0.45, gamma=64)(net(images, images), labels).total.backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == {
        f"domain.followers.{modality}.weight" for modality in ("visible", "infrared")
    }
    assert net.bottleneck.bias.requires_grad


# ---- losses against plain loops


def test_circle_loss_is_the_plain_loop():
    torch.manual_seed(2)
    labels = torch.arange(3).repeat(3)
    features = torch.eye(3, 4, dtype=torch.float64)[labels] + 0.4 * torch.randn(9, 4)
    units = [x / x.norm() for x in features]
    total, right = 0.0, 0
    for i in range(9):
        cosines = {j: (units[i] @ units[j]).item() for j in range(9) if j != i}
        near = [s for j, s in cosines.items() if labels[j] == labels[i]]
        far = [s for j, s in cosines.items() if labels[j] != labels[i]]
        positive = sum(np.exp(5 * max(1.3 - s, 0) * (0.7 - s)) for s in near)
        negative = sum(np.exp(5 * max(s + 0.3, 0) * (s - 0.3)) for s in far)
        total += np.log(1 + positive * negative) / 9 / 9
        right += min(near) >= max(far)
    value, correct = CircleLoss(0.3, 5.0)(features, labels)
    assert value.item() == pytest.approx(total, rel=1e-9)
    assert correct == right
    assert 0 < right < 9


# ---- augmentation


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.75, 0.999])
def test_hue_is_torchvision_s(draw, monkeypatch):
    torch.manual_seed(4)
    images = torch.rand(4, 3, 5, 4)
    images[0, :, 0, 0] = 0.5  # gray
    images[0, :, 0, 1] = 0
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, draw))
    expected = functional.adjust_hue(images, draw - 0.5)
    torch.testing.assert_close(random_hue(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gray", [True, False])
def test_exchange_has_the_published_shares(gray):
    torch.manual_seed(5)
    images = torch.randn(6000, 3, 2, 2)
    before, out = images.clone(), random_exchange(images, gray=gray)
    assert torch.equal(images, before)
    luminance = (images * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    cases = [images[:, i : i + 1].expand_as(images) for i in range(3)] + [luminance.expand_as(images), images]
    shares = [torch.isclose(out, case, atol=1e-6).flatten(1).all(dim=1).float().mean().item() for case in cases]
    expected = [1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 3] if gray else [2 / 9, 2 / 9, 2 / 9, 0, 1 / 3]
    assert shares == pytest.approx(expected, abs=0.03)


# ---- the recipe


def test_defaults_are_the_published_recipe():
    args = parse("--method", "dns")
    assert (args.img_h, args.img_w, args.batch_size, args.num_pos, args.epochs) == (288, 144, 6, 4, 100)
    assert (args.lr, args.optim, args.margin, args.gamma, args.share_net) == (0.2, "sgd", 0.45, 64, 3)
    assert parse("--method=dns", "--dataset=regdb").lr == 0.1
    assert parse("--method=dns", "--dataset=regdb", "--lr=0.3").lr == 0.3


def test_schedule_is_the_published_one():
    """Epoch ends at 1e-4 of the rate, at the rate in epoch 16, at 0 in epoch 100; nine of 10 steps count, one of 2."""
    net, args = tiny(), parse("--method", "dns")
    optimizer = train_ext_test0.build_optimizer(net, "sgd", args.lr, METHODS["dns"].rates)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [0.1, 0.2, 0.25, 1.0]
    names = {id(p): name for name, p in net.named_parameters()}
    parts = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert all(name.startswith("shared.layer3.") for name in parts[1])
    assert all(name.startswith("shared.layer4.") for name in parts[2])
    assert {name.rsplit(".", 1)[0] for name in parts[3]} == {
        "bottleneck", "classifier", "domain.classifiers.visible", "domain.classifiers.infrared"
    }  # fmt: skip
    ends = ((0, 2e-5, 0.2 / 16 + 2e-5 * 15 / 16), (16, 0.2, 0.2 * 83 / 84), (99, 0.2 / 84, 0))
    for (epoch, start, end), steps in itertools.product(ends, (2, 10)):
        rates = [train_ext_test0.set_rates(optimizer, args, epoch, steps, step) for step in range(steps)]
        whole = np.linspace(start, end, steps)[:-1]
        assert rates == pytest.approx([whole[-1], *whole])
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [rates[-1] * scale for scale in (0.1, 0.2, 0.25, 1.0)]
        )


# ---- through the programs


def dns_flags(tree, out, *more):
    return tiny_flags(tree, out, "--method", "dns", "--stages", "4", "--amp", "off", "--warmup", "0", *more)


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(InputError, match="--warmup 16: .*--epochs 16; reduce --warmup"):
        train_ext_test0.check_flags(parse("--method=dns", "--epochs=16"))


def test_a_rate_of_a_part_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="shared.layer3: .*--share_net"):
        train_ext_test0.build_optimizer(tiny(share_net=4), "sgd", 0.1, METHODS["dns"].rates)


@pytest.mark.slow
def test_training_testing_and_export(tiny_tree, tmp_path):
    result = train_ext_test0.main(dns_flags(tiny_tree, tmp_path, "--epochs", "1"))
    file = checks.run_is_tested_and_exported(result, tiny_tree, TINY, ("alignment", "distillation"), tmp_path)
    assert file.net.domain is None


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(tiny_tree, tmp_path):
    """And --epochs, which decides the rates, may not change."""
    whole = train_ext_test0.main(dns_flags(tiny_tree, tmp_path / "whole", "--epochs", "2"))
    train_ext_test0.main(dns_flags(tiny_tree, tmp_path / "other", "--epochs", "1"))
    with pytest.raises(InputError, match="was saved with --epochs 1, but this run uses --epochs 2"):
        train_ext_test0.main(dns_flags(tiny_tree, tmp_path / "other", "--epochs", "2", "--resume", "auto"))
    flags = dns_flags(tiny_tree, tmp_path / "broken", "--epochs", "2")
    epoch_ends = []
    with pytest.MonkeyPatch.context() as patch:
        end_epoch = train_ext_test0.Run.end_epoch

        def stop_after_one(run, entry):
            end_epoch(run, entry)
            epoch_ends.append(entry["epoch"])
            raise KeyboardInterrupt

        patch.setattr(train_ext_test0.Run, "end_epoch", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            train_ext_test0.main(flags)
    assert epoch_ends == [0]
    resumed = train_ext_test0.main([*flags, "--resume", "auto"])
    first, second = (torch.load(run["last"])["net"] for run in (whole, resumed))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def published_file(tmp_path_factory):
    """A checkpoint as the published code writes them, of a small network; also what that code keeps without use."""
    net = tiny()
    unused = [f"base.base.layer{number}.0.conv1.weight" for number in (1, 2)]
    path = tmp_path_factory.mktemp("published") / "sysu_dns_best.pth"
    state = checks.write_published(net, unused, path, shift=True)
    assert {name.split(".")[0] for name in state} == {
        "visible", "thermal", "base", "bottleneck", "classifier", "CSS", "DD"
    }  # fmt: skip
    return path, net


def test_published_checkpoint_loads(published_file):
    path, net = published_file
    needed = ("base.HSS4.conv_h.weight", "thermal.thermal.bn1.bias")
    checks.published_file_loads(path, net, (288, 144), "dns, resnet18, 288x144, epoch 7", needed)


@pytest.mark.slow
def test_published_checkpoint_through_the_programs(published_file, sysu_tree, tmp_path):
    path, _ = published_file
    checks.published_file_is_tested_and_exported(path, sysu_tree, tmp_path)

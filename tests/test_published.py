"""Checkpoints of the published code: golden features of each network, any share_net, and refusals in one line."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

import checks
import model
import published_state
import testa
from checks import published_weights
from methods import METHODS, method_name
from parts import published
from tools import demo_data
from utils import InputError

PLAIN = {"attention": False, "non_local": False, "pool": "avg", "local": False}


@pytest.fixture(scope="module")
def agw():
    return published_weights("agw")


def checkpoint(state, prefix=""):
    """As the published code writes them, with NumPy's numbers."""
    net = {prefix + name: value for name, value in state.items()}
    return {"net": net, "cmc": np.ones(20), "mAP": np.float64(0.5), "mINP": np.float64(0.5), "epoch": 30}


def theirs(state):
    return {published.published_name(name): value for name, value in state.items()}


@pytest.mark.parametrize(("network", "method"), [("agw", "agw or caj"), ("base", "base")])
def test_features_golden(network, method):
    """Measured deviation 3e-7, allowed 1e-3."""
    net, size = model.load_network(checkpoint(published_weights(network), "module."), "x.t")
    assert size == (288, 144)
    assert method_name(net.options) == method
    pictures = torch.from_numpy(published_state.images(12, 144, 72, 1))
    golden = np.load(checks.GOLDEN / "forerunners.npz")
    for modality, rows in (("visible", slice(0, 4)), ("infrared", slice(4, 8))):
        with torch.inference_mode():
            features = net.eval().embed(pictures[rows], modality)
        for feature, actual in zip(("pool", "fc"), features, strict=True):
            expected = F.normalize(torch.from_numpy(golden[f"{network}_{modality}_{feature}"]))
            assert (actual - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "options",
    [{"share_net": share_net, **PLAIN} for share_net in range(1, 6)]
    + [{"share_net": share_net, "attention": attention} for share_net in (1, 2) for attention in (True, False)]
    + [{"arch": arch} for arch in ("resnet34", "resnet50")],
    ids=str,
)
def test_options_and_weights_come_from_the_names(options):
    net = model.GFMNet(7, **{"arch": "resnet18", **options})
    loaded, _ = model.load_network({"net": theirs(net.state_dict())}, "x.t")
    assert loaded.options == net.options
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize("stages", [3, 4])
def test_depth_and_stages_come_from_the_names(arch, stages):
    """Those of RLE tell the stages by a width."""
    with torch.device("meta"):
        net = model.GFMNet(7, arch, stages=stages, **METHODS["rle"].network)
    state = {published.published_name(name, thirds=True): value for name, value in net.state_dict().items()}
    found = published.published_options(state)
    assert (found["num_classes"], found["arch"], found["stages"], found["thirds"]) == (7, arch, stages, True)


@pytest.mark.parametrize("method", METHODS)
def test_method_names(method):
    options = model.GFMNet(7, "resnet18", **METHODS[method].network).options
    assert method in method_name(options).split(" or ")


def test_conversion_leaves_its_argument_alone(agw):
    before = dict(agw)
    converted = model.convert_published_state(agw)
    assert agw.keys() == before.keys()
    assert all(agw[name] is before[name] for name in before)
    assert {id(value) for value in converted.values()} < {id(value) for value in agw.values()}


def test_what_is_not_used_may_be_there_or_not(agw):
    """The classifiers of the ResNets, and how many batches a batch norm has seen."""
    state = {name: value for name, value in agw.items() if not name.endswith("num_batches_tracked")}
    unused = dict.fromkeys(("visible_module.visible.fc.weight", "base_resnet.base.fc.bias"), torch.ones(9))
    model.load_network({"net": state | unused}, "x.t")


def without(state, *beginnings):
    return {name: value for name, value in state.items() if not name.startswith(beginnings)}


NOT_FINITE = torch.full((64,), torch.nan)
DAMAGES = {  # what it does to AGW's state, and the tensor to be named
    "unknown": (lambda s: s | {"extra.weight": torch.ones(1)}, "extra.weight"),
    "long name": (lambda s: s | {"x" * 999: torch.ones(1)}, "x" * 99),
    "unknown, first of two": (lambda s: {"a": torch.ones(1)} | s | {"b": torch.ones(1)}, "'a'"),
    "unknown in a stage that is not used": (
        lambda s: s | {"visible_module.visible.layer2.0.se.weight": torch.ones(1)},
        "visible_module.visible.layer2.0.se.weight",
    ),
    "another block": (lambda s: s | {"NL_3.3.phi.bias": torch.ones(1)}, "NL_3.3.phi.bias"),
    "deeper": (lambda s: s | {"base_resnet.base.layer4.3.bn1.bias": torch.ones(512)}, "base_resnet.base.layer4.3.bn1"),
    "learned pooling": (lambda s: s | {"pool.p": torch.ones(1)}, "pool.p"),
    "part of the attention": (lambda s: s | {"afam.non_local.phi.bias": torch.ones(1)}, "afam.channel_attention.fc1"),
    "shape": (lambda s: s | {"bottleneck.bias": torch.ones(3)}, "bottleneck.bias"),
    "shape of many numbers": (lambda s: s | {"bottleneck.bias": torch.ones([1] * 60)}, "bottleneck.bias"),
    "shape of the classifier": (lambda s: s | {"classifier.weight": torch.tensor(1.0)}, "classifier.weight"),
    "shape of a block": (lambda s: s | {"NL_2.1.W.1.bias": torch.ones(9)}, "NL_2.1.W.1.bias"),
    "missing": (lambda s: without(s, "base_resnet.base.layer3.5.conv1"), "base_resnet.base.layer3.5.conv1.weight"),
    "missing block": (lambda s: without(s, "NL_3.2."), "NL_3.2."),
    "missing stem": (lambda s: without(s, "visible_module"), "visible_module.visible.conv1.weight"),
    "missing stage": (lambda s: without(s, "base_resnet.base.layer1."), "base_resnet.base.layer1.0.conv1.weight"),
    "missing classifier": (lambda s: without(s, "classifier."), "classifier.weight"),
    "not finite": (lambda s: s | {"thermal_module.thermal.bn1.bias": NOT_FINITE}, "thermal_module.thermal.bn1.bias"),
    "foreign": (lambda _: torchvision.models.resnet18().state_dict(), "conv1.weight"),
    "no tensor": (lambda s: s | {"y" * 999: 1}, "y" * 99),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_does_not_fit_is_refused_in_a_line(agw, case):
    damage, name = DAMAGES[case]
    with pytest.raises(InputError) as caught:
        model.load_network(checkpoint(damage(agw)), "x.t")
    path, message = str(caught.value).split(": ", 1)
    assert path == "x.t"
    assert name in message
    assert len(message) <= 300
    assert "\n" not in message
    assert ";" in message  # the remedy


@pytest.mark.parametrize("damage", [lambda s: s | {"z" * 999: torch.ones(1)}, lambda s: without(s, "shared.layer2")])
def test_a_checkpoint_of_this_repo_is_refused_in_a_line(damage):
    net = model.GFMNet(7, "resnet18")
    with pytest.raises(InputError, match=r"^x\.t: does not fit its resnet18: '(z{99}|shared\.layer2\.)") as caught:
        model.load_network({"net": damage(net.state_dict()), "options": net.options, "image_size": (96, 48)}, "x.t")
    assert len(str(caught.value)) < 300


def test_weights_of_this_repo_load_from_a_wrapped_model():
    """DataParallel puts `module.` before each name."""
    net = model.GFMNet(7, "resnet18")
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    loaded, _ = model.load_network({"net": state, "options": net.options, "image_size": (96, 48)}, "x.t")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(InputError, match=r"x\.t: has no 'options' and 'image_size', .*; pass the whole checkpoint"):
        model.load_network({"net": state}, "x.t")
    with pytest.raises(InputError, match=r"x\.t: has no 'options' and 'image_size'"):
        model.load_network({"net": state, "options": net.options}, "x.t")


@pytest.mark.slow
def test_testa_takes_agw_and_refuses_it_damaged(agw, tmp_path):
    """On the smallest tree: the network and the images are of full size."""
    tree = tmp_path / "sysu"
    demo_data.main(["--out", str(tree), "--layout", "sysu", "--ids", "6", "--images", "1"])
    torch.save(checkpoint(agw, "module."), tmp_path / "agw.t")
    torch.save(checkpoint(without(agw, "NL_2.")), tmp_path / "damaged.t")
    command = [sys.executable, testa.__file__, "--data_path", tree, "--gpu", "cpu", "--mode", "indoor"]
    command += ["--table", "full", "--resume"]
    good, bad = (
        subprocess.run([*command, tmp_path / name], capture_output=True, text=True) for name in ("agw.t", "damaged.t")
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert f"{tmp_path}/agw.t (agw or caj, resnet50, 288x144, epoch 30)" in good.stdout
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith(f"testa.py: error: {tmp_path}/damaged.t: does not fit its resnet50: 'NL_2.0.")
    assert bad.stderr.count("\n") == 1

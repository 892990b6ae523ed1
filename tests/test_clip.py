"""CLIP's ResNets against their definition, written out on a state dict under CLIP's names."""

import pytest
import torch
from torch.nn import functional as F

import model
from methods import METHODS
from tools import check_data, pretrain
from utils import InputError

DEPTHS = {"clip_resnet50": (3, 4, 6, 3), "clip_resnet101": (3, 4, 23, 3)}


def clip_state(arch):
    """Random weights under the names and of the shapes of CLIP's file, in its float16."""
    generator, shapes = torch.Generator().manual_seed(0), {}

    def norm(name, channels):
        shapes.update({f"{name}.{end}": (channels,) for end in ("weight", "bias", "running_mean", "running_var")})

    def block(name, channels, width, downsample):
        for i, shape in enumerate(((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)), 1):
            shapes[f"{name}.conv{i}.weight"] = shape
            norm(f"{name}.bn{i}", shape[0])
        if downsample:
            shapes[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
            norm(f"{name}.downsample.1", 4 * width)

    for i, shape in enumerate(((32, 3, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3)), 1):
        shapes[f"visual.conv{i}.weight"] = shape
        norm(f"visual.bn{i}", shape[0])
    channels = 64
    for stage, depth in enumerate(DEPTHS[arch], 1):
        for number in range(depth):
            block(f"visual.layer{stage}.{number}", channels, 64 * 2 ** (stage - 1), number == 0)
            channels = 256 * 2 ** (stage - 1)
    shapes["visual.attnpool.positional_embedding"], shapes["logit_scale"] = (50, 2048), ()
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, value in state.items():
        if name.endswith("running_var") or (".bn" in name and name.endswith("weight")):
            value.abs_().add_(0.5)
        elif value.ndim == 4:
            value.div_(value[0].numel() ** 0.5)
    return {name: value.half() for name, value in state.items()}


def plain_clip(state, x, depths):
    """Maps of CLIP's tower, whose last stage has the stride 1. Blocks and strides as its paper's code defines them."""

    def norm(name, x):
        parts = [state[f"visual.{name}.{end}"] for end in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts)

    def convolution(name, x, **options):
        return F.conv2d(x, state[f"visual.{name}.weight"], **options)

    for i in (1, 2, 3):
        x = norm(f"bn{i}", convolution(f"conv{i}", x, padding=1, stride=2 if i == 1 else 1)).relu()
    x = F.avg_pool2d(x, 2)
    for stage, depth in enumerate(depths, 1):
        for number in range(depth):
            name, pool = f"layer{stage}.{number}", 2 if number == 0 and stage in (2, 3) else 1
            y = norm(f"{name}.bn1", convolution(f"{name}.conv1", x)).relu()
            y = norm(f"{name}.bn2", convolution(f"{name}.conv2", y, padding=1)).relu()
            y = norm(f"{name}.bn3", convolution(f"{name}.conv3", F.avg_pool2d(y, pool)))
            if number == 0:
                x = norm(f"{name}.downsample.1", convolution(f"{name}.downsample.0", F.avg_pool2d(x, pool)))
            x = (x + y).relu()
    return x


@pytest.mark.parametrize("arch", ["clip_resnet50", pytest.param("clip_resnet101", marks=pytest.mark.slow)])
def test_maps_are_those_of_the_definition(arch, tmp_path):
    state = clip_state(arch)
    torch.save(state, tmp_path / "clip.pth")
    net = model.GFMNet(5, arch, **METHODS["base"].network, weights=str(tmp_path / "clip.pth")).eval().double()
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    expected = plain_clip({name: value.double() for name, value in state.items()}, images, DEPTHS[arch])
    assert expected.shape == (2, 2048, 4, 2)
    with torch.inference_mode():
        for modality in model.MODALITIES:
            torch.testing.assert_close(net.vectors(images, modality)[0], expected.mean(dim=(2, 3)))
    assert list(net.infrared._modules)[:3] == ["conv1", "bn1", "relu1"]
    loaded, _ = model.load_network({"net": net.state_dict(), "options": net.options, "image_size": (64, 32)}, "x.t")
    assert loaded.options == net.options


def test_every_method_takes_it():
    """DEEN asks for the strides, which are in the means here, and for maps of the sizes that strides give."""
    for method in ("deen", "dns", "quad"):
        net = model.GFMNet(5, "clip_resnet50", share_net=1, **METHODS[method].network).eval()
        assert len([p for p in net.visible.parameters() if p.ndim == 4]) == 3  # the whole stem is of one modality
        with torch.inference_mode():
            assert net.embed(torch.rand(1, 3, 64, 40), "visible")[0].isfinite().all()


def test_maps_of_odd_sizes_are_as_large_as_those_of_strides():
    images, sizes = torch.rand(1, 3, 75, 42), []
    for arch in ("resnet18", "clip_resnet50"):
        net = model.GFMNet(5, arch, **METHODS["base"].network).eval()
        with torch.inference_mode():
            maps = net.visible(images)
            sizes.append((maps.shape[2:], net.shared(maps).shape[2:]))
    assert sizes[0] == sizes[1] == ((19, 11), (5, 3))


def test_other_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="--weights imagenet: is not of clip_resnet50; pass a state dict of CLIP's"):
        model.backbone("clip_resnet50", "imagenet")
    state = clip_state("clip_resnet50")
    torch.save({name: value for name, value in state.items() if name != "visual.conv3.weight"}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: conv3\.weight is missing or has another shape than in CLIP's clip"):
        model.backbone("clip_resnet50", str(tmp_path / "a.pth"))
    assert (
        check_data.check_weights("clip_resnet50") == "note: clip_resnet50 starts from a file of CLIP's: --weights FILE"
    )


def test_a_stand_in_can_be_trained():
    network = model.backbone("clip_resnet50").network
    assert network(torch.rand(2, 3, 64, 32)).shape == (2, 1000)
    assert pretrain.ARCHS is model.ARCHS

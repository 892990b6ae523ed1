"""GFMNet: a two-stream ResNet with joint attention (AFAM), non-local blocks, GeM pooling and a local branch.

"Global-to-Local Feature Mining Network for RGB-Infrared Person Re-Identification", MMM 2024, on the
network of AGW (Ye et al., TPAMI 2021). B, H, W: images, height, width; C: 512 (ResNet-18, 34) or 2048 (50, 101).
The same class is DEEN ("Diverse Embedding Expansion Network", Zhang and Wang, CVPR 2023) and
DNS ("Domain Shifting", Jiang et al., ECCV 2024), the baseline of RLE (Tan et al., NeurIPS 2024) and the four streams of
MSCMNet (Hua et al., Pattern Recognition 2025), by other parts.
"""

import copy
import itertools
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor

from ChannelAug import without_colour
from core.checkpoint import check_state, load_weights
from core.files import file_sha256, is_regular
from parts.clip import clip_resnet
from parts.deen import EXPANSIONS, Aggregation, Expansion
from parts.dns import Domain, DomainBranch, SpaceShift
from parts.heads import bottleneck, classifier
from parts.non_local import NonLocal
from parts.published import convert_published_state, is_published, published_name, published_options
from parts.rle import THIRDS, Thirds, ThirdsBranch
from utils import InputError, full_precision

MODALITIES = ("visible", "infrared")
FEATURES = ("POOL", "FC")  # what the tables call the two that `GFMNet.embed` gives
NON_LOCAL_BLOCKS = {"layer2": 2, "layer3": 3}  # after that many of a stage's last blocks
STRIPE_ROWS = 3  # rows of the feature map in one stripe of the local branch
LOCAL_WIDTH = 128
REDUCTION = 16  # of the channel attention's hidden layer
SHIFTED_STAGES = (3, 4)  # after which DNS has a `SpaceShift`


class Output(NamedTuple):
    """pooled [A+B, C], logits [A+B, K], local [A+B, 128, P] or None: the visible images' rows first.

    With expansion there are 3 (A+B) rows: those of the embeddings, then of the first, then of the second expansion.
    domain: with shift, what `DomainBranch` gives. thirds: with thirds, what `ThirdsBranch` gives. visible: A.
    """

    pooled: torch.Tensor
    logits: torch.Tensor
    local: torch.Tensor | None
    domain: Domain | None = None
    thirds: Thirds | None = None
    visible: int = 0


class Attention(nn.Module):
    """AFAM: the mean of channel-attended and spatially attended features, then a non-local block. Keeps the shape."""

    def __init__(self, channels):
        super().__init__()
        hidden = channels // REDUCTION
        self.channel = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.non_local = NonLocal(channels)

    def forward(self, x):
        channel = self.channel(x.mean(dim=(2, 3), keepdim=True)) + self.channel(x.amax(dim=(2, 3), keepdim=True))
        spatial = self.spatial(torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1))
        return self.non_local(x * (channel.sigmoid() + spatial.sigmoid()) / 2)


class Stage(nn.Module):
    """One stage of a backbone, with non-local blocks of `inner` channels after its last blocks. low_channels: those of
    its input, which `Aggregation` then adds to its output; None adds nothing."""

    def __init__(self, blocks, channels, non_local, inner=1, low_channels=None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.non_local = nn.ModuleList(NonLocal(channels, inner) for _ in range(min(non_local, len(self.blocks))))
        self.aggregation = None
        if low_channels:
            stride = max(part.stride[0] for part in self.blocks[0].modules() if isinstance(part, nn.Conv2d))
            self.aggregation = Aggregation(channels, low_channels, stride)

    def forward(self, x):
        low, first = x, len(self.blocks) - len(self.non_local)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= first:
                x = self.non_local[i - first](x)
        return x if self.aggregation is None else self.aggregation(x, low)


class GeM(nn.Module):
    """Generalised mean pooling with fixed p = 3 (Radenovic et al., TPAMI 2019). [B, C, H, W] -> [B, C]."""

    def forward(self, x):
        # After a ReLU nothing is negative. After attention (share_net=5), or in other backbones, values are: as 0, they
        # leave the gradient to the others, which a mean below 0 would not.
        return (x.clamp_min(0).pow(3).mean(dim=(2, 3)) + 1e-12).pow(1 / 3)


class LocalBranch(nn.Module):
    """Horizontal stripes of the feature map. [B, C, H, W] -> [B, 128, P], each stripe of unit length; P = H // 3."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, LOCAL_WIDTH, 1)

    def forward(self, x):
        if x.shape[2] < STRIPE_ROWS:
            raise ValueError(
                f"the local branch needs feature maps of {STRIPE_ROWS} rows, images of 48; not {x.shape[2]}"
            )
        x = F.max_pool2d(self.norm(x).relu(), (STRIPE_ROWS, x.shape[3]))
        return F.normalize(full_precision(self.conv(x).squeeze(3)), dim=1)


class GFMNet(nn.Module):
    """The network of all methods; `attention`, `non_local`, `pool` and `local` switch GFMNet's parts.

    num_classes: identities in the training set, K.
    arch: one of ARCHS; the last stage's stride is 1, so a feature map has 1/16 of the image's height and width.
    share_net: 1 to 5. Each modality has its own stem and first share_net - 1 stages; the others are shared.
    non_local: whether AGW's non-local blocks follow blocks of stages 2 and 3; "half": within, they have half of the
        channels instead of one, as MSCMNet has them.
    pool: "gem" or "avg".
    expansion: DEEN's parts: an `Aggregation` after each stage but the last, and an `Expansion` before the last, which
        makes three embeddings of an image. share_net is then at most `stages`: the last stage is shared.
    shift: DNS's parts: a `SpaceShift` after stages 3 and 4, a bottleneck with a bias, and a `DomainBranch`.
    gray: the network takes the luminance of visible images instead of their colours (gfm2).
    thirds: RLE's `ThirdsBranch`: `embed` then gives the features of the whole map and of its thirds, side by side.
    twins: MSCMNet's streams: a modality has its own parts twice. In training, which needs two views of each image, the
        first half of its images, their first views, goes through the first, the other half through the second; `embed`
        takes the mean of both.
    stages: of the backbone, 4, or 3 to leave out the last (DEEN on RegDB).
    weights: what the backbone starts from: None (random), "imagenet" (torchvision's V1), torchvision's name of others,
        such as "IMAGENET1K_V2", or the path of a state dict of its network. Both streams start from the same values.

    `net.options` holds these arguments but for the weights: GFMNet(**net.options) is the same network, untrained.
    `net.feature_widths` has the number of values of each of the FEATURES that `embed` gives.

    Raises InputError (a ValueError) for an unknown arch, share_net, non_local, pool or stages, or weights that cannot
    be had.
    """

    def __init__(
        self,
        num_classes: int,
        arch: str = "resnet50",
        share_net: int = 2,
        attention: bool = True,
        non_local: bool | str = True,
        pool: str = "gem",
        local: bool = True,
        expansion: bool = False,
        shift: bool = False,
        gray: bool = False,
        thirds: bool = False,
        twins: bool = False,
        stages: int = 4,
        weights: Path | str | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__", "weights")}
        super().__init__()
        self.options = options
        if stages not in (3, 4):
            raise InputError(f"stages {stages}: how many of the backbone's four stages are used, 3 or 4")
        largest = stages if expansion else stages + 1
        if share_net not in range(1, largest + 1):
            raise InputError(
                f"share_net {share_net}: how many of stem and {stages} stages each modality has for itself, "
                f"1 to {largest}"
            )
        if non_local not in (True, False, "half"):
            raise InputError(f"non_local {non_local!r}: neither True, False nor 'half'")
        if pool not in ("gem", "avg"):
            raise InputError(f"pool {pool!r}: neither 'gem' nor 'avg'")
        _, stem, blocks, widths = backbone(arch, weights)
        parts, width = dict(stem), widths[stages]
        for number in range(1, stages + 1):
            name, low_channels = f"layer{number}", widths[number - 1]
            if expansion and number == stages:
                parts["expansion"], low_channels = Expansion(low_channels), None
            non_local_blocks = NON_LOCAL_BLOCKS.get(name, 0) if non_local else 0
            low_channels = low_channels if expansion else None
            inner = widths[number] // 2 if non_local == "half" else 1
            parts[name] = Stage(blocks[number - 1], widths[number], non_local_blocks, inner, low_channels)
            if shift and number in SHIFTED_STAGES:
                parts[f"shift{number}"] = SpaceShift(widths[number])
        last_own = f"layer{share_net - 1}" if share_net > 1 else [*stem][-1]
        own = [*parts][: [*parts].index(last_own) + 1]

        self.visible = nn.Sequential(OrderedDict((name, parts[name]) for name in own))
        self.infrared = copy.deepcopy(self.visible)
        own_parts = {"visible": self.visible, "infrared": self.infrared}
        self.twins = copy.deepcopy(nn.ModuleDict(own_parts)) if twins else None
        self.attention = Attention(widths[share_net - 1]) if attention else nn.Identity()
        self.shared = nn.Sequential(OrderedDict(item for item in parts.items() if item[0] not in own))
        self.pool = GeM() if pool == "gem" else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        embeddings = 1 + EXPANSIONS * expansion + THIRDS * thirds
        self.feature_widths = {"POOL": embeddings * width, "FC": (2 * embeddings if embeddings > 1 else 1) * width}
        self.bottleneck = bottleneck(width, bias=shift)
        self.classifier = classifier(width, num_classes)
        self.local = LocalBranch(width) if local else None
        self.domain = DomainBranch(width, num_classes) if shift else None
        self.thirds = ThirdsBranch(width, num_classes) if thirds else None

    def forward(self, visible: Tensor, infrared: Tensor) -> Output:
        """visible [A, 3, H, W], infrared [B, 3, H, W], normalised -> Output of A + B rows, the visible first."""
        views = []
        for images, modality in ((visible, "visible"), (infrared, "infrared")):
            streams = self._streams(modality)
            halves = self._input(images, modality).tensor_split(len(streams))
            views += [own_parts(half) for own_parts, half in zip(streams, halves, strict=True)]
        x = self._features(torch.cat(views))
        with torch.autocast(x.device.type, enabled=False):  # in float32 from here: the losses live on it
            maps = full_precision(x)
            pooled = self.pool(maps)
            normed = self.bottleneck(pooled)
            logits, domain = self.classifier(normed), None
            if self.domain is not None:
                domain = self.domain(maps.mean(dim=(2, 3)), normed, len(visible))
            thirds = None if self.thirds is None else self.thirds(maps)
        local = None if self.local is None else self.local(x)
        return Output(pooled, logits, local, domain, thirds, len(visible))

    def embed(self, images: Tensor, modality: str) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W], normalised, of one modality, "visible" or "infrared" -> (pooled, normed).

        Both [B, C] and L2-normalised: before ("POOL" in the tables) and after ("FC") the batch-norm bottleneck.
        With expansion, [B, 3 C] and [B, 6 C]: the three embeddings before the bottleneck, each of unit length, side by
        side; and these with the three after it. So the cosine of two images is the mean of three or six cosines, as
        published, where all six rank. With thirds, [B, 4 C] and [B, 8 C]: the whole map and its thirds before the
        bottlenecks, and both these and what follows the bottlenecks, of unit length each, as published.
        """
        pooled, normed = self.vectors(images, modality)
        return F.normalize(pooled), F.normalize(normed)

    def vectors(self, images: Tensor, modality: str) -> tuple[Tensor, Tensor]:
        """What `embed` gives, before it is normalised. The lengths by which parts of it are divided count as
        constants."""
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r}: neither 'visible' nor 'infrared'")
        streams, images = self._streams(modality), self._input(images, modality)
        x = streams[0](images) if len(streams) == 1 else sum(own_parts(images) for own_parts in streams) / len(streams)
        maps = full_precision(self._features(x))
        pooled = self.pool(maps)
        normed = self.bottleneck(pooled)
        if self.options["expansion"]:
            units = [_unit(x).unflatten(0, (EXPANSIONS + 1, -1)) for x in (pooled, normed)]
            pooled, normed = (x.movedim(1, 0).flatten(1) for x in units)
        elif self.thirds is not None:
            parts = zip((pooled, normed), self.thirds.embed(maps), strict=True)
            pooled, normed = (_unit(torch.cat([whole, *thirds], dim=1)) for whole, thirds in parts)
        else:
            return pooled, normed
        return pooled, torch.cat([pooled, normed], dim=1)

    def compile(self, **options):
        """Compile, in place, the parts that `forward` and `embed` share; the names of the weights stay."""
        for part in (*self._streams("visible"), *self._streams("infrared"), self.attention, self.shared):
            part.compile(**options)

    def _streams(self, modality):
        """The parts that a modality has for itself, once or twice."""
        own = getattr(self, modality)
        return [own] if self.twins is None else [own, self.twins[modality]]

    def _input(self, images, modality):
        return without_colour(images) if self.options["gray"] and modality == "visible" else images

    def _features(self, x):
        return self.shared(self.attention(x))


def _unit(x):
    """[B, C] of unit length."""
    return x / x.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)


# ---------------------------------------------------------------------------------------------------- backbones


class Backbone(NamedTuple):
    """A network of torchvision's, and its parts that GFMNet uses; the last stage has stride 1.

    stem: {name: module}, in the order in which they run. stages: the blocks of each of the four stages, in order.
    widths: channels after the stem and after each stage, five numbers.
    """

    network: nn.Module
    stem: dict
    stages: list
    widths: list


def resnet(network):
    """torchvision's ResNet, or CLIP's -> Backbone."""
    first = network.layer4[0]
    for module in (first.conv1, first.conv2, first.downsample[0]):
        module.stride = (1, 1)
    stem = dict(itertools.takewhile(lambda child: child[0] != "layer1", network.named_children()))
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    width = network.fc.in_features
    return Backbone(network, stem, stages, [64, width // 8, width // 4, width // 2, width])


# torchvision's name, or CLIP's network by that of torchvision's: the function that takes the network apart
CLIP = "clip_"
ARCHS = dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "clip_resnet50", "clip_resnet101"), resnet)
HEADS = ("fc.", "classifier.", "head.")  # torchvision's names of the ImageNet classifier, which is not used


def backbone(arch, weights=None):
    """One of ARCHS -> Backbone. weights: as in `GFMNet`."""
    if arch not in ARCHS:
        raise InputError(f"arch {arch!r}: unknown; choose one of {', '.join(ARCHS)}")
    network = getattr(torchvision.models, arch.removeprefix(CLIP))()
    if arch.startswith(CLIP):
        network = clip_resnet(network)
    if weights is not None:
        network.load_state_dict(_backbone_state(arch, network, weights))
    return ARCHS[arch](network)


def _backbone_state(arch, network, weights):
    """State dict for `network` from torchvision's server or a file, in which the classifier may be missing."""
    sources = {} if arch.startswith(CLIP) else torchvision.models.get_model_weights(arch).__members__
    name = "IMAGENET1K_V1" if weights == "imagenet" else str(weights)
    if weights == "imagenet" and not sources:
        raise InputError(f"--weights imagenet: is not of {arch}; pass a state dict of CLIP's: --weights FILE, or none")
    file = _downloaded(sources[name], weights) if name in sources else Path(weights)
    state = check_state(load_weights(file), f"--weights {weights}")
    owner = "CLIP's" if arch.startswith(CLIP) else "torchvision's"
    if any(name.startswith("visual.") for name in state):  # the whole of CLIP
        state = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    wanted = network.state_dict()
    counts = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    head = {name: value for name, value in wanted.items() if name.startswith(HEADS)}
    state = counts | state | head
    if wrong := [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]:
        raise InputError(
            f"--weights {weights}: {wrong[0]} is missing or has another shape than in {owner} {arch}; pass a "
            f"state dict of {arch}, or the --arch that it belongs to"
        )
    if bad := [name for name in wanted if not torch.isfinite(state[name].float()).all()]:
        raise InputError(f"--weights {weights}: {bad[0]} holds values that are not finite; use another file")
    return {name: state[name] for name in wanted}


def _downloaded(source, weights):
    """The file of `source`, weights of torchvision's, downloaded unless it is there. PyTorch itself would run what is
    pickled in a file that is there, and look at the digest of a new one only."""
    file = cache_file(source)
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source.url, str(file))
        except Exception as error:  # a server, or a proxy, may answer anything
            raise InputError(
                f"--weights {weights}: could not download {source.url} ({error}); "
                "fetch that file elsewhere and pass --weights FILE, or train from scratch: --weights none"
            ) from error
    if not is_intact(file, source):
        raise InputError(f"{file}: is damaged; delete it, and the next training downloads it again")
    return file


def cache_file(source):
    """Where PyTorch keeps the file of weights of torchvision's."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(source.url).name)


def is_intact(file, source):
    """Whether a file is that of weights of torchvision's, whose name ends with the beginning of its digest."""
    return is_regular(file) and file_sha256(file).startswith(Path(source.url).stem.rpartition("-")[2])


# ------------------------------------------------------------------------------------------------- checkpoints


def untrained_network(options):
    """A network with these options and random weights, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GFMNet(**options)


def load_network(checkpoint, path):
    """A checkpoint of this repo or of the published code -> (GFMNet, (height, width) of its images).

    path names the checkpoint in the InputError that weights which do not fit, or are not finite, raise.
    """
    state = check_state(checkpoint["net"], path)
    known_as = str  # our name of a tensor -> its name in the file
    try:
        if is_published(state):
            options = published_options(state)
            known_as = partial(published_name, shift=options["shift"], thirds=options["thirds"])
            # DEEN's, RLE's, and all others'; the file does not say.
            size = (384, 144) if options["expansion"] else (384, 192) if options["thirds"] else (288, 144)
            state = convert_published_state(state)
        elif "options" in checkpoint and "image_size" in checkpoint:
            options, size = checkpoint["options"], checkpoint["image_size"]
        elif any(name.startswith("shared.layer") for name in state):
            raise InputError("has no 'options' and 'image_size', only weights; pass the whole checkpoint")
        else:
            raise InputError(
                f"{next(iter(state))!r:.120} is no tensor of this repo's checkpoints, nor of the published baseline, "
                "AGW, CAJ, DEEN, DNS, RLE or GFMNet; train with train_ext_test0.py"
            )
        # Options may ask for more than the memory has, or for no class, of which PyTorch warns.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            net = GFMNet(**options, weights=None)  # TypeError for options that name a file of their own
        # Nothing uses how many batches a batch norm has seen, and old versions of PyTorch did not count them.
        counts = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
        state = {name: torch.zeros_like(count, device="cpu") for name, count in counts.items()} | state
        _check_fit(state, net, known_as)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{path}: its options are not those of this GFMNet ({error!s:.120}); train again") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    net.to_empty(device="cpu").load_state_dict(state)
    return net, size


def _check_fit(state, net, known_as):
    """Raise InputError, by the name that `known_as` gives it, for the first tensor that `net` cannot load or use."""
    wanted = net.state_dict()
    for name in state | wanted:  # first what the file has, then what it lacks
        if name not in wanted:
            wrong = "is unknown"
        elif name not in state:
            wrong = "is missing"
        elif state[name].shape != wanted[name].shape:
            wrong = f"has the shape {list(state[name].shape)!s:.60}, not {list(wanted[name].shape)}"
        else:
            continue
        arch = net.options["arch"]
        raise InputError(f"does not fit its {arch}: {known_as(name)!r:.120} {wrong}; name a whole, unedited checkpoint")
    for name, value in state.items():
        if not torch.isfinite(value.float()).all():  # as the network will have it
            raise InputError(f"{known_as(name)!r} holds values that are not finite; use an earlier checkpoint")

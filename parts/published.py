"""Checkpoints of the published code of this family (two-stream baseline, AGW, CAJ, DEEN, DNS, RLE, GFMNet): their names
and options.

A network is two streams and a shared ResNet. GFMNet's code gives a stream exactly the stages that are not shared.
That of the baseline, AGW, CAJ, DEEN and RLE keeps a whole ResNet in all three, and runs only the stem of a stream's and
the stages of the shared one: share_net 1. DEEN's and RLE's for RegDB do not run the last stage either. RLE's keeps a
fourth ResNet, which it does not run.
DNS's gives a stream the stem and two stages, which the shared one keeps but does not run: share_net 3.
"""

import re

from utils import InputError

_RESNETS = {"visible_module.visible": "visible", "thermal_module.thermal": "infrared", "base_resnet.base": "shared"}
_DNS_RESNETS = {"visible.visible": "visible", "thermal.thermal": "infrared", "base.base": "shared"}
_NON_LOCAL_BLOCKS = {f"NL_{n}.{i}": f"shared.layer{n}.non_local.{i}" for n in (2, 3) for i in range(n)}
_NON_LOCAL_BLOCKS |= {"afam.non_local": "attention.non_local"}
_NON_LOCAL_PARTS = {"g.0": "g", "W.0": "out", "W.1": "norm", "theta": "theta", "phi": "phi"}
_AGGREGATION_PARTS = {"CNL": "channel", "PNL": "position"}
_SHIFT_PARTS = {"channel_attention": "squeeze", "conv_h": "rows", "conv_w": "columns"}
_CROSS_PARTS = {"g": "g", "W.0": "out", "W.1": "norm", "theta": "theta", "phi": "phi"}


def _resnet_names(resnets):
    return {
        **{f"{theirs}.{part}.": f"{ours}.{part}." for theirs, ours in resnets.items() for part in ("conv1", "bn1")},
        **{f"{theirs}.layer{n}.": f"{ours}.layer{n}.blocks." for theirs, ours in resnets.items() for n in range(1, 5)},
    }


_OURS = {  # how a published name begins: how ours does
    **_resnet_names(_DNS_RESNETS),
    **_resnet_names(_RESNETS),
    **{
        f"{block}.{part}.": f"{our_block}.{our_part}."
        for block, our_block in _NON_LOCAL_BLOCKS.items()
        for part, our_part in _NON_LOCAL_PARTS.items()
    },
    **{
        f"MFA{n}.{block}.{part}.": f"shared.layer{n}.aggregation.{our_block}.{our_part}."
        for n in range(1, 4)
        for block, our_block in _AGGREGATION_PARTS.items()
        for part, our_part in _CROSS_PARTS.items()
    },
    **{f"DEE.FC{b + 1}{d + 1}.": f"shared.expansion.branches.{b}.dilated.{d}." for b in range(2) for d in range(3)},
    **{f"DEE.FC{b + 1}.": f"shared.expansion.branches.{b}.out." for b in range(2)},
    **{
        f"base.HSS{n}.{part}.": f"shared.shift{n}.{our_part}."
        for n in (3, 4)
        for part, our_part in _SHIFT_PARTS.items()
    },
    **{
        f"DD.{modality}_classifier{end}.": f"domain.{part}.{modality}."
        for modality in ("visible", "infrared")
        for end, part in (("", "classifiers"), ("_", "followers"))
    },
    "CSS.mlp.": "domain.common.",
    "afam.channel_attention.fc1.": "attention.channel.0.",
    "afam.channel_attention.fc2.": "attention.channel.2.",
    "afam.spatial_attention.conv1.": "attention.spatial.",
    "bn.": "local.norm.",
    "conv1.": "local.conv.",
    "bottleneck.": "bottleneck.",
    "classifier.": "classifier.",
}
_OURS_OF_RLE = {
    **{f"{part}{n}.": f"thirds.{part}s.{n - 1}." for part in ("bottleneck", "classifier") for n in range(1, 4)},
    **{f"{part}g.": f"{part}." for part in ("bottleneck", "classifier")},
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_THEIRS_OF_DNS = _THEIRS | {ours: theirs for theirs, ours in _resnet_names(_DNS_RESNETS).items()}
_THEIRS_OF_RLE = _THEIRS | {ours: theirs for theirs, ours in _OURS_OF_RLE.items()}

_STREAM = r"(?:visible(?:_module)?\.visible|thermal(?:_module)?\.thermal)"
_SHARED = r"base(?:_resnet)?\.base"
_STAGE = r"layer[1-4]\.\d+\.(?:conv[1-3]|bn[1-3]|downsample\.[01])"
_VALUE = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
# What the code of the baseline, AGW, CAJ and DEEN keeps but does not run; DEEN's and RLE's for RegDB besides; RLE's
# besides; and DNS's.
_UNUSED = rf"(?:{_STREAM}\.(?:{_STAGE}|fc)|{_SHARED}\.(?:conv1|bn1|fc))\.{_VALUE}"
_UNUSED_LAST = rf"{_SHARED}\.{_STAGE.replace('[1-4]', '4')}\.{_VALUE}"
_UNUSED_BY_RLE = rf"middle_module\.middle\.(?:conv1|bn1|{_STAGE})\.{_VALUE}"
_UNUSED_BY_DNS = rf"{_SHARED}\.{_STAGE.replace('[1-4]', '[12]')}\.{_VALUE}"


def is_published(state):
    """Whether a state dict has names of the published code."""
    return any(re.match(rf"(?:{_STREAM}|{_SHARED})\.", name) for name in state)


def convert_published_state(state):
    """State dict under the names of the published code -> the same under ours, without what that code does not run.

    Raises InputError for a name that the published code does not have.
    """
    return {_renamed(name, _OURS | _OURS_OF_RLE): value for name, value in _used(state).items()}


def published_name(name, shift=False, thirds=False):
    """The name of a tensor of ours in the published code; shift: in that of DNS; thirds: in that of RLE."""
    return _renamed(name, _THEIRS_OF_DNS if shift else _THEIRS_OF_RLE if thirds else _THEIRS)


def published_options(state):
    """What the shapes and names of a published state dict tell: keyword arguments for GFMNet.

    Whether every tensor of that network is there, and fits, they leave open.
    """
    state = _used(state)
    depth = max((int(m[1]) for name in state if (m := re.search(r"\.layer3\.(\d+)\.", name))), default=0) + 1
    small, its_depth, large = ("resnet50", 6, "resnet101") if _wide(state) else ("resnet18", 2, "resnet34")
    classifier = _classifier(state)
    shift = _has(state, "base.HSS")
    return {
        "num_classes": 1 if classifier is None or classifier.ndim == 0 else len(classifier),
        "arch": small if depth <= its_depth else large,
        "share_net": 1 + len(_stages(_STREAM, state) - _stages(_SHARED, state)),
        "attention": _has(state, "afam."),
        "non_local": (non_local := _has(state, "NL_")),
        "pool": "gem" if non_local or shift else "avg",  # the published code turns both on together
        "local": _has(state, ("bn.", "conv1.")),
        "expansion": _has(state, "DEE."),
        "shift": shift,
        "thirds": _has(state, "bottleneckg."),
        "stages": 3 if _without_last(state) else 4,
    }


def _used(state):
    """The tensors that the network runs, as a dict."""
    unused = []
    if _has(state, "base.HSS"):
        unused = [_UNUSED_BY_DNS]
    elif _stages(_STREAM, state) & _stages(_SHARED, state):
        unused = [_UNUSED, _UNUSED_BY_RLE]
    if _without_last(state):
        unused.append(_UNUSED_LAST)
    return {name: value for name, value in state.items() if not any(re.fullmatch(part, name) for part in unused)}


def _without_last(state):
    """Whether the network does not run its last stage, as DEEN's and RLE's for RegDB."""
    if _has(state, "DEE."):
        return not _has(state, "MFA3.")  # it aggregates after each stage but the last that it runs
    classifier = _classifier(state)
    width = 1024 if _wide(state) else 256  # of the last stage but one
    return _has(state, "bottleneckg.") and classifier is not None and classifier.shape[1:] == (width,)


def _classifier(state):
    return state.get("classifier.weight", state.get("classifierg.weight"))


def _wide(state):
    """Whether the ResNet has blocks of three convolutions."""
    return any(re.search(r"\.layer\d\.0\.conv3\.", name) for name in state)


def _has(state, beginning):
    return any(name.startswith(beginning) for name in state)


def _stages(part, state):
    """The stages, "1" to "4", of which a part of the network has tensors."""
    return {m[1] for name in state if (m := re.match(rf"{part}\.layer([1-4])\.", name))}


def _renamed(name, prefixes):
    for prefix, other in prefixes.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    raise InputError(
        f"{name!r:.120} is no tensor of the published baseline, AGW, CAJ, DEEN, DNS, RLE or GFMNet; name one of theirs"
    )

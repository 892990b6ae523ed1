"""What a `--method` is, all of it: one entry of `METHODS`; and the loss that is made of it."""

from collections import namedtuple
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from core.distributed import gather
from loss import AlignedLocalLoss, HardTripletLoss, SquaredTripletLoss, WeightedTripletLoss
from parts.deen import centre_pair_loss, orthogonal_loss
from parts.distances import euclidean, same_identity
from parts.dns import CircleLoss, alignment_loss, distillation_loss
from parts.quad import QuadCentreLoss
from parts.rle import THIRDS
from utils import InputError, full_precision


class Losses(NamedTuple):
    """The losses of a batch, scalar tensors. `correct`: the share of anchors with d- >= d+; `accuracy`: of images whose
    identity the classifier finds. Each of a method's `terms` adds a field."""

    total: torch.Tensor
    identity: torch.Tensor
    triplet: torch.Tensor
    local: torch.Tensor
    correct: torch.Tensor
    accuracy: torch.Tensor


class Health(NamedTuple):
    """What tells a triplet loss that trains from one that is stuck; scalar tensors, of the whole batch.

    beyond_clamp, at_ln2: shares of anchors without a gradient, as `SquaredTripletLoss.without_gradient` has them;
    distance_within, distance_across: mean distance of two images of one person, and of two people.
    """

    beyond_clamp: torch.Tensor
    distance_within: torch.Tensor
    distance_across: torch.Tensor
    at_ln2: torch.Tensor


def _squared(alpha, gamma, square, weighting, **_):
    return SquaredTripletLoss(alpha, gamma, square, weighting)


class Batch(NamedTuple):
    """What the terms of a method see. embeddings [N, E, 2, C], identities [N]: of N pairs of a visible (0) and an
    infrared (1) view of all processes, E embeddings each; where there are more visible views, of the first ones; output
    (`model.Output`), labels: of the images of this process; flags: those of `MethodLoss`."""

    embeddings: torch.Tensor
    identities: torch.Tensor
    output: tuple
    labels: torch.Tensor
    flags: dict


def _thirds_identity(batch):
    """Cross-entropy, the mean over the thirds."""
    return F.cross_entropy(full_precision(batch.output.thirds.logits).flatten(0, 1), batch.labels.repeat(THIRDS))


def _thirds_triplet(batch):
    """Batch-hard triplet loss of all processes' images, the mean over the thirds."""
    triplet, labels = HardTripletLoss(batch.flags["margin"]), gather(batch.labels)
    return sum(triplet(gather(third), labels)[0] for third in full_precision(batch.output.thirds.pooled)) / THIRDS


class Method(NamedTuple):
    """What a `--method` trains, and how.

    network: the parts of GFMNet that it uses, as keyword arguments.
    triplet, local: functions that make its losses from the flags of `MethodLoss`; local is None for no local loss.
    terms: {name: (weight, function of a `Batch`)}, further losses.
    augmentation: one of `ChannelAug.AUGMENTATIONS`; augmentations: {data set: another one}.
    rates: {part of the network: its learning rate} as shares of `--lr`, beside bottleneck and classifier, which learn
        at the full rate; all else learns at a tenth.
    recipe: {flag: default} of the flags of training whose default is another one for this method.
    recipes: {data set: the same}, where the recipe depends on the data.
    """

    network: dict
    triplet: Callable
    local: Callable | None = None
    terms: dict = {}
    augmentation: str = "exchange"
    augmentations: dict = {}
    rates: dict = {}
    recipe: dict = {}
    recipes: dict = {}


_PARTS = ("attention", "non_local", "local", "expansion", "shift", "gray", "thirds", "twins")
_BASE = dict.fromkeys(_PARTS, False) | {"pool": "avg"}
_AGW = _BASE | {"non_local": True, "pool": "gem"}
METHODS = {
    "base": Method(_BASE, lambda margin, **_: HardTripletLoss(margin)),
    "agw": Method(_AGW, lambda weighting, **_: WeightedTripletLoss(weighting)),
    "caj": Method(_AGW, _squared),
    "adp": Method(_AGW | {"attention": True, "local": True}, _squared, lambda margin, **_: AlignedLocalLoss(margin)),
    "deen": Method(
        _BASE | {"expansion": True},
        lambda margin, **_: HardTripletLoss(margin),
        terms={
            "centre": (0.8, lambda batch: centre_pair_loss(batch.embeddings, batch.identities)),
            "orthogonal": (0.01, lambda batch: orthogonal_loss(batch.embeddings)),
        },
        augmentation="gray",
        recipe={"img_h": 384, "batch_size": 6, "share_net": 1, "epochs": 151, "milestones": [20, 80], "eval_every": 1},
        recipes={"sysu": {"erase_area": [0.2, 0.8]}, "regdb": {"stages": 3}},
    ),
    "dns": Method(
        _BASE | {"pool": "gem", "shift": True},
        lambda margin, gamma, **_: CircleLoss(margin, gamma),
        terms={
            "alignment": (0.2, lambda batch: alignment_loss(batch.embeddings)),
            "distillation": (1.0, lambda batch: distillation_loss(batch.output.domain, batch.labels)),
        },
        augmentation="shift",
        augmentations={"regdb": "shift_regdb", "llcm": "shift_llcm"},
        rates={"shared.layer3": 0.2, "shared.layer4": 0.25, "domain.classifiers": 1.0},
        recipe={"batch_size": 6, "share_net": 3, "lr": 0.2, "schedule": "triangle", "warmup": 16, "epochs": 100}
        | {"margin": 0.45, "gamma": 64.0, "amp": "bf16", "eval_every": 1},
        recipes={"regdb": {"lr": 0.1}},
    ),
    # The part baseline with which RLE (Tan et al., NeurIPS 2024) was measured; RLE itself is its augmentation.
    "rle": Method(
        _BASE | {"thirds": True},
        lambda margin, **_: HardTripletLoss(margin),
        terms={"thirds_identity": (1.0, _thirds_identity), "thirds_triplet": (1.0, _thirds_triplet)},
        augmentation="rle",
        augmentations={"regdb": "rle_gray", "llcm": "rle_gray"},
        rates={"thirds": 1.0},
        recipe={"img_h": 384, "img_w": 192, "batch_size": 6, "share_net": 1, "epochs": 151}
        | {"milestones": [20, 80, 120]},
        recipes={"regdb": {"stages": 3}},
    ),
    # The streams, views and loss of MSCMNet (Hua et al., Pattern Recognition 2025), without its attention over scales.
    "quad": Method(
        _AGW | {"non_local": "half", "twins": True},
        lambda margin, **_: QuadCentreLoss(margin),
        augmentation="mscmnet",
        recipe={"img_h": 384, "img_w": 192, "batch_size": 6, "share_net": 1, "epochs": 150, "eval_every": 1}
        | {"milestones": [25, 90, 120], "margin": 0.7, "amp": "bf16"},
    ),
    # GFMNet without colour and without the local branch. A step sees 64 images instead of 96: 134 epochs take about as
    # long as 101.
    "gfm2": Method(
        _AGW | {"attention": True, "gray": True},
        _squared,
        augmentation="curve",
        recipe={"weighting": "stable", "square": 1, "epochs": 134, "warmup": 13, "milestones": [27, 67]},
    ),
}


def method_name(options):
    """The methods that use a network with these options, such as "adp" or "agw or caj"; or "custom"."""
    names = [name for name, method in METHODS.items() if method.network.items() <= options.items()]
    return " or ".join(names) or "custom"


def _gather(rows, visible):
    """The rows of all processes, the first `visible` of each before the others."""
    return torch.cat([gather(part) for part in rows.tensor_split([visible])])


class MethodLoss(nn.Module):
    """The loss of a `--method`, one of METHODS. forward(output of GFMNet, labels [N]) -> Losses.

    Cross-entropy of the logits + the triplet loss of the pooled features + 0.5 x the local loss, if there is one, +
    the method's weighted terms. The images of an expanded network have several rows each, all of which count. Terms
    need visible and infrared views of the same identities in the same order. Everything is computed in float32,
    whatever precision the network ran in. Of several processes, each computes the triplet and local losses, and the
    terms of `Batch.embeddings`, of the whole batch, and the cross-entropy of its own rows. `DistributedDataParallel`
    takes the mean of their gradients, which is then the gradient of the whole batch.
    """

    def __init__(self, method="adp", margin=0.3, alpha=1.0, gamma=1.0, square=1, weighting="published"):
        super().__init__()
        self.flags = {"margin": margin, "alpha": alpha, "gamma": gamma, "square": square, "weighting": weighting}
        spec = METHODS[method]
        self.triplet, self.terms = spec.triplet(**self.flags), spec.terms
        self.local = spec.local(**self.flags) if spec.local else None
        self.losses = namedtuple("Losses", [*Losses._fields, *self.terms])

    def forward(self, output, labels):
        with torch.autocast(output.pooled.device.type, enabled=False):
            rows = labels.repeat(len(output.pooled) // len(labels))
            identity = F.cross_entropy(full_precision(output.logits), rows)
            pooled, all_rows = (_gather(values, output.visible) for values in (self._features(output), rows))
            if isinstance(self.triplet, QuadCentreLoss) and 2 * output.visible != len(labels):
                raise InputError(
                    "QuadCentreLoss: needs as many views of infrared as of visible images; choose such an augmentation"
                )
            triplet, correct = self.triplet(pooled, all_rows)
            local = torch.zeros_like(triplet)
            if self.local is not None and output.local is not None:
                local = self.local(pooled, all_rows, _gather(full_precision(output.local), output.visible))
            terms = self._weighted_terms(output, labels)
            total = sum(terms, identity + triplet + 0.5 * local)
            accuracy = (output.logits.detach().argmax(dim=1) == rows).float().mean()
            return self.losses(total, identity, triplet, local, correct / len(all_rows), accuracy, *terms)

    def _weighted_terms(self, output, labels):
        if not self.terms:
            return []
        pairs, embeddings = len(labels) - output.visible, full_precision(output.pooled)
        if output.visible < pairs:
            raise InputError("terms need as many views of visible as of infrared images; choose such an augmentation")
        if output.domain is not None:
            embeddings = torch.cat([embeddings, full_precision(output.domain.shifted)])
        views = len(labels) // pairs
        embeddings = embeddings.unflatten(0, (-1, views, pairs))[:, :: views - 1].movedim(2, 0)  # the first, the last
        batch = Batch(gather(embeddings), gather(labels[:pairs]), output, labels, self.flags)
        return [weight * term(batch) for weight, term in self.terms.values()]

    @staticmethod
    def _features(output):
        """What the triplets are taken of."""
        return full_precision(output.pooled if output.domain is None else output.domain.normed)

    @torch.no_grad()
    def health(self, output, labels):
        """Health of the features that `forward` takes the triplets of."""
        rows = labels.repeat(len(output.pooled) // len(labels))
        features, labels = (_gather(values, output.visible) for values in (self._features(output), rows))
        distance, same = euclidean(features, features), same_identity(labels)
        other = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        stuck = torch.zeros_like(distance[:2], dtype=torch.bool)
        if isinstance(self.triplet, SquaredTripletLoss):
            stuck = torch.stack(self.triplet.without_gradient(features, labels))
        within, across = ((distance * mask).sum() / mask.sum().clamp_min(1) for mask in (other, ~same))
        beyond_clamp, at_ln2 = stuck.float().mean(dim=1)
        return Health(beyond_clamp, within, across, at_ln2)

"""The losses: batch-hard, weighted and squared triplets, aligned local parts, and the spec of each `--method`.

d+ and d- are an anchor's distances to its positives (itself included, as published) and its negatives.
"""

import math
from collections import namedtuple
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from core.deen import CentrePairLoss, OrthogonalLoss
from core.distances import euclidean, same_identity
from core.distributed import gather
from core.dns import AlignmentLoss, CircleLoss, DistillationLoss
from utils import full_precision

WEIGHTINGS = ("published", "exact", "stable")
STABLE_MEAN = 4.0  # "stable": the mean distance of a batch, within the range where all weightings nearly agree
EXPONENT_LIMIT = 44.0  # published: the squared triplet's exponent is clamped here
AT_LN2 = 0.07  # an exponent up to which log(1 + exp) is within 5 % of ln 2


def weighted_mean(distance, scores, mask, weighting):
    """Mean of each row of `distance` [N, N] under softmax(`scores`) over the entries of `mask` -> [N].

    weighting="exact" or "stable": the true masked softmax.
    weighting="published": the published form. Its shift m is the row maximum of scores TIMES mask, and 1e-6 is added
    to the sum. For negatives (scores = -d) the masked zeros win, nothing is shifted, and past a distance of about 14
    the 1e-6 outweighs the sum: the mean falls to 0 however far the negatives are.
    """
    if weighting != "published":
        # The lowest finite score instead of -inf, and the mask below: a row without entries gives 0, as published.
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1) * mask
    else:
        scores = scores * mask
        # The maximum carries gradient, as published; it reaches the weights through the 1e-6 only.
        exponent = (scores - scores.amax(dim=1, keepdim=True)).exp() * mask
        weights = exponent / (exponent.sum(dim=1, keepdim=True) + 1e-6)
    return (weights * distance).sum(dim=1)


def _weighted_triplet(features, labels, alpha, weighting):
    """d+, d- [N] of the weighted triplets: softmax(alpha d) over positives, softmax(-alpha d) over negatives.

    "stable" first divides the distances by their mean. No scaling of the features changes the loss then, so nothing
    draws them into a point, and it begins alike from pretrained weights at any distance.
    """
    distance = euclidean(features, features)
    same = same_identity(labels)
    if weighting == "stable":
        distance = STABLE_MEAN * distance / distance.mean()
    positive = weighted_mean(distance, alpha * distance, same, weighting)
    negative = weighted_mean(distance, -alpha * distance, ~same, weighting)
    return positive, negative


def _check_weighting(weighting):
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r}: not one of {', '.join(WEIGHTINGS)}")


class HardTripletLoss(nn.Module):
    """Batch-hard triplet loss (Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017).

    forward(features [N, C], labels [N]) -> (loss, correct): mean over anchors of max(0, margin + d+ - d-) with the
    farthest positive and the nearest negative; correct: how many anchors have d- >= d+ (a tensor: no device sync).
    """

    def __init__(self, margin=0.3):
        super().__init__()
        self.margin = margin

    def forward(self, features, labels):
        distance = euclidean(features, features)
        same = same_identity(labels)
        positive = distance.masked_fill(~same, -math.inf).amax(dim=1)
        negative = distance.masked_fill(same, math.inf).amin(dim=1)
        return F.relu(self.margin + positive - negative).mean(), (negative >= positive).sum()


class WeightedTripletLoss(nn.Module):
    """Weighted regularised triplet loss (Ye et al., "Deep Learning for Person Re-identification", TPAMI 2021, AGW).

    forward(features [N, C], labels [N]) -> (loss, correct): mean over anchors of softplus(d+ - d-), where d+ and d-
    are softmax-weighted means (see `weighted_mean`).
    """

    def __init__(self, weighting="published"):
        super().__init__()
        _check_weighting(weighting)
        self.weighting = weighting

    def forward(self, features, labels):
        positive, negative = _weighted_triplet(features, labels, 1.0, self.weighting)
        return F.softplus(positive - negative).mean(), (negative >= positive).sum()


class SquaredTripletLoss(nn.Module):
    """Squared-difference triplet loss (Ye et al., "Channel Augmented Joint Learning", ICCV 2021, section 3.3).

    forward(features [N, C], labels [N]) -> (loss, correct). With delta = d+ - d- (weights from alpha d):
    square=0: mean of log(1 + exp(gamma delta)); square=1: mean of log(1 + exp(s gamma delta^2)), s the sign of delta.
    The published exponent is clamped at 44, beyond which an anchor gets no gradient. weighting="exact" goes on from
    there along the tangent: the gradient of a wrong anchor neither vanishes nor grows without bound, but where all
    distances are equal it is zero, and the features stay in a point that they were drawn into. weighting="stable" is
    free of scale and adds delta to the squared difference: delta = 0 has a gradient.
    """

    def __init__(self, alpha=1.0, gamma=1.0, square=1, weighting="published"):
        super().__init__()
        _check_weighting(weighting)
        self.alpha, self.gamma, self.square, self.weighting = alpha, gamma, square, weighting

    def forward(self, features, labels):
        positive, negative = _weighted_triplet(features, labels, self.alpha, self.weighting)
        delta = positive - negative
        exponent = self._signed_square(delta) if self.square else self.gamma * delta
        return F.softplus(exponent).mean(), (negative >= positive).sum()

    def without_gradient(self, features, labels):
        """Anchors that a squared difference leaves without a gradient, by the published form: two boolean [N].

        Those that are wrong and beyond the clamp; and those at ln 2, where d+ = d- (but "stable" has a gradient there).
        """
        positive, negative = _weighted_triplet(features, labels, self.alpha, self.weighting)
        delta = positive - negative
        exponent = self.gamma * delta**2 * self.square
        at_ln2 = (exponent < AT_LN2) & bool(self.square and self.weighting != "stable")
        return (delta > 0) & (exponent > EXPONENT_LIMIT), at_ln2

    def _signed_square(self, delta):
        # delta of exactly 0 counts as right (published: s = +1 only where d+ > d-).
        sign = torch.where(delta > 0, 1.0, -1.0)
        if self.weighting == "published":
            return sign * (self.gamma * delta**2).clamp_max(EXPONENT_LIMIT)
        if self.weighting == "stable":
            return self.gamma * (delta + delta * delta.abs())
        knee = math.sqrt(EXPONENT_LIMIT / self.gamma)
        size = delta.abs()
        inside = size.clamp_max(knee)
        return sign * self.gamma * (inside**2 + 2 * knee * (size - inside))


def aligned_distance(x, y):
    """Aligned distance of stripes (Zhang et al., "AlignedReID", 2017; the published GFMNet's greedy form).

    x, y [N, P, C] -> [N]. D = tanh(d / 2) of the Euclidean stripe distances [P, P] of each pair; a walk from (0, 0) to
    (P-1, P-1): at (j, k), the smallest entry in the rest of row j (to the right) and the smallest in the rest of
    column k (below); jump to the smaller of the two, to the one in the row on a tie. The result is
    (D[0, 0] + all entries jumped to) / number of jumps. Gradient flows through the entries visited.
    All walks advance together, in at most 2 (P - 1) steps of tensor operations without a device sync.
    With a single stripe (P = 1) there is nothing to walk: the result is D[0, 0].
    """
    if x.shape != y.shape or x.ndim != 3:
        raise ValueError(
            f"aligned_distance needs two [N, P, C] of one shape, not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return _walked(euclidean(x, y))


def _walked(distance):
    """The walk of `aligned_distance` over the stripes' distances [N, P, P] -> [N]."""
    local = (distance / 2).tanh().flatten(1)
    visits = _greedy_walk(local.detach().view_as(distance))
    return (local * visits).sum(dim=1) / (visits.sum(dim=1) - 1).clamp_min(1)


def _greedy_walk(local):
    """The entries of D [N, P, P] that the walk visits: [N, P P] as 0 or 1."""
    n, p, _ = local.shape
    index = torch.arange(p, device=local.device)

    def smallest_after(values):
        """For each entry, the smallest later one of its row and its place; past the end, infinity and the end."""
        smallest, place = values.flip(2).cummin(dim=2)
        smallest, place = smallest.flip(2)[:, :, 1:], (p - 1 - place).flip(2)[:, :, 1:]
        return F.pad(smallest, (0, 1), value=math.inf), F.pad(place, (0, 1), value=p - 1)

    right, right_place = smallest_after(local)
    below, below_place = (x.mT for x in smallest_after(local.mT))
    # Where the walk goes from each entry; from the last one it stays there.
    following = torch.where(right <= below, index[:, None] * p + right_place, below_place * p + index).flatten(1)
    entry = following.new_zeros(n, 1)
    visits = local.new_zeros(n, p * p)
    visits[:, 0] = 1
    for _ in range(2 * (p - 1)):
        entry = following.gather(1, entry)
        visits.scatter_(1, entry, 1)
    return visits


class AlignedLocalLoss(nn.Module):
    """Triplet loss on the aligned distance of local stripes, with hard samples mined by the global features.

    forward(features [N, C], labels [N], local [N, C', P]) -> loss: mean over anchors of max(0, margin + d+ - d-).
    d+ and d- are the aligned distances to the hardest positive and the hardest negative by Euclidean distance of
    `features` (the anchor is one of its positives).
    """

    def __init__(self, margin=0.3):
        super().__init__()
        self.margin = margin

    def forward(self, features, labels, local):
        with torch.no_grad():
            distance = euclidean(features, features)
            same = same_identity(labels)
            positive = distance.masked_fill(~same, -math.inf).argmax(dim=1)
            negative = distance.masked_fill(same, math.inf).argmin(dim=1)
        stripes = local.transpose(1, 2)
        # One call for both: half the steps of the walk. index_select, not [hardest]: its gradient adds up in a fixed
        # order on the CPU, so that runs repeat bit for bit.
        hardest = stripes.index_select(0, torch.cat([positive, negative])).unflatten(0, (2, -1))
        near, far = _walked(euclidean(stripes, hardest).flatten(0, 1)).chunk(2)
        return F.relu(self.margin + near - far).mean()


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
    infrared (1) image of all processes, E embeddings each; domain (of `model.Output`), labels: of the images of this
    process."""

    embeddings: torch.Tensor
    identities: torch.Tensor
    domain: tuple | None
    labels: torch.Tensor


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


_BASE = dict.fromkeys(("attention", "non_local", "local", "expansion", "shift", "gray"), False) | {"pool": "avg"}
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
            "centre": (0.8, lambda batch: CentrePairLoss(margin=0.2)(batch.embeddings, batch.identities)),
            "orthogonal": (0.01, lambda batch: OrthogonalLoss()(batch.embeddings, batch.identities)),
        },
        augmentation="gray",
        recipe={"img_h": 384, "batch_size": 6, "share_net": 1, "epochs": 151, "milestones": [20, 80], "eval_every": 1},
        recipes={"sysu": {"erase_area": [0.2, 0.8]}, "regdb": {"stages": 3}},
    ),
    "dns": Method(
        _BASE | {"pool": "gem", "shift": True},
        lambda margin, gamma, **_: CircleLoss(margin, gamma),
        terms={
            "alignment": (0.2, lambda batch: AlignmentLoss()(batch.embeddings, batch.identities)),
            "distillation": (1.0, lambda batch: DistillationLoss()(batch.domain, batch.labels)),
        },
        augmentation="shift",
        augmentations={"regdb": "shift_regdb", "llcm": "shift_llcm"},
        rates={"shared.layer3": 0.2, "shared.layer4": 0.25, "domain.classifiers": 1.0},
        recipe={"batch_size": 6, "share_net": 3, "lr": 0.2, "schedule": "triangle", "warmup": 16, "epochs": 100}
        | {"margin": 0.45, "gamma": 64.0, "amp": "bf16", "eval_every": 1},
        recipes={"regdb": {"lr": 0.1}},
    ),
    # GFMNet without colour and without the local branch. A step sees 64 images instead of 96: 134 epochs take the time
    # of 101.
    "gfm2": Method(
        _AGW | {"attention": True, "gray": True},
        _squared,
        augmentation="curve",
        recipe={"weighting": "stable", "square": 1, "epochs": 134, "warmup": 13, "milestones": [27, 67]},
    ),
}


def method_name(options):
    """The methods that use a network with these options: "base", "agw or caj", "adp" or "custom"."""
    names = [name for name, method in METHODS.items() if method.network.items() <= options.items()]
    return " or ".join(names) or "custom"


class MethodLoss(nn.Module):
    """The loss of a `--method`, one of METHODS. forward(output of GFMNet, labels [N]) -> Losses.

    Cross-entropy of the logits + the triplet loss of the pooled features + 0.5 x the local loss, if there is one, +
    the method's weighted terms. The images of an expanded network have several rows each, all of which count. Terms
    need as many visible as infrared images, of the same identities in the same order. Everything is computed in
    float32, whatever precision the network ran in. Of several processes, each computes the triplet and local losses and
    the terms of the whole batch and the cross-entropy of its own rows. `DistributedDataParallel` takes the mean of
    their gradients, which is then the gradient of the whole batch.
    """

    LOCAL_WEIGHT = 0.5

    def __init__(self, method="adp", margin=0.3, alpha=1.0, gamma=1.0, square=1, weighting="published"):
        super().__init__()
        flags = {"margin": margin, "alpha": alpha, "gamma": gamma, "square": square, "weighting": weighting}
        spec = METHODS[method]
        self.triplet, self.terms = spec.triplet(**flags), spec.terms
        self.local = spec.local(**flags) if spec.local else None
        if self.terms and "exchange" in (spec.augmentation, *spec.augmentations.values()):
            raise ValueError(f"method {method!r}: terms need one visible view, but its augmentation gives two")
        self.losses = namedtuple("Losses", [*Losses._fields, *self.terms])

    def forward(self, output, labels):
        with torch.autocast(output.pooled.device.type, enabled=False):
            rows = labels.repeat(len(output.pooled) // len(labels))
            identity = F.cross_entropy(full_precision(output.logits), rows)
            pooled, all_rows = gather(self._features(output)), gather(rows)
            triplet, correct = self.triplet(pooled, all_rows)
            local = torch.zeros_like(triplet)
            if self.local is not None and output.local is not None:
                local = self.local(pooled, all_rows, gather(full_precision(output.local)))
            terms = self._weighted_terms(output, labels)
            total = sum(terms, identity + triplet + self.LOCAL_WEIGHT * local)
            accuracy = (output.logits.detach().argmax(dim=1) == rows).float().mean()
            return self.losses(total, identity, triplet, local, correct / len(all_rows), accuracy, *terms)

    def _weighted_terms(self, output, labels):
        if not self.terms:
            return []
        pairs, embeddings = len(labels) // 2, full_precision(output.pooled)
        if output.domain is not None:
            embeddings = torch.cat([embeddings, full_precision(output.domain.shifted)])
        embeddings = embeddings.unflatten(0, (-1, 2, pairs)).movedim(2, 0)
        batch = Batch(gather(embeddings), gather(labels[:pairs]), output.domain, labels)
        return [weight * term(batch) for weight, term in self.terms.values()]

    @staticmethod
    def _features(output):
        """What the triplets are taken of."""
        return full_precision(output.pooled if output.domain is None else output.domain.normed)

    @torch.no_grad()
    def health(self, output, labels):
        """Health of the features that `forward` takes the triplets of."""
        rows = labels.repeat(len(output.pooled) // len(labels))
        features, labels = gather(self._features(output)), gather(rows)
        distance, same = euclidean(features, features), same_identity(labels)
        other = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        stuck = torch.zeros_like(distance[:2], dtype=torch.bool)
        if isinstance(self.triplet, SquaredTripletLoss):
            stuck = torch.stack(self.triplet.without_gradient(features, labels))
        within, across = ((distance * mask).sum() / mask.sum().clamp_min(1) for mask in (other, ~same))
        beyond_clamp, at_ln2 = stuck.float().mean(dim=1)
        return Health(beyond_clamp, within, across, at_ln2)

"""The losses: batch-hard, weighted and squared triplets, aligned local parts.

d+ and d- are an anchor's distances to its positives (itself included, as published) and its negatives.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from parts.distances import euclidean, same_identity

WEIGHTINGS = ("published", "exact", "stable")
STABLE_MEAN = 4.0  # "stable": the mean distance of a batch, within the range where all weightings nearly agree
EXPONENT_LIMIT = 44.0  # published: the squared triplet's exponent is clamped here
AT_LN2 = 0.07  # an exponent up to which log(1 + exp) is within 6 % of ln 2


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

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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

    def __init__(self, weighting: str = "published") -> None:
        super().__init__()
        _check_weighting(weighting)
        self.weighting = weighting

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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

    def __init__(self, alpha: float = 1.0, gamma: float = 1.0, square: int = 1, weighting: str = "published") -> None:
        super().__init__()
        _check_weighting(weighting)
        self.alpha, self.gamma, self.square, self.weighting = alpha, gamma, square, weighting

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, features: Tensor, labels: Tensor, local: Tensor) -> Tensor:
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

"""Parts and losses of DNS (Jiang et al., "Domain Shifting", ECCV 2024)."""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.distances import same_identity
from utils import full_precision

DROPOUT = 0.01  # of the common space
FOLLOW = 0.2  # how far a follower of `DomainBranch` goes to its classifier in a step


class Domain(NamedTuple):
    """normed, shifted [A+B, C]: embeddings after the bottleneck, and in the common space.

    own, other [2 (A+B), K]: logits of `normed`, then of `shifted`, by the classifier of the image's own modality, and
    by the follower of the other modality's classifier.
    """

    normed: torch.Tensor
    shifted: torch.Tensor
    own: torch.Tensor
    other: torch.Tensor


class SpaceShift(nn.Module):
    """DNS's heterogeneous space shifting: coordinate attention of a feature map [B, C, H, W] that is shifted by its
    maxima's distribution over rows and columns. Keeps the shape.

    The published shift is the product of two softmaxes, over rows and over columns. Only its means over a row and a
    column are used: each is one softmax, divided by the number of the other's positions.
    """

    def __init__(self, channels):
        super().__init__()
        hidden = max(8, channels // 32)
        self.squeeze = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish())
        self.rows = nn.Conv2d(hidden, channels, 1, bias=False)
        self.columns = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x):
        height, width = x.shape[2:]
        rows = x.mean(dim=3, keepdim=True) + x.amax(dim=3, keepdim=True).softmax(dim=2) / width
        columns = x.mean(dim=2, keepdim=True) + x.amax(dim=2, keepdim=True).softmax(dim=3) / height
        rows, columns = self.squeeze(torch.cat([rows, columns.mT], dim=2)).split([height, width], dim=2)
        return x * self.columns(columns.mT).sigmoid() * self.rows(rows).sigmoid()


class DomainBranch(nn.Module):
    """DNS's common space and domain distillation, in training only.

    forward(means [N, C] of the feature maps, normed [N, C], visible: number of visible images) -> Domain. In training,
    the followers, which learn nothing themselves, go towards their classifiers before they are used.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.common = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(4 * channels, channels),
            nn.Dropout(DROPOUT),
        )
        self.classifiers = nn.ModuleDict(
            {m: nn.Linear(channels, num_classes, bias=False) for m in ("visible", "infrared")}
        )
        self.followers = copy.deepcopy(self.classifiers).requires_grad_(False)

    def forward(self, means, normed, visible):
        shifted = self.common(means + means.softmax(dim=1))
        if self.training:
            self._follow()
        own, other = [], []
        for features in (normed, shifted):
            first, second = features.tensor_split([visible])
            own += [self.classifiers["visible"](first), self.classifiers["infrared"](second)]
            with torch.no_grad():
                other += [self.followers["infrared"](first), self.followers["visible"](second)]
        return Domain(normed, shifted, torch.cat(own), torch.cat(other))

    @torch.no_grad()
    def _follow(self):
        for modality, follower in self.followers.items():
            follower.weight.lerp_(self.classifiers[modality].weight, FOLLOW)


class CircleLoss(nn.Module):
    """Circle loss (Sun et al., CVPR 2020) of each anchor, as DNS has it, of features of unit length.

    forward(features [N, C], labels [N]) -> (loss, correct): the mean over anchors of softplus(log-sum-exp over
    positives + log-sum-exp over negatives), divided by N once more, as published. The anchor is no positive of its own.
    correct: how many anchors are nearer to all their positives than to any negative.
    """

    MASKED = 99999999.0  # published: what is taken off the logits of other pairs

    def __init__(self, margin=0.45, gamma=64.0):
        super().__init__()
        self.margin, self.gamma = margin, gamma

    def forward(self, features, labels):
        features = F.normalize(features)
        cosine, same = features @ features.mT, same_identity(labels)
        positive = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        # The published code computes these weights from masked cosines: for masked pairs they do not matter.
        pull = (1 + self.margin - cosine.detach()).clamp_min(0) * (1 - self.margin - cosine)
        push = (cosine.detach() + self.margin).clamp_min(0) * (cosine - self.margin)
        near, far = (
            (self.gamma * logits - self.MASKED * ~mask).logsumexp(dim=1)
            for logits, mask in ((pull, positive), (push, ~same))
        )
        least = cosine.masked_fill(~positive, math.inf).amin(dim=1)
        correct = least >= cosine.masked_fill(same, -math.inf).amax(dim=1)
        return F.softplus(near + far).mean() / len(features), correct.sum()


def alignment_loss(features):
    """Domain alignment of DNS (Jiang et al., "Domain Shifting", ECCV 2024).

    features [N, 2, 2, C] -> loss. features: of N visible (0) and N infrared (1) images, in their own space (0) and in
    the common one (1). 0.45 x the discrepancies between the modalities, of either space, + 0.05 x those between the
    spaces, of either modality. All features get unit length.
    """
    (visible, infrared), (common_visible, common_infrared) = F.normalize(features, dim=3).permute(1, 2, 0, 3)
    between = mean_discrepancy(visible, infrared) + mean_discrepancy(common_visible, common_infrared)
    within = mean_discrepancy(visible, common_visible) + mean_discrepancy(infrared, common_infrared)
    return 0.45 * between + 0.05 * within


def mean_discrepancy(x, y, kernels=5):
    """Maximum mean discrepancy (Gretton et al., JMLR 2012) of x, y [N, C], by a sum of Gaussian kernels.

    Their bandwidths are 1/4, 1/2, ... 4 times the mean squared distance of two samples, which counts as a constant.
    """
    samples = torch.cat([x, y])
    squared = (samples[:, None] - samples).square().sum(dim=2)
    bandwidth = squared.detach().sum() / (len(samples) ** 2 - len(samples))
    kernel = sum((-squared / (bandwidth * 2.0 ** (i - kernels // 2))).exp() for i in range(kernels))
    (xx, xy), (yx, yy) = (half.split(len(x), dim=1) for half in kernel.split(len(x)))
    return xx.mean() + yy.mean() - xy.mean() - yx.mean()


def distillation_loss(domain, labels):
    """Domain distillation of DNS (Jiang et al., ECCV 2024).

    domain, a `Domain` of N images, labels [N] -> loss. The Kullback-Leibler divergence of the other modality's
    prediction (a constant) from the own one's, a mean over images that is summed over the two spaces, + cross-entropy
    of the own ones.
    """
    own, other = (full_precision(logits).log_softmax(dim=1) for logits in (domain.own, domain.other))
    divergence = F.kl_div(other, own, log_target=True, reduction="sum") / len(labels)
    return divergence + F.nll_loss(own, labels.repeat(2))

"""Parts and losses of DEEN (Zhang and Wang, "Diverse Embedding Expansion Network", CVPR 2023)."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.distances import euclidean, same_identity
from parts.non_local import NonLocalParts
from utils import InputError

EXPANSIONS = 2  # embeddings that are generated from each one
DILATIONS = (1, 2, 3)  # of the convolutions that generate one
DROPOUT = 0.01  # of the expanded feature maps


class ChannelNonLocal(NonLocalParts):
    """high [B, C, H, W] attends to low [B, C', H', W'], by affinities between channels -> as `high`.

    `low` has `stride` times the height and width of `high`, and is reduced to them.
    """

    def __init__(self, channels, low_channels, stride):
        super().__init__(channels, low_channels, low_channels)
        for convolution in (self.phi, self.out):
            convolution.stride = (stride, stride)

    def forward(self, high, low):
        affinity = self.theta(high).flatten(2) @ self.phi(low).flatten(2).mT / low.shape[1]
        y = affinity @ self.g(low).flatten(2)
        return high + self.norm(self.out(y.view_as(low)))


class PositionNonLocal(NonLocalParts):
    """high [B, C, H, W] attends to low [B, C', H', W'], by affinities between positions, of half of the channels.

    As published, the upper and the lower half of a map count as channels of their own: position n and the one half a
    map later go together, so maps need an even number of positions. Published: y = (theta' phi / N) g' with an affinity
    of N' x N positions. Here y = theta' (phi g' / N): the same value, by a matrix of channels.
    """

    def __init__(self, channels, low_channels):
        super().__init__(channels, low_channels, low_channels // 2)

    def forward(self, high, low):
        theta, phi, g = (self._halves(part) for part in (self.theta(high), self.phi(low), self.g(low)))
        y = (g @ phi.mT / g.shape[2]) @ theta
        return high + self.norm(self.out(y.flatten(1).unflatten(1, (-1, *high.shape[2:]))))

    @staticmethod
    def _halves(x):
        """[B, C, H, W] -> [B, 2 C, H W / 2]."""
        if x.shape[2] * x.shape[3] % 2:
            raise InputError(
                f"--method deen: a feature map has {x.shape[2]} x {x.shape[3]} positions, an odd number; choose an "
                "--img_h that is a multiple of 32"
            )
        return x.flatten(1).unflatten(1, (2 * x.shape[1], -1))


class Aggregation(nn.Module):
    """DEEN's multistage feature aggregation: a stage's output and input, by channels and then by positions."""

    def __init__(self, channels, low_channels, stride):
        super().__init__()
        self.channel = ChannelNonLocal(channels, low_channels, stride)
        self.position = PositionNonLocal(channels, low_channels)

    def forward(self, high, low):
        return self.position(self.channel(high, low), low)


class DilatedBranch(nn.Module):
    """One expansion of `Expansion`: the mean of dilated convolutions, ReLU, 1x1 convolution. Keeps the shape."""

    def __init__(self, channels):
        super().__init__()
        hidden = channels // 4
        self.dilated = nn.ModuleList(
            nn.Conv2d(channels, hidden, 3, padding=d, dilation=d, bias=False) for d in DILATIONS
        )
        self.out = nn.Conv2d(hidden, channels, 1)
        for convolution in (*self.dilated, self.out):
            nn.init.kaiming_normal_(convolution.weight)

    def forward(self, x):
        return self.out((sum(convolution(x) for convolution in self.dilated) / len(self.dilated)).relu())


class Expansion(nn.Module):
    """DEEN's diverse embedding expansion: [B, C, H, W] -> [3 B, C, H, W], the input and what is generated from it."""

    def __init__(self, channels):
        super().__init__()
        self.branches = nn.ModuleList(DilatedBranch(channels) for _ in range(EXPANSIONS))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        return self.dropout(torch.cat([x, *(branch(x) for branch in self.branches)]))


def centre_pair_loss(features, labels, margin=0.2):
    """Centre-guided pair mining (Zhang and Wang, "Diverse Embedding Expansion Network", CVPR 2023), as published.

    features [N, E, 2, C], labels [N] -> loss. features: of N visible (0) and N infrared (1) images, E embeddings each:
    the plain one, then the expanded ones. Everything is measured between centres, an identity's mean embeddings. d+ is
    the distance of an expanded centre to the plain one of the other modality. It is to be smaller, by the margin, than
    the distance to the plain centre of its own modality (a constant), and, at half the weight each, than the smallest
    distance between two identities' expanded centres of its modality, and between two plain ones.
    The loss is the mean over identities and modalities, summed over the expansions.
    """
    same = same_identity(labels)
    weights = same.to(features.dtype) / same.sum(dim=1, keepdim=True)
    centres = (weights @ features.flatten(1)).view_as(features).permute(1, 2, 0, 3)  # [E, 2, N, C], a row an image
    plain, expanded = centres[:1], centres[1:]
    nearest = euclidean(centres, centres).masked_fill(same, math.inf).amin(dim=3)
    positive = _distance(expanded, plain.flip(1))
    own = _distance(expanded, plain).detach()
    of_own, of_expanded, of_plain = (F.relu(positive - other + margin) for other in (own, nearest[1:], nearest[:1]))
    return (of_own + 0.5 * (of_expanded + of_plain)).mean(dim=(1, 2)).sum()


def _distance(x, y):
    """Euclidean distances [...] of the rows of x and y [..., C]; squared distances below 1e-12 count as 1e-12."""
    return (x - y).square().sum(dim=-1).clamp_min(1e-12).sqrt()


def orthogonal_loss(features):
    """Keeps the two expansions of an embedding apart (Zhang and Wang, CVPR 2023): their inner product.

    features [N, 3, 2, C] -> loss: the mean over images, divided by the number of embeddings, as published.
    """
    return (features[:, 1] * features[:, 2]).sum(dim=-1).mean() / features.shape[1]

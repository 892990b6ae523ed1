"""The part branch of RLE's baseline (Tan et al., "RLE: A Unified Perspective of Data Augmentation for Cross-Spectral
Re-Identification", NeurIPS 2024): horizontal thirds of the feature map, each with a head of its own, as in PCB."""

from typing import NamedTuple

import torch
import torch.nn as nn

from parts.heads import bottleneck, classifier

THIRDS = 3


class Thirds(NamedTuple):
    """Of each third, the upper one first, of B images: pooled [3, B, C], logits [3, B, K]."""

    pooled: torch.Tensor
    logits: torch.Tensor


class ThirdsBranch(nn.Module):
    """Feature maps [B, C, H, W] -> `Thirds`. Where 3 does not divide H, the upper thirds have a row more; the published
    `torch.chunk` agrees where it does."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.bottlenecks = nn.ModuleList(bottleneck(channels) for _ in range(THIRDS))
        self.classifiers = nn.ModuleList(classifier(channels, num_classes) for _ in range(THIRDS))

    def forward(self, maps):
        pooled, normed = self.embed(maps)
        logits = [classify(third) for classify, third in zip(self.classifiers, normed, strict=True)]
        return Thirds(torch.stack(pooled), torch.stack(logits))

    def embed(self, maps):
        """-> the three thirds' means, and the same after their bottlenecks; [B, C] each."""
        pooled = [third.mean(dim=(2, 3)) for third in maps.tensor_split(THIRDS, dim=2)]
        return pooled, [norm(third) for norm, third in zip(self.bottlenecks, pooled, strict=True)]

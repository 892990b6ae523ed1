"""The loss of MSCMNet (Hua et al., Pattern Recognition 2025), of two views of each image of either modality."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.distances import euclidean, same_identity


class QuadCentreLoss(nn.Module):
    """Quadruple-stream centre triplet loss (QCT of MSCMNet), as its code has it.

    forward(features [N, C], labels [N]) -> (loss, correct). features: the first half of visible, the second of infrared
    images. An image is pulled to the centre of its identity in the other modality, and pushed away from other
    identities' centres, of both modalities, that are nearer than the margin: half the sum of both means. The published
    term within a view has the weight 0. correct: how many images are nearer to their own centre than to any other's.
    """

    def __init__(self, margin=0.7):
        super().__init__()
        self.margin = margin

    def forward(self, features, labels):
        if len(features) % 2:
            raise ValueError(f"{len(features)} features: half are of visible and half of infrared images")
        same = same_identity(labels)
        modality = torch.arange(2, device=labels.device).repeat_interleave(len(labels) // 2)
        centres, across = (
            (mask.to(features.dtype) / mask.sum(dim=1, keepdim=True)) @ features
            for mask in (same, same & (modality[:, None] != modality))
        )
        pull = (features - across).square().sum(dim=1).clamp_min(1e-12).sqrt()
        distance = euclidean(features, centres)
        push = (F.relu(self.margin - distance) * ~same).sum(dim=1) / (~same).sum(dim=1)
        correct = pull <= distance.masked_fill(same, math.inf).amin(dim=1)
        return (pull.mean() + push.mean()) / 2, correct.sum()

"""The head of an embedding: a batch-norm bottleneck (Luo et al., "Bag of Tricks", CVPRW 2019) and a classifier."""

import torch.nn as nn


def bottleneck(channels, bias=False):
    """Batch norm of [B, C], whose bias learns only if asked to."""
    norm = nn.BatchNorm1d(channels)
    norm.bias.requires_grad_(bias)
    nn.init.normal_(norm.weight, 1.0, 0.01)
    return norm


def classifier(channels, num_classes):
    """[B, C] -> logits [B, K]."""
    linear = nn.Linear(channels, num_classes, bias=False)
    nn.init.normal_(linear.weight, 0, 0.001)
    return linear

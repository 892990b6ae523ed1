"""Distances between features, and which pairs show one person."""

import torch

from utils import full_precision


def euclidean(x, y):
    """Euclidean distances [..., N, M] of x [..., N, C] and y [..., M, C], at least in float32; squared distances below
    1e-12 count as 1e-12.

    |x|^2 + |y|^2 - 2xy in float64: many times faster than forming all differences, and it keeps the digits of near
    features, which float32 (and TF32 all the more) would cancel. (Features that are equal come out at 1e-8 of their
    length or less, without gradient.)
    """
    wide = x.double()
    other = wide if y is x else y.double()
    norms = torch.linalg.vecdot(wide, wide)
    others = norms if y is x else torch.linalg.vecdot(other, other)
    squared = norms[..., :, None] + others[..., None, :] - 2 * (wide @ other.mT)
    return squared.clamp_min(1e-12).sqrt().to(full_precision(x).dtype)


def same_identity(labels):
    """labels [N] -> boolean [N, N]: True where two samples show one person (the diagonal included).

    Raises ValueError for labels of another shape, which would pair up otherwise.
    """
    if labels.ndim != 1:
        raise ValueError(f"labels need the shape [N], not {list(labels.shape)}")
    return labels[:, None] == labels[None, :]

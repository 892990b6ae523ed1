"""Re-ranking: distances from queries to a gallery, refined by how all of these images lie among each other.

A re-ranked result has used the whole test set at once; it stands beside the plain one, never in its place.
"""

from typing import TypeVar

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

Array = TypeVar("Array", np.ndarray, torch.Tensor)

BLOCK = 2**22  # distances, or pairs of neighbours, that are worked on at a time: bounds the memory


def k_reciprocal(query: Array, gallery: Array, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Array:
    """k-reciprocal encoding -> distances, float32 [Q, G], NumPy or torch as `query` is.

    query [Q, C], gallery [G, C]: features, NumPy or torch. Source: Zhong et al., "Re-ranking Person Re-identification
    with k-reciprocal Encoding", CVPR 2017. Each image is described by its k1-reciprocal neighbours and by theirs where
    more than two thirds of those are shared (eq. 5), weighted by exp(-distance) (eq. 7), averaged over its k2 nearest
    images (eq. 11). The result is 1 - lambda_value times the Jaccard distance of the descriptions (eq. 10) plus
    lambda_value times the original one (eq. 12): the squared Euclidean, over the largest of its row, as their code has
    it. k1 + 1 and k2 are cut to the number of images.
    """
    features = torch.cat([torch.as_tensor(query), torch.as_tensor(gallery)]).float()
    features = features - features.mean(dim=0)  # distances stay; what float32 would cancel below is gone
    queries, total = len(query), len(features)
    norms = features.square().sum(dim=1)

    def distances(rows, columns):
        products = features[rows] @ features[columns].T
        return products.mul_(-2).add_(norms[rows, None]).add_(norms[columns]).clamp_min_(0)

    def blocks(count, rows):
        return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]

    nearest, farthest = [], []
    for rows in blocks(total, max(1, BLOCK // total)):
        block = distances(rows, slice(None))
        nearest.append(block.topk(min(max(k1 + 1, k2), total), largest=False).indices)
        farthest.append(block.amax(dim=1))
    nearest = torch.cat(nearest).cpu().numpy()
    farthest = torch.cat(farthest).clamp_min(torch.finfo(torch.float32).tiny)

    neighbours, close = (_reciprocal(nearest[:, : k + 1]) for k in (k1, round(k1 / 2)))
    shared = (neighbours @ close.T).multiply(neighbours).tocsr()
    shared.data = (shared.data > 2 / 3 * close.sum(axis=1)[shared.indices]).astype(np.float32)
    shared.eliminate_zeros()
    described = (neighbours + shared @ close).tocsr()
    row = np.repeat(np.arange(total), np.diff(described.indptr))
    for rows in blocks(total, 64):  # images in a row of the list tend to have the same neighbours
        part = slice(described.indptr[rows.start], described.indptr[rows.stop])
        columns, place = np.unique(described.indices[part], return_inverse=True)
        block = distances(rows, torch.from_numpy(columns).to(features.device)) / farthest[rows, None]
        described.data[part] = torch.exp(-block).cpu().numpy()[row[part] - rows.start, place]
    described.data /= described.sum(axis=1)[row]
    if k2 > 1:
        described = _indicator(nearest[:, :k2]) @ described / min(k2, total)

    result = torch.empty(queries, total - queries)
    left, right = described[:queries], described[queries:].tocsc()
    pairs = int((left.astype(bool) @ np.diff(right.indptr)).max(initial=0))  # pairs of entries of the busiest query
    for rows in blocks(queries, max(1, BLOCK // max(total, pairs))):
        overlap = torch.from_numpy(_overlap(left[rows], right))
        jaccard = 1 - overlap / (2 - overlap)
        original = (distances(rows, slice(queries, None)) / farthest[rows, None]).cpu()
        result[rows] = ((1 - lambda_value) * jaccard + lambda_value * original).float()
    return result.to(features.device) if torch.is_tensor(query) else result.numpy()


def random_walk(query: Array, gallery: Array, alpha: float = 0.95) -> Array:
    """Random walk over the gallery -> distances (negative similarities), float32 [Q, G], NumPy or torch as `query` is.

    query [Q, C], gallery [G, C]: features, NumPy or torch. The similarities s of a query to the gallery spread to
    similar gallery images: (1 - alpha) (I - alpha W)^-1 s, with W the row-wise softmax of the gallery's cosines among
    each other. Source: Shen et al., "Deep Group-shuffling Random Walk for Person Re-identification", CVPR 2018. As in
    the published GFMNet code, the zero diagonal goes INTO the softmax, so an image keeps some weight of its own.
    """
    is_tensor = torch.is_tensor(query)
    queries, images = (F.normalize(torch.as_tensor(x).float()) for x in (query, gallery))
    walk = (images @ images.T).fill_diagonal_(0).softmax(dim=1)
    system = torch.eye(len(images), device=images.device) - alpha * walk
    similarity = (1 - alpha) * torch.linalg.solve(system, images @ queries.T).T
    return -similarity if is_tensor else -similarity.numpy()


def _indicator(indices):
    """int [N, k] -> sparse float32 [N, N] with ones at the indices of each row."""
    total, k = indices.shape
    ones = np.ones(indices.size, np.float32)
    return sp.csr_array((ones, indices.ravel(), np.arange(0, indices.size + 1, k)), shape=(total, total))


def _reciprocal(nearest):
    """Who is among whose nearest [N, k], both ways: sparse [N, N] of ones."""
    forward = _indicator(nearest)
    return forward.multiply(forward.T).tocsr()


def _overlap(left, right):
    """Sum over n of min(left[q, n], right[g, n]): sparse [Q, N] and [G, N] (by columns) -> float64 [Q, G].

    Joins the two lists of entries on n, so that only what is non-zero in both is touched.
    """
    pairs = np.diff(right.indptr)[left.indices]  # entries of `right` that each entry of `left` meets
    entry = np.repeat(np.arange(left.nnz), pairs)
    place = np.arange(len(entry)) - np.repeat(np.cumsum(pairs) - pairs, pairs) + right.indptr[left.indices[entry]]
    row = np.repeat(np.arange(left.shape[0]), np.diff(left.indptr))[entry]
    least = np.minimum(left.data[entry], right.data[place])
    shape = (left.shape[0], right.shape[0])
    return np.bincount(row * shape[1] + right.indices[place], least, shape[0] * shape[1]).reshape(shape)

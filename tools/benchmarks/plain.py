"""Slow references, written as the definitions read. tools.bench measures against them, and tests compare with them."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional

from ChannelAug import ERASE_FILL, GRAY, MEAN, STD
from data_loader import eval_loader
from loss import SquaredTripletLoss
from methods import Losses
from model import FEATURES


def plain_metrics(distances, q_pids, g_pids, q_camids=None, g_camids=None, max_rank=20):
    """Query by query, on Python lists of the whole ranked gallery, as in the published code.

    With cameras SYSU-MM01's metrics, without them RegDB's. They differ in two ways: SYSU-MM01 hides camera 2
    from queries of camera 3, and its CMC counts identities, of which only the first image takes a rank.
    """
    curves, precisions, penalties = [], [], []
    for q, order in enumerate(np.argsort(distances, axis=1, kind="stable")):
        if q_camids is not None:
            order = [g for g in order if not (q_camids[q] == 3 and g_camids[g] == 2)]
        ranked = [g_pids[g] for g in order]
        if q_pids[q] not in ranked:
            continue
        candidates = ranked if q_camids is None else list(dict.fromkeys(ranked))
        hits = np.cumsum([pid == q_pids[q] for pid in candidates])[:max_rank].clip(max=1)
        curves.append(np.append(hits, [hits[-1]] * (max_rank - len(hits))))
        match = np.array([pid == q_pids[q] for pid in ranked])
        precision = np.array([count / (i + 1) for i, count in enumerate(match.cumsum())])
        precisions.append((precision * match).sum() / match.sum())
        penalties.append(match.sum() / (np.flatnonzero(match).max() + 1))
    return np.mean(curves, axis=0), np.mean(precisions), np.mean(penalties)


def lean_metrics(distances, q_pids, g_pids, q_camids=None, g_camids=None, max_rank=20):
    """`plain_metrics` on NumPy arrays, with no more work than a query needs."""
    curve, precisions, penalties = np.zeros(max_rank), [], []
    for q, row in enumerate(distances):
        order = np.argsort(row, kind="stable")
        if q_camids is not None and q_camids[q] == 3:
            order = order[g_camids[order] != 2]
        ranked = g_pids[order]
        hits = np.flatnonzero(ranked == q_pids[q])
        if not len(hits):
            continue
        first = hits[0] if q_camids is None else len(np.unique(ranked[: hits[0]]))
        curve[first:] += 1
        precisions.append((np.arange(1, len(hits) + 1) / (hits + 1)).mean())
        penalties.append(len(hits) / (hits[-1] + 1))
    return curve / len(precisions), np.mean(precisions), np.mean(penalties)


def plain_k_reciprocal(query, gallery, k1=20, k2=6, lambda_value=0.3):
    """Zhong et al.'s re-ranking image by image on dense arrays, as in the published code, in their dtype."""
    features = np.concatenate([query, gallery])
    total, queries = len(features), len(query)
    norms = (features**2).sum(axis=1)
    distances = np.maximum(norms[:, None] + norms - 2 * features @ features.T, 0)
    distances /= distances.max(axis=1, keepdims=True)
    ranked = np.argsort(distances, axis=1)

    def reciprocal(i, k):
        forward = ranked[i, : k + 1]
        return forward[(ranked[forward, : k + 1] == i).any(axis=1)]

    codes = np.zeros((total, total), features.dtype)
    for i in range(total):
        near = expanded = reciprocal(i, k1)
        for j in near:
            further = reciprocal(j, round(k1 / 2))
            if len(np.intersect1d(further, near)) > 2 / 3 * len(further):
                expanded = np.append(expanded, further)
        expanded = np.unique(expanded)
        weights = np.exp(-distances[i, expanded])
        codes[i, expanded] = weights / weights.sum()
    if k2 > 1:
        codes = np.stack([codes[ranked[i, :k2]].mean(axis=0) for i in range(total)])

    entries = [np.flatnonzero(codes[:, n]) for n in range(total)]
    result = np.empty((queries, total - queries), features.dtype)
    for i in range(queries):
        least = np.zeros(total, features.dtype)
        for n in np.flatnonzero(codes[i]):
            least[entries[n]] += np.minimum(codes[i, n], codes[entries[n], n])
        result[i] = 1 - (least / (2 - least))[queries:]
    return (1 - lambda_value) * result + lambda_value * distances[:queries, queries:]


def plain_aligned_distance(x, y):
    """Aligned distance of one pair of images with stripes x, y [P, C]: a greedy walk, jump by jump."""
    local = torch.tanh((x[:, None] - y[None]).square().sum(dim=2).clamp_min(1e-12).sqrt() / 2)
    j = k = jumps = 0
    last = len(local) - 1
    total = local[0, 0]
    while (j, k) != (last, last):
        # min() of (value, index) pairs takes the first of equal values; <= gives a tie to the row.
        right = min(((local[j, m].item(), m) for m in range(k + 1, last + 1)), default=(torch.inf, 0))
        below = min(((local[m, k].item(), m) for m in range(j + 1, last + 1)), default=(torch.inf, 0))
        j, k = (j, right[1]) if right[0] <= below[0] else (below[1], k)
        total = total + local[j, k]
        jumps += 1
    return total / max(jumps, 1)


def plain_aligned_loss(features, labels, local, margin=0.3):
    """The aligned local loss anchor by anchor."""
    distances = torch.cdist(features, features)
    stripes, losses = local.transpose(1, 2), []
    for i in range(len(labels)):
        same = labels == labels[i]
        positive = distances[i].masked_fill(~same, -1).argmax()
        negative = distances[i].masked_fill(same, torch.inf).argmin()
        near, far = (plain_aligned_distance(stripes[i], stripes[j]) for j in (positive, negative))
        losses.append(F.relu(margin + near - far))
    return torch.stack(losses).mean()


class PlainPairs(Dataset):
    """The sampler's images pair by pair, each augmented on its own, by torchvision."""

    def __init__(self, data, sampler, size):
        self.data, self.pairs = data, np.concatenate([np.stack(batch, axis=1) for batch in sampler])
        geometry = [transforms.ToPILImage(), transforms.Pad(10), transforms.RandomCrop(size)]
        geometry += [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        normalise = transforms.Normalize(MEAN, STD)
        erase = transforms.RandomErasing(0.5, (0.02, 0.4), (0.3, 10 / 3), ERASE_FILL)
        self.augment_plain = transforms.Compose([*geometry, erase, normalise])
        self.augment = transforms.Compose([*geometry, normalise, erase])

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        visible, infrared = self.pairs[index]
        plain, second = (augment(self.data.visible[visible]) for augment in (self.augment_plain, self.augment))
        other = self.augment(self.data.infrared[infrared])
        case = random.randrange(8)
        if case < 6:
            other = other[[case // 2] * 3]
        elif case == 6:
            other = (other * torch.tensor(GRAY).view(3, 1, 1)).sum(dim=0).expand(3, -1, -1)
        return plain, second[[random.randrange(3)] * 3], other, self.data.visible_labels[visible]


def plain_step(net, criterion, optimizer, batch, device):
    """In float32 (on a GPU, PyTorch runs its convolutions in TF32), reading the loss after each step, as published."""
    plain, second, infrared, labels = (x.to(device) for x in batch)
    loss = criterion(net(torch.cat([plain, second]), infrared), labels.repeat(3)).total
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def plain_loss(output, labels):
    """GFMNet's whole loss, with the local part anchor by anchor."""
    identity = F.cross_entropy(output.logits, labels)
    triplet, correct = SquaredTripletLoss()(output.pooled, labels)
    local = plain_aligned_loss(output.pooled, labels, output.local)
    accuracy = (output.logits.argmax(dim=1) == labels).float().mean()
    return Losses(identity + triplet + 0.5 * local, identity, triplet, local, correct / len(labels), accuracy)


@torch.no_grad()
def plain_features(net, images, modality, feature="FC"):
    """uint8 [B, 3, H, W] -> [B, C]: features of image and mirror, added, of unit length."""
    images = functional.normalize(images.float() / 255, MEAN, STD)
    row = FEATURES.index(feature)
    image, mirror = (net.embed(view, modality)[row] for view in (images, images.flip(3)))
    return F.normalize(image + mirror)


def plain_extract(net, paths, modality, size, workers, device):
    """Image files -> float32 [N, C], batch by batch."""
    batches = eval_loader(paths, size, 64, workers)
    return torch.cat([plain_features(net, images.to(device), modality).cpu() for images in batches]).numpy()


def plain_test(net, test, size, workers, device):
    """Metrics of each search: queries embedded once a mode, the gallery anew for each trial, both from the files."""

    def embed(images):
        paths = [test.paths[images.modality][row] for row in images.rows]
        return plain_extract(net, paths, images.modality, size, workers, device)

    mode, query, results = None, None, []
    for search in test.searches:
        if search.setting["mode"] != mode:
            mode, query = search.setting["mode"], embed(search.query)
        (_, _, q_ids, q_cameras), (_, _, g_ids, g_cameras) = search.query, search.gallery
        results.append(plain_metrics(-query @ embed(search.gallery).T, q_ids, g_ids, q_cameras, g_cameras))
    return results

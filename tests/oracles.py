"""Slow references of the tests only, written as the definitions read; tools/benchmarks/plain.py has the others."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional

from model import GFMNet
from tools.benchmarks.plain import plain_features

STABLE_MEAN = 4.0
EXPONENT_LIMIT = 44.0

# ------------------------------------------------------------------------------------------------------------- metrics


def plain_match_ranks(hidden, identities, distmat, q_pids, g_pids, q_camids, g_camids):
    """Of each query with a match: its row, the rank of its first match, and the ranks of all among images.

    hidden(query, gallery image), of (identity, camera) each; identities: whether these count for the first match.
    """
    matches = []
    for q in range(len(q_pids)):
        order = sorted(range(len(g_pids)), key=lambda g: distmat[q, g])  # equal ones stay in gallery order
        order = [g for g in order if not hidden((q_pids[q], q_camids[q]), (g_pids[g], g_camids[g]))]
        ranks = [rank for rank, g in enumerate(order, 1) if g_pids[g] == q_pids[q]]
        if ranks:
            before = [g_pids[g] for g in order[: ranks[0] - 1]]
            matches.append((q, 1 + len(set(before) if identities else before), ranks))
    return matches


# -------------------------------------------------------------------------------------------------------------- losses


def naive_distances(features):
    """Euclidean distances from explicit differences (no Gram matrix), squares clamped at 1e-12."""
    difference = features[:, None] - features[None]
    return difference.pow(2).sum(2).clamp(min=1e-12).sqrt()


def naive_softmax_mean(values, scores, weighting, shift):
    """Mean of `values` weighted by the softmax of `scores`; `shift` is what the published code subtracts before exp."""
    if weighting == "published":
        weights = torch.exp(scores - shift) / (torch.exp(scores - shift).sum() + 1e-6)
    else:
        weights = torch.softmax(scores, 0)
    return (weights * values).sum()


def naive_triplet(features, labels, anchor_loss, weighting, alpha=1.0):
    """Loop over anchors with softmax-weighted distances: mean of `anchor_loss(d+, d-)` and count of correct anchors."""
    distances = naive_distances(features)
    if weighting == "stable":
        distances = distances * STABLE_MEAN * len(features) ** 2 / distances.sum()
    losses, correct = [], 0
    for anchor, row in enumerate(distances):
        positives, negatives = row[labels == labels[anchor]], row[labels != labels[anchor]]
        # The published shift is the row maximum of score times mask. The scores of positives beat the masked zeros,
        # those of negatives, all below zero, never do.
        d_pos = naive_softmax_mean(positives, alpha * positives, weighting, shift=(alpha * positives).max())
        d_neg = naive_softmax_mean(negatives, -alpha * negatives, weighting, shift=0.0)
        losses.append(anchor_loss(d_pos, d_neg))
        correct += bool(d_neg >= d_pos)
    return torch.stack(losses).mean(), correct


def squared_anchor_loss(gamma, square, weighting):
    """log(1 + exp(exponent)) of one anchor, written with the case distinctions of the definition."""

    def anchor_loss(d_pos, d_neg):
        gap = d_pos - d_neg
        if not square:
            return torch.logaddexp(torch.zeros_like(gap), gamma * gap)
        if weighting == "stable":
            return torch.log1p(torch.exp(gamma * (gap + gap * abs(gap))))
        exponent = gamma * gap**2 if gap > 0 else -gamma * gap**2
        if weighting == "published":
            return torch.log1p(torch.exp(torch.clamp(exponent, -EXPONENT_LIMIT, EXPONENT_LIMIT)))
        if exponent < EXPONENT_LIMIT:
            return torch.log1p(torch.exp(exponent))
        limit = math.sqrt(EXPONENT_LIMIT / gamma)  # from here on a straight line with the slope reached at the limit
        slope = 2 * gamma * limit / (1 + math.exp(-EXPONENT_LIMIT))
        return math.log1p(math.exp(EXPONENT_LIMIT)) + slope * (gap - limit)

    return anchor_loss


def naive_hard_triplet(features, labels, margin):
    distances = naive_distances(features)
    losses, correct = [], 0
    for anchor, row in enumerate(distances):
        furthest, nearest = row[labels == labels[anchor]].max(), row[labels != labels[anchor]].min()
        losses.append(torch.clamp(furthest - nearest + margin, min=0))
        correct += bool(nearest >= furthest)
    return torch.stack(losses).mean(), correct


# ------------------------------------------------------------------------------------------------------------ training


def plain_batches(data, people, images, seed, epoch):
    """An epoch's batches: of `people` different identities, `images` of each in either modality, with replacement."""
    rng = np.random.default_rng([seed, epoch])
    everybody = sorted(set(data.visible_labels) & set(data.infrared_labels))
    for _ in range(max(len(data.visible), len(data.infrared)) // (people * images) + 1):
        chosen = [everybody[i] for i in rng.choice(len(everybody), people, replace=False)]
        rows = []
        for labels in (data.visible_labels, data.infrared_labels):
            rows.append([row for who in chosen for row in rng.choice(np.flatnonzero(labels == who), images)])
        yield data.visible[rows[0]], data.infrared[rows[1]], data.visible_labels[rows[0]]


def plain_training(net, steps, share):
    """`base` and SGD with Nesterov's momentum, as the formulas read -> the loss of each step. The network changes.

    steps: (rate of the head, the network's two inputs, their labels). share: of the rate, by the name of a parameter.
    """
    parameters = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    momentum, losses = dict.fromkeys(parameters, 0), []
    for rate, visible, infrared, labels in steps:
        net.train()
        output = net(visible, infrared)
        loss = F.cross_entropy(output.logits, labels) + naive_hard_triplet(output.pooled, labels, margin=0.3)[0]
        gradients = torch.autograd.grad(loss, parameters.values())
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            decayed = gradient + 5e-4 * parameter.detach()
            momentum[name] = 0.9 * momentum[name] + decayed
            parameter.data -= rate * share(name) * (decayed + 0.9 * momentum[name])
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------------------- testing


def plain_network(checkpoint):
    """The path of a checkpoint of this code -> (network, (height, width) of its images)."""
    content = torch.load(checkpoint)
    net = GFMNet(**content["options"])
    net.load_state_dict(content["net"])
    return net.eval(), content["image_size"]


def plain_embedding(checkpoint):
    """The path of a checkpoint -> embed(image file, modality) -> FC feature [C], image by image."""
    net, (height, width) = plain_network(checkpoint)

    def embed(path, modality):
        with Image.open(path) as image:
            image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        return plain_features(net, functional.pil_to_tensor(image)[None], modality)[0].numpy()

    return embed

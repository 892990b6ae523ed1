"""The loops: one epoch of training, embedding a set of images, and the searches of a protocol."""

import time

import numpy as np
import torch
import torch.nn.functional as F

import re_rank
from eval_metrics import CosineDistances, eval_llcm, eval_regdb, eval_sysu
from utils import InputError, autocast, progress, ranks, sum_over_ranks

RANKS = (1, 5, 10, 20)
LOG_STEPS = 10  # steps between two readings of the losses: each reading waits for the device


def train_epoch(net, criterion, optimizer, loader, augment, device, amp="off", desc="train"):
    """One pass over `loader` -> the epoch's mean losses, `correct`, `seconds` and `images_per_second` (network inputs
    of all ranks).

    augment: uint8 (visible, infrared) on the device -> the two inputs of `net`; criterion(output, labels) -> a named
    tuple of scalar tensors whose `total` is minimised.

    Raises InputError when the mean loss of the epoch is not finite.
    """
    net.train()
    totals, images, start = 0, 0, time.perf_counter()
    with progress(loader, desc=desc, unit="step", leave=False) as bar:
        for step, (visible, infrared, labels) in enumerate(bar, 1):
            visible, infrared, labels = (t.to(device, non_blocking=True) for t in (visible, infrared, labels))
            visible, infrared = augment(visible, infrared)
            with autocast(device, amp):
                output = net(visible, infrared)
            losses = criterion(output, labels)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            optimizer.step()
            totals = totals + torch.stack([loss.detach() for loss in losses])
            images += len(labels)
            if step % LOG_STEPS == 0:
                means = dict(zip(losses._fields, (totals / step).tolist(), strict=True))
                bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
    totals = sum_over_ranks(totals) / ranks()
    means = dict(zip(losses._fields, (totals / step).tolist(), strict=True))
    if not np.isfinite(means["total"]):
        raise InputError(f"the loss is {means['total']} in '{desc}': lower --lr, or start from --weights imagenet")
    seconds = time.perf_counter() - start
    return {**means, "seconds": round(seconds, 3), "images_per_second": round(ranks() * images / seconds, 1)}


def network_embedding(net, device, preprocess, amp="off"):
    """Wrap a network as an embedding for `extract`: features of an image and its mirror, averaged, of unit length.

    preprocess: uint8 [B, 3, H, W] -> the network's input.
    """
    net.eval()

    def embed(images, modality):
        images = preprocess(images.to(device, non_blocking=True))
        with autocast(device, amp):
            views = [net.embed(view, modality) for view in (images, images.flip(3))]
        return {name: F.normalize(a.float() + b.float()) for name, a, b in zip(("POOL", "FC"), *views, strict=True)}

    return embed


@torch.inference_mode()
def extract(embed, loader, modality, desc):
    """Features of all images of a loader: {name: float32 [N, C]}, on the device where `embed` leaves them.

    embed: (uint8 [B, 3, H, W], modality) -> {name: [B, C]}.

    Raises InputError when a feature is not finite.
    """
    batches = [embed(images, modality) for images in progress(loader, desc=desc, unit="batch", leave=False)]
    features = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    if ranks() > 1:  # each has some rows, and all get all
        for name, values in features.items():
            features[name] = values.new_zeros(len(loader.dataset), values.shape[1])
            features[name][loader.rows] = values[: len(loader.rows)]
            sum_over_ranks(features[name])
    for name, values in features.items():
        if not torch.isfinite(values).all():
            raise InputError(
                f"{desc}: the {name} features are not finite; the network has diverged: train at a lower --lr"
            )
    return features


def run_search(features, search, reranking=()):
    """One search -> {(feature name, re-ranking): {"Rank-1": ..., "mAP": ..., "mINP": ...}}, in percent, and the number
    of its queries that have a match, over which they are means.

    features: {"visible": {name: [N, C]}, "infrared": {name: [M, C]}}, of unit length, for the images of a `Searches`.
    Plain results, by cosine similarity, have the re-ranking "none"; those of `reranking`, any of "k_reciprocal" and
    "random_walk", stand beside them.
    """
    distances = {}
    for name in features[search.query.modality]:
        query, gallery = (features[images.modality][name][images.rows] for images in (search.query, search.gallery))
        distances[name, "none"] = CosineDistances(query, gallery)
        if "k_reciprocal" in reranking:
            distances[name, "k_reciprocal"] = re_rank.k_reciprocal(query, gallery)
        if "random_walk" in reranking:
            distances[name, "random_walk"] = re_rank.random_walk(query, gallery)
    measured = {name: _measure(values, search) for name, values in distances.items()}
    (evaluated,) = {count for _, count in measured.values()}
    return {name: scores for name, (scores, _) in measured.items()}, evaluated


def _measure(distances, search):
    """The data set's measure of distances [Q, G]: scores in percent, number of queries that have a match."""
    (_, _, q_ids, q_cameras), (_, _, g_ids, g_cameras) = search.query, search.gallery
    if search.setting["dataset"] == "regdb":
        cmc, mean_ap, mean_inp, count = eval_regdb(distances, q_ids, g_ids, return_count=True)
    else:
        evaluate = {"sysu": eval_sysu, "llcm": eval_llcm}[search.setting["dataset"]]
        cmc, mean_ap, mean_inp, count = evaluate(distances, q_ids, g_ids, q_cameras, g_cameras, return_count=True)
    scores = {f"Rank-{k}": 100 * float(cmc[k - 1]) for k in RANKS} | {"mAP": 100 * mean_ap, "mINP": 100 * mean_inp}
    return scores, count


def summarise(rows):
    """Rows of single searches -> one row for all trials of a setting: mean and standard deviation of each metric.

    A row is a dict of labels, and of one trial "trial", "checkpoint", "network", "queries", "evaluated" (those that
    have a match), "gallery" and "metrics" {name: percent}; rows whose other labels agree are trials of one setting. The
    deviation is the population's, as papers print it; of a single trial there is none.
    """
    groups = {}
    varying = ("trial", "checkpoint", "network", "queries", "evaluated", "gallery", "metrics")
    for row in rows:
        labels = {name: value for name, value in row.items() if name not in varying}
        groups.setdefault(tuple(labels.items()), []).append(row)
    return [
        {
            **dict(labels),
            "trials": [row["trial"] for row in group],
            "mean": {name: float(np.mean([row["metrics"][name] for row in group])) for name in group[0]["metrics"]},
            "std": {name: float(np.std([row["metrics"][name] for row in group])) for name in group[0]["metrics"]}
            if len(group) > 1
            else None,
            "per_trial": [{name: row[name] for name in varying} for row in group],
        }
        for labels, group in groups.items()
    ]

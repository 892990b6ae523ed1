"""Embedding a set of images, and the searches of a protocol."""

import torch
import torch.nn.functional as F

from core.distributed import sum_over_processes
from eval_metrics import CosineDistances, match_ranks
from model import FEATURES
from testing import re_rank
from utils import InputError, autocast, process_count, progress


class FeaturesNotFinite(InputError):
    """A network's features are not finite."""


def network_embedding(net, device, preprocess, amp="off"):
    """Wrap a network as an embedding for `extract`: features of an image and its mirror, averaged, of unit length.

    preprocess: uint8 [B, 3, H, W] -> the network's input.
    """
    net.eval()

    def embed(images, modality):
        images = preprocess(images.to(device, non_blocking=True))
        with autocast(device, amp):
            views = [net.embed(view, modality) for view in (images, images.flip(3))]
        return {name: F.normalize(a.float() + b.float()) for name, a, b in zip(FEATURES, *views, strict=True)}

    return embed


@torch.inference_mode()
def extract(embed, loader, modality, desc):
    """Features of all images of a loader: {name: float32 [N, C]}, on the device where `embed` leaves them.

    embed: (uint8 [B, 3, H, W], modality) -> {name: [B, C]}.

    Raises FeaturesNotFinite when a feature is not finite.
    """
    batches = [embed(images, modality) for images in progress(loader, desc=desc, unit="batch", leave=False)]
    features = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    if process_count() > 1:  # each has some rows, and all get all
        for name, values in features.items():
            features[name] = values.new_zeros(len(loader.dataset), values.shape[1])
            features[name][loader.rows] = values[: len(loader.rows)]
            sum_over_processes(features[name])
    for name, values in features.items():
        if not torch.isfinite(values).all():
            raise FeaturesNotFinite(f"{desc}: the {name} features are not finite; train at a lower --lr")
    return features


def run_search(features, search, reranking=()):
    """One search -> {(feature name, re-ranking): `eval_metrics.MatchRanks`}.

    search: a `datasets.Search`. features: {"visible": {name: [N, C]}, "infrared": {name: [M, C]}}, of unit length, of
    the images of its `Searches`. Plain results, by cosine similarity, have the re-ranking "none". reranking: any of
    "k_reciprocal" and "random_walk", whose results are added.
    """
    distances = {}
    for name in features[search.query.modality]:
        query, gallery = search.features(features, name)
        distances[name, "none"] = CosineDistances(query, gallery)
        for method in reranking:
            distances[name, method] = getattr(re_rank, method)(query, gallery)
    (_, _, q_ids, q_cameras), (_, _, g_ids, g_cameras) = search.query, search.gallery
    labels = q_ids, g_ids, q_cameras, g_cameras
    return {name: match_ranks(search.rules, values, *labels) for name, values in distances.items()}

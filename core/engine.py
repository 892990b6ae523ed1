"""The loops: one epoch of training, embedding a set of images, and the searches of a protocol."""

import torch
import torch.nn.functional as F

from core import re_rank
from core.distributed import sum_over_processes
from core.meter import EpochMeter
from eval_metrics import CosineDistances, match_ranks
from model import FEATURES
from utils import InputError, autocast, process_count, progress

LOG_STEPS = 10  # steps between two readings of losses and health: each waits for the device


class FeaturesNotFinite(InputError):
    """A network's features are not finite."""


def train_epoch(step, optimizer, loader, desc="train", meter=None, saver=None, schedule=None, run_steps=(0, None)):
    """One pass over `loader`, or the rest of it -> `EpochMeter` of the whole epoch.

    step: a `step.TrainStep`, whose criterion.health(output, labels) -> a named tuple of scalars. meter: of the steps
    before `loader`'s first batch. saver: after each step, saver.due() says whether to call saver.save(meter).
    schedule(step) sets the learning rates before each step, counted from 0 in the epoch. run_steps: of the whole run,
    those before the epoch and all, for the bar.

    Raises Diverged when a loss or gradient is not finite. That is read every few steps, as it waits for the device, so
    that some more steps may follow; but a network with a weight that is not finite is never saved or returned.
    """
    net, device = step.net, step.device
    net.train()
    meter = meter or EpochMeter(device)
    meter.start_clock()
    before, total = run_steps
    with progress(loader, desc=desc, unit="step", leave=False, initial=before + meter.step, total=total) as bar:
        for batch in bar:
            if schedule is not None:
                schedule(meter.step)
            losses, output, labels = step(*(t.to(device, non_blocking=True) for t in batch))
            meter.add(losses, [p.grad for p in net.parameters() if p.grad is not None])
            optimizer.step()
            meter.images += len(labels)
            if meter.step % LOG_STEPS == 0 or meter.step == 1:
                meter.read(step.criterion.health(output, labels))
                bar.set_postfix({name: f"{value:.3f}" for name, value in meter.means().items()})
                meter.check(desc)
            if saver is not None and saver.due():
                meter.stop_clock()  # saving is not training
                meter.check(desc, _weights(net))
                saver.save(meter)
                meter.start_clock()
    meter.stop_clock()
    meter.check(desc, _weights(net))
    return meter


def _weights(net):
    return [value for value in net.state_dict().values() if value.is_floating_point()]


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
            raise FeaturesNotFinite(
                f"{desc}: the {name} features are not finite; the network has diverged: train at a lower --lr"
            )
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
        if "k_reciprocal" in reranking:
            distances[name, "k_reciprocal"] = re_rank.k_reciprocal(query, gallery)
        if "random_walk" in reranking:
            distances[name, "random_walk"] = re_rank.random_walk(query, gallery)
    (_, _, q_ids, q_cameras), (_, _, g_ids, g_cameras) = search.query, search.gallery
    labels = q_ids, g_ids, q_cameras, g_cameras
    return {name: match_ranks(search.rules, values, *labels) for name, values in distances.items()}

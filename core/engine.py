"""The loops: one epoch of training, embedding a set of images, and the searches of a protocol."""

import time

import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from core import re_rank
from core.distributed import min_over_processes, sum_over_processes
from eval_metrics import CosineDistances, match_ranks
from utils import InputError, autocast, process_count, progress

LOG_STEPS = 10  # steps between two readings of losses and health: each waits for the device


class Diverged(InputError):
    """A loss, its gradient or a weight is not finite."""


class Epoch:
    """The sums of an epoch of training up to some step. They stay on the device: only reading them waits for it.

    `vars(epoch)`, a dict of tensors and plain values, is what a checkpoint within the epoch keeps of it.
    """

    def __init__(self, device, kept=None):
        self.step, self.seconds, self.images, self.readings = 0, 0.0, 0, 0
        self.names, self.losses = [], torch.zeros((), device=device)
        self.health_names, self.health = [], torch.zeros((), device=device)
        self.first_bad = torch.full((), torch.inf, device=device)  # the first step that is not finite
        for name in vars(self).keys() & (kept or {}).keys():  # older checkpoints keep more
            value = kept[name]
            setattr(self, name, value.to(device) if isinstance(value, torch.Tensor) else value)

    def add(self, losses, grads):
        """Count a step: its losses, a named tuple of scalars, and the gradients of `losses.total`."""
        self.step += 1
        self.names = list(losses._fields)
        self.losses = self.losses + torch.stack([loss.detach() for loss in losses])
        finite = torch.isfinite(losses.total.detach()) & torch.isfinite(get_total_norm(grads))
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp_max(self.step))

    def read(self, health):
        """Count a reading of the features' health, a named tuple of scalars."""
        self.health_names = list(health._fields)
        self.health = self.health + torch.stack(health)
        self.readings += 1

    def check(self, desc, weights=()):
        """Raise Diverged, on all processes, if a step was not finite on one of them, or if `weights` are not now."""
        bad = [self.first_bad] + [torch.where(torch.isfinite(w).all(), torch.inf, self.step) for w in weights]
        if (step := min_over_processes(torch.stack(bad).min()).item()) <= self.step:
            raise Diverged(
                f"{desc}: the loss, its gradient or a weight is not finite from step {int(step)} on; lower --lr, or "
                "start from --weights imagenet"
            )

    def means(self):
        """{name: mean} of the losses."""
        return dict(zip(self.names, (self.losses / self.step).tolist(), strict=True))

    def over_processes(self):
        """The epoch with the mean losses of all processes."""
        whole = Epoch(self.losses.device, vars(self))
        whole.losses = sum_over_processes(self.losses.clone()) / process_count()
        return whole

    def summary(self):
        """The epoch's entry in the log: means, health, `seconds`, and `images_per_second` (inputs of all processes)."""
        health = dict(zip(self.health_names, (self.health / self.readings).tolist(), strict=True))
        seconds = max(self.seconds, 1e-9)
        speed = {"seconds": round(seconds, 3), "images_per_second": round(process_count() * self.images / seconds, 1)}
        return {**self.means(), **health, **speed}


def train_epoch(net, criterion, optimizer, loader, augment, device, amp="off", desc="train", epoch=None, pause=None):
    """One pass over `loader`, or the rest of it -> `Epoch`, whose `step` counts the whole epoch's.

    augment: uint8 (visible, infrared) on the device -> the two inputs of `net`; criterion(output, labels) -> a named
    tuple of scalar tensors whose `total` is minimised, criterion.health(output, labels) -> another.
    epoch: what came before `loader`'s first batch. pause(): after each step, whether to return already.

    Raises Diverged when a loss or gradient is not finite. That is read every few steps, as it waits for the device, so
    that some more steps may follow; but a network with a weight that is not finite is never returned.
    """
    net.train()
    epoch, start = epoch or Epoch(device), time.perf_counter()
    before = epoch.seconds
    with progress(loader, desc=desc, unit="step", leave=False) as bar:
        for visible, infrared, labels in bar:
            visible, infrared, labels = (t.to(device, non_blocking=True) for t in (visible, infrared, labels))
            visible, infrared = augment(visible, infrared)
            with autocast(device, amp):
                output = net(visible, infrared)
            losses = criterion(output, labels)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            epoch.add(losses, [p.grad for p in net.parameters() if p.grad is not None])
            optimizer.step()
            epoch.images += len(labels)
            if epoch.step % LOG_STEPS == 0 or epoch.step == 1:
                epoch.read(criterion.health(output, labels))
                bar.set_postfix({name: f"{value:.3f}" for name, value in epoch.means().items()})
                epoch.check(desc)
            if pause is not None and pause():
                break
    epoch.check(desc, [value for value in net.state_dict().values() if value.is_floating_point()])
    epoch.seconds = before + time.perf_counter() - start
    return epoch


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
    if process_count() > 1:  # each has some rows, and all get all
        for name, values in features.items():
            features[name] = values.new_zeros(len(loader.dataset), values.shape[1])
            features[name][loader.rows] = values[: len(loader.rows)]
            sum_over_processes(features[name])
    for name, values in features.items():
        if not torch.isfinite(values).all():
            raise InputError(
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

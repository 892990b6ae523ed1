"""The loops: one epoch of training, embedding a set of images, and the searches of a protocol."""

import numpy as np
import torch
import torch.nn.functional as F

from core import re_rank
from core.distributed import sum_over_processes
from core.meter import EpochMeter
from data_manager import describe
from eval_metrics import NOT_SEEN, CosineDistances, match_ranks
from utils import InputError, autocast, process_count, progress

RANKS = (1, 5, 10, 20)
LOG_STEPS = 10  # steps between two readings of losses and health: each waits for the device


class FeaturesNotFinite(InputError):
    """A network's features are not finite."""


def train_epoch(net, criterion, optimizer, loader, augment, device, amp="off", desc="train", meter=None, saver=None):
    """One pass over `loader`, or the rest of it -> `EpochMeter` of the whole epoch.

    augment: uint8 (visible, infrared) and labels on the device -> the two inputs of `net`, and their labels;
    criterion(output, labels) -> a named tuple of scalar tensors whose `total` is minimised, criterion.health(output,
    labels) -> another. meter: of the steps before `loader`'s first batch. saver: after each step, saver.due() says
    whether to call saver.save(meter).

    Raises Diverged when a loss or gradient is not finite. That is read every few steps, as it waits for the device, so
    that some more steps may follow; but a network with a weight that is not finite is never saved or returned.
    """
    net.train()
    meter = meter or EpochMeter(device)
    meter.start_clock()
    with progress(loader, desc=desc, unit="step", leave=False) as bar:
        for batch in bar:
            visible, infrared, labels = augment(*(t.to(device, non_blocking=True) for t in batch))
            with autocast(device, amp):
                output = net(visible, infrared)
            losses = criterion(output, labels)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            meter.add(losses, [p.grad for p in net.parameters() if p.grad is not None])
            optimizer.step()
            meter.images += len(labels)
            if meter.step % LOG_STEPS == 0 or meter.step == 1:
                meter.read(criterion.health(output, labels))
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
        return {name: F.normalize(a.float() + b.float()) for name, a, b in zip(("POOL", "FC"), *views, strict=True)}

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

    features: {"visible": {name: [N, C]}, "infrared": {name: [M, C]}}, of unit length, for the images of a `Searches`.
    Plain results, by cosine similarity, have the re-ranking "none"; those of `reranking`, any of "k_reciprocal" and
    "random_walk", stand beside them.
    """
    distances = {}
    for name in features[search.query.modality]:
        query, gallery = features_of(features, search, name)
        distances[name, "none"] = CosineDistances(query, gallery)
        if "k_reciprocal" in reranking:
            distances[name, "k_reciprocal"] = re_rank.k_reciprocal(query, gallery)
        if "random_walk" in reranking:
            distances[name, "random_walk"] = re_rank.random_walk(query, gallery)
    (_, _, q_ids, q_cameras), (_, _, g_ids, g_cameras) = search.query, search.gallery
    labels = q_ids, g_ids, q_cameras, g_cameras
    return {name: match_ranks(search.setting["dataset"], values, *labels) for name, values in distances.items()}


def check_matches(search):
    """Raise InputError when no query of a search has a match that it sees."""
    (_, _, *asked), (_, _, *there), not_seen = search.query, search.gallery, NOT_SEEN[search.setting["dataset"]]
    asked, there = (np.unique(np.stack(labels), axis=1) for labels in (asked, there))
    match = asked[0][:, None] == there[0]
    if not_seen:
        match &= ~not_seen(*asked[:, :, None], *there)
    if not match.any():
        raise InputError(
            f"no query has a match in the gallery that it sees ({describe(search.setting)}; not seen: "
            f"{search.setting['unseen'] or 'nothing'}); check the ids, and the cameras' numbers"
        )


def features_of(features, search, name):
    """One feature of a search's queries and gallery: [Q, C], [G, C]."""
    return [features[images.modality][name][images.rows] for images in (search.query, search.gallery)]


def scores(found):
    """`MatchRanks` -> {"Rank-1": ..., "mAP": ..., "mINP": ...}, in percent."""
    cmc, mean_ap, mean_inp = found.means(max(RANKS))
    return {f"Rank-{k}": 100 * float(cmc[k - 1]) for k in RANKS} | {"mAP": 100 * mean_ap, "mINP": 100 * mean_inp}


def curves(found):
    """`MatchRanks` -> in percent, "cmc" at the ranks 1 .. 20, and "precision" at a recall of 0, 10 .. 100 %."""
    return {"cmc": (100 * found.cmc()).tolist(), "precision": (100 * found.precision_at_recall()).tolist()}


def choose_queries(found, search, which, count, seed=0):
    """Some of the queries that have a match: positions in `found`, a `MatchRanks`.

    which: "worst" or "best" by average precision, "random", or an identity, whose worst come first. Equal ones come in
    the queries' order. Raises InputError when no query of that identity has a match.
    """
    precision = found.average_precision()
    if which == "random":
        drawn = torch.randperm(len(precision), generator=torch.Generator().manual_seed(seed))[:count]
        return drawn.sort().values.tolist()
    order = precision.sort(descending=which == "best", stable=True).indices.tolist()
    if which not in ("worst", "best"):
        ids = search.query.ids[found.rows.cpu().numpy()]
        order = [i for i in order if ids[i] == int(which)]
        if not order:
            raise InputError(f"--which {which}: no query of that identity has a match; there are {_some(ids)}")
    return order[:count]


def _some(ids):
    ids = np.unique(ids)
    return ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")


def rank_images(features, paths, search, name, found, chosen, top=None):
    """The nearest gallery images, of those that it sees, of each of the chosen queries, as plain values.

    Similarities are computed anew: images that are equally near but for rounding may rank otherwise than in `found`.

    name: which of the features; paths {modality: [N]} are those of a `Searches`; found, chosen: as `choose_queries`
    has them. -> a list of {"path", "id", "camera", "modality", "average_precision", "first_match" (its rank among
    images, from 1), "gallery": [{"path", "id", "camera", "similarity", "correct"}, ...]}; at most `top` images each, or
    all.
    """
    query, gallery = features_of(features, search, name)
    rows = found.rows[chosen]
    similarity = query[rows] @ gallery.T
    similarity = similarity.masked_fill(~_seen(search, rows).to(similarity.device), -torch.inf)
    values, order = (x[:, :top].cpu() for x in similarity.sort(dim=1, descending=True, stable=True))

    def image(images, i):
        path = paths[images.modality][images.rows[i]]
        return {"path": path, "id": int(images.ids[i]), "camera": int(images.cameras[i])}

    precision, listed = found.average_precision(), []
    for i, row, near, nearest in zip(chosen, rows.tolist(), values.tolist(), order.tolist(), strict=True):
        asked = image(search.query, row) | {"modality": search.query.modality}
        asked |= {"average_precision": float(precision[i]), "first_match": int(found.positions[i, 0])}
        asked["gallery"] = [
            (there := image(search.gallery, j)) | {"similarity": value, "correct": there["id"] == asked["id"]}
            for j, value in zip(nearest, near, strict=True)
            if value > -np.inf
        ]
        listed.append(asked)
    return listed


def pair_distances(features, search, name):
    """Cosine distances (0 to 2) of all queries to the gallery images that they see -> (those of the same identity,
    those of two identities), two NumPy arrays. Raises InputError when there are none of either."""
    query, gallery = features_of(features, search, name)
    distances, seen = (1 - query @ gallery.T).cpu(), _seen(search, torch.arange(len(query)))
    same = torch.from_numpy(search.query.ids[:, None] == search.gallery.ids)
    pairs = [distances[seen & chosen].numpy() for chosen in (same, ~same)]
    if not all(map(len, pairs)):
        raise InputError("no distances to compare: the search needs a match, and images of two identities")
    return pairs


def _seen(search, rows):
    """Which gallery images some of the queries see: bool [n, G], on the CPU."""
    (_, _, ids, cameras), gallery, rows = search.query, search.gallery, rows.cpu().numpy()[:, None]
    not_seen = NOT_SEEN[search.setting["dataset"]]
    hidden = not_seen(ids[rows], cameras[rows], gallery.ids, gallery.cameras) if not_seen else False
    return ~torch.from_numpy(np.broadcast_to(hidden, (len(rows), len(gallery.ids))).copy())


def summarise(rows):
    """Rows of single searches -> one row for all trials of a setting: mean and standard deviation of each metric.

    A row is a dict of labels, and of one trial "trial", "checkpoint", "network", "queries", "evaluated" (those that
    have a match), "gallery", "metrics" {name: percent} and "curves" {name: percents}; rows whose other labels agree are
    trials of one setting. The deviation is the population's, as papers print it; of a single trial there is none. Of
    curves there are means only.
    """
    groups = {}
    varying = ("trial", "checkpoint", "network", "queries", "evaluated", "gallery", "metrics")
    for row in rows:
        labels = {name: value for name, value in row.items() if name not in (*varying, "curves")}
        groups.setdefault(tuple(labels.items()), []).append(row)
    return [
        {
            **dict(labels),
            "trials": [row["trial"] for row in group],
            "mean": {name: float(np.mean([row["metrics"][name] for row in group])) for name in group[0]["metrics"]},
            "std": {name: float(np.std([row["metrics"][name] for row in group])) for name in group[0]["metrics"]}
            if len(group) > 1
            else None,
            "curves": {
                name: np.mean([row["curves"][name] for row in group], axis=0).tolist() for name in group[0]["curves"]
            },
            "per_trial": [{name: row[name] for name in varying} for row in group],
        }
        for labels, group in groups.items()
    ]

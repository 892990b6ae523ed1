"""Draw figures of a checkpoint or of runs: rankings, heat maps, feature maps, distances, curves.

    python -m tools.visualize ranking --resume save_model/..._best.t --out ranking.png

--help lists all kinds of figures.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ChannelAug import normalise
from core.checkpoint import find_checkpoint
from core.images import read_image
from data_manager import NUMBER
from datasets import DATASETS, Search, search_title
from drawing import figures
from model import FEATURES
from testing import engine, evaluation
from testing.results import choose_queries, pair_distances, rank_images, read_results
from training.log import read_json_lines
from utils import ArgumentParser, InputError, bounded, cli, progress, select_device


def get_args_parser():
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(draw, name, text, nargs=None):
        """A command that draws a checkpoint's figure by `draw` -> the group of its own flags. nargs: of --resume."""
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(draw=draw)
        group = sub.add_argument_group("figure")
        group.add_argument("--out", required=True, metavar="FILE", help="figure to write: .png, .svg or .pdf")
        group.add_argument("--feature", choices=FEATURES, default="FC", help="feature after or before the bottleneck")
        text = "trial of the gallery, for SYSU-MM01 and LLCM (default: 0)"
        group.add_argument("--gallery", type=bounded(int, 0, 9), help=text)
        source = sub.add_argument_group("checkpoint and protocol")
        text = "checkpoint (or two, to compare them)" if nargs else "checkpoint"
        source.add_argument("--resume", required=True, nargs=nargs, help=f"{text}: a path, or a name in --model_path")
        evaluation.add_flags(source)
        return group

    ranking = command(draw_ranking, "ranking", "queries with their nearest gallery images under the protocol")
    heatmap = command(draw_heatmaps, "heatmap", "where the network looks, for queries and their matches")
    for group, queries in ((ranking, 6), (heatmap, 3)):
        text = "queries: worst or best by average precision, random, or an ID"
        group.add_argument("--which", type=which, default="worst", help=text)
        group.add_argument("--queries", type=bounded(int, 1, 100), default=queries, help="number of queries")
        group.add_argument("--seed", type=bounded(int, 0), default=0, help="seed of --which random")
    ranking.add_argument("--top", type=bounded(int, 1, 50), default=10, help="gallery images per query")
    tsne = command(draw_feature_map, "tsne", "a map of the features of some identities in both modalities")
    tsne.add_argument("--people", type=bounded(int, 2, 100), default=10, help="number of identities")
    tsne.add_argument("--seed", type=bounded(int, 0), default=0, help="seed of the map and of the identities")
    command(draw_distances, "distances", "distances within and between identities", nargs="+")
    curves = commands.add_parser("curves", help="losses and metrics by epoch, from logs of runs; or CMC curves")
    curves.set_defaults(draw=draw_curves)
    curves.add_argument("logs", nargs="+", metavar="FILE", help="{name}.jsonl of runs, or .json of testa.py")
    curves.add_argument("--out", required=True, metavar="FILE", help="figure to write: .png, .svg or .pdf")
    curves.add_argument("--values", nargs="+", help="values of the logs (default: identity triplet FC/Rank-1)")
    curves.add_argument("--labels", nargs="+", help="names of the runs (default: those of their files)")
    return parser


def which(text):
    """An argparse type: the choice of queries."""
    if text not in ("worst", "best", "random") and not re.fullmatch(NUMBER, text):
        raise argparse.ArgumentTypeError(f"{text!r} is not worst, best, random, or the number of an identity")
    return text


def main(argv=None):
    """Returns the path of the figure."""
    args = get_args_parser().parse_args(argv)
    figures.check_picture(args.out)
    figures.save(args.draw(args), args.out)
    print(args.out)
    return args.out


class Tested(NamedTuple):
    """A checkpoint's network, one search with paths and features of its images, and both in words."""

    net: torch.nn.Module
    device: torch.device
    size: tuple
    paths: dict
    search: Search
    features: dict
    network: str
    setting: str


def embed_test(args, resume):
    """The checkpoint `resume` and the search of the flags -> `Tested`."""
    evaluation.check_search_flags(args)
    spec = DATASETS[args.dataset]
    if args.gallery is not None and ("trial" in spec.options or len(spec.trials) == 1):
        raise InputError(f"--gallery is for SYSU-MM01 and LLCM; {spec.name} draws none: leave it out")
    device, data_path = select_device(args.gpu, args.amp), evaluation.data_folder(args)
    path = find_checkpoint(resume, args.model_path)
    net, size, origin = evaluation.open_checkpoint(path, data_path)
    trial = evaluation.tested_trial(path, origin, args.dataset, args.trial, cross_data=False)
    test = evaluation.find_searches(args, data_path, trial, [args.gallery or 0])
    net.to(device, memory_format=torch.channels_last)
    embed = engine.network_embedding(net, device, normalise, args.amp)
    features = evaluation.embed_images(embed, test.paths, size, args)
    (search,) = test.searches
    name = spec.title(origin["demo"], len(search.query.rows))
    setting = f"{name}, {search_title(search.setting)}, trial {search.setting['trial']}; {args.feature}"
    return Tested(net, device, size, test.paths, search, features, origin["network"], setting)


def rank_queries(args, tested, top=None):
    """The queries of `--which` with their `top` nearest images, or all: as `rank_images` gives them."""
    matches = engine.run_search(tested.features, tested.search)[args.feature, "none"]
    queries = choose_queries(matches, tested.search, args.which, args.queries, args.seed)
    return rank_images(tested.features, tested.paths, tested.search, args.feature, matches, queries, top)


def draw_ranking(args):
    tested = embed_test(args, args.resume)
    ranked = rank_queries(args, tested, args.top)
    title = (
        f"{tested.setting}; {tested.network}; queries: {args.which}. AP: average precision; numbers: cosine similarity"
    )
    return figures.ranking_sheet(figures.ranking_tiles(ranked), title)


def draw_heatmaps(args):
    tested = embed_test(args, args.resume)
    pairs = []
    for query in progress(rank_queries(args, tested), desc="heat maps", unit="pair"):
        match = next(image for image in query["gallery"] if image["correct"])
        images = [(query, tested.search.query.modality), (match, tested.search.gallery.modality)]
        names, heats = ("query", f"match, rank {query['first_match']}"), pair_heats(tested, images, args.feature)
        captions = [f"{name}: id {i['id']}, camera {i['camera']}" for name, (i, _) in zip(names, images, strict=True)]
        pairs.append(list(zip(captions, (image["path"] for image, _ in images), heats, strict=True)))
    title = (
        f"{tested.setting}; {tested.network}; queries: {args.which}. Dark: smallest, yellow: largest value of each map"
    )
    return figures.heatmap_sheet(pairs, title)


def pair_heats(tested, images, feature):
    """Where the network looks in two images [(image, modality), ...] -> for each {name: heat [H, W], 0 to 1}.

    "similarity": the contribution of each position of the last feature map to the similarity to the other image, 0 if
    negative: HiResCAM (Draelos and Carin, 2020), which is Grad-CAM without averaging gradients over positions. Images
    are not mirrored; of DEEN's three embeddings, it is the plain one's. "attention": AFAM's spatial attention, if the
    network has it. Each is scaled to its range.
    """
    from pytorch_grad_cam import HiResCAM  # slow to import

    net, device = tested.net, tested.device
    inputs = [
        normalise(torch.from_numpy(read_image(image["path"], tested.size)).movedim(-1, 0)[None].to(device))
        for image, _ in images
    ]
    streams = [Stream(net, modality, feature) for _, modality in images]
    with torch.no_grad():
        vectors = [F.normalize(stream(x))[0] for stream, x in zip(streams, inputs, strict=True)]
    heats = []
    for i, stream in enumerate(streams):
        last = net.shared if len(net.shared) else net.attention
        with HiResCAM(stream, [last]) as cam:
            maps = {"similarity": cam(inputs[i], [vectors[1 - i].dot])[0]}
        if net.options["attention"]:
            maps["attention"] = attention_map(net, inputs[i], stream.modality)
        heats.append({name: (heat - heat.min()) / max(np.ptp(heat), 1e-9) for name, heat in maps.items()})
    return heats


class Stream(torch.nn.Module):
    """One stream of a network as a module: images [B, 3, H, W] -> [B, C], not normalised. The gradient of the cosine
    similarity itself is orthogonal to the feature: contributions of the positions would cancel."""

    def __init__(self, net, modality, feature):
        super().__init__()
        self.net, self.modality, self.feature = net, modality, feature

    def forward(self, images):
        return self.net.vectors(images, self.modality)[self.feature == "FC"]


def attention_map(net, images, modality):
    """AFAM's spatial attention for an image [1, 3, H, W] -> [h, w], 0 to 1."""
    maps = []
    handle = net.attention.spatial.register_forward_hook(lambda module, inputs, output: maps.append(output.sigmoid()))
    with torch.no_grad():
        net.embed(images, modality)
    handle.remove()
    return maps[0][0, 0].cpu().numpy()


def draw_feature_map(args):
    from sklearn.manifold import TSNE  # slow to import

    tested = embed_test(args, args.resume)
    query, gallery = tested.search.query, tested.search.gallery
    people = np.intersect1d(query.ids, gallery.ids)
    if len(people) < args.people:
        raise InputError(f"--people {args.people}: only {len(people)} have images of both modalities; reduce it")
    features = torch.cat(tested.search.features(tested.features, args.feature)).cpu().numpy()
    ids = np.concatenate([query.ids, gallery.ids])
    modalities = np.repeat([query.modality, gallery.modality], [len(query.ids), len(gallery.ids)])
    chosen = np.isin(ids, np.random.default_rng(args.seed).choice(people, args.people, replace=False))
    features = features[chosen]
    perplexity = min(30, (len(features) - 1) / 3)
    points = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=args.seed).fit_transform(features)
    title = f"t-SNE; {tested.setting}; {tested.network}; numbers: identities"
    return figures.feature_map(points, ids[chosen], modalities[chosen], title)


def draw_distances(args):
    if len(args.resume) > 2 or len(set(args.resume)) < len(args.resume):
        raise InputError(f"--resume {' '.join(args.resume)}: pass one checkpoint, or two to compare")
    tested = [embed_test(args, resume) for resume in args.resume]
    if len({one.setting for one in tested}) > 1:
        raise InputError(
            f"--resume {' '.join(args.resume)}: were trained on different trials, with different people; pass "
            "checkpoints of one trial"
        )
    choices = [one.network for one in tested], [Path(resume).name for resume in args.resume], args.resume
    labels = next(labels for labels in choices if len(set(labels)) == len(labels))
    pairs = [pair_distances(one.features, one.search, args.feature) for one in tested]
    return figures.distance_histograms(dict(zip(labels, pairs, strict=True)), tested[0].setting)


def draw_curves(args):
    if args.labels and len(args.labels) != len(args.logs):
        raise InputError(f"--labels {' '.join(args.labels)}: pass one for each of the {len(args.logs)} files")
    names = [Path(log).stem for log in args.logs]
    labels = args.labels or (names if len(set(names)) == len(names) else args.logs)
    if len(set(labels)) < len(labels):
        raise InputError(f"{' '.join(labels)}: two files have the same name; distinguish them with --labels")
    kinds = {Path(log).suffix for log in args.logs}
    if kinds == {".json"}:
        if args.values:
            raise InputError(f"--values {' '.join(args.values)}: is for logs (.jsonl); leave it out for .json")
        tables = [read_results(log)["results"] for log in args.logs]
        return figures.result_curves(dict(zip(labels, tables, strict=True)), "cmc")
    if ".json" in kinds:
        raise InputError(f"{' '.join(args.logs)}: pass logs (.jsonl) or results of testa.py (.json), not both")
    runs = dict(zip(labels, map(read_log, args.logs), strict=True))
    return figures.epoch_curves(runs, args.values or ["identity", "triplet", "FC/Rank-1"])


def read_log(path):
    """The entries of a run's log."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; pass the .jsonl of a run, which is under its --log_path")
    entries = read_json_lines(Path(path))
    if not entries:
        raise InputError(f"{path}: contains no epoch; pass the .jsonl of a run that has finished one")
    return entries


if __name__ == "__main__":
    cli(main)

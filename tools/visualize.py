"""Pictures of a checkpoint and of runs: rankings, heat maps, feature maps, distances, curves.

    python -m tools.visualize ranking --resume save_model/..._best.t --out ranking.png

ranking     queries with the gallery images nearest to them, as the protocol lets them see it
heatmap     where the network looks, over queries and their matches
tsne        the features of some identities, both modalities, on a map
distances   how far images of one identity and of two identities are apart
curves      losses and metrics of runs by epoch, from their logs; or CMC curves, from testa.py's --json
"""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data_manager
from ChannelAug import normalise
from core import engine, protocol
from core.checkpoint import find_checkpoint
from core.log import read_json_lines
from data_loader import read_image
from model import FEATURES
from tools import figures
from utils import ArgumentParser, InputError, bounded, cli, progress, select_device


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, resume):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("--out", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf")
        if resume:
            sub.add_argument("--resume", required=True, **resume)
            protocol.add_flags(sub)
            sub.add_argument("--feature", choices=FEATURES, default="FC")
            sub.add_argument("--gallery", type=bounded(int, 0, 9), help="SYSU-MM01, LLCM: gallery's trial (default: 0)")
        return sub

    one = {"help": "checkpoint: a path, or a name under --model_path"}
    ranking = command("ranking", "queries with their nearest gallery images", one)
    heatmap = command("heatmap", "where the network looks, over queries and their matches", one)
    for sub, queries in ((ranking, 6), (heatmap, 3)):
        sub.add_argument(
            "--which", type=which, default="worst", help="queries: worst or best by average precision, random, or an ID"
        )
        sub.add_argument("--queries", type=bounded(int, 1, 100), default=queries, help="how many")
        sub.add_argument("--seed", type=bounded(int, 0), default=0, help="of --which random")
    ranking.add_argument("--top", type=bounded(int, 1, 50), default=10, help="gallery images of each")
    tsne = command("tsne", "features of some identities, both modalities, on a map", one)
    tsne.add_argument("--people", type=bounded(int, 2, 100), default=10, help="identities")
    tsne.add_argument("--seed", type=bounded(int, 0), default=0, help="of the identities' choice and of the map")
    two = {"help": "one checkpoint, or two: from before and after", "nargs": "+"}
    command("distances", "distances of images of one identity and of two", two)
    curves = command("curves", "losses and metrics by epoch, or CMC curves", None)
    curves.add_argument("logs", nargs="+", metavar="FILE", help="runs' {name}.jsonl, or testa.py's .json")
    curves.add_argument("--values", nargs="+", help="what of a log's entries (default: total correct FC/Rank-1)")
    curves.add_argument("--labels", nargs="+", help="names of the runs (default: those of their files)")
    return parser


def which(text):
    """An argparse type: which queries."""
    if text not in ("worst", "best", "random") and not re.fullmatch(data_manager.NUMBER, text):
        raise argparse.ArgumentTypeError(f"{text!r} is not worst, best, random, or the number of an identity")
    return text


def main(argv=None):
    """Returns the picture's path."""
    args = get_args_parser().parse_args(argv)
    figures.check_picture(args.out)
    draw = {"ranking": ranking, "heatmap": heatmap, "tsne": tsne, "distances": distances, "curves": curves}
    figures.save(draw[args.command](args), args.out)
    print(args.out)
    return args.out


class Tested(NamedTuple):
    """A checkpoint's network, the search that the flags ask for with its images' paths and features, and what both are
    in words."""

    net: torch.nn.Module
    device: torch.device
    size: tuple
    paths: dict
    search: data_manager.Search
    features: dict
    network: str
    setting: str


def embed_test(args, resume):
    """-> `Tested`: all images of the flags' search, embedded by the checkpoint that `resume` names."""
    protocol.check_flags(args)
    if args.dataset == "regdb" and args.gallery is not None:
        raise InputError("--gallery is SYSU-MM01's and LLCM's: RegDB's galleries are whole; leave it out")
    device, data_path = select_device(args.gpu, args.amp), protocol.data_folder(args)
    path = find_checkpoint(resume, args.model_path)
    net, size, origin = protocol.open_checkpoint(path, data_path)
    trial = protocol.tested_trial(path, origin, args.dataset, args.trial)
    test = protocol.searches(args, data_path, trial, [args.gallery or 0])
    net.to(device, memory_format=torch.channels_last)
    embed = engine.network_embedding(net, device, normalise, args.amp)
    features = protocol.embed_images(embed, test.paths, size, args)
    (search,) = test.searches
    setting = f"{data_manager.describe(search.setting)}, trial {search.setting['trial']}"
    name = data_manager.data_name(args.dataset, origin["demo"], len(search.query.rows))
    setting = f"{name}, {setting}; {args.feature}"
    return Tested(net, device, size, test.paths, search, features, origin["network"], setting)


def choose(args, tested, top=None):
    """The queries that `--which` asks for, with `top` images each, or all: as `engine.rank_images` gives them."""
    found = engine.run_search(tested.features, tested.search)[args.feature, "none"]
    chosen = engine.choose_queries(found, tested.search, args.which, args.queries, args.seed)
    return engine.rank_images(tested.features, tested.paths, tested.search, args.feature, found, chosen, top)


def ranking(args):
    tested = embed_test(args, args.resume)
    ranked = choose(args, tested, args.top)
    title = (
        f"{tested.setting}; {tested.network}; queries: {args.which}. AP: average precision; numbers: cosine similarity"
    )
    return figures.ranking_sheet(figures.ranking_tiles(ranked), title)


def heatmap(args):
    tested = embed_test(args, args.resume)
    pairs = []
    for query in progress(choose(args, tested), desc="heat maps", unit="pair"):
        match = next(image for image in query["gallery"] if image["correct"])
        images = [(query, tested.search.query.modality), (match, tested.search.gallery.modality)]
        captions = ["query", f"match, rank {query['first_match']}"]
        pairs.append(
            [
                (f"{caption}: id {image['id']}, camera {image['camera']}", image["path"], heat)
                for caption, (image, _), heat in zip(
                    captions, images, pair_heats(tested, images, args.feature), strict=True
                )
            ]
        )
    title = f"{tested.setting}; {tested.network}; queries: {args.which}. Dark: least, yellow: most of each map"
    return figures.heatmap_sheet(pairs, title)


def pair_heats(tested, images, feature):
    """Where the network looks in two images, [(image, modality), ...] -> of each {name: heat [H, W], 0 to 1}.

    "similarity": what each place of the last feature map adds to the similarity to the other image, or 0 where it takes
    away: HiResCAM (Draelos and Carin, 2020), Grad-CAM without its averaging of gradients over places. Of the images
    without their mirrors. "attention": AFAM's spatial attention, where the network has it. Each from its smallest to
    its largest value.
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
    """One stream of a network as a module: images [B, 3, H, W] -> [B, C], not normalised. The cosine similarity's own
    gradient would be orthogonal to the feature: what a place adds and what another takes away would cancel."""

    def __init__(self, net, modality, feature):
        super().__init__()
        self.net, self.modality, self.feature = net, modality, feature

    def forward(self, images):
        return self.net.vectors(images, self.modality)[self.feature == "FC"]


def attention_map(net, images, modality):
    """AFAM's spatial attention in [1, 3, H, W] -> [h, w], 0 to 1."""
    kept = []
    handle = net.attention.spatial.register_forward_hook(lambda module, inputs, output: kept.append(output.sigmoid()))
    with torch.no_grad():
        net.embed(images, modality)
    handle.remove()
    return kept[0][0, 0].cpu().numpy()


def tsne(args):
    from sklearn.manifold import TSNE  # slow to import

    tested = embed_test(args, args.resume)
    query, gallery = tested.search.query, tested.search.gallery
    people = np.intersect1d(query.ids, gallery.ids)
    if len(people) < args.people:
        raise InputError(f"--people {args.people}: only {len(people)} have images of both modalities in this search")
    people = np.sort(np.random.default_rng(args.seed).choice(people, args.people, replace=False))
    features, ids, modalities = [], [], []
    for images in (query, gallery):
        chosen = np.isin(images.ids, people)
        features.append(tested.features[images.modality][args.feature][images.rows[chosen]].cpu().numpy())
        ids.append(images.ids[chosen])
        modalities += [images.modality] * chosen.sum()
    features = np.concatenate(features)
    perplexity = min(30, (len(features) - 1) / 3)
    points = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=args.seed).fit_transform(features)
    return figures.feature_map(
        points,
        np.concatenate(ids),
        np.array(modalities),
        f"t-SNE; {tested.setting}; {tested.network}; numbers: identities",
    )


def distances(args):
    if len(args.resume) > 2 or len(set(args.resume)) < len(args.resume):
        raise InputError(f"--resume {' '.join(args.resume)}: give one checkpoint, or two to compare")
    tested = [embed_test(args, resume) for resume in args.resume]
    if len({one.setting for one in tested}) > 1:
        raise InputError(f"--resume {' '.join(args.resume)}: are of two trials, whose people differ; give one trial's")
    labels = [one.network for one in tested]
    if len(set(labels)) < len(labels):
        labels = args.resume
    pairs = [engine.pair_distances(one.features, one.search, args.feature) for one in tested]
    return figures.distance_histograms(dict(zip(labels, pairs, strict=True)), tested[0].setting)


def curves(args):
    if args.labels and len(args.labels) != len(args.logs):
        raise InputError(f"--labels {' '.join(args.labels)}: give one for each of the {len(args.logs)} files")
    names = [Path(log).stem for log in args.logs]
    labels = args.labels or (names if len(set(names)) == len(names) else args.logs)
    if len(set(labels)) < len(labels):
        raise InputError(f"{' '.join(labels)}: two files of one name; tell them apart with --labels")
    kinds = {Path(log).suffix for log in args.logs}
    if kinds == {".json"}:
        if args.values:
            raise InputError(f"--values {' '.join(args.values)}: is of logs (.jsonl); testa.py's .json has CMC curves")
        return figures.result_curves(dict(zip(labels, map(read_results, args.logs), strict=True)), "cmc")
    if ".json" in kinds:
        raise InputError(f"{' '.join(args.logs)}: logs (.jsonl) or testa.py's results (.json), not both")
    runs = dict(zip(labels, map(read_log, args.logs), strict=True))
    return figures.epoch_curves(runs, args.values or ["total", "correct", "FC/Rank-1"])


def read_log(path):
    """The entries of a run's JSON lines."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; name a run's .jsonl, which lies under its --log_path")
    entries = read_json_lines(Path(path))
    if not entries:
        raise InputError(f"{path}: has no entry of an epoch; name the .jsonl of a run that has finished one")
    return entries


def read_results(path):
    """The results in testa.py's JSON."""
    try:
        results = json.loads(Path(path).read_text())["results"]
        for row in results or [{}]:
            (
                data_manager.describe_result(row),
                row["model"],
                row["selection"],
                row["feature"],
                row["reranking"],
                row["curves"]["cmc"][0],
            )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path}: has no results with CMC curves ({type(error).__name__}); write it with testa.py --json"
        ) from error
    return results


if __name__ == "__main__":
    cli(main)

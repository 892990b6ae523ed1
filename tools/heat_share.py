"""Measure where a network looks: the share of its heat on the person, and the search without the background.

    python -m tools.heat_share --data_path demo/data --resume demo/save_model/..._best.t --json heat.json

For demo data that was drawn with --masks. Heat maps are those of `tools.visualize heatmap`, of random queries and their
nearest matches, by the trained network and by one with random weights. A map that ignores the image has the
person's share of the area. A map that is the person itself, at the resolution of the network's last feature map, has
the share in the row "coarse mask". Heat does not show what a network uses, as a position of the last map has seen most
of the image. So the search is also repeated with the background replaced by the mean colour.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ChannelAug import MEAN, normalise
from core.files import check_output, save_json
from core.images import read_image
from model import untrained_network
from testing import engine, evaluation, results
from tools.demo_data import mask_file
from tools.visualize import add_search_flags, embed_test, pair_heats, rank_queries
from utils import ArgumentParser, InputError, bounded, cli, progress


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("measurement")
    group.add_argument("--queries", type=bounded(int, 1), default=100, help="number of queries")
    group.add_argument("--seed", type=bounded(int, 0), default=0, help="seed of their choice")
    group.add_argument("--json", metavar="FILE", help="write the results to this file")
    add_search_flags(parser, group)
    parser.set_defaults(which="random")  # of the choice of queries
    return parser


def main(argv=None):
    """Returns {"shares": [{"network", "map", "modality", "images", "mean", "std"}], shares of the heat in percent;
    "Rank-1": {"image" or, for images that show nothing else, "person": percent}}."""
    args = get_args_parser().parse_args(argv)
    if args.json:
        check_output(args.json)
    tested = embed_test(args, args.resume)
    data_path = evaluation.data_folder(args)
    untrained = untrained_network(tested.net.options).to(tested.device).eval()
    shares, networks = {}, {"untrained": untrained, "trained": tested.net}
    for query in progress(rank_queries(args, tested), desc="heat maps", unit="pair"):
        match = next(image for image in query["gallery"] if image["correct"])
        images = [(query, tested.search.query.modality), (match, tested.search.gallery.modality)]
        masks = [read_mask(data_path, image["path"], tested.size) for image, _ in images]
        for (_, modality), mask in zip(images, masks, strict=True):
            shares.setdefault(("-", "area", modality), []).append(mask.mean())
            shares.setdefault(("-", "coarse mask", modality), []).append(share(coarse(mask), mask))
        for network, net in networks.items():
            heats = pair_heats(tested._replace(net=net), images, args.feature)
            for (_, modality), mask, maps in zip(images, masks, heats, strict=True):
                for name, heat in maps.items():
                    shares.setdefault((network, name, modality), []).append(share(heat, mask))
    rows = [
        {"network": network, "map": name, "modality": modality, "images": len(values)}
        | {"mean": 100 * float(np.mean(values)), "std": 100 * float(np.std(values))}
        for (network, name, modality), values in shares.items()
    ]
    shown = {"image": tested.features, "person": person_features(tested, args)}
    rank_1 = {name: rank_1_of(features, tested, args) for name, features in shown.items()}
    found = {"shares": rows, "Rank-1": rank_1}
    if args.json:
        save_json({"flags": vars(args), "network": tested.network, **found}, args.json)
    print(f"{tested.setting}; {tested.network}\nShare of the heat that lies on the person, in %:")
    for row in rows:
        print("{network:<11}{map:<13}{modality:<10}{mean:6.1f} ± {std:4.1f}".format(**row))
    print("Rank-1: {image:.1f}\nRank-1 when images show only the person: {person:.1f}".format(**rank_1))
    return found


def read_mask(data_path, path, size):
    """The mask of an image at size (height, width): float32, the share of each pixel that shows the person."""
    file = mask_file(Path(data_path), os.path.relpath(path, data_path))
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("L").resize(size[::-1], Image.Resampling.BOX), np.float32) / 255
    except OSError as error:
        raise InputError(f"{file}: cannot be read; draw the demo data again, with tools.demo_data --masks") from error


def share(heat, mask):
    """The share of a heat map [h, w] that lies on a mask [H, W]; of a map without heat, that of the area."""
    heat = F.interpolate(torch.from_numpy(heat)[None, None], mask.shape, mode="bilinear")[0, 0].numpy()
    return float((heat * mask).sum() / heat.sum()) if heat.sum() > 0 else float(mask.mean())


def coarse(mask):
    """The mask, averaged over the cells of the network's last feature map."""
    return F.adaptive_avg_pool2d(torch.from_numpy(mask)[None], [math.ceil(n / 16) for n in mask.shape])[0].numpy()


def rank_1_of(features, tested, args):
    """Rank-1, in percent, of the search with these features of its images."""
    return results.scores(engine.run_search(features, tested.search)[args.feature, "none"])["Rank-1"]


def person_features(tested, args):
    """Features of the search's images, as `testing.engine.run_search` wants them, when only the person is shown. (The
    background alone would tell little: what is cut out of it is the person's silhouette.)"""
    embed = engine.network_embedding(tested.net, tested.device, normalise, args.amp)
    mean, data_path = np.array(MEAN) * 255, evaluation.data_folder(args)

    def picture(path):
        mask = read_mask(data_path, path, tested.size)[:, :, None]
        image = mask * read_image(path, tested.size) + (1 - mask) * mean
        return torch.from_numpy(image.round().astype(np.uint8)).movedim(-1, 0)

    features = {}
    for modality, paths in tested.paths.items():
        images = torch.stack([picture(path) for path in paths]).split(args.test_batch)
        features[modality] = engine.extract(embed, images, modality, "only the person")
    return features


if __name__ == "__main__":
    cli(main)

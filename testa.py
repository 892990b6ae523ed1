"""Test a checkpoint, or saved features, on SYSU-MM01, RegDB or LLCM by the field's protocols.

    python testa.py --mode all --resume save_model/..._best.t

Network and options come from the checkpoint: this repo's, or one of the published GFMNet code. Features are those of
an image and its mirror, averaged; POOL before and FC after the batch-norm bottleneck; cosine similarity.
"""

import os
import platform
from itertools import groupby

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision

import data_manager
from ChannelAug import GRAY, normalise
from core import engine, protocol
from core.features import load_features, save_features, select_features
from core.files import check_output, locate, save_json
from model import GFMNet
from utils import ArgumentParser, InputError, cli, import_tools, progress, select_device

PAGE = "report.html"
HARDEST, NEAREST = 40, 10  # queries, and gallery images of each, on the page
BASELINES = ("gray pixels", "colour histogram", "untrained")


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    several = "; for RegDB's ten trials, one name with {trial} in it"
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--resume", help=f"checkpoint: a path, or a name under --model_path{several}")
    source.add_argument("--from_features", metavar="FILE", help=f"test the features in this .npz file{several}")
    parser.add_argument("--features", metavar="FILE", help=f"save the features to this .npz file{several}")
    protocol.add_flags(parser)
    parser.add_argument("--all", action="store_true", help="every protocol and direction of the data set, in one table")
    parser.add_argument(
        "--rerank",
        nargs="+",
        choices=("k_reciprocal", "random_walk"),
        default=[],
        help="add rows with re-ranked distances",
    )
    parser.add_argument("--baselines", action="store_true", help="add gray pixels, colours, the untrained net")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    parser.add_argument("--report", metavar="DIR", help=f"write a page of the results, {PAGE}, to this folder")
    return parser


def main(argv=None):
    """Returns the results: a list of `engine.summarise`'s rows."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    device = select_device(args.gpu, args.amp)
    data_path = protocol.data_folder(args)

    rows, leading = [], None
    for path, trial in sources(args):
        if args.from_features:
            stored, origin = load_features(path)
        else:
            net, size, origin = protocol.open_checkpoint(path, data_path)
        origin["trial"] = trial = protocol.tested_trial(path, origin, args.dataset, trial)
        test = protocol.searches(args, data_path, trial, everything=args.all)
        if args.from_features:
            features = select_features(path, stored, test.paths, data_path, device)
        else:
            net.to(device, memory_format=torch.channels_last)
            embeddings = {"trained": engine.network_embedding(net, device, normalise, args.amp)}
            if args.baselines:
                embeddings = baselines(net.options, device, args.amp) | embeddings
            features = protocol.embed_images(together(embeddings), test.paths, size, args)
            if args.features:
                save_features(for_trial(args.features, trial), features, test.paths, data_path, origin)

        flipped = origin.get("flipped")
        for search in progress(test.searches, desc="searching", unit="search", leave=False):
            counts = {"queries": len(search.query.rows), "gallery": len(search.gallery.rows)}
            measured = engine.run_search(features, search, args.rerank)
            leading = leading or (features, test, measured, origin)
            for ((model, feature), reranking), found in measured.items():
                labels = {
                    "model": model,
                    "feature": feature,
                    "flip_averaging": None if flipped is None else feature in flipped,
                    "reranking": reranking,
                    "selection": None if model in BASELINES else origin.get("selection") or "unknown",
                    "images": origin.get("data_path") or "unknown",
                    "demo": origin.get("demo"),
                }
                where = {"checkpoint": origin.get("checkpoint") or str(path), "network": origin.get("network")}
                counts["evaluated"] = len(found.rows)
                values = {"metrics": engine.scores(found), "curves": engine.curves(found)}
                rows.append({**search.setting, **labels, **where, **counts, **values})

    results = engine.summarise(rows)
    if args.json:
        save_json({"flags": vars(args), "torch": torch.__version__, "results": results}, args.json)
    print_results(results, by_trial=not args.all)
    if args.report:
        write_report(args, results, *leading)
    return results


def write_report(args, results, features, test, found, origin):
    """The page of `--report`. Rankings and distances are of the first search, by the network's FC feature.

    found: of that search, as `engine.run_search` gives it."""
    figures, report = import_tools("--report", "figures", "report")
    search, names = test.searches[0], list(features["visible"])
    name = next((name for name in names if name[1] == "FC" and name[0] not in BASELINES), names[-1])
    found = found[name, "none"]
    chosen = engine.choose_queries(found, search, "worst", HARDEST)
    setting = f"{data_manager.describe(search.setting)}, trial {search.setting['trial']}"
    where = f"{setting}, model {name[0]}, feature {name[1]}"
    pictures = {}
    for described in dict.fromkeys(map(data_manager.describe_result, results)):
        rows = [row for row in results if data_manager.describe_result(row) == described]
        pictures[f"CMC: {described}"] = figures.result_curves({"": rows}, "cmc", titled=False)
        pictures[f"Precision by recall: {described}"] = figures.result_curves({"": rows}, "precision", titled=False)
        if len(pictures) == 2 and len(np.unique(search.gallery.ids)) > 1:
            distances = engine.pair_distances(features, search, name)
            pictures[f"Distances of queries to gallery images: {where}"] = figures.distance_histograms({"": distances})
    modules, path = (torch, torchvision, np, PIL), os.path.join(args.report, PAGE)
    report.write_page(
        path,
        f"Test results: {data_manager.data_name(args.dataset, origin.get('demo'), len(search.query.rows))}",
        results,
        engine.rank_images(features, test.paths, search, name, found, chosen, NEAREST),
        where,
        pictures,
        {
            "Flags of this test": vars(args),
            "Flags of the training": origin.get("flags") or {},
            "Versions": {"Python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}},
        },
    )
    print(f"\n{path}: the page of these results")


def check_flags(args):
    """Raise InputError for flags that do not go together, and for outputs that cannot be written."""
    name = source_name(args)
    page = args.report and os.path.join(args.report, PAGE)
    files = [file for file in (name, args.features, args.json, page) if file is not None]
    protocol.check_flags(args, files)
    if args.all and (args.tvsearch or not protocol.is_default(args)):
        raise InputError("--all tests them all: leave --mode, --protocol, --shots and --tvsearch out, or --all")
    if args.from_features is not None and (args.baselines or args.features):
        raise InputError("--baselines and --features need images: give them with --resume, not with --from_features")
    if args.features and "{trial}" in name and not args.trial and "{trial}" not in args.features:
        raise InputError(f"--features {args.features}: would hold one trial of ten; put {{trial}} into the name")
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise InputError(f"{', '.join(files)}: name the same file twice; what is read and written must differ")
    for output in filter(None, (args.features, args.json, page)):
        check_output(output)
    if args.report:
        import_tools("--report", "figures", "report")


def source_name(args):
    return args.resume if args.from_features is None else args.from_features


def sources(args):
    """(path, RegDB's trial or None) of each checkpoint or file of features: one, or one a trial if named {trial}."""
    name, own = source_name(args), args.from_features is None
    trials = data_manager.REGDB_TRIALS if "{trial}" in name and not args.trial else [args.trial]
    found = {trial: locate(for_trial(name, trial), args.model_path if own else "") for trial in trials}
    if missing := [trial for trial, path in found.items() if not path]:
        there = ", ".join(str(trial) for trial in found if trial not in missing)
        if there:
            remedy = f"of the ten there are those of trial {there}: make the others, or test one with --trial"
        elif own:
            remedy = f"nor one of that name under --model_path {args.model_path}; train first, or name another"
        else:
            remedy = "save one with --features"
        raise InputError(f"{for_trial(name, missing[0])}: no such file; {remedy}")
    return [(path, trial) for trial, path in found.items()]


def for_trial(name, trial):
    return name.replace("{trial}", str(trial))


def together(embeddings):
    """Several embeddings {model: embed} as one whose features are named (model, feature): one pass over the images."""

    def embed(images, modality):
        return {
            (model, feature): values
            for model, embed_one in embeddings.items()
            for feature, values in embed_one(images, modality).items()
        }

    return embed


def baselines(options, device, amp):
    """What is to be beaten, as embeddings for `engine.extract`: raw pixels, colours, the network before training."""
    torch.manual_seed(0)
    untrained = GFMNet(**options).to(device, memory_format=torch.channels_last)
    embeddings = (
        lambda images, _: {"pixels": gray_pixels(images)},
        lambda images, _: {"colours": colour_histogram(images)},
        engine.network_embedding(untrained, device, normalise, amp),
    )
    return dict(zip(BASELINES, embeddings, strict=True))


def gray_pixels(images):
    """uint8 [B, 3, H, W] -> luminance of all pixels, its mean taken out, of unit length: [B, H W]."""
    gray = (images * torch.tensor(GRAY).view(3, 1, 1)).sum(dim=1).flatten(1)
    return F.normalize(gray - gray.mean(dim=1, keepdim=True))


def colour_histogram(images):
    """uint8 [B, 3, H, W] -> histogram of the colours in 8 x 8 x 8 bins, of unit length: [B, 512]."""
    red, green, blue = (images.long() // 32).flatten(2).unbind(dim=1)
    colour = (red * 8 + green) * 8 + blue
    return F.normalize(torch.zeros(len(images), 512).scatter_add_(1, colour, torch.ones_like(colour).float()))


def print_results(results, by_trial):
    """A table of means and standard deviations, each protocol's rows under a line that names it; before it, the single
    trials if asked for."""

    def origin(name):
        return ", ".join(dict.fromkeys(str(trial[name]) for row in results for trial in row["per_trial"]))

    flips = {True: "yes", False: "no", None: "unknown"}
    for row in results if by_trial else []:
        if row["model"] not in BASELINES:
            print(f"\n{describe(row)}")
            labels = f"flip {flips[row['flip_averaging']]}, re-ranking {row['reranking']}, chosen on {row['selection']}"
            print(f"{row['model']}, {row['feature']}, {labels}:")
            for trial in row["per_trial"]:
                print(f"trial {trial['trial']:>2}" + "".join(f"  {k} {v:6.2f}" for k, v in trial["metrics"].items()))
    print(f"\nImages: {', '.join(dict.fromkeys(row['images'] for row in results))}")
    print(f"Checkpoint: {origin('checkpoint')} ({origin('network')})")
    print("Mean ± standard deviation over the trials, in %, by cosine similarity.")
    print("flip: features of image and mirror, averaged; chosen on: the ids that chose the epoch (none: a fixed one).")
    head = ["model", "feature", "flip", "re-ranking", "chosen on"]
    cells = [
        [row["model"], row["feature"], flips[row["flip_averaging"]], row["reranking"], row["selection"] or "-"]
        for row in results
    ]
    widths = [max(map(len, column)) + 2 for column in zip(head, *cells, strict=True)]
    lines = ["  " + "".join(map(str.ljust, labels, widths)) for labels in (head, *cells)]
    print(lines[0] + "".join(f"{metric:>14}" for metric in results[0]["mean"]))
    for title, rows in groupby(zip(results, lines[1:], strict=True), lambda row: describe(row[0])):
        print(title)
        for row, labels in rows:
            print(labels + "".join(cell(row, metric) for metric in row["mean"]))


def cell(row, metric):
    """One number of the table: without a deviation where there is one trial only."""
    deviation = f" ±{row['std'][metric]:5.2f}" if row["std"] else 7 * " "
    return f"{row['mean'][metric]:7.2f}{deviation}"


def describe(row):
    """What was searched, in words: data set, mode, direction, protocol, shots, trials, sizes."""
    count = row["per_trial"][0]
    return (
        f"{data_manager.describe_result(row)}: {count['queries']} queries"
        + (f" ({count['evaluated']} with a match)" if count["evaluated"] < count["queries"] else "")
        + f", gallery of {count['gallery']}"
    )


if __name__ == "__main__":
    cli(main)

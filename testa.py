"""Test a checkpoint, or saved features, on a data set by the field's protocols.

    python testa.py --mode all --resume save_model/..._best.t

Network and options come from the checkpoint, of this repository or of the published code. Features are averaged over an
image and its mirror: POOL, before the batch-norm bottleneck, and FC, after it. The similarity is the cosine.
"""

import importlib
import os
import platform
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision

from ChannelAug import luminance, normalise
from core.files import check_output, file_sha256, locate, save_json
from datasets import DATASETS, TRAINING_SETS, option_values, search_title
from model import untrained_network
from testing import corruptions, engine, evaluation, results, verification
from testing.features import load_features, save_features, select_features
from utils import ArgumentParser, InputError, cli, progress, select_device

PAGE = "report.html"
CORRUPTED = ", visible images corrupted"
HARDEST, NEAREST = 40, 10  # queries, and gallery images of each, on the page


def get_args_parser():
    parser = ArgumentParser(description=__doc__)
    several = "; for RegDB's ten trials, one name with {trial} in it"
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--resume", help=f"checkpoint: a path, or a name under --model_path{several}")
    source.add_argument("--from_features", metavar="FILE", help=f"test the features in this .npz file{several}")
    parser.add_argument("--features", metavar="FILE", help=f"save the features to this .npz file{several}")
    evaluation.add_flags(parser)
    flag = parser.add_argument
    flag("--all", action="store_true", help="every protocol and direction of the data set, in one table")
    text = "the network was trained on another data set; RegDB: all ten trials are tested"
    flag("--cross_data", action="store_true", help=text)
    text = f"add rows of corrupted visible images, {corruptions.REPETITIONS} repetitions, as CIL has them"
    flag("--corrupt", action="store_true", help=text)
    text = "add rows with re-ranked distances"
    flag("--rerank", nargs="+", choices=("k_reciprocal", "random_walk"), default=[], help=text)
    flag("--baselines", action="store_true", help="add gray pixels, colours, gradients, the untrained net")
    flag("--table", choices=("short", "full"), default="short", help="print the network's FC alone, or all rows")
    flag("--json", metavar="FILE", help="write all results to this file")
    text = "write the similarities at which pairs are one person, by false positives, for tools.search"
    flag("--calibrate", metavar="FILE", help=text)
    flag("--report", metavar="DIR", help=f"write a page of the results, {PAGE}, to this folder")
    return parser


def main(argv=None):
    """Returns the rows of the table: a list, as `results.summarise` gives it."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    device, data_path = select_device(args.gpu, args.amp), evaluation.data_folder(args)

    rows, first, by_kind, pairs, tested = [], None, {}, [], sources(args)
    sha256 = file_sha256(tested[0][0]) if args.calibrate else None
    for number, (path, trial) in enumerate(tested):
        test, features, origin, embed_corrupted = embed_test(args, path, trial, data_path, device)
        trained_on = f" on {TRAINING_SETS[origin['dataset']].name}" if args.cross_data and origin.get("dataset") else ""
        found = ((search, features, "") for search in test.searches)
        if args.corrupt:
            repetitions = range(corruptions.REPETITIONS) if len(tested) == 1 else [number]
            found = chain(found, corrupted(test, features, embed_corrupted, data_path, repetitions, by_kind))
        for search, features, corruption in progress(found, desc="searching", unit="search", leave=False):
            matches = engine.run_search(features, search, args.rerank)
            first = first or (search, features, test.paths, matches, origin)
            if not corruption and search_title(search.setting) == search_title(first[0].setting):
                pairs.append(verification.error_rates(features, search, results.leading([*features["visible"]])))
            for ((model, feature), reranking), ranks_of_matches in matches.items():
                labels = {
                    "model": model + trained_on * (model == "trained") + corruption,
                    "feature": feature,
                    "flip_averaging": feature in origin["flipped"] if origin.get("flipped") is not None else None,
                    "reranking": reranking,
                    "selection": None if model in results.BASELINES else origin.get("selection") or "unknown",
                    "images": origin.get("data_path") or "unknown",
                    "demo": origin.get("demo"),
                    "checkpoint": origin.get("checkpoint") or str(path),
                    "network": origin.get("network"),
                }
                rows.append(results.result_row(search, ranks_of_matches, **labels))

    table = results.summarise(rows)
    pairs = verification.mean_rates([*filter(None, pairs)]) if any(pairs) else None
    if args.json:
        content = {"flags": vars(args), "torch": torch.__version__, "results": table, "verification": pairs}
        save_json(content | ({"corruption": corruptions.table(by_kind)} if by_kind else {}), args.json)
    files = [args.json, args.report and os.path.join(args.report, PAGE)]
    results.print_results(table, args.table == "full", [*filter(None, files)])
    if args.calibrate:
        calibrate(args, path, sha256, pairs, table[0], first[0].setting)
    if args.report:
        write_report(args, table, *first, pairs, by_kind)
    return table


def embed_test(args, path, trial, data_path, device):
    """The images of the searches, embedded by a checkpoint or found in a file of features.

    Returns `datasets.Searches`, features {modality: {(model, feature): [N, C]}}, where they come from, and a function:
    repetition of `--corrupt` -> the network's features of the visible images.
    """
    if args.from_features:
        stored, origin = load_features(path)
    else:
        net, size, origin = evaluation.open_checkpoint(path, data_path)
    origin["trial"] = trial = evaluation.tested_trial(path, origin, args.dataset, trial, args.cross_data)
    test = evaluation.find_searches(args, data_path, trial, everything=args.all)
    if args.from_features:
        return test, select_features(path, stored, test.paths, data_path, device), origin, None
    net.to(device, memory_format=torch.channels_last)
    network = {"trained": engine.network_embedding(net, device, normalise, args.amp)}

    def embed(images, modality, embeddings=network):
        """All embeddings in one pass over the images."""
        return {
            (model, feature): values
            for model, embed_one in embeddings.items()
            for feature, values in embed_one(images, modality).items()
        }

    def embed_corrupted(repetition):
        change = partial(corruptions.corrupt, data_path=data_path, repetition=repetition)
        return evaluation.embed_images(embed, {"visible": test.paths["visible"]}, size, args, change)["visible"]

    every = (baselines(net.options, device, args.amp) if args.baselines else {}) | network
    features = evaluation.embed_images(partial(embed, embeddings=every), test.paths, size, args)
    if args.features:
        save_features(for_trial(args.features, trial), features, test.paths, data_path, origin)
    return test, features, origin, embed_corrupted


def corrupted(test, features, embed_corrupted, data_path, repetitions, by_kind):
    """(search, features, what its rows are called besides), for all settings in each repetition of `--corrupt`: in the
    search of the trial of that number, or where there is one search, in that. by_kind: of `corruptions.add_by_kind`."""
    settings, infrared = {}, features["infrared"]
    for search in test.searches:
        settings.setdefault(search_title(search.setting), []).append(search)
    name = results.leading(list(infrared))
    add = partial(corruptions.add_by_kind, by_kind, test, name, data_path)
    add(features)
    for repetition in progress(repetitions, desc="corrupting", unit="repetition", leave=False):
        visible = embed_corrupted(repetition)
        both = {"visible": visible, "infrared": {name: infrared[name] for name in visible}}
        add(both, repetition)
        for searches in settings.values():
            yield searches[repetition % len(searches)], both, CORRUPTED


def calibrate(args, path, sha256, rates, row, setting):
    """Write the file of `--calibrate`. sha256: of the checkpoint, before it was tested."""
    if file_sha256(path) != sha256:
        raise InputError(f"{path}: was replaced during the test, by a training perhaps; test a copy of it")
    if not rates:
        raise InputError(f"--calibrate {args.calibrate}: the test has no pairs of one and of two people; leave it out")
    data = DATASETS[args.dataset].title(row["demo"], row["per_trial"][0]["queries"])
    save_json(verification.calibration(path, sha256, data, setting, "FC", rates), args.calibrate)
    print(f"{verification.describe(rates)} {args.calibrate}")


def write_report(args, table, search, features, paths, matches, origin, rates, by_kind):
    """Write the page of `--report`. Its rankings and distances are those of one search by the network's FC feature.

    matches: as `engine.run_search` gives them. rates: of `verification.mean_rates`, or None. by_kind: of
    `corruptions.add_by_kind`.
    """
    from drawing import figures, report  # only here: they are slow to import

    name = results.leading(list(features["visible"]))
    matches = matches[name, "none"]
    hardest = results.choose_queries(matches, search, "worst", HARDEST)
    setting = f"{search_title(search.setting)}, trial {search.setting['trial']}, model {name[0]}, feature {name[1]}"
    pictures = {}
    for title in dict.fromkeys(map(results.result_title, table)):
        rows = [row for row in table if results.result_title(row) == title]
        pictures[f"CMC: {title}"] = figures.result_curves({"": rows}, "cmc", titled=False)
        pictures[f"Precision by recall: {title}"] = figures.result_curves({"": rows}, "precision", titled=False)
        if len(pictures) == 2 and len(np.unique(search.gallery.ids)) > 1:
            pairs = {"": results.pair_distances(features, search, name)}
            pictures[f"Distances of queries to gallery images: {setting}"] = figures.distance_histograms(pairs)
    if rates:
        title = f"Pairs of one person that are recognised, by false positives: {search_title(search.setting)}"
        equal = f"{100 * rates['equal_error']:.1f} % at similarity {rates['equal_error_similarity']:.3f}"
        pictures[f"{title}; equal error rate {equal}"] = figures.roc_curve(rates)
    if by_kind:
        title = f"mAP of visible images, each corrupted, as queries, by kind and level: {setting}"
        pictures[title] = figures.corruption_curves(corruptions.table(by_kind))
    modules = (torch, torchvision, np, PIL)
    report.write_page(
        os.path.join(args.report, PAGE),
        f"Test results: {DATASETS[args.dataset].title(origin.get('demo'), len(search.query.rows))}",
        table,
        results.rank_images(features, paths, search, name, matches, hardest, NEAREST),
        setting,
        pictures,
        {
            "Flags of this test": vars(args),
            "Flags of the training": origin.get("flags") or {},
            "Versions": {"Python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}},
        },
    )


def check_flags(args):
    """Raise InputError for flags that do not go together, and for outputs that cannot be written."""
    name = args.from_features or args.resume
    page = args.report and os.path.join(args.report, PAGE)
    files = [file for file in (name, args.features, args.json, args.calibrate, page) if file is not None]
    evaluation.check_search_flags(args, files)
    chosen = [flag for flag in ("mode", "protocol", "shots") if getattr(args, flag) != option_values(flag)[0]]
    if args.all and (chosen or args.tvsearch):
        raise InputError("--all already covers --mode, --protocol, --shots and --tvsearch; leave out those, or --all")
    if args.from_features and (args.baselines or args.features or args.corrupt):
        raise InputError("--baselines, --corrupt and --features need images: use them with --resume")
    if args.calibrate and (args.from_features or "{trial}" in name):
        raise InputError(f"--calibrate {args.calibrate}: is of one checkpoint; pass one with --resume")
    if args.corrupt and DATASETS[args.dataset].tracks:
        raise InputError(f"--corrupt: is of images, but --dataset {args.dataset} is tested by tracks; leave it out")
    if args.corrupt:
        corruptions.prepare()  # fails now, too, if the package is missing
    if args.cross_data and "{trial}" in (args.features or ""):
        raise InputError(f"--features {args.features}: with --cross_data, one file has all trials; drop {{trial}}")
    if args.features and "{trial}" in name and not args.trial and "{trial}" not in args.features:
        raise InputError(f"--features {args.features}: would keep only one of the trials; put {{trial}} into the name")
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise InputError(f"{', '.join(files)}: the same file twice; use a different file for each input and output")
    for output in filter(None, (args.features, args.json, args.calibrate, page)):
        check_output(output)
        DATASETS[args.dataset].check_not_data(output, args.data_path)
    if args.report:
        importlib.import_module("drawing.report")  # fails now rather than after the test


def sources(args):
    """(path, --trial or None) of each checkpoint or file of features: one, or one for each trial if named {trial}."""
    name, resumed = args.from_features or args.resume, not args.from_features
    trials = [args.trial]
    if "{trial}" in name and not args.trial:
        trials = DATASETS[args.dataset].trials
    paths = {trial: locate(for_trial(name, trial), args.model_path if resumed else "") for trial in trials}
    if missing := [trial for trial, path in paths.items() if not path]:
        others = ", ".join(str(trial) for trial in trials if trial not in missing)
        remedy = "save one with --features"
        if others:
            remedy = f"of the {len(trials)}, only trials {others} exist; make the others, or test one with --trial"
        elif resumed:
            remedy = f"nor is one in --model_path {args.model_path}; train first, or correct the name"
        name = for_trial(name, missing[0])
        if name and Path(name).is_dir():
            raise InputError(f"{name}: is a folder; pass one of its files")
        raise InputError(f"{name}: no such file; {remedy}")
    for trial, path in paths.items():  # which may be named by its name in --model_path
        for output in filter(None, (args.features, args.json, args.calibrate)):
            if os.path.realpath(path) == os.path.realpath(for_trial(output, trial)):
                raise InputError(f"{output}: is what is tested; choose another file")
    return [(path, trial) for trial, path in paths.items()]


def for_trial(name, trial):
    return name.replace("{trial}", str(trial))


def baselines(options, device, amp):
    """The embeddings to beat, for `engine.extract`: raw pixels, colours, gradients, the network before training."""
    untrained = untrained_network(options).to(device, memory_format=torch.channels_last)
    embeddings = (
        lambda images, _: {"pixels": gray_pixels(images)},
        lambda images, _: {"colours": colour_histogram(images)},
        lambda images, _: {"gradients": gradient_histograms(images)},
        engine.network_embedding(untrained, device, normalise, amp),
    )
    return dict(zip(results.BASELINES, embeddings, strict=True))


def gray_pixels(images):
    """uint8 [B, 3, H, W] -> luminance of all pixels less its mean, of unit length: [B, H W]."""
    gray = luminance(images).flatten(1)
    return F.normalize(gray - gray.mean(dim=1, keepdim=True))


def colour_histogram(images):
    """uint8 [B, 3, H, W] -> histogram of the colours in 8 x 8 x 8 bins, of unit length: [B, 512]."""
    red, green, blue = (images.long() // 32).flatten(2).unbind(dim=1)
    colour = (red * 8 + green) * 8 + blue
    return F.normalize(torch.zeros(len(images), 512).scatter_add_(1, colour, torch.ones_like(colour).float()))


def gradient_histograms(images):
    """uint8 [B, 3, H, W] -> HOG (Dalal and Triggs, CVPR 2005), resized to 128x64, of unit length: [B, 3780]."""
    from skimage.feature import hog  # slow to import

    resized = F.interpolate(luminance(images), (128, 64), mode="bilinear", antialias=True)[:, 0].numpy()
    return F.normalize(torch.from_numpy(np.stack([hog(image, cells_per_block=(2, 2)) for image in resized])).float())


if __name__ == "__main__":
    cli(main)

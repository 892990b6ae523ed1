"""Test a checkpoint, or saved features, on SYSU-MM01, RegDB or LLCM by the field's protocols.

    python testa.py --mode all --resume save_model/..._best.t

Network and options come from the checkpoint: this repo's, or one of the published GFMNet code. Features are those of
an image and its mirror, averaged; POOL before and FC after the batch-norm bottleneck; cosine similarity.
"""

import json
import os
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data_manager
import engine
from ChannelAug import GRAY, normalise
from data_loader import eval_loader
from model import GFMNet, load_network
from utils import (
    ArgumentParser,
    InputError,
    atomic,
    check_output,
    cli,
    find_checkpoint,
    load_checkpoint,
    number,
    progress,
    save_json,
    select_device,
)

BASELINES = ("gray pixels", "colour histogram", "untrained")


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=data_manager.DATA_PATHS, default="sysu")
    parser.add_argument("--data_path", help="folder of the data set (default: by --dataset)")
    several = "; for RegDB's ten trials, one name with {trial} in it"
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--resume", help=f"checkpoint: a path, or a name under --model_path{several}")
    source.add_argument("--from_features", metavar="FILE", help=f"test the features in this .npz file{several}")
    parser.add_argument("--features", metavar="FILE", help=f"save the features to this .npz file{several}")
    parser.add_argument("--model_path", default="save_model/", help="folder of the checkpoints")
    parser.add_argument("--mode", choices=("all", "indoor"), default="all", help="of SYSU-MM01: all- or indoor-search")
    parser.add_argument(
        "--protocol",
        choices=data_manager.SYSU_PROTOCOLS,
        default="seeded",
        help="SYSU-MM01: galleries drawn by seeded generators, or those of its authors' rand_perm_cam.mat",
    )
    parser.add_argument(
        "--shots",
        type=int,
        choices=data_manager.SYSU_SHOTS,
        default=1,
        help="SYSU-MM01: gallery images of an identity and camera",
    )
    parser.add_argument("--trial", type=number(int, 1, 10), help="RegDB's trial (default: the checkpoint's own)")
    parser.add_argument(
        "--tvsearch", action="store_true", help="RegDB: thermal to visible; LLCM: infrared to visible; not from visible"
    )
    parser.add_argument("--all", action="store_true", help="every protocol and direction of the data set, in one table")
    parser.add_argument(
        "--rerank",
        nargs="+",
        choices=("k_reciprocal", "random_walk"),
        default=[],
        help="add rows with re-ranked distances",
    )
    parser.add_argument("--baselines", action="store_true", help="add gray pixels, colours, the untrained net")
    parser.add_argument("--test_batch", type=number(int, 1), default=64, help="images in a batch")
    parser.add_argument("--workers", type=number(int, 0), default=4, help="loading processes, at most one a core")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="mixed precision of the network")
    parser.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    return parser


def main(argv=None):
    """Returns the results: a list of `engine.summarise`'s rows."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    device = select_device(args.gpu)
    data_path = args.data_path or data_manager.DATA_PATHS[args.dataset]

    rows = []
    for path, trial in sources(args):
        if args.from_features:
            stored, origin = load_features(path)
        else:
            checkpoint = load_checkpoint(path)
            net, size = load_network(checkpoint, path)
            origin = {name: checkpoint.get("args", {}).get(name) for name in ("dataset", "trial")}
            origin |= {"checkpoint": str(path), "selection": checkpoint.get("selection"), "flipped": ["POOL", "FC"]}
            origin["data_path"] = os.path.abspath(data_path)
        origin["trial"] = trial = tested_trial(path, origin, args.dataset, trial)
        test = searches(args, data_path, trial)
        if args.from_features:
            features = select_features(path, stored, test.paths, data_path, device)
        else:
            net.to(device, memory_format=torch.channels_last)
            embeddings = {"trained": engine.network_embedding(net, device, normalise, args.amp)}
            if args.baselines:
                embeddings = baselines(net.options, device, args.amp) | embeddings
            embed = together(embeddings)
            loaders = {m: eval_loader(paths, size, args.test_batch, args.workers) for m, paths in test.paths.items()}
            features = {m: engine.extract(embed, loader, m, f"embedding {m}") for m, loader in loaders.items()}
            if args.features:
                save_features(for_trial(args.features, trial), features, test.paths, data_path, origin)

        for search in progress(test.searches, desc="searching", unit="search", leave=False):
            counts = {"queries": len(search.query.rows), "gallery": len(search.gallery.rows)}
            for ((model, feature), reranking), metrics in engine.run_search(features, search, args.rerank).items():
                flipped = origin.get("flipped")
                labels = {
                    "model": model,
                    "feature": feature,
                    "flip_averaging": None if flipped is None else feature in flipped,
                    "reranking": reranking,
                    "selection": None if model in BASELINES else origin.get("selection") or "unknown",
                    "images": origin.get("data_path") or "unknown",
                }
                where = {"checkpoint": origin.get("checkpoint") or str(path), **counts}
                rows.append({**search.setting, **labels, **where, "metrics": metrics})

    results = engine.summarise(rows)
    print_results(results, by_trial=not args.all)
    if args.json:
        save_json({"flags": vars(args), "torch": torch.__version__, "results": results}, args.json)
    return results


def check_flags(args):
    """Raise InputError for flags that do not go together, and for outputs that cannot be written."""
    name = source_name(args)
    files = [file for file in (name, args.features, args.json) if file is not None]
    if args.dataset != "regdb" and (args.trial or any("{trial}" in file for file in files)):
        raise InputError(
            f"--trial and {{trial}} are RegDB's: --dataset {args.dataset} has ten trials for one checkpoint"
        )
    if args.dataset == "sysu" and args.tvsearch:
        raise InputError("--tvsearch is RegDB's and LLCM's: SYSU-MM01 is searched from infrared to visible only")
    chosen = (args.mode, args.protocol, args.shots) != ("all", "seeded", 1)
    if args.dataset != "sysu" and chosen:
        raise InputError(
            f"--mode, --protocol and --shots are SYSU-MM01's: --dataset {args.dataset} has one protocol; leave them out"
        )
    if args.all and (chosen or args.tvsearch):
        raise InputError("--all tests them all: leave --mode, --protocol, --shots and --tvsearch out, or --all")
    if args.from_features is not None and (args.baselines or args.features):
        raise InputError("--baselines and --features need images: give them with --resume, not with --from_features")
    if args.features and "{trial}" in name and not args.trial and "{trial}" not in args.features:
        raise InputError(f"--features {args.features}: would hold one trial of ten; put {{trial}} into the name")
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise InputError(f"{', '.join(files)}: name the same file twice; what is read and written must differ")
    for output in filter(None, (args.features, args.json)):
        check_output(output)


def source_name(args):
    return args.resume if args.from_features is None else args.from_features


def sources(args):
    """(path, RegDB's trial or None) of each checkpoint or file of features: one, or one a trial if named {trial}."""
    name = source_name(args)
    trials = data_manager.REGDB_TRIALS if "{trial}" in name and not args.trial else [args.trial]
    paths = [for_trial(name, trial) for trial in trials]
    if args.from_features is None:
        paths = [find_checkpoint(path, args.model_path) for path in paths]
    return list(zip(paths, trials, strict=True))


def for_trial(name, trial):
    return name.replace("{trial}", str(trial))


def tested_trial(path, origin, dataset, trial):
    """RegDB's trial to test on (None for the other data sets): that of the checkpoint or features.

    origin: {"dataset", "trial"}, as far as they are known. Raises InputError for another data set, for another trial,
    whose test people it was trained on, or for an unknown one: published checkpoints do not say.
    """
    if (origin.get("dataset") or dataset) != dataset:
        raise InputError(f"{path}: was trained on {origin['dataset']}; test it with --dataset {origin['dataset']}")
    if dataset != "regdb":
        return None
    own = origin.get("trial") or trial
    if own is None:
        raise InputError(f"{path}: does not say which of RegDB's trials it was trained on; give --trial")
    if trial not in (None, own):
        raise InputError(f"{path}: was trained on trial {own}, on people of test trial {trial}; leave --trial out")
    return own


def searches(args, data_path, trial):
    """The searches that the flags ask for: a `data_manager.Searches`."""
    directions = data_manager.DIRECTIONS[args.dataset]
    directions = directions if args.all else [directions[args.tvsearch]]
    if args.dataset == "regdb":
        return data_manager.regdb_test(data_path, trial, directions)
    if args.dataset == "llcm":
        return data_manager.llcm_test(data_path, directions)
    if not args.all:
        return data_manager.sysu_test(data_path, [args.mode], [args.protocol], [args.shots])
    protocols = data_manager.SYSU_PROTOCOLS
    if not (file := data_manager.permutations_file(data_path)).is_file():
        print(f"note: no {file}, so without the official protocol; --protocol official says where to find it")
        protocols = ["seeded"]
    return data_manager.sysu_test(data_path, data_manager.SYSU_VISIBLE, protocols, data_manager.SYSU_SHOTS)


def save_features(path, features, paths, data_path, origin):
    """Write features {modality: {(model, feature): [N, C]}} and their images' paths {modality: [N]} to one .npz file.

    Arrays: `{modality}/paths`, relative to the data path, and `{modality}/{model}/{feature}`, float32; `origin`, JSON.
    """
    arrays = {"origin": np.array(json.dumps(origin))}
    for modality, named in features.items():
        relative = [Path(os.path.relpath(file, data_path)).as_posix() for file in paths[modality]]
        arrays[f"{modality}/paths"] = np.array(relative)
        arrays |= {f"{modality}/{'/'.join(name)}": values.cpu().numpy() for name, values in named.items()}
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_features(path):
    """A file of `save_features`, or another project's -> ({modality: {"paths": ..., (model, feature): ...}}, origin).

    `origin` may be missing; nothing in the file is executed. Raises InputError for any other file.
    """
    stored, origin = {"visible": {}, "infrared": {}}, {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                modality, _, rest = name.partition("/")
                if name == "origin":
                    origin = dict(json.loads(arrays[name].item()))
                elif rest == "paths":
                    stored[modality]["paths"] = arrays[name].astype(str).ravel().tolist()
                else:
                    model, feature = rest.split("/")
                    stored[modality][model, feature] = torch.from_numpy(arrays[name]).float()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; save one with --features") from error
    except Exception as error:  # the readers raise anything when a file is damaged
        raise InputError(
            f"{path}: is no file of features ({type(error).__name__}); it needs the arrays visible/paths, "
            "visible/MODEL/FEATURE, and the same of infrared, as --features writes them"
        ) from error
    widths = [
        {name: list(values.shape[1:]) for name, values in arrays.items() if name != "paths"}
        for arrays in stored.values()
    ]
    if not widths[0] or widths[0] != widths[1]:
        raise InputError(f"{path}: visible features {widths[0]}, infrared {widths[1]}; give the same of both")
    for modality, arrays in stored.items():
        paths = arrays.pop("paths", [])
        row = arrays["row"] = {file: i for i, file in enumerate(paths)}
        if len(row) < len(paths):
            twice = next(file for i, file in enumerate(paths) if row[file] != i)
            raise InputError(f"{path}: {modality}/paths has {twice} twice; give each image once")
        for model, feature in widths[0]:
            values = arrays[model, feature]
            if values.ndim != 2 or len(values) != len(row) or not (values.numel() and torch.isfinite(values).all()):
                raise InputError(
                    f"{path}: {modality}/{model}/{feature} is {list(values.shape)}, not [{len(row)}, C] finite "
                    f"numbers, a row for each of {modality}/paths"
                )
            if not (model and feature and f"{model}{feature}".isprintable()):
                raise InputError(f"{path}: {modality}/{model}/{feature}: give model and feature names that print")
    check_origin(path, origin)
    return stored, origin


def check_origin(path, origin):
    """Raise InputError unless the origin of features has values that the table can show; all may be missing."""
    wanted = {
        "dataset": lambda value: value in tuple(data_manager.DATA_PATHS),
        "trial": lambda value: type(value) is int and value in data_manager.REGDB_TRIALS,
        "selection": lambda value: value in ("test", "val", "none"),
        "flipped": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "checkpoint": lambda value: isinstance(value, str),
        "data_path": lambda value: isinstance(value, str),
    }
    for name, value in origin.items():
        if value is not None and not (name in wanted and wanted[name](value)):
            raise InputError(f"{path}: the origin's {name!r} is {value!r}, which is none; --features shows how")


def select_features(path, stored, paths, data_path, device):
    """The features of some images, in their order and of unit length: {modality: {(model, feature): [N, C]}}."""
    features = {}
    for modality, files in paths.items():
        row = stored[modality]["row"]
        relative = [Path(os.path.relpath(file, data_path)).as_posix() for file in files]
        if missing := [file for file in relative if file not in row]:
            raise InputError(
                f"{path}: has no {modality} features of {missing[0]} ({len(missing)} of {len(files)} images are "
                "missing); save them again with the same flags, or --all"
            )
        rows = torch.tensor([row[file] for file in relative])
        features[modality] = {
            name: F.normalize(values[rows]).to(device) for name, values in stored[modality].items() if name != "row"
        }
    return features


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
    for row in results if by_trial else []:
        if row["model"] not in BASELINES:
            print(f"\n{describe(row)}; {row['model']} {row['feature']}, re-ranking {row['reranking']}: trial by trial")
            for trial in row["per_trial"]:
                print(f"trial {trial['trial']:>2}" + "".join(f"  {k} {v:6.2f}" for k, v in trial["metrics"].items()))
    print(f"\nImages: {', '.join(dict.fromkeys(row['images'] for row in results))}")
    print("Mean ± standard deviation over the trials, in %, by cosine similarity.")
    print("flip: features of image and mirror, averaged; chosen on: the ids that chose the epoch (none: a fixed one).")
    flips = {True: "yes", False: "no", None: "unknown"}
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
            print(labels + "".join(f"{mean:7.2f} ±{row['std'][metric]:5.2f}" for metric, mean in row["mean"].items()))


def describe(row):
    """What was searched, in words: data set, mode, direction, protocol, shots, trials, sizes."""
    count, trials = row["per_trial"][0], row["trials"]
    parts = [data_manager.DATA_NAMES[row["dataset"]]]
    parts += [f"{row['mode']}-search"] if row["mode"] else []
    parts += [row["direction"], f"{row['protocol']} protocol"]
    parts += [f"{row['shots']}-shot"] if row["shots"] else []
    parts += [f"trial {trials[0]}" if len(trials) == 1 else f"{len(trials)} trials"]
    return ", ".join(parts) + f": {count['queries']} queries, gallery of {count['gallery']}"


if __name__ == "__main__":
    cli(main)

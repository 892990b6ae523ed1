"""Test a checkpoint, or saved features, on SYSU-MM01, RegDB or LLCM by the field's protocols.

    python testa.py --mode all --resume save_model/..._best.t

Network and options come from the checkpoint: this repo's, or one of the published GFMNet code. Features are those of
an image and its mirror, averaged; POOL before and FC after the batch-norm bottleneck; cosine similarity.
"""

import os
from itertools import groupby

import torch
import torch.nn.functional as F

import data_manager
import engine
from ChannelAug import GRAY, normalise
from data_loader import eval_loader
from feature_store import load_features, save_features, select_features
from model import GFMNet, load_network
from utils import (
    ArgumentParser,
    InputError,
    check_output,
    cli,
    load_checkpoint,
    locate,
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
    parser.add_argument("--test_batch", type=number(int, 1, 65536), default=64, help="images in a batch")
    parser.add_argument("--workers", type=number(int, 0, 1024), default=4, help="loading processes, at most one a core")
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
            origin = checkpoint_origin(path, checkpoint, net, size, data_path)
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

        flipped = origin.get("flipped")
        for search in progress(test.searches, desc="searching", unit="search", leave=False):
            scores, evaluated = engine.run_search(features, search, args.rerank)
            counts = {"queries": len(search.query.rows), "evaluated": evaluated, "gallery": len(search.gallery.rows)}
            for ((model, feature), reranking), metrics in scores.items():
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
                rows.append({**search.setting, **labels, **where, **counts, "metrics": metrics})

    results = engine.summarise(rows)
    if args.json:
        save_json({"flags": vars(args), "torch": torch.__version__, "results": results}, args.json)
    print_results(results, by_trial=not args.all)
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


def checkpoint_origin(path, checkpoint, net, size, data_path):
    """What the rows of a table say of a checkpoint's features, and `--features` saves with them; None is unknown."""
    flags, epoch = checkpoint.get("args", {}), checkpoint.get("epoch", "unknown")
    if "within" in checkpoint:
        epoch = f"{epoch + 1}, {checkpoint['sums']['step']} steps of it"
    return {
        "dataset": flags.get("dataset"),
        "trial": flags.get("trial"),
        "selection": checkpoint.get("selection"),
        "flipped": ["POOL", "FC"],
        "checkpoint": str(path),
        "network": f"{flags.get('method', 'published')}, {net.options['arch']}, {size[0]}x{size[1]}, epoch {epoch}",
        "data_path": os.path.abspath(data_path),
        "demo": data_manager.is_demo(data_path),
    }


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
    modes, protocols, shots = [args.mode], [args.protocol], [args.shots]
    if args.all:
        modes, protocols, shots = data_manager.SYSU_VISIBLE, data_manager.SYSU_PROTOCOLS, data_manager.SYSU_SHOTS
    if args.all and not (file := data_manager.permutations_file(data_path)).is_file():
        print(
            f"note: no {file}, so without the official protocol (its authors publish it: github.com/wuancong/SYSU-MM01)"
        )
        protocols = ["seeded"]
    test = data_manager.sysu_test(data_path, modes, protocols, shots)
    seen = {camera for search in test.searches for images in search[1:] for camera in images.cameras.tolist()}
    wanted = {*data_manager.SYSU_INFRARED, *(camera for mode in modes for camera in data_manager.SYSU_VISIBLE[mode])}
    if absent := sorted(wanted - seen):
        print(f"warning: {data_path}: no test id has an image of camera {', '.join(map(str, absent))}")
    return test


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
    count, trials = row["per_trial"][0], row["trials"]
    name = data_manager.DATA_NAMES[row["dataset"]]
    return (
        f"{f'demo data like {name}' if row['demo'] else name}, {data_manager.describe(row)}, "
        f"{f'trial {trials[0]}' if len(trials) == 1 else f'{len(trials)} trials'}: {count['queries']} queries"
        + (f" ({count['evaluated']} with a match)" if count["evaluated"] < count["queries"] else "")
        + f", gallery of {count['gallery']}"
    )


if __name__ == "__main__":
    cli(main)

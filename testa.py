"""Test a checkpoint on SYSU-MM01 or RegDB by the field's protocols.

    python testa.py --mode all --resume save_model/..._best.t

Network and options come from the checkpoint: this repo's, or one of the published GFMNet code. Features are those of
an image and its mirror, averaged; POOL before and FC after the batch-norm bottleneck; cosine similarity.
"""

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
    check_output,
    cli,
    find_checkpoint,
    load_checkpoint,
    number,
    save_json,
    select_device,
)

DIRECTIONS = {False: "visible to thermal", True: "thermal to visible"}  # of --tvsearch


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=data_manager.DATA_PATHS, default="sysu")
    parser.add_argument("--data_path", help="folder of the data set (default: by --dataset)")
    several = "; for RegDB's ten trials, one name with {trial} in it"
    parser.add_argument("--resume", required=True, help=f"checkpoint: a path, or a name under --model_path{several}")
    parser.add_argument("--model_path", default="save_model/", help="folder of the checkpoints")
    parser.add_argument("--mode", choices=("all", "indoor"), default="all", help="of SYSU-MM01: all- or indoor-search")
    parser.add_argument("--trial", type=number(int, 1, 10), help="RegDB's trial (default: the checkpoint's own)")
    parser.add_argument("--tvsearch", action="store_true", help="RegDB: thermal to visible, not visible to thermal")
    parser.add_argument("--all", action="store_true", help="every mode or direction, in one table")
    parser.add_argument("--baselines", action="store_true", help="add gray pixels, colours, the untrained net")
    parser.add_argument("--test_batch", type=number(int, 1), default=64, help="images in a batch")
    parser.add_argument("--workers", type=number(int, 0), default=4, help="loading processes, at most one a core")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="mixed precision of the network")
    parser.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
    parser.add_argument("--json", help="write all results to this file")
    return parser


def main(argv=None):
    """Returns the results: a list of `engine.summarise`'s rows."""
    args = get_args_parser().parse_args(argv)
    if args.dataset == "sysu" and (args.trial or args.tvsearch or "{trial}" in args.resume):
        raise InputError("--trial, --tvsearch and {trial} are RegDB's: SYSU-MM01 is always tested in its ten trials")
    if args.json:
        check_output(args.json)
    device = select_device(args.gpu)
    data_path = args.data_path or data_manager.DATA_PATHS[args.dataset]

    rows = []
    for path, trial in checkpoint_paths(args):
        checkpoint = load_checkpoint(path)
        trial = tested_trial(path, checkpoint, args.dataset, trial)
        net, size = load_network(checkpoint, path)
        net.to(device, memory_format=torch.channels_last)
        if args.dataset == "sysu":
            test = data_manager.sysu_test(data_path, ("all", "indoor") if args.all else [args.mode])
        else:
            directions = DIRECTIONS.values() if args.all else [DIRECTIONS[args.tvsearch]]
            test = data_manager.regdb_test(data_path, trial, directions)
        loaders = {m: eval_loader(paths, size, args.test_batch, args.workers) for m, paths in test.paths.items()}

        embeddings = {"trained": engine.network_embedding(net, device, normalise, args.amp)}
        if args.baselines:
            embeddings = baselines(net.options, device, args.amp) | embeddings
        embed = together(embeddings)
        features = {m: engine.extract(embed, loader, m, f"embedding {m}") for m, loader in loaders.items()}
        for search in test.searches:
            counts = {"queries": len(search.query.rows), "gallery": len(search.gallery.rows)}
            for (model, feature), metrics in engine.run_search(features, search).items():
                labels = {"model": model, "feature": feature, "flip_averaging": feature in ("POOL", "FC")}
                rows.append({**search.setting, **labels, "checkpoint": str(path), **counts, "metrics": metrics})

    results = sorted(engine.summarise(rows), key=search_name)
    print_results(results)
    if args.json:
        origin = {"flags": vars(args), "data_path": data_path, "torch": torch.__version__}
        save_json({**origin, "results": results}, args.json)
    return results


def checkpoint_paths(args):
    """(path, RegDB's trial or None) of each checkpoint: one, or one for every trial where --resume has {trial}."""
    trials = data_manager.REGDB_TRIALS if "{trial}" in args.resume and not args.trial else [args.trial]
    return [(find_checkpoint(args.resume.replace("{trial}", str(t)), args.model_path), t) for t in trials]


def tested_trial(path, checkpoint, dataset, trial):
    """RegDB's trial to test this checkpoint on (None for SYSU-MM01): its own.

    Raises InputError for a checkpoint of another data set, of another trial, whose test people it was trained on, or of
    an unknown one: published checkpoints do not say.
    """
    origin = checkpoint.get("args", {})
    if origin.get("dataset", dataset) != dataset:
        raise InputError(f"{path}: was trained on {origin['dataset']}; test it with --dataset {origin['dataset']}")
    if dataset == "sysu":
        return None
    own = origin.get("trial", trial)
    if own is None:
        raise InputError(f"{path}: does not say which of RegDB's trials it was trained on; give --trial")
    if trial not in (None, own):
        raise InputError(f"{path}: was trained on trial {own}, on people of test trial {trial}; leave --trial out")
    return own


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
    return {
        "gray pixels": lambda images, _: {"pixels": gray_pixels(images)},
        "colour histogram": lambda images, _: {"colours": colour_histogram(images)},
        "untrained": engine.network_embedding(untrained, device, normalise, amp),
    }


def gray_pixels(images):
    """uint8 [B, 3, H, W] -> luminance of all pixels, its mean taken out, of unit length: [B, H W]."""
    gray = (images * torch.tensor(GRAY).view(3, 1, 1)).sum(dim=1).flatten(1)
    return F.normalize(gray - gray.mean(dim=1, keepdim=True))


def colour_histogram(images):
    """uint8 [B, 3, H, W] -> histogram of the colours in 8 x 8 x 8 bins, of unit length: [B, 512]."""
    red, green, blue = (images.long() // 32).flatten(2).unbind(dim=1)
    colour = (red * 8 + green) * 8 + blue
    return F.normalize(torch.zeros(len(images), 512).scatter_add_(1, colour, torch.ones_like(colour).float()))


def print_results(results):
    """The trials one by one; then mean and standard deviation, in one table below lines that name the protocols."""
    for row in results:
        if row["model"] == "trained":
            print(f"\n{describe(row)}: {row['feature']}, trial by trial")
            for trial in row["per_trial"]:
                print(f"trial {trial['trial']:>2}" + "".join(f"  {k} {v:6.2f}" for k, v in trial["metrics"].items()))
    print()
    for key, setting in dict.fromkeys((search_name(row), describe(row)) for row in results):
        print(f"{key}: {setting}")
    print("Mean ± standard deviation over the trials, %")
    print(f"{'search':20}{'model':18}{'feature':9}" + "".join(f"{metric:>15}" for metric in results[0]["mean"]))
    for row in results:
        cells = "".join(f"{mean:8.2f} ±{row['std'][metric]:5.2f}" for metric, mean in row["mean"].items())
        print(f"{search_name(row):20}{row['model']:18}{row['feature']:9}{cells}")


def search_name(row):
    """What tells the searches of one data set apart: SYSU-MM01's mode, RegDB's direction."""
    return row["mode"] or row["direction"]


def describe(row):
    """The protocol of a row of results in words."""
    count = row["per_trial"][0]
    where = f"SYSU-MM01, {row['mode']}-search" if row["dataset"] == "sysu" else "RegDB"
    shots = f", {row['shots']} shot" if row["shots"] else ""
    trials = f"trial {row['trials'][0]}" if len(row["trials"]) == 1 else f"{len(row['trials'])} trials"
    return (
        f"{where}, {row['direction']}, {row['protocol']} protocol{shots}, {trials}, {count['queries']} queries, "
        f"gallery of {count['gallery']}"
    )


if __name__ == "__main__":
    cli(main)

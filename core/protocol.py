"""What a test asks for: the flags that choose data set and protocol, shared by the scripts that test, and from them the
searches, the checkpoint's network and the features of all images."""

import json
import os

import data_manager
from core import engine
from core.checkpoint import load_checkpoint
from data_loader import eval_loader
from loss import method_name
from model import load_network
from utils import InputError, bounded


def add_flags(parser):
    """The flags that choose data set and protocol, and how images are embedded."""
    parser.add_argument("--dataset", choices=data_manager.DATA_PATHS, default="sysu")
    parser.add_argument("--data_path", help="folder of the data set (default: by --dataset)")
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
    parser.add_argument("--trial", type=bounded(int, 1, 10), help="RegDB's trial (default: the checkpoint's own)")
    parser.add_argument(
        "--tvsearch", action="store_true", help="RegDB: thermal to visible; LLCM: infrared to visible; not from visible"
    )
    parser.add_argument("--test_batch", type=bounded(int, 1, 65536), default=64, help="images in a batch")
    parser.add_argument("--workers", type=bounded(int, 0, 1024), default=4, help="loading processes, one a core")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="mixed precision of the network")
    parser.add_argument("--gpu", default="0", help="number of the GPU, or cpu")


def check_flags(args, names=()):
    """Raise InputError for flags that do not go with the data set. names: of checkpoints or files of features."""
    if args.dataset != "regdb" and (args.trial or any("{trial}" in name for name in names)):
        raise InputError(
            f"--trial and {{trial}} are RegDB's: --dataset {args.dataset} has ten trials for one checkpoint"
        )
    if args.dataset == "sysu" and args.tvsearch:
        raise InputError("--tvsearch is RegDB's and LLCM's: SYSU-MM01 is searched from infrared to visible only")
    if args.dataset != "sysu" and not is_default(args):
        raise InputError(
            f"--mode, --protocol and --shots are SYSU-MM01's: --dataset {args.dataset} has one protocol; leave them out"
        )


def is_default(args):
    """Whether the flags leave SYSU-MM01's protocol as it is by default."""
    return (args.mode, args.protocol, args.shots) == ("all", "seeded", 1)


def data_folder(args):
    return args.data_path or data_manager.DATA_PATHS[args.dataset]


def open_checkpoint(path, data_path):
    """A checkpoint's path -> (network, (height, width) of its images, what is known of where it comes from)."""
    checkpoint = load_checkpoint(path)
    net, size = load_network(checkpoint, path)
    return net, size, checkpoint_origin(path, checkpoint, net, size, data_path)


def checkpoint_origin(path, checkpoint, net, size, data_path):
    """What the rows of a table say of a checkpoint's features, and `--features` saves with them; None is unknown."""
    flags, epoch = checkpoint.get("args", {}), checkpoint.get("epoch", "unknown")
    method = flags.get("method") or method_name(net.options)
    if "within" in checkpoint:
        epoch = f"{epoch + 1}, {checkpoint['sums']['step']} steps of it"
    return {
        "dataset": flags.get("dataset"),
        "trial": flags.get("trial"),
        "selection": checkpoint.get("selection"),
        "flipped": ["POOL", "FC"],
        "checkpoint": str(path),
        "network": f"{method}, {net.options['arch']}, {size[0]}x{size[1]}, epoch {epoch}",
        "data_path": os.path.abspath(data_path),
        "demo": data_manager.is_demo(data_path),
        "flags": json.loads(json.dumps(flags, default=str)),  # plain values, whatever the file holds
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


def searches(args, data_path, trial, galleries=data_manager.TRIALS, everything=False):
    """The searches that the flags ask for, or all of the data set: a `data_manager.Searches`.

    trial: RegDB's. galleries: the trials of the other data sets. Raises InputError for a search without a match.
    """
    test = _searches(args, data_path, trial, galleries, everything)
    for search in test.searches:
        engine.check_matches(search)
    return test


def _searches(args, data_path, trial, galleries, everything):
    directions = data_manager.DIRECTIONS[args.dataset]
    directions = directions if everything else [directions[args.tvsearch]]
    if args.dataset == "regdb":
        return data_manager.regdb_test(data_path, trial, directions)
    if args.dataset == "llcm":
        return data_manager.llcm_test(data_path, directions, galleries)
    modes, protocols, shots = [args.mode], [args.protocol], [args.shots]
    if everything:
        modes, protocols, shots = data_manager.SYSU_VISIBLE, data_manager.SYSU_PROTOCOLS, data_manager.SYSU_SHOTS
    if everything and not (file := data_manager.permutations_file(data_path)).is_file():
        print(
            f"note: no {file}, so without the official protocol (its authors publish it: github.com/wuancong/SYSU-MM01)"
        )
        protocols = ["seeded"]
    test = data_manager.sysu_test(data_path, modes, protocols, shots, galleries)
    seen = {camera for search in test.searches for images in search[1:] for camera in images.cameras.tolist()}
    wanted = {*data_manager.SYSU_INFRARED, *(camera for mode in modes for camera in data_manager.SYSU_VISIBLE[mode])}
    if absent := sorted(wanted - seen):
        print(f"warning: {data_path}: no test id has an image of camera {', '.join(map(str, absent))}")
    return test


def embed_images(embed, paths, size, args):
    """Features of images {modality: paths}, as `engine.extract` gives them: {modality: {name: [N, C]}}."""
    loaders = {m: eval_loader(files, size, args.test_batch, args.workers) for m, files in paths.items()}
    return {m: engine.extract(embed, loader, m, f"embedding {m}") for m, loader in loaders.items()}

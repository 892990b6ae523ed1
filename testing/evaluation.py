"""What the programs that test share: the flags that choose a search, the checkpoint, the searches, the features."""

import os

import msgspec

from core.checkpoint import load_checkpoint
from core.formats import checked
from data_loader import eval_loader
from data_manager import is_demo
from datasets import DATASETS, TRAINING_SETS, check_options, option_values
from methods import method_name
from model import FEATURES, load_network
from testing import engine
from testing.features import Origin
from utils import AMP, InputError, bounded


def add_flags(parser):
    """Add the flags that choose data set and search, and how images are embedded."""
    flag = parser.add_argument
    flag("--dataset", choices=DATASETS, default="sysu")
    flag("--data_path", help="folder of the data set (default: by --dataset)")
    flag("--model_path", default="save_model/", help="folder of the checkpoints")
    flag("--mode", choices=option_values("mode"), default="all", help="of SYSU-MM01: all- or indoor-search")
    text = "SYSU-MM01: galleries drawn by seeded generators, or those of its authors' rand_perm_cam.mat"
    flag("--protocol", choices=option_values("protocol"), default="seeded", help=text)
    text = "SYSU-MM01: gallery images of an identity and camera"
    flag("--shots", type=int, choices=option_values("shots"), default=1, help=text)
    flag("--trial", type=bounded(int, 1, 10), help="RegDB's trial (default: the checkpoint's own)")
    text = "search the other direction: thermal to visible (RegDB), infrared to visible (all but SYSU-MM01)"
    flag("--tvsearch", action="store_true", help=text)
    flag("--test_batch", type=bounded(int, 1, 65536), default=64, help="images in a batch")
    flag("--workers", type=bounded(int, 0, 1024), default=4, help="loading processes, one a core")
    flag("--amp", choices=AMP, default="off", help="mixed precision of the network")
    flag("--gpu", default="0", help="number of the GPU, or cpu")


def check_search_flags(args, names=()):
    """Raise InputError for flags that have no meaning for the data set. names: of checkpoints or feature files."""
    check_options(args)
    trials = args.trial or any("{trial}" in name for name in names)
    if trials and "trial" not in DATASETS[args.dataset].options:
        raise InputError(f"--trial, {{trial}}: --dataset {args.dataset} has a single checkpoint; leave them out")


def data_folder(args):
    return args.data_path or TRAINING_SETS[args.dataset].path


def open_checkpoint(path, data_path):
    """A checkpoint's path -> (network, (height, width) of its images, its `checkpoint_origin`)."""
    checkpoint = load_checkpoint(path)
    net, size = load_network(checkpoint, path)
    return net, size, checkpoint_origin(path, checkpoint, net, size, data_path)


def checkpoint_origin(path, checkpoint, net, size, data_path):
    """Where a checkpoint's features come from, for tables and feature files: the fields of an `Origin`."""
    flags, epoch = checkpoint.get("args", {}), checkpoint.get("epoch", "unknown")
    method = flags.get("method") or method_name(net.options)
    left_out = "".join(f" without {part}" for part in ("afam", "local") if flags.get(part) == 0)
    if "sums" in checkpoint and "epoch" in checkpoint:
        epoch = f"{epoch + 1}, {checkpoint['sums']['step']} steps of it"
    origin = {
        "dataset": flags.get("dataset"),
        "trial": flags.get("trial"),
        "selection": checkpoint.get("selection"),
        "flipped": list(FEATURES),
        "checkpoint": str(path),
        "network": f"{method}{left_out}, {net.options['arch']}, {size[0]}x{size[1]}, epoch {epoch}",
        "data_path": os.path.abspath(data_path),
        "demo": is_demo(data_path),
        "flags": flags,
    }
    return msgspec.structs.asdict(checked(origin, Origin, f"{path}: args", "use another checkpoint, or train again"))


def tested_trial(path, origin, dataset, trial, cross_data):
    """The trial to test on, that of the checkpoint or features; None where a network is trained for all trials.

    origin: {"dataset", "trial"}, as far as they are known. trial: of --trial. cross_data: the network is of another
    data set and knows nobody of this one: all trials are tested. Raises InputError for features of another data set, or
    with cross_data of this one; of another trial, whose network was trained on people that this one tests; and of an
    unknown trial, which published checkpoints do not record.
    """
    own = origin.get("dataset")
    known = TRAINING_SETS[own].parts or (own,) if own else ()
    if cross_data:
        if dataset in known:
            raise InputError(f"{path}: was trained on {dataset} itself; leave out --cross_data")
        return trial
    if known and dataset not in known:
        remedy = f"--dataset {' or '.join(known)}, or with testa.py --cross_data as one that knows nobody here"
        raise InputError(f"{path}: was trained on {own}; test it with {remedy}")
    if "trial" not in DATASETS[dataset].options:
        return None
    own = origin.get("trial") or trial
    if own is None:
        raise InputError(f"{path}: does not record the trial that it was trained on; pass it with --trial")
    if trial not in (None, own):
        raise InputError(f"{path}: was trained on trial {own}, with test people of trial {trial}; leave --trial out")
    return own


def find_searches(args, data_path, trial, galleries=None, everything=False):
    """The searches that the flags choose, or all of the data set: `datasets.Searches`.

    trial: of `tested_trial`. galleries: the trials, if only some, of other data sets. Raises InputError for a search
    without a match.
    """
    dataset = DATASETS[args.dataset]
    flags = dataset.own(mode=args.mode, protocol=args.protocol, shots=args.shots)
    options = {flag: dataset.options[flag] if everything else [value] for flag, value in flags.items()}
    directions = dataset.directions if everything else [dataset.directions[args.tvsearch]]
    test = dataset.searches(data_path, directions, [trial] if trial else galleries or dataset.trials, **options)
    for note in test.notes:
        print(note)
    for search in test.searches:
        search.check_matches()
    return test


def embed_images(embed, paths, size, args, change=None):
    """Features of images {modality: paths}, as `engine.extract` gives them: {modality: {name: [N, C]}}. change: of
    `data_loader.ImageFiles`."""
    loaders = {m: eval_loader(files, size, args.test_batch, args.workers, change) for m, files in paths.items()}
    return {m: engine.extract(embed, loader, m, f"embedding {m}") for m, loader in loaders.items()}

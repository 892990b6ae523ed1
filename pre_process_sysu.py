"""Prepare SYSU-MM01 for training: decode and resize the images of the train and val ids once, into four arrays.

    python pre_process_sysu.py --data_path ../data/SYSU-MM01/

Writes train_rgb_resized_img.npy and train_ir_resized_img.npy (uint8 [N, H, W, 3], Lanczos) and, beside them,
..._label.npy (the number of the id among the sorted training ids) and train_ids.npy (those ids) into the data path.
"""

from collections import Counter
from contextlib import ExitStack, suppress

import numpy as np

from core.files import atomic, flush, writing
from core.images import check_readable, write_images
from data_loader import sysu_train_files
from data_manager import read_splits, sysu_training_images
from datasets import DATASETS
from utils import ArgumentParser, InputError, bounded, cli, one_line


def get_args_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", default=DATASETS["sysu"].path, help="folder with cam1 .. cam6 and exp")
    parser.add_argument("--img_h", type=bounded(int, 1, 4096), default=288, help="height of the arrays' images, pixels")
    parser.add_argument("--img_w", type=bounded(int, 1, 4096), default=144, help="width of the arrays' images, pixels")
    parser.add_argument("--skip_bad", action="store_true", help="continue without unreadable images")
    return parser


def main(argv=None):
    """Returns {split: {camera: images}}, with "train" and "val" as splits."""
    args = get_args_parser().parse_args(argv)
    splits = read_splits(args.data_path)
    del splits["test"]
    identities = sorted(splits["train"] | splits["val"])
    images = sysu_training_images(args.data_path, identities)
    check_identities(args.data_path, identities, images)

    files = sysu_train_files(args.data_path)
    with ExitStack() as stack:
        temporary = [stack.enter_context(atomic(file)) for file in files]
        write_arrays(args, identities, images, files, temporary)
        # All are whole. Before they take their names, the old ones step aside, so that a crash among the renames leaves
        # neither a mixed set nor less than there was. The ids go last and, as the stack unwinds, come first: arrays are
        # never without theirs.
        aside = [file.with_suffix(".npy.old") for file in files]
        for file, old in zip(files, aside, strict=True):
            with suppress(FileNotFoundError):
                file.replace(old)
    for old in aside:
        old.unlink(missing_ok=True)

    counts = count_images(splits, images)
    visible, infrared = (len(paths) for paths, _, _ in images.values())
    print(f"{visible} visible and {infrared} infrared images of {len(identities)} ids, {args.img_h}x{args.img_w}")
    return counts


def write_arrays(args, identities, images, files, temporary):
    """Write the arrays to `temporary`, which become `files`. images {kind: (paths, ids, cameras)}: unreadable ones
    are taken out with --skip_bad, and are an InputError without it."""
    size, unreadable = (args.img_h, args.img_w), {}
    outs = dict(zip(images, temporary[:4:2], strict=True))
    for (kind, (paths, _, _)), file in zip(images.items(), files[:4:2], strict=True):
        with writing(file):
            unreadable[kind] = write_images(paths, size, outs[kind], desc=kind)
    if not args.skip_bad:
        errors = [error for of_kind in unreadable.values() for error in of_kind.values()]
        total = sum(len(paths) for paths, _, _ in images.values())
        check_readable(errors, total, ", or continue without it: --skip_bad")
    for kind, errors in unreadable.items():
        for error in errors.values():
            print(one_line(f"left out: {error}"))
        if errors:
            paths, ids, cameras = (np.delete(column, [*errors]) for column in images[kind])
            images[kind] = paths.tolist(), ids, cameras
            again = write_images(images[kind][0], size, outs[kind], desc=f"{kind}, without {len(errors)}")
            check_readable([*again.values()], len(images[kind][0]))
    check_identities(args.data_path, identities, images)
    labels = [np.searchsorted(identities, ids) for _, ids, _ in images.values()]
    for values, file in zip([*labels, identities], [*temporary[1:4:2], temporary[4]], strict=True):
        with file.open("wb") as stream:
            np.save(stream, values)
    for file in temporary:
        flush(file)


def count_images(splits, images):
    """Print a table of the images of each split and camera -> {split: {camera: images}}."""
    counts = {split: Counter() for split in splits}
    for _, ids, cameras in images.values():
        for identity, camera in zip(ids.tolist(), cameras.tolist(), strict=True):
            counts["train" if identity in splits["train"] else "val"][camera] += 1
    print(f"{'split':8}{'ids':>6}" + "".join(f"{f'cam{camera}':>8}" for camera in range(1, 7)) + f"{'images':>9}")
    for split, count in counts.items():
        cells = "".join(f"{count[camera]:8}" for camera in range(1, 7))
        print(f"{split:8}{len(splits[split]):6}{cells}{count.total():9}")
    return counts


def check_identities(data_path, identities, images):
    """Raise InputError for an id without images, whose label would be missing."""
    if without := set(identities).difference(*(ids.tolist() for _, ids, _ in images.values())):
        raise InputError(f"{data_path}: id {min(without)} of exp/train_id.txt or val_id.txt has no image; take it out")


if __name__ == "__main__":
    cli(main)

"""Prepare SYSU-MM01 for training: decode and resize the images of the train and val ids once, into four arrays.

    python pre_process_sysu.py --data_path ../data/SYSU-MM01/

Writes train_rgb_resized_img.npy and train_ir_resized_img.npy (uint8 [N, H, W, 3], Lanczos) and, beside them,
..._label.npy (the rank of the id among all training ids) into the data path.
"""

from collections import Counter
from contextlib import ExitStack
from itertools import combinations

import numpy as np

from data_loader import sysu_train_files, write_images
from data_manager import DATA_PATHS, SYSU_INFRARED, SYSU_VISIBLE, read_ids, sysu_images
from utils import ArgumentParser, InputError, atomic, cli, number


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default=DATA_PATHS["sysu"], help="folder with cam1 .. cam6 and exp")
    parser.add_argument("--img_h", type=number(int, 1), default=288, help="height of the arrays' images, pixels")
    parser.add_argument("--img_w", type=number(int, 1), default=144, help="width of the arrays' images, pixels")
    return parser


def main(argv=None):
    """Returns {split: {camera: images}}, with "train" and "val" as splits."""
    args = get_args_parser().parse_args(argv)

    splits = {split: set(read_ids(args.data_path, split)) for split in ("train", "val", "test")}
    for one, other in combinations(splits, 2):
        if both := splits[one] & splits[other]:
            raise InputError(
                f"{args.data_path}: id {min(both)} is in exp/{one}_id.txt and in exp/{other}_id.txt; remove it from one"
            )
    del splits["test"]
    identities = sorted(splits["train"] | splits["val"])
    visible_paths, visible_ids, visible_cameras = sysu_images(args.data_path, identities, SYSU_VISIBLE["all"])
    infrared_paths, infrared_ids, infrared_cameras = sysu_images(args.data_path, identities, SYSU_INFRARED)

    size = (args.img_h, args.img_w)
    files = sysu_train_files(args.data_path)
    with ExitStack() as stack:
        visible, visible_labels, infrared, infrared_labels = (stack.enter_context(atomic(file)) for file in files)
        for out, ids in ((visible_labels, visible_ids), (infrared_labels, infrared_ids)):
            with out.open("wb") as file:
                np.save(file, np.searchsorted(identities, ids))
        write_images(visible_paths, size, visible, desc="visible")
        write_images(infrared_paths, size, infrared, desc="infrared")
        # All four are whole. The old ones go first, so that a crash among the renames cannot leave a mixed set.
        for file in files:
            file.unlink(missing_ok=True)

    counts = {split: Counter() for split in splits}
    for ids, cameras in ((visible_ids, visible_cameras), (infrared_ids, infrared_cameras)):
        for identity, camera in zip(ids.tolist(), cameras.tolist(), strict=True):
            counts["train" if identity in splits["train"] else "val"][camera] += 1
    print(f"{'split':8}{'ids':>6}" + "".join(f"{f'cam{camera}':>8}" for camera in range(1, 7)) + f"{'images':>9}")
    for split, count in counts.items():
        cells = "".join(f"{count[camera]:8}" for camera in range(1, 7))
        print(f"{split:8}{len(splits[split]):6}{cells}{count.total():9}")
    total = f"{len(visible_paths)} visible and {len(infrared_paths)} infrared images of {len(identities)} ids"
    print(f"{total}, {size[0]}x{size[1]}")
    return counts


if __name__ == "__main__":
    cli(main)

"""Prepare SYSU-MM01 for training: decode and resize the images of the train and val ids once, into four arrays.

    python pre_process_sysu.py --data_path ../data/SYSU-MM01/

Writes train_rgb_resized_img.npy and train_ir_resized_img.npy (uint8 [N, H, W, 3], Lanczos) and, beside them,
..._label.npy (the rank of the id among all training ids) into the data path.
"""

from collections import Counter
from contextlib import ExitStack, suppress
from itertools import combinations

import numpy as np

from core.files import atomic, flush, writing
from data_loader import check_readable, sysu_train_files, write_images
from data_manager import DATA_PATHS, SYSU_INFRARED, SYSU_VISIBLE, read_ids, sysu_images
from utils import ArgumentParser, InputError, bounded, cli


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default=DATA_PATHS["sysu"], help="folder with cam1 .. cam6 and exp")
    parser.add_argument("--img_h", type=bounded(int, 1, 4096), default=288, help="height of the arrays' images, pixels")
    parser.add_argument("--img_w", type=bounded(int, 1, 4096), default=144, help="width of the arrays' images, pixels")
    parser.add_argument("--skip_bad", action="store_true", help="go on without the images that cannot be read")
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
    kinds = {"visible": SYSU_VISIBLE["all"], "infrared": SYSU_INFRARED}
    images = {kind: sysu_images(args.data_path, identities, cameras) for kind, cameras in kinds.items()}
    check_identities(args.data_path, identities, images)

    size = (args.img_h, args.img_w)
    files = sysu_train_files(args.data_path)
    with ExitStack() as stack:
        temporary = [stack.enter_context(atomic(file)) for file in files]
        out = dict(zip(kinds, zip(temporary[::2], temporary[1::2], strict=True), strict=True))
        bad = {}
        for (kind, (paths, _, _)), file in zip(images.items(), files[::2], strict=True):
            with writing(file):
                bad[kind] = write_images(paths, size, out[kind][0], desc=kind)
        if not args.skip_bad:
            unreadable = [error for errors in bad.values() for error in errors.values()]
            total = sum(len(paths) for paths, _, _ in images.values())
            check_readable(unreadable, total, ", or go on without it: --skip_bad")
        for kind, errors in bad.items():
            for error in errors.values():
                print(f"left out: {error}")
            if errors:
                paths, ids, cameras = (np.delete(column, [*errors]) for column in images[kind])
                images[kind] = paths.tolist(), ids, cameras
                write_images(images[kind][0], size, out[kind][0], desc=f"{kind}, without {len(errors)}")
        check_identities(args.data_path, identities, images)
        for kind, (_, ids, _) in images.items():
            with out[kind][1].open("wb") as file:
                np.save(file, np.searchsorted(identities, ids))
        for file in temporary:
            flush(file)
        # All four are whole. Before they take their names, the old ones step aside, so that a crash among the renames
        # leaves neither a mixed set nor less than there was.
        aside = [file.with_suffix(".npy.old") for file in files]
        for file, old in zip(files, aside, strict=True):
            with suppress(FileNotFoundError):
                file.replace(old)
    for old in aside:
        old.unlink(missing_ok=True)

    counts = {split: Counter() for split in splits}
    for _, ids, cameras in images.values():
        for identity, camera in zip(ids.tolist(), cameras.tolist(), strict=True):
            counts["train" if identity in splits["train"] else "val"][camera] += 1
    print(f"{'split':8}{'ids':>6}" + "".join(f"{f'cam{camera}':>8}" for camera in range(1, 7)) + f"{'images':>9}")
    for split, count in counts.items():
        cells = "".join(f"{count[camera]:8}" for camera in range(1, 7))
        print(f"{split:8}{len(splits[split]):6}{cells}{count.total():9}")
    visible, infrared = (len(paths) for paths, _, _ in images.values())
    print(f"{visible} visible and {infrared} infrared images of {len(identities)} ids, {size[0]}x{size[1]}")
    return counts


def check_identities(data_path, identities, images):
    """Raise InputError for an id without images: its label would be missing. images: {kind: (paths, ids, cameras)}."""
    if without := set(identities).difference(*(ids.tolist() for _, ids, _ in images.values())):
        raise InputError(f"{data_path}: id {min(without)} of exp/train_id.txt or val_id.txt has no image; take it out")


if __name__ == "__main__":
    cli(main)

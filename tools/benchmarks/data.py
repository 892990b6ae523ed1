"""Preparing the arrays of a data set, and loading an epoch."""

import os
import tempfile
import time
from functools import partial
from pathlib import Path

from ChannelAug import TrainAugmentation
from core.images import write_images
from data_loader import IdentitySampler, sysu_train, train_loader
from data_manager import SYSU_VISIBLE, read_ids, sysu_images
from tools.benchmarks.measuring import compare, gib_text, print_head, run_measured
from utils import cores, progress

SCALING_IMAGES, SCALING_REPEATS = 2000, 3  # prepared on all cores and on one


def bench_data(args, device):
    """The arrays are prepared anew, in a process of its own."""
    size = (args.img_h, args.img_w)
    _, imports = run_measured("-c", "import pre_process_sysu")
    flags = ["--data_path", os.path.abspath(args.data_path), "--img_h", str(size[0]), "--img_w", str(size[1])]
    seconds, peak = run_measured("pre_process_sysu.py", *flags)
    above = None if None in (peak, imports) else peak - imports
    data = sysu_train(args.data_path, size)
    images = sum(data.num_images)
    print(
        f"prepared {images} images in {seconds:.1f} s, {images / seconds:.0f} images/s; peak memory "
        f"{gib_text(peak)}, {gib_text(above)} above the interpreter with its imports"
    )
    results = {"prepared_images": images, "prepare_seconds": seconds, "prepare_images_per_second": images / seconds}
    results |= {"prepare_peak_gib": peak, "prepare_peak_above_imports_gib": above}
    results["prepare_scaling"] = prepare_on_one_core(args.data_path, size, device)
    return results | load_epoch(data, args, device)


def prepare_on_one_core(data_path, size, device):
    """Preparing on all cores against one."""
    ids = [identity for split in ("train", "val") for identity in read_ids(data_path, split)]
    paths = sysu_images(data_path, ids, SYSU_VISIBLE["all"])[0][:SCALING_IMAGES]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "images.npy"
        runs = [partial(write_images, paths, size, out, "preparing", count) for count in (cores(), 1)]
        print_head()
        return compare(f"preparing {len(paths)} images, all cores, one core", *runs, SCALING_REPEATS, device)


def load_epoch(data, args, device):
    sampler = IdentitySampler(data, args.batch_size, args.num_pos, seed=0)
    augment = TrainAugmentation(1, 0.5)
    loader = train_loader(data, sampler, args.workers, device, args.cache)
    next(iter(loader))  # starts the loading processes
    inputs, start = 0, time.perf_counter()
    for batch in progress(loader, desc="epoch", unit="step"):
        visible, _, labels = augment(*(x.to(device, non_blocking=True) for x in batch))
        inputs += len(labels)
    float(visible.sum())  # waits for the device
    seconds = time.perf_counter() - start
    print(f"an epoch: {len(sampler)} steps, {inputs} network inputs, {seconds:.1f} s, {inputs / seconds:.0f} a second")
    return {"epoch_steps": len(sampler), "epoch_inputs": inputs, "epoch_seconds": seconds}

"""Measure how fast things are here.

    python bench.py data --data_path ../data/SYSU-MM01/

data: prepare SYSU-MM01's arrays with pre_process_sysu.py (which writes them), time and peak memory; then one epoch of
the sampler, the loader and the augmentation over them, without a network.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from ChannelAug import TrainAugmentation
from data_loader import IdentitySampler, sysu_train, train_loader
from data_manager import DATA_PATHS
from utils import ArgumentParser, InputError, check_output, cli, number, progress, save_json, select_device

REPO = Path(__file__).parent


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="prepare the data set's arrays anew; one epoch of loading and augmenting")
    data.add_argument("--data_path", default=DATA_PATHS["sysu"], help="folder of SYSU-MM01, or of demo data like it")
    data.add_argument("--img_h", type=number(int, 1), default=288, help="image height, pixels")
    data.add_argument("--img_w", type=number(int, 1), default=144, help="image width, pixels")
    data.add_argument("--batch_size", type=number(int, 2), default=8, help="identities in a batch")
    data.add_argument("--num_pos", type=number(int, 1), default=4, help="images of an identity and modality in a batch")
    data.add_argument("--workers", type=number(int, 0), default=4, help="loading processes, at most one a core")
    data.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
    data.add_argument("--json", metavar="FILE", help="write the figures to this file")
    return parser


def main(argv=None):
    """Returns the figures, a dict."""
    args = get_args_parser().parse_args(argv)
    if args.json:
        check_output(args.json)
    figures = bench_data(args)
    figures |= {"flags": vars(args), "cores": os.cpu_count(), "torch": torch.__version__}
    if args.json:
        save_json(figures, args.json)
    return figures


def bench_data(args):
    device = select_device(args.gpu)
    _, imported = run_measured("-c", "import pre_process_sysu")
    sizes = ["--img_h", str(args.img_h), "--img_w", str(args.img_w)]
    seconds, peak = run_measured("pre_process_sysu.py", "--data_path", os.path.abspath(args.data_path), *sizes)
    data = sysu_train(args.data_path, (args.img_h, args.img_w))
    images = sum(data.num_images)
    figures = {
        "prepared_images": images,
        "prepare_seconds": seconds,
        "prepare_images_per_second": images / seconds,
        "prepare_peak_gib": peak / 2**30,
        "prepare_peak_above_imports_gib": (peak - imported) / 2**30,
    }
    print(
        f"prepared {images} images in {seconds:.1f} s, {images / seconds:.0f} images/s; peak memory {peak / 2**30:.2f} "
        f"GiB, {(peak - imported) / 2**30:.2f} above the interpreter with its imports"
    )

    sampler = IdentitySampler(data, args.batch_size, args.num_pos, seed=0)
    augment = TrainAugmentation(1, 0.5)
    loaded, start = 0, time.perf_counter()
    for visible, infrared, _ in progress(train_loader(data, sampler, args.workers), desc="epoch", unit="step"):
        views = augment(visible.to(device, non_blocking=True), infrared.to(device, non_blocking=True))
        loaded += sum(len(view) for view in views)
    float(views[0].sum())  # waits for the device
    seconds = time.perf_counter() - start
    print(f"an epoch: {len(sampler)} steps, {loaded} network inputs, {seconds:.1f} s, {loaded / seconds:.0f} a second")
    return {**figures, "epoch_steps": len(sampler), "epoch_inputs": loaded, "epoch_seconds": seconds}


def run_measured(*arguments):
    """Run Python with these arguments in the repo -> (seconds, peak memory in bytes).

    The peak is read from Linux's /proc while the command runs. (What `wait4` reports is at least the memory of the
    process that started it.)
    """
    if not Path("/proc/self/status").exists():
        raise InputError(f"{sys.platform}: has no /proc to read the peak memory from; run this on Linux")
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *arguments], cwd=REPO)
    while process.poll() is None:
        if high := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()):
            peak = int(high[1]) * 1024
        time.sleep(0.01)
    if process.returncode:
        sys.exit(process.returncode)  # it has said why
    return time.perf_counter() - start, peak


if __name__ == "__main__":
    cli(main)

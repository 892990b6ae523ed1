"""Measure the speed of this code against plain references in the same process.

    python -m tools.bench metrics        (--help lists what can be measured)

Each comparison warms up, alternates between code and reference, repeats, and reports medians. The references are in
tools/benchmarks/plain.py.
"""

import platform

import torch

from core.files import check_output, save_json
from data_loader import CACHES
from datasets import DATASETS
from model import ARCHS
from tools.benchmarks.data import bench_data
from tools.benchmarks.embedding import bench_embed
from tools.benchmarks.methods import bench_methods
from tools.benchmarks.search import bench_search
from tools.benchmarks.step import bench_loss, bench_step
from tools.benchmarks.testing import bench_metrics, bench_rerank, bench_test
from utils import AMP, ArgumentParser, bounded, cli, cores, select_device

FLAGS = {
    "data_path": {"default": DATASETS["sysu"].path, "help": "folder of SYSU-MM01 or of demo data"},
    "img_h": {"type": bounded(int, 48), "default": 288, "help": "image height in pixels"},
    "img_w": {"type": bounded(int, 16), "default": 144, "help": "image width in pixels"},
    "workers": {"type": bounded(int, 0), "default": 4, "help": "loading processes, at most one per core"},
    "cache": {"choices": CACHES, "default": "auto", "help": "where training images are kept"},
    "batch_size": {"type": bounded(int, 2), "default": 8, "help": "identities per batch"},
    "num_pos": {"type": bounded(int, 1), "default": 4, "help": "images per identity and modality in a batch"},
    "arch": {"choices": ARCHS, "default": "resnet50", "help": "backbone"},
    "amp": {"choices": AMP, "default": "off", "help": "mixed precision of the network"},
    "graph": {"type": int, "choices": (0, 1), "default": 1, "help": "0 starts the tasks of a step one by one"},
    "steps": {"type": bounded(int, 1), "default": 10, "help": "training steps per turn"},
    "queries": {"type": bounded(int, 1), "default": 3803, "help": "number of queries"},
    "gallery": {"type": bounded(int, 1), "default": 301, "help": "number of gallery images"},
    "index": {"help": "empty database, postgresql://... (default: a file in the folder of TMPDIR)"},
    "vectors": {"type": bounded(int, 1000), "default": 1_000_000, "help": "vectors in the index"},
    "people": {"type": bounded(int, 1), "default": 20_000, "help": "clusters of the vectors"},
    "dim": {"type": bounded(int, 2), "default": 2048, "help": "values per vector"},
    "images": {"type": bounded(int, 1), "default": 256, "help": "number of random images"},
    "test_batch": {"type": bounded(int, 1), "default": 64, "help": "images per batch"},
    "repeats": {"type": bounded(int, 1), "default": 5, "help": "turns of each side of a comparison"},
    "gpu": {"default": "0", "help": "number of the GPU, or cpu"},
    "json": {"metavar": "FILE", "help": "write the results to this file"},
}


SIZE, BATCH, RUN = "img_h img_w", "batch_size num_pos", "repeats gpu json"
COMMANDS = {
    bench_data: f"data_path {SIZE} workers cache {BATCH} gpu json",
    bench_step: f"{SIZE} workers cache arch amp graph {BATCH} steps {RUN}",
    bench_methods: f"{SIZE} arch amp graph steps {RUN}",
    bench_loss: f"{BATCH} {RUN}",
    bench_metrics: RUN,
    bench_test: f"data_path {SIZE} workers arch amp test_batch {RUN}",
    bench_rerank: f"queries gallery {RUN}",
    bench_search: "index vectors people dim repeats json",
    bench_embed: f"images {SIZE} workers arch test_batch repeats json",
}


def get_args_parser():
    """A command for each function bench_NAME, whose docstring begins with what it measures."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for bench, flags in COMMANDS.items():
        sub = commands.add_parser(bench.__name__.removeprefix("bench_"), help=(bench.__doc__ or "").partition("\n")[0])
        sub.set_defaults(bench=bench)
        for flag in flags.split():
            sub.add_argument(f"--{flag}", **FLAGS[flag])
    return parser


def main(argv=None):
    """Returns the results, a dict."""
    args = get_args_parser().parse_args(argv)
    bench = vars(args).pop("bench")  # not one of the flags
    if args.json:
        check_output(args.json)
        DATASETS["sysu"].check_not_data(args.json, getattr(args, "data_path", None))
    device = select_device(getattr(args, "gpu", "cpu"), getattr(args, "amp", "off"))
    results = bench(args, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"device": name, "cores": cores(), "python": platform.python_version(), "torch": torch.__version__}
    results |= {"flags": vars(args), **machine}
    if args.json:
        save_json(results, args.json)
    return results


if __name__ == "__main__":
    cli(main)

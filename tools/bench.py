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
from tools.benchmarks.gpu import STAGES, bench_gpu
from tools.benchmarks.methods import bench_methods
from tools.benchmarks.search import bench_search
from tools.benchmarks.step import bench_loss, bench_step
from tools.benchmarks.testing import bench_metrics, bench_rerank, bench_test
from utils import ArgumentParser, bounded, cli, cores, select_device

FLAGS = {
    "--data_path": {"default": DATASETS["sysu"].path, "help": "folder of SYSU-MM01 or of demo data"},
    "--img_h": {"type": bounded(int, 48), "default": 288, "help": "image height in pixels"},
    "--img_w": {"type": bounded(int, 16), "default": 144, "help": "image width in pixels"},
    "--workers": {"type": bounded(int, 0), "default": 4, "help": "loading processes, at most one per core"},
    "--cache": {"choices": CACHES, "default": "auto", "help": "where training images are kept"},
    "--batch_size": {"type": bounded(int, 2), "default": 8, "help": "identities per batch"},
    "--num_pos": {"type": bounded(int, 1), "default": 4, "help": "images per identity and modality in a batch"},
    "--arch": {"choices": ARCHS, "default": "resnet50", "help": "backbone"},
    "--amp": {"choices": ("off", "bf16"), "default": "off", "help": "mixed precision of the network"},
    "--graph": {"type": int, "choices": (0, 1), "default": 1, "help": "0 starts the tasks of a step one by one"},
    "--steps": {"type": bounded(int, 1), "default": 10, "help": "training steps per turn"},
    "--repeats": {"type": bounded(int, 1), "default": 5, "help": "turns of each side of a comparison"},
    "--gpu": {"default": "0", "help": "number of the GPU, or cpu"},
    "--json": {"metavar": "FILE", "help": "write the results to this file"},
}


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(bench, name, text, **groups):
        """A command that calls `bench`, with flags of FLAGS in groups -> its parser."""
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(bench=bench)
        for title, flags in groups.items():
            group = sub.add_argument_group(title)
            for flag in flags.split():
                group.add_argument(f"--{flag}", **FLAGS[f"--{flag}"])
        return sub

    images, batch, run = "img_h img_w workers", "batch_size num_pos", "repeats gpu json"
    text = "prepare the arrays of a data set (time, peak memory); load and augment one epoch"
    command(bench_data, "data", text, data=f"data_path {images}", training=f"cache {batch}", run="gpu json")
    text = "training steps against the published recipe; where the time of a step goes"
    parts = {"data": f"cache {images}", "training": f"arch amp graph {batch}", "run": f"steps {run}"}
    step = command(bench_step, "step", text, **parts)
    step.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    text = "parameters of each --method, its training step and its test, on random images"
    command(bench_methods, "methods", text, data="img_h img_w", network="arch amp graph", run=f"steps {run}")
    command(bench_loss, "loss", "the aligned local loss against a walk sample by sample", training=batch, run=run)
    text = "the metrics against Python lists query by query; a search directly from features"
    metrics = command(bench_metrics, "metrics", text, run=run)
    metrics.add_argument("--queries", type=bounded(int, 1), default=20_000, help="queries of the search from features")
    metrics.add_argument("--gallery", type=bounded(int, 1), default=200_000, help="gallery of the search from features")
    text = "from image files to metrics, against reading the files again for each gallery"
    test = command(bench_test, "test", text, data=f"data_path {images}", network="arch amp", run=run)
    test.set_defaults(test_batch=64)
    rerank = command(bench_rerank, "rerank", "k-reciprocal re-ranking against loops over images", run=run)
    rerank.add_argument("--queries", type=bounded(int, 1), default=3803, help="number of queries")
    rerank.add_argument("--gallery", type=bounded(int, 1), default=301, help="number of gallery images")
    text = "an index of random vectors: size, rate, time per query; of a server's graph also the recall"
    search = command(bench_search, "search", text, run="repeats json")
    search.add_argument("--index", help="empty database, postgresql://... (default: a file in the folder of TMPDIR)")
    search.add_argument("--vectors", type=bounded(int, 1000), default=1_000_000, help="vectors in the index")
    search.add_argument("--people", type=bounded(int, 1), default=20_000, help="clusters of the vectors")
    search.add_argument("--dim", type=bounded(int, 2), default=2048, help="values per vector")
    text = "mean cosine of two vectors of a person"
    search.add_argument("--cosine", type=bounded(float, 0.01, 0.99), default=0.45, help=text)
    search.set_defaults(gpu="cpu")
    text = "images embedded from files: PyTorch, ONNX Runtime, bf16, int8; what they lose"
    embed = command(bench_embed, "embed", text, data=f"data_path {images}", network="arch", run="repeats json")
    embed.add_argument("--images", type=bounded(int, 32), default=256, help="number of random images")
    embed.add_argument("--resume", metavar="FILE", help="a checkpoint, to embed the test images of --data_path instead")
    embed.add_argument("--batch", type=bounded(int, 1), default=64, help="images per batch")
    embed.set_defaults(gpu="cpu")
    gpu = commands.add_parser("gpu", help="the GPU tests, then every measurement, each in a process of its own")
    gpu.add_argument("--out", required=True, metavar="FILE", help="write all results to this file, after each stage")
    gpu.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, help="run only these stages")
    gpu.add_argument("--like", metavar="FILE", help="SYSU-MM01's rand_perm_cam.mat, to test at its full size")
    gpu.add_argument("--timeout", type=bounded(int, 1), default=540, help="seconds after which a process is stopped")
    gpu.add_argument("--gpu", default="0", help="number of the GPU")
    return parser


def main(argv=None):
    """Returns the results, a dict."""
    args = get_args_parser().parse_args(argv)
    if args.command == "gpu":
        return bench_gpu(args)
    bench = vars(args).pop("bench")  # not one of the flags
    if args.json:
        check_output(args.json)
    device = select_device(args.gpu, getattr(args, "amp", "off"))
    results = bench(args, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"device": name, "cores": cores(), "python": platform.python_version(), "torch": torch.__version__}
    results |= {"flags": vars(args), **machine}
    if args.json:
        save_json(results, args.json)
    return results


if __name__ == "__main__":
    cli(main)

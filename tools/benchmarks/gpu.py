"""All measurements on a GPU, and the GPU tests, each in a process of its own: one that fails leaves the others."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from core.files import check_output, save_json
from tools.benchmarks.measuring import REPO
from utils import InputError

STAGES = ("tests", "step", "methods", "loss", "metrics", "rerank", "data", "train")
LONGEST = 30_000  # characters of an output that are kept
STEPS = {
    "step float32": ["--amp", "off"],
    "step bf16": ["--amp", "bf16"],
    "step bf16 without a graph": ["--amp", "bf16", "--graph", "0"],
    "step bf16 from loading processes": ["--amp", "bf16", "--cache", "disk", "--workers", "16"],
    "step bf16 compiled": ["--amp", "bf16", "--compile"],
}
DEMO = ["--layout", "sysu", "--ids", "100", "--images", "4"]
SMALL = ["--img_h", "96", "--img_w", "48"]
SWEEP = ["--vary", "amp=off,bf16", "--seeds", "0", "1", "2"]
TRAIN = ["--arch", "resnet18", "--weights", "none", "--weighting", "stable", "--padding", "6", "--rande", "0"]
TRAIN += ["--batch_size", "16", "--num_pos", "2", "--optim", "adam", "--lr", "0.01", "--epochs", "11", "--warmup", "0"]
TRAIN += ["--milestones", "8", "--eval_every", "5"]


def bench_gpu(args):
    """Returns the results, which `--out` holds after each stage.

    `--out` keeps the stages of earlier calls, so that several calls with `--only` fill one file. Exits with status 1
    if anything failed.
    """
    out = Path(args.out)
    check_output(out)
    if not torch.cuda.is_available():
        raise InputError("PyTorch sees no CUDA device; run this on a machine with a GPU")
    if args.like and not Path(args.like).is_file():
        raise InputError(f"--like {args.like}: no such file; pass SYSU-MM01's rand_perm_cam.mat, or leave it out")
    try:
        results = dict(json.loads(out.read_text())) if out.is_file() else {}
    except (TypeError, ValueError) as error:
        raise InputError(f"{out}: holds no results of earlier stages ({error}); choose another --out") from error
    with tempfile.TemporaryDirectory() as work:
        for name, commands, files in plan(args, work):
            results[name] = {"runs": []}
            for command in commands:
                results[name]["runs"].append(run_recorded(command, args.timeout))
                kept = {pattern: [file.read_text() for file in sorted(Path(work).glob(pattern))] for pattern in files}
                results[name]["files"] = kept
                save_json(results, out)
    if any(run["status"] for result in results.values() for run in result["runs"]):
        sys.exit(1)
    return results


def run_recorded(command, timeout):
    """Run Python with these arguments in the repo -> {"command", "seconds", "status", "stdout", "stderr"}."""
    start, pipes = time.perf_counter(), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *command], cwd=REPO, text=True, errors="replace", **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()  # a sweep passes that on, and waits for its runs
            (stdout, stderr), status = process.communicate(), "timeout"
    seconds = round(time.perf_counter() - start, 1)
    print(f"{' '.join(command)}: status {status} after {seconds} s\n{stdout[-800:]}{stderr[-800:]}", flush=True)
    output = {"stdout": stdout[-LONGEST:], "stderr": stderr[-LONGEST:]}
    return {"command": command, "seconds": seconds, "status": status, **output}


def plan(args, work):
    """The measurements of the chosen stages: (name, commands, files in `work` to keep)."""
    tree, large, gpu = f"{work}/demo", f"{work}/large", ["--gpu", args.gpu]
    size = ["--like", os.path.abspath(args.like)] if args.like else DEMO

    def bench(name, command, *flags):
        line = ["-m", "tools.bench", command, *flags, *gpu, "--json", f"{work}/{name}.json"]
        return name, [line], [f"{name}.json"]

    data, preparation, files = bench("data", "data", "--data_path", large)
    test = ["--amp", "bf16", "--workers", "16", "--repeats", "1"]
    make_tree = [["-m", "tools.demo_data", "--out", tree, *DEMO], ["pre_process_sysu.py", "--data_path", tree, *SMALL]]
    sweep = ["-m", "tools.sweep", "--out", f"{work}/sweep", "--gpus", args.gpu, *SWEEP]
    sweep += ["--", "--data_path", tree, *SMALL, *TRAIN]
    runs = {
        "tests": [("tests", [["-m", "pytest", "-q", "-m", "gpu"]], [])],
        "step": [bench(name, "step", *flags, "--repeats", "3") for name, flags in STEPS.items()],
        "methods": [bench("methods", "methods", "--amp", "bf16", "--repeats", "3")],
        "loss": [bench("loss", "loss")],
        "metrics": [bench("metrics", "metrics")],
        "rerank": [bench("rerank", "rerank")],
        "data": [
            (data, [["-m", "tools.demo_data", "--out", large, *size], *preparation], files),
            bench("test", "test", "--data_path", large, *test),
        ],
        "train": [("train", [*make_tree, sweep], ["sweep/table.json", "sweep/*/*/log/*/*.jsonl"])],
    }
    return [run for stage in args.only for run in runs[stage]]

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

STAGES = ("tests", "step", "loss", "metrics", "rerank", "data", "train")
LONGEST = 30_000  # characters of an output that are kept
STEPS = {
    "step float32": ["--amp", "off"],
    "step bf16": ["--amp", "bf16"],
    "step bf16 from loading processes": ["--amp", "bf16", "--cache", "disk", "--workers", "16"],
    "step bf16 compiled": ["--amp", "bf16", "--compile"],
}
DEMO = ["--layout", "sysu", "--ids", "100", "--images", "4"]
SMALL = ["--img_h", "96", "--img_w", "48"]
TRAIN = ["--arch", "resnet18", "--weights", "none", "--square", "0", "--rande", "0.2", "--optim", "adam"]
TRAIN += ["--lr", "0.01", "--epochs", "11", "--warmup", "1", "--milestones", "8", "--eval_every", "5"]


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
    results = json.loads(out.read_text()) if out.is_file() else {}
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
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, text=True, timeout=timeout)
        status, stdout, stderr = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        status, (stdout, stderr) = "timeout", ((text or b"").decode() for text in (late.stdout, late.stderr))
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

    def train(amp, seed):
        flags = ["--data_path", tree, *SMALL, *TRAIN, *gpu, "--amp", amp, "--seed", str(seed)]
        flags += ["--model_path", f"{work}/{amp}{seed}", "--log_path", f"{work}/{amp}{seed}"]
        return f"train {amp} seed {seed}", [["train_ext_test0.py", *flags]], [f"{amp}{seed}/sysu_log/*.jsonl"]

    data, preparation, files = bench("data", "data", "--data_path", large)
    test = ["--amp", "bf16", "--workers", "16", "--repeats", "1"]
    make_tree = [["-m", "tools.demo_data", "--out", tree, *DEMO], ["pre_process_sysu.py", "--data_path", tree, *SMALL]]
    runs = {
        "tests": [("tests", [["-m", "pytest", "-q", "-m", "gpu"]], [])],
        "step": [bench(name, "step", *flags) for name, flags in STEPS.items()],
        "loss": [bench("loss", "loss")],
        "metrics": [bench("metrics", "metrics")],
        "rerank": [bench("rerank", "rerank")],
        "data": [
            (data, [["-m", "tools.demo_data", "--out", large, *size], *preparation], files),
            bench("test", "test", "--data_path", large, *test),
        ],
        "train": [("demo data", make_tree, [])] + [train(amp, seed) for seed in range(3) for amp in ("off", "bf16")],
    }
    return [run for stage in args.only for run in runs[stage]]

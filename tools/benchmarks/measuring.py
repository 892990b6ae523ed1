"""Time and memory of functions and processes."""

import contextlib
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from utils import progress

REPO = Path(__file__).parents[2]
PROC = Path("/proc")
CPU = torch.device("cpu")


def seconds(function, calls, device):
    """Mean seconds of a call, over `calls` of them in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def compare(name, ours, baseline, repeats, device):
    """Time both by turns -> {"name", "ours_seconds", "baseline_seconds", "ratio"}, medians; prints them."""
    return compared(name, *alternate(name, [ours, baseline], repeats, device))


def compared(name, ours, baseline):
    """Print the seconds of both -> them and their ratio."""
    print(f"{name:52}{1000 * baseline:12.1f} ms{1000 * ours:12.2f} ms{baseline / ours:9.1f} x")
    return {"name": name, "ours_seconds": ours, "baseline_seconds": baseline, "ratio": baseline / ours}


def alternate(name, functions, repeats, device, before=lambda: None):
    """Time functions by turns -> the median seconds of a call of each.

    A turn makes as many calls as fill 50 ms, after two to warm up (one, if that takes a second). before: called,
    untimed, before each turn.
    """
    runs = []
    for function in functions:
        calls = 1
        if seconds(function, 1, device) < 1:
            calls = max(1, int(0.05 / seconds(function, 1, device)))
        runs.append((function, calls, device))

    def turn(run):
        before()
        return seconds(*run)

    turns = [[turn(run) for run in runs] for _ in progress(range(repeats), desc=name, unit="turn", leave=False)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def print_head():
    print(f"{'':52}{'baseline':>15}{'ours':>15}{'ratio':>11}")


class PeakMemory:
    """Measures the memory of a block: of this process on Linux, or of PyTorch's tensors on a GPU.

    start, peak: bytes; None on systems that do not report them.
    """

    def __init__(self, device=CPU):
        self.device, self.start, self.peak = device, None, None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                (PROC / "self/clear_refs").write_text("5")  # resets the peak
        self.start = self._read()
        return self

    def __exit__(self, *_):
        self.peak = self._read()

    def _read(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return proc_bytes(PROC / "self/status", "VmHWM")

    @property
    def gib(self):
        """GiB above the start, or None."""
        return None if None in (self.start, self.peak) else (self.peak - self.start) / 2**30


def gib_text(value):
    return "an unknown number of GiB" if value is None else f"{value:.2f} GiB"


def proc_bytes(file, name):
    """A size from a file of /proc, in bytes; None if it cannot be read."""
    try:
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", file.read_text())[1])
    except (OSError, TypeError):  # not Linux, or the process has ended
        return None


def tree_memory(process):
    """Bytes that a process and its children hold, shared pages counted once; 0 if unknown."""
    folder = PROC / str(process)
    total = proc_bytes(folder / "smaps_rollup", "Pss") or 0
    with contextlib.suppress(OSError):
        children = " ".join(file.read_text() for file in folder.glob("task/*/children"))
        total += sum(tree_memory(child) for child in children.split())
    return total


def run_measured(*arguments):
    """Run Python with these arguments in the repo -> (seconds, peak GiB of all its processes or None).

    Exits with the status of a process that fails.
    """
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *arguments], cwd=REPO)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)  # its own message says why
    return time.perf_counter() - start, peak / 2**30 or None

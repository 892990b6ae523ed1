"""Time of functions."""

import statistics
import time

import torch

CPU = torch.device("cpu")


def seconds(function, device=CPU, calls=1):
    """Mean seconds of a call, over `calls` of them in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def alternate(functions, repeats, device, before=lambda: None):
    """Time functions by turns -> the median seconds of a call of each.

    A turn makes as many calls as fill 50 ms, after two to warm up (one, if that takes a second). before: called,
    untimed, before each turn.
    """
    calls = []
    for function in functions:
        slow = seconds(function, device) > 1
        calls.append(1 if slow else max(1, int(0.05 / seconds(function, device))))
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, count, own in zip(functions, calls, times, strict=True):
            before()
            own.append(seconds(function, device, count))
    return [statistics.median(own) for own in times]


def compare(name, ours, baseline, repeats, device):
    """Time both by turns -> `compared` of their seconds."""
    return compared(name, *alternate([ours, baseline], repeats, device))


def compared(name, ours, baseline):
    """Print the seconds of both -> them and their ratio."""
    print(f"{name:52}{1000 * baseline:10.1f} ms baseline{1000 * ours:10.2f} ms here{baseline / ours:8.1f} x")
    return {"name": name, "ours_seconds": ours, "baseline_seconds": baseline, "ratio": baseline / ours}

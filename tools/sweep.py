"""Train and test a grid of flags with several seeds, and compare the rows: mean, deviation and paired differences.

    python -m tools.sweep --out sweep/methods --vary method=base,agw,caj,adp --seeds 0 1 2 -- --dataset sysu --gpu 0

What follows -- are flags of train_ext_test0.py for all runs. Started again, the same command goes on where it was: a
finished run is never repeated, a stopped one goes on from its last save. The first row is what others are compared to.
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tqdm import tqdm

import data_manager
import testa
import train_ext_test0
from core.files import atomic, check_output, save_json
from core.log import read_json_lines
from core.run import SaveTimer, run_lock
from loss import Health, Losses
from tools import figures
from utils import ArgumentParser, InputError, Stopped, bounded, cli, progress

SCRIPTS = {"train": train_ext_test0, "test": testa}
PROGRAMS = {name: script.__file__ for name, script in SCRIPTS.items()}
PLAN = "sweep.json"
NOTE = (
    "Mean ± standard deviation over the seeds (in brackets: over the trials of a seed), in %. Under it: the difference "
    "to the first row, seed by seed, with its 95 % interval (Student's t)."
)
METRICS = ("Rank-1", "mAP", "mINP")
LOGGED = (*Losses._fields, *Health._fields, "lr")
LOGGED += tuple(f"{feature}/{metric}" for feature in ("FC", "POOL") for metric in METRICS)
# Flags that the sweep gives its runs.
OWN = {"train": {"seed", "model_path", "log_path", "resume"}}
OWN["test"] = {"model_path", "resume", "from_features", "features", "json", "report"}
# Flags that may change between two starts: where things are and how fast they go. Not the number of epochs, which
# training lets change: rows would be of different lengths.
MAY_CHANGE = {"train": train_ext_test0.MAY_CHANGE - {"epochs", "eval_every"}}
MAY_CHANGE["test"] = OWN["test"] | {"data_path", "gpu", "workers", "test_batch"}
# Flags of training that are handed to testing, too.
BOTH = ("dataset", "data_path", "mode", "amp", "gpu", "workers", "test_batch")


def get_args_parser():
    usage = "%(prog)s --out DIR (--vary FLAG=VALUE,... ... | --row 'NAME: FLAGS' ... | --table) [-- flags of training]"
    parser = ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the tables")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--vary",
        nargs="+",
        action="extend",
        type=varied,
        metavar="FLAG=VALUE,...",
        help="a flag of training and its values, a row each; of several flags all combinations",
    )
    what.add_argument(
        "--row", action="append", type=row, metavar="'NAME: FLAGS'", help="a row by its flags, such as 'paper: --lr 1'"
    )
    what.add_argument("--table", action="store_true", help="run nothing; tables and figures of what is finished")
    parser.add_argument("--seeds", nargs="+", type=bounded(int, 0), metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--test", type=shlex.split, metavar="'FLAGS'", help="more flags of testa.py, such as '--all'")
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        help="the one that is tested (default: last, so that no epoch is chosen)",
    )
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--jobs", type=bounded(int, 1, 1024), default=1, help="runs at once")
    many.add_argument("--gpus", nargs="+", type=bounded(int, 0), metavar="N", help="one run on each of these at once")
    parser.add_argument("--retry", action="store_true", help="go on with failed runs, too")
    parser.add_argument(
        "--curves",
        nargs="+",
        choices=LOGGED,
        default=["identity", "triplet", "distance_across", "FC/Rank-1"],
        metavar="VALUE",
        help=f"what of the logs to draw by epoch, of {', '.join(LOGGED)}",
    )
    return parser


def varied(text):
    """An argparse type: "flag=value,value" -> [(label, flags)], a pair for each value."""
    flag, equals, values = text.partition("=")
    flag = flag.lstrip("-").replace("-", "_")
    if not (flag and equals and all(values.split(","))):
        raise argparse.ArgumentTypeError(f"{text!r} is not FLAG=VALUE,VALUE")
    return [(f"{flag}={value}", [f"--{flag}", *words(value)]) for value in values.split(",")]


def row(text):
    """An argparse type: "name: flags" -> (name, flags)."""
    name, colon, flags = text.partition(":")
    if not (name.strip() and colon):
        raise argparse.ArgumentTypeError(f"{text!r} is not 'NAME: FLAGS'")
    return name.strip(), words(flags)


def words(text):
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def main(argv=None):
    """Returns the table, as OUT/table.json has it."""
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    split = argv.index("--") if "--" in argv else len(argv)
    args = get_args_parser().parse_args(test_joined(argv[:split]))
    out = Path(args.out)
    if args.table:
        plan = kept_plan(args, argv[split:])
        runs = plan_runs(plan, out)
    else:
        plan = new_plan(args, argv[split + 1 :])
        runs = plan_runs(plan, out)
        for run in runs:
            run.check_unchanged()
        with run_lock(out / "sweep", "another --out"):
            save_json(plan, out / PLAN)
            run_all(runs, args.gpus or [None] * args.jobs, args.retry)
    table = tabulate(runs, plan)
    write(table, runs, args.curves, out)
    return table


def test_joined(argv):
    """`--test --all` as `--test=--all`: argparse takes a value that begins so for a flag."""
    argv = list(argv)
    for i in reversed([i for i, arg in enumerate(argv[:-1]) if arg == "--test"]):
        argv[i : i + 2] = [f"--test={argv[i + 1]}"]
    return argv


# ---------------------------------------------------------------------------------------------------------------- plan


def new_plan(args, flags):
    """What is to run, as plain values: OUT/sweep.json."""
    grid = itertools.product(*args.vary) if args.vary else [[pair] for pair in args.row]
    rows = [[",".join(name for name, _ in pairs), [f for _, more in pairs for f in more]] for pairs in grid]
    if args.gpus and "gpu" in named([*flags, *itertools.chain(*(more for _, more in rows))]):
        raise InputError("--gpus gives each run its --gpu: leave one of them out")
    seeds, test, checkpoint = args.seeds or [0, 1, 2], args.test or [], args.checkpoint or "last"
    return {"rows": rows, "seeds": list(dict.fromkeys(seeds)), "flags": flags, "test": test, "checkpoint": checkpoint}


def named(flags):
    """The names of the flags that are given."""
    return {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}


def kept_plan(args, more):
    """The plan of the sweep that lies in `--out`."""
    if more or args.seeds or args.test or args.checkpoint or args.gpus or args.jobs > 1 or args.retry:
        raise InputError("--table shows the sweep as it was started: give only --out and --curves with it")
    plan = read_json(path := Path(args.out) / PLAN)
    if not (isinstance(plan, dict) and {"rows", "seeds", "flags", "test", "checkpoint"} <= plan.keys()):
        raise InputError(f"{path}: is no plan of a sweep; name the --out of one")
    return plan


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); is it a folder of a sweep?") from error


@dataclass
class Run:
    """One row with one seed, in a folder of its own.

    train, test: the flags, as the two scripts' parsers have them (Namespace) and as they are given (list).
    """

    row: str
    seed: int
    folder: Path
    train: argparse.Namespace
    train_flags: list
    test: argparse.Namespace
    test_flags: list

    def __str__(self):
        return f"{self.row}, seed {self.seed}"

    @property
    def results(self):
        return self.folder / "results.json"

    @property
    def failure(self):
        return self.folder / "failed.json"

    def check_unchanged(self):
        """Raise InputError if the run that its folder holds was begun, or tested, with other flags."""
        held = {"train": self.folder / "flags.json", "test": self.results}
        for script, remedy in (("train", "it"), ("test", f"{self.results.name} to test anew")):
            if held[script].exists():
                there, mine = read_json(held[script])["flags"], vars(getattr(self, script))
                default = SCRIPTS[script].get_args_parser().get_default  # for runs from before there was a flag
                for flag in sorted(set(mine) - MAY_CHANGE[script]):
                    if (before := there.get(flag, default(flag))) != mine[flag]:
                        raise InputError(
                            f"{self.folder}: is of a run with --{flag} {before}, not {mine[flag]}; give the same "
                            f"flags or another --out, or remove {remedy}"
                        )
                if script == "test" and Path(there["resume"]).name != Path(self.test.resume).name:
                    raise InputError(
                        f"{self.folder}: {there['resume']} was tested; give the same --checkpoint, or remove {remedy}"
                    )

    def log(self):
        """The entries of the training's log."""
        return [entry for path in Path(self.train.log_path).rglob("*.jsonl") for entry in read_json_lines(path)]


def plan_runs(plan, out):
    """The runs of a plan, seed by seed, so that rows can be compared early. Raises InputError (or ends, as the scripts
    do) for flags that training or testing does not take."""
    names = {name: re.sub(r"[^\w.=,+-]", "_", name).lstrip(".") for name, _ in plan["rows"]}
    if len(set(names.values())) < len(plan["rows"]) or not all(names.values()):
        raise InputError(f"rows need names of their own that can be folders; there are {', '.join(names.values())}")
    runs = []
    for seed, (name, flags) in itertools.product(plan["seeds"], plan["rows"]):
        folder = out / names[name] / f"seed_{seed}"
        given = [*plan["flags"], *flags]
        mine = [f"--seed={seed}", f"--model_path={folder}/models", f"--log_path={folder}/log", "--resume=auto"]
        train = parse("train", [*given, *mine], given, name)
        checkpoint = Path(train.model_path) / f"{train_ext_test0.run_name(train)}_{plan['checkpoint']}.t"
        shared = [f"--{flag}={getattr(train, flag)}" for flag in BOTH if getattr(train, flag) is not None]
        tested = [*shared, *plan["test"], f"--resume={checkpoint}"]
        test = parse("test", tested, plan["test"], name)
        tested.append(f"--json={folder}/results.json")  # not before: the parser's check would make the folder
        runs.append(Run(name, seed, folder, train, [*given, *mine], test, tested))
    return runs


def parse(script, flags, given, name):
    """Flags -> Namespace, by the script's own parser and checks. given: those that are the user's."""
    for flag in sorted(named(given) & OWN[script]):
        raise InputError(f"row {name}: --{flag} is the sweep's to give; leave it out")
    parser = SCRIPTS[script].get_args_parser()
    parser.prog = f"{Path(sys.argv[0]).name}: row {name}"
    args = parser.parse_args(flags)
    SCRIPTS[script].check_flags(args)
    return args


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Job:
    """A run that is being trained or tested.

    lock: a file that the process inherits, so that the run is taken for as long as that lives, also without the sweep.
    """

    run: Run
    gpu: int | None
    lock: TextIO
    script: str = ""
    process: subprocess.Popen | None = None

    def start(self, script, environment):
        """A session of its own: a terminal's Ctrl-C is the sweep's to pass on, once."""
        self.script, run = script, self.run
        flags = run.train_flags if script == "train" else run.test_flags
        gpu = [] if self.gpu is None else [f"--gpu={self.gpu}"]
        with (run.folder / f"{script}.txt").open("a") as out, (run.folder / f"{script}_errors.txt").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAMS[script], *flags, *gpu],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                pass_fds=[self.lock.fileno()],
                start_new_session=True,
            )


def run_all(runs, gpus, retry):
    """Train and test what is not finished, as many runs at once as there are `gpus` (None: the GPU that flags name).

    Raises Stopped on SIGTERM and Ctrl-C, once the running ones, which are sent SIGTERM, have saved and ended.
    """
    environment = dict(os.environ)
    if len(gpus) > 1:  # or each would take all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // len(gpus))))
    pending = deque(run for run in runs if not run.results.exists() and (retry or not run.failure.exists()))
    free, jobs, told = list(gpus), [], set()
    with (
        SaveTimer(math.inf, torch.device("cpu")) as timer,
        progress(total=len(runs), initial=len(runs) - len(pending), desc="runs", unit="run") as bar,
    ):
        timer.hold = True
        try:
            while (pending or jobs) and not timer.due():
                for _ in range(min(len(free), len(pending))):
                    run = pending.popleft()
                    if lock := begin(run):
                        jobs.append(Job(run, free.pop(0), lock))
                        jobs[-1].start("train", environment)
                    else:
                        pending.append(run)
                        if run.folder not in told:
                            tqdm.write(f"{run}: a process of an earlier sweep is still at it; waiting for its end")
                            told.add(run.folder)
                bar.set_postfix_str("; ".join(f"{job.script} {job.run}" for job in jobs))
                time.sleep(0.2)
                for job in [job for job in jobs if job.process.poll() is not None]:
                    if job.script == "train" and job.process.returncode == 0 and not job.run.results.exists():
                        job.start("test", environment)
                        continue
                    jobs.remove(job)
                    job.lock.close()
                    free.append(job.gpu)
                    tqdm.write(f"{job.run}: {end(job)}")
                    bar.update()
        finally:
            for job in jobs:
                job.process.terminate()
            for job in jobs:
                job.process.wait()
    if timer.stop:
        done = sum(run.results.exists() for run in runs)
        raise Stopped(timer.stop, f"; {done} of {len(runs)} runs are finished: the same command goes on")


def begin(run):
    """Make a run's folder ready -> its lock, or None if a process that outlived an earlier sweep still has it."""
    check_output(run.folder / "flags.json")
    lock = (run.folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    save_json({"row": run.row, "seed": run.seed, "flags": vars(run.train)}, run.folder / "flags.json")
    run.failure.unlink(missing_ok=True)
    return lock


def end(job):
    """Record how a run ended -> in words."""
    run, status = job.run, job.process.returncode
    if status == 0:
        tested = read_json(run.results)["results"]
        return "  ".join(f"{metric} {value:.2f}" for metric, value in shown(tested)[0]["mean"].items())
    number = -status if status < 0 else status - 128
    if number in (signal.SIGTERM, signal.SIGINT):
        return f"stopped by {signal.Signals(number).name}; started again, it goes on"
    lines = (run.folder / f"{job.script}_errors.txt").read_text(errors="replace").split("\n")
    line = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status}, without a word")
    save_json({"script": job.script, "status": status, "line": line}, run.failure)
    return f"failed: {line}"


# --------------------------------------------------------------------------------------------------------------- table


def shown(results):
    """The rows of testa.py's results that are compared: the network's, by its FC feature."""
    return [result for result in results if result["model"] == "trained" and result["feature"] == "FC"]


def describe(result):
    reranked = "" if result["reranking"] == "none" else f", re-ranked by {result['reranking']}"
    epoch = "fixed" if result["selection"] == "none" else f"chosen on {result['selection']} ids"
    return f"{data_manager.describe_result(result)}; FC{reranked}; epoch {epoch}"


def tabulate(runs, plan):
    """What is finished, as plain values: the plan with "settings", a list (of one, but for `--test --all` and the like)
    of {"setting": in words, "rows": as `summarise` gives them}, and with "failed", a list of runs."""
    failed = [
        {"row": run.row, "seed": run.seed, **read_json(run.failure)}
        for run in runs
        if run.failure.exists() and not run.results.exists()
    ]
    settings = {}
    for run in runs:
        if run.results.exists():
            seconds = sum(entry["seconds"] for entry in run.log())
            for result in shown(read_json(run.results)["results"]):
                value = {"mean": result["mean"], "trials_std": result["std"], "seconds": seconds}
                settings.setdefault(describe(result), {}).setdefault(run.row, {})[str(run.seed)] = value
    if not settings:
        raise InputError(
            "no run has finished"
            + "".join(f"; {run['row']}, seed {run['seed']} failed: {run['line']}" for run in failed[:1])
        )
    measured = {name for rows in settings.values() for name in rows}
    table = {**plan, "settings": [], "failed": failed}
    for setting, rows in settings.items():
        (first, _), *_ = plan["rows"]
        lines = []
        for name, _ in plan["rows"]:
            if name in rows or name not in measured:  # else it was tested in other settings
                line = summarise(rows.get(name, {}), rows.get(first, {}) if name != first else {})
                failures = [run["seed"] for run in failed if run["row"] == name]
                lines.append({"row": name, "failed": failures, **line})
        table["settings"].append({"setting": setting, "rows": lines})
    return table


def summarise(seeds, first):
    """One row's statistics in one setting.

    seeds: {seed: {"mean": {metric: over the trials}, "trials_std": {metric: deviation of the trials} or None,
    "seconds"}}; first: those of the row to compare with. A seed's value is its mean over the trials.
    """
    summary = {"seeds": seeds, "metrics": {}, "differences": {}}
    if not seeds:
        return summary
    for metric in METRICS:
        values = {seed: value["mean"][metric] for seed, value in seeds.items()}
        deviations = [value["trials_std"][metric] for value in seeds.values() if value["trials_std"]]
        trials_std = float(np.mean(deviations)) if deviations else None
        summary["metrics"][metric] = {**spread(list(values.values())), "trials_std": trials_std}
        pairs = [values[seed] - first[seed]["mean"][metric] for seed in seeds if seed in first]
        if pairs:
            summary["differences"][metric] = spread(pairs)
    summary["seconds"] = spread([value["seconds"] for value in seeds.values()])
    return summary


def spread(values):
    """Mean, standard deviation (n - 1), and 95 % interval of the mean (Student's t) of a few values, as plain values.
    A single one has no deviation and no interval: None."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "std": None, "interval": None, "count": count}
    from scipy.stats import t  # slow to import

    std = float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "interval": [mean - half, mean + half], "count": count}


# -------------------------------------------------------------------------------------------------------------- output


def write(table, runs, values, out):
    """Print the table; write it as table.md, .tex and .json, and the figures table.png and curves.png."""
    failures = [f"{run['row']}, seed {run['seed']} failed: {run['line']}" for run in table["failed"]]
    text, markdown, latex = [], [], []
    for setting in table["settings"]:
        lines = cells(setting["rows"], len(table["seeds"]))
        text += [setting["setting"], *aligned(lines), ""]
        markdown += [f"**{setting['setting']}**", "", *markdown_table(lines), ""]
        latex += [f"% {setting['setting']}", *latex_table(lines), ""]
    print("\n".join(["", *text, textwrap.fill(NOTE, 120), *failures]))
    notes = [NOTE, *(f"- {line}" for line in failures)]
    for name, lines in (("md", [*markdown, *notes]), ("tex", [*latex, *(f"% {line}" for line in (NOTE, *failures))])):
        with atomic(out / f"table.{name}") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_json(table, out / "table.json")
    figures.save(figures.dots(dots(table)), out / "table.png")
    if panels := curves(runs, values):
        figure = figures.curves(panels, "epoch")
        figure.suptitle(
            "mean over the seeds, ± their standard deviation; scores: of the test's first trial", fontsize=9
        )
        figures.save(figure, out / "curves.png")
    print(f"\n{out}/table.md, .tex, .json and .png; {out}/curves.png")
    if failures:
        print("Each failed run's folder has its lines in full; --retry goes on with them.")


def cells(rows, planned):
    """The table as lists of texts: a head, and for each row its means and the differences under them."""
    lines = [["row", "seeds", *METRICS, "training, s"]]
    for row in rows:
        seeds = f"{len(row['seeds'])} of {planned}" + (f", {len(row['failed'])} failed" if row["failed"] else "")
        if not row["seeds"]:
            lines.append([row["row"], seeds, *["–"] * (len(METRICS) + 1)])
            continue
        means = []
        for metric in row["metrics"].values():
            trials = "" if metric["trials_std"] is None else f" ({metric['trials_std']:.2f})"
            means.append(plus_minus(metric, 2) + trials)
        lines.append([row["row"], seeds, *means, plus_minus(row["seconds"], 1)])
        if row["differences"]:
            (pairs,) = {difference["count"] for difference in row["differences"].values()}
            lines.append([f"  minus {rows[0]['row']}", f"{pairs} pairs", *map(signed, row["differences"].values()), ""])
    return lines


def plus_minus(values, digits):
    deviation = "" if values["std"] is None else f" ± {values['std']:.{digits}f}"
    return f"{values['mean']:.{digits}f}{deviation}"


def signed(values):
    interval = "" if values["interval"] is None else " [{:+.2f}, {:+.2f}]".format(*values["interval"])
    return f"{values['mean']:+.2f}{interval}"


def aligned(lines):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]


def markdown_table(lines):
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]


def latex_table(lines):
    """A tabular; its rules are the package booktabs'."""
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
    head, *body = [" & ".join("".join(special.get(c, c) for c in cell) for cell in line) + r" \\" for line in lines]
    columns = "l" + "r" * (len(lines[0]) - 1)
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]


def dots(table):
    """{setting: {metric: {row: (its seeds' values, their mean, its interval or None)}}}."""
    return {
        setting["setting"]: {
            metric: {
                row["row"]: (
                    [seed["mean"][metric] for seed in row["seeds"].values()],
                    row["metrics"][metric]["mean"],
                    row["metrics"][metric]["interval"],
                )
                for row in setting["rows"]
                if row["seeds"]
            }
            for metric in METRICS
        }
        for setting in table["settings"]
    }


def curves(runs, values):
    """{value of the logs: {row: (epochs, means over its finished seeds, a deviation less, a deviation more)}}."""
    logs = {}
    for run in runs:
        if run.results.exists():
            logs.setdefault(run.row, []).append(run.log())
    panels = {}
    for value in values:
        for name, entries in logs.items():
            points = {}
            for entry in itertools.chain(*entries):
                if value in entry:
                    points.setdefault(entry["epoch"], []).append(entry[value])
            if points:
                epochs = sorted(points)
                mean = np.array([np.mean(points[epoch]) for epoch in epochs])
                std = np.array([np.std(points[epoch], ddof=1) if len(points[epoch]) > 1 else 0 for epoch in epochs])
                panels.setdefault(value, {})[name] = epochs, mean, mean - std, mean + std
    return panels


if __name__ == "__main__":
    cli(main)

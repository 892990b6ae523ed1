"""Train and test a grid of flags with several seeds, and compare the rows: mean, deviation and paired differences.

    python -m tools.sweep --out sweep/methods --vary method=base,agw,caj,adp --seeds 0 1 2 -- --dataset sysu --gpu 0

Everything after -- is passed to train_ext_test0.py in all runs. Start the same command again to continue: finished runs
are not repeated, and a stopped run continues from its last save. All rows are compared to the first.
"""

import argparse
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TextIO, TypedDict

from msgspec import Meta
from tqdm import tqdm

import testa
import train_ext_test0
from core.files import check_output, save_json
from core.formats import Count, Flags, Text, read_json
from datasets import DATASETS, fingerprint
from testing.evaluation import data_folder
from testing.results import read_results
from tools import records, sweep_tables
from training.log import read_json_lines
from training.run import run_lock
from utils import ArgumentParser, InputError, Stopped, bounded, cli, cores, progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


SCRIPTS = {"train": train_ext_test0, "test": testa}
PROGRAMS = {name: script.__file__ for name, script in SCRIPTS.items()}
PLAN = "sweep.json"
RECORD, FAILURE = "flags.json", "failed.json"  # in the folder of a run
RESULTS = {"last": "results.json", "best": "results_best.json"}  # of each --checkpoint, in the folder of a run
# Flags that the sweep sets for its runs.
SWEEP_FLAGS = {
    "train": {"seed", "model_path", "log_path", "resume"},
    "test": {"model_path", "resume", "from_features", "features", "json", "report", "calibrate"},
}
# Flags that may differ when a sweep continues: locations and speed. Training also lets the number of epochs change,
# but then rows would differ in length.
MAY_CHANGE = {
    "train": train_ext_test0.MAY_CHANGE - {"epochs", "eval_every"},
    "test": SWEEP_FLAGS["test"] | {"data_path", "gpu", "workers", "test_batch"},
}
# Flags of training that are passed on to testing; the first only if --test names no data set of its own.
DATA_FLAGS = ("dataset", "data_path", "mode")
SHARED = ("amp", "gpu", "workers", "test_batch")
MOST_RUNS = 1000
REMEDY = "pass the --out of a sweep, or another one"


class Plan(TypedDict):
    """OUT/sweep.json."""

    rows: Annotated[list[tuple[Text, list[str]]], Meta(min_length=1)]  # names, flags
    seeds: Annotated[list[Count], Meta(min_length=1)]
    flags: list[str]
    test: list[str]
    checkpoint: Literal["last", "best"]
    data: NotRequired[dict[str, str]]  # the fingerprint of each data set


class Record(TypedDict):
    """What is read of flags.json, in the folder of a run."""

    flags: Flags
    data: NotRequired[str | None]
    commit: NotRequired[str]  # of this code, when the run began; empty without git


class Failure(TypedDict):
    """failed.json, in the folder of a run: the script, its exit status and its last line."""

    script: str
    status: int
    line: str


def get_args_parser():
    usage = "%(prog)s --out DIR (--vary FLAG=VALUE,... ... | --row 'NAME: FLAGS' ... | --table) [-- flags of training]"
    parser = ArgumentParser(description=__doc__, usage=usage)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the tables")
    group = parser.add_argument_group("runs (one of --vary, --row, --table)")
    rows = group.add_mutually_exclusive_group(required=True)
    text = "a flag of training and its values, one row each; several flags give all combinations"
    rows.add_argument("--vary", nargs="+", action="extend", type=varied, metavar="FLAG=VALUE,...", help=text)
    text = "one row with its flags, such as 'paper: --lr 1'"
    rows.add_argument("--row", action="append", type=row, metavar="'NAME: FLAGS'", help=text)
    text = "run nothing; write tables and figures of the finished runs"
    rows.add_argument("--table", action="store_true", help=text)
    group.add_argument("--seeds", nargs="+", type=bounded(int, 0), metavar="N", help="seeds (default: 0 1 2)")
    text = "more flags for testa.py, such as '--all'"
    group.add_argument("--test", type=shlex.split, metavar="'FLAGS'", help=text)
    text = "the checkpoint to test (default: last, so that the test does not select an epoch)"
    group.add_argument("--checkpoint", choices=("last", "best"), help=text)
    group = parser.add_argument_group("execution")
    parallel = group.add_mutually_exclusive_group()
    parallel.add_argument("--jobs", type=bounded(int, 1, 1024), default=1, help="parallel runs")
    text = "GPUs to use, one run at a time on each"
    parallel.add_argument("--gpus", nargs="+", type=bounded(int, 0), metavar="N", help=text)
    group.add_argument("--retry", action="store_true", help="also continue failed runs")
    group = parser.add_argument_group("output")
    text = f"values of the logs to draw by epoch, of {', '.join(sweep_tables.LOGGED)}"
    default = ["identity", "triplet", "distance_across", "FC/Rank-1"]
    choices = sweep_tables.LOGGED
    group.add_argument("--curves", nargs="+", choices=choices, default=default, metavar="VALUE", help=text)
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
    if name.strip().startswith(("table.", "curves.")) or not name.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: names a file of the table, or has a line break; choose another")
    return name.strip(), words(flags)


def words(text):
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def main(argv=None):
    """Returns the table, the content of OUT/table.json."""
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = get_args_parser()
    args, unknown = parser.parse_known_args(join_test_flags(argv[:split]))
    if unknown:
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}; flags of training follow after --")
    if not fcntl:
        raise InputError("a sweep locks its runs, which needs Linux or macOS; run train_ext_test0.py by hand")
    out = Path(args.out)
    plan = read_plan(args, argv[split:]) if args.table else new_plan(args, argv[split + 1 :])
    runs = plan_runs(plan, out)
    if args.table:
        check_same_data(runs)
    else:
        for run in runs:
            run.check_unchanged()
        data = {folder: fingerprint(*folder) for folder in dict.fromkeys(run.data for run in runs)}
        for dataset, folder in dict.fromkeys(run.test_data for run in runs if run.test_data != run.data):
            data[f"{dataset} of the test", folder] = fingerprint(dataset, folder)
        before = read_json(out / PLAN, Plan, REMEDY).get("data", {}) if (out / PLAN).exists() else {}
        if all(record.with_name(FAILURE).exists() for record in out.glob(f"*/seed_*/{RECORD}")):
            before = {}
        check_same_data(runs, data, {(dataset, out / PLAN): digest for dataset, digest in before.items()})
        plan["data"] = before | {dataset: digest for (dataset, _), digest in data.items()}
        with run_lock(out / "sweep", "another --out"):
            save_json(plan, out / PLAN)
            run_all(runs, data, args.gpus or [None] * args.jobs, args.retry)
    table = sweep_tables.tabulate(runs, plan)
    sweep_tables.write(table, runs, args.curves, out)
    return table


def join_test_flags(argv):
    """`--test --all` as `--test=--all`: argparse would take the value for a flag."""
    argv = list(argv)
    for i in reversed([i for i, arg in enumerate(argv[:-1]) if arg == "--test"]):
        argv[i : i + 2] = [f"--test={argv[i + 1]}"]
    return argv


# ---------------------------------------------------------------------------------------------------------------- plan


def new_plan(args, flags):
    """The plan of the runs as plain values: OUT/sweep.json."""
    varied_flags = [flag for ((_, (flag, *_)), *_) in args.vary or ()]
    if twice := [flag for flag in varied_flags if varied_flags.count(flag) > 1]:
        raise InputError(f"--vary {twice[0][2:]}: is there twice; give all its values after one =")
    grid = itertools.product(*args.vary) if args.vary else [[pair] for pair in args.row]
    grid = itertools.islice(grid, MOST_RUNS + 1)  # six flags of 59 values each are 4e10 rows
    rows = [[",".join(name for name, _ in pairs), [f for _, more in pairs for f in more]] for pairs in grid]
    if args.gpus and "gpu" in flag_names([*flags, *itertools.chain(*(more for _, more in rows))]):
        raise InputError("--gpus sets --gpu for each run; leave one of them out")
    seeds, test, checkpoint = args.seeds or [0, 1, 2], args.test or [], args.checkpoint or "last"
    return {"rows": rows, "seeds": list(dict.fromkeys(seeds)), "flags": flags, "test": test, "checkpoint": checkpoint}


def flag_names(flags):
    """The names of the flags in a command line."""
    return {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}


def read_plan(args, flags):
    """The plan of the sweep in `--out`."""
    if flags or args.seeds or args.test or args.checkpoint or args.gpus or args.jobs > 1 or args.retry:
        raise InputError("--table shows the sweep as it was started; pass only --out and --curves with it")
    plan = read_json(Path(args.out) / PLAN, Plan, REMEDY)
    return plan | {"rows": [[*row] for row in plan["rows"]]}


@dataclass
class SweepRun:
    """One row with one seed, in its own folder.

    train, test: the flags as the two scripts parse them (Namespace); train_flags, test_flags: as words.
    """

    row: str
    seed: int
    folder: Path
    train: argparse.Namespace
    train_flags: list
    test: argparse.Namespace
    test_flags: list
    results: Path

    def __str__(self):
        return f"{self.row}, seed {self.seed}"

    @property
    def data(self):
        """(data set, its folder) of the training."""
        return self.train.dataset, data_folder(self.train)

    @property
    def test_data(self):
        return self.test.dataset, data_folder(self.test)

    @property
    def record(self):
        return self.folder / RECORD

    @property
    def failure(self):
        return self.folder / FAILURE

    def check_unchanged(self):
        """Raise InputError if the run in the folder was trained or tested with other flags."""
        records = {"train": (self.record, self.recorded), "test": (self.results, lambda: read_results(self.results))}
        for script, remedy in (("train", "this folder"), ("test", f"{self.results.name} to test again")):
            path, read = records[script]
            if not path.exists():
                continue
            saved, flags = read()["flags"], vars(getattr(self, script))
            default = SCRIPTS[script].get_args_parser().get_default  # for flags that are newer than the run
            saved = {flag: default(flag) for flag in flags} | saved
            if other := [flag for flag in sorted(set(flags) - MAY_CHANGE[script]) if saved[flag] != flags[flag]]:
                before, now = (" ".join(f"--{flag} {values[flag]}" for flag in other) for values in (saved, flags))
                raise InputError(
                    f"{self.folder}: was run with {before}, but this sweep uses {now}; pass the same values, choose "
                    f"another --out, or remove {remedy}"
                )
            tested = str(saved.get("resume"))
            if script == "test" and Path(tested).name != Path(self.test.resume).name:
                raise InputError(f"{self.folder}: {tested} was tested; pass the same --checkpoint, or remove {remedy}")

    def recorded(self):
        return read_json(self.record, Record, REMEDY)

    def failed(self):
        return read_json(self.failure, Failure, REMEDY)

    def log(self):
        """The entries of the training's log."""
        return [entry for path in Path(self.train.log_path).rglob("*.jsonl") for entry in read_json_lines(path)]


def check_same_data(runs, data=(), earlier=()):
    """Raise InputError if two runs have different data under the name of one data set.

    data: {(data set, folder): `fingerprint`} of what is to be used; earlier: the same of earlier calls. Of the runs
    that there are, their records tell, but not of failed ones: what they failed for may have been a test image.
    """
    known = [(dataset, digest, folder) for (dataset, folder), digest in dict(data).items()]
    recorded = [run for run in runs if run.record.exists() and not run.failure.exists()]
    known += [(run.train.dataset, run.recorded().get("data"), run.folder) for run in recorded]
    known += [(dataset, digest, file) for (dataset, file), digest in dict(earlier).items()]
    first = {}
    for dataset, digest, place in known:
        before, other = first.setdefault(dataset, (digest, place)) if digest else (digest, place)
        if before != digest:
            raise InputError(
                f"{place}: has other data than {other}; pass the --data_path of the same data, or choose another --out"
            )
    if unknown := [place for _, digest, place in known if not digest]:
        print(f"note: {unknown[0]} is older and does not record its data, perhaps other ({len(unknown)} such runs)")


def plan_runs(plan, out):
    """The runs of a plan, seed by seed, so that rows can be compared early.

    Raises InputError, or exits as the scripts do, for flags that training or testing rejects.
    """
    if len(plan["rows"]) * len(plan["seeds"]) > MOST_RUNS:
        raise InputError(f"these rows and seeds are more than {MOST_RUNS} runs; take fewer, or several sweeps")
    given = [name for name, _ in plan["rows"]]
    names = {name: re.sub(r"[^\w.=,+-]", "_", name).lstrip(".") for name in given}
    if len(set(names.values())) < len(given) or not all(names.values()):
        raise InputError(f"rows need different names that can be folders, not {', '.join(given):.300}")
    runs = []
    for seed, (name, row_flags) in itertools.product(plan["seeds"], plan["rows"]):
        folder = out / names[name] / f"seed_{seed}"
        user_flags = [*plan["flags"], *row_flags]
        train_flags = [*user_flags, f"--seed={seed}", f"--model_path={folder}/models", f"--log_path={folder}/log"]
        train_flags.append("--resume=auto")
        train = parse("train", train_flags, user_flags, name)
        checkpoint = Path(train.model_path) / f"{train_ext_test0.run_name(train)}_{plan['checkpoint']}.t"
        own = "dataset" in flag_names(plan["test"])
        if not (own or train.dataset in DATASETS):
            example = "--test '--dataset regdb --data_path ../data/RegDB --cross_data'"
            raise InputError(f"--dataset {train.dataset}: name one data set to test on, such as {example}")
        shared = SHARED if own else DATA_FLAGS + SHARED
        shared = [f"--{flag}={getattr(train, flag)}" for flag in shared if getattr(train, flag) is not None]
        test_flags = [*shared, *plan["test"], f"--resume={checkpoint}"]
        test = parse("test", test_flags, plan["test"], name)
        results = folder / RESULTS[plan["checkpoint"]]
        test_flags.append(f"--json={results}")  # only now: checking the flags would make the folder
        runs.append(SweepRun(name, seed, folder, train, train_flags, test, test_flags, results))
    return runs


def parse(script, flags, user_flags, name):
    """Flags -> Namespace, by the parser and checks of a script."""
    for flag in sorted(flag_names(user_flags) & SWEEP_FLAGS[script]):
        raise InputError(f"row {name}: the sweep sets --{flag}; leave it out")
    parser = SCRIPTS[script].get_args_parser()
    parser.prog = f"{Path(sys.argv[0]).name}: row {name}"
    args = parser.parse_args(flags)
    SCRIPTS[script].check_flags(args)
    return args


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Job:
    """A run that is being trained or tested.

    lock: a file that the process inherits: the run stays locked until the process ends, even if the sweep is killed.
    """

    run: SweepRun
    gpu: int | None
    lock: TextIO
    script: str = ""
    process: subprocess.Popen | None = None

    def start(self, script, environment):
        """In a session of its own: the sweep passes a terminal's Ctrl-C on, once."""
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


def run_all(runs, data, gpus, retry):
    """Train and test unfinished runs, as many in parallel as there are `gpus` (None: the GPU of the flags).

    data: {(data set, folder): `fingerprint`}, which each run records.

    On SIGTERM and Ctrl-C, sends SIGTERM to the running ones, waits until they have saved, and raises Stopped.
    """
    environment = dict(os.environ)
    if len(gpus) > 1:  # otherwise each run would use all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // len(gpus))))
    pending = deque(run for run in runs if not run.results.exists() and (retry or not run.failure.exists()))
    free, jobs, blocked = list(gpus), [], set()
    try:
        with progress(total=len(runs), initial=len(runs) - len(pending), desc="runs", unit="run") as bar:
            while pending or jobs:
                start_jobs(pending, data, free, jobs, blocked, environment)
                bar.set_postfix_str("; ".join(f"{job.script} {job.run}" for job in jobs))
                time.sleep(0.2)
                for job in [job for job in jobs if job.process.poll() is not None]:
                    if job.script == "train" and job.process.returncode == 0 and not job.run.results.exists():
                        job.start("test", environment)
                        continue
                    jobs.remove(job)
                    job.lock.close()
                    free.append(job.gpu)
                    tqdm.write(f"{job.run}: {outcome(job)}")
                    bar.update()
    except (KeyboardInterrupt, Stopped) as stop:
        finished = sum(run.results.exists() for run in runs)
        message = f"; {finished} of {len(runs)} runs are finished; start the same command to continue"
        raise Stopped(getattr(stop, "number", signal.SIGINT), message) from stop
    finally:
        processes = [job.process for job in jobs if job.process]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def start_jobs(pending, data, free, jobs, blocked, environment):
    """Start pending runs on free GPUs. A run whose earlier process is still alive goes to the end of the queue."""
    for _ in range(min(len(free), len(pending))):
        run = pending.popleft()
        if lock := prepare(run, data[run.data]):
            jobs.append(Job(run, free.pop(0), lock))
            jobs[-1].start("train", environment)
            continue
        pending.append(run)
        if run.folder not in blocked:
            tqdm.write(f"{run}: a process of an earlier sweep is still running it; waiting for its end")
            blocked.add(run.folder)


def prepare(run, digest):
    """Prepare the folder of a run -> its lock, or None if a process of an earlier sweep still holds it."""
    for name in (RECORD, ".lock", *(f"{script}{end}.txt" for script in SCRIPTS for end in ("", "_errors"))):
        check_output(run.folder / name)  # a pipe would wait for its reader
    lock = (run.folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    commit = (run.recorded().get("commit") if run.record.exists() else None) or records.git("rev-parse", "HEAD")
    about = {"row": run.row, "seed": run.seed, "flags": vars(run.train), "data": digest, "commit": commit}
    save_json(about, run.record)
    run.failure.unlink(missing_ok=True)
    return lock


def outcome(job):
    """Record how a run ended -> in words."""
    run, status = job.run, job.process.returncode
    if status == 0:
        first, *_ = sweep_tables.network_rows(run.results)
        return "  ".join(f"{metric} {value:.2f}" for metric, value in first["mean"].items())
    number = -status if status < 0 else status - 128
    if number in (signal.SIGTERM, signal.SIGINT):
        return f"stopped by {signal.Signals(number).name}; start the sweep again to continue"
    lines = (run.folder / f"{job.script}_errors.txt").read_text(errors="replace").split("\n")
    line = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status} without a message")
    save_json({"script": job.script, "status": status, "line": line}, run.failure)
    return f"failed: {line}"


if __name__ == "__main__":
    cli(main)

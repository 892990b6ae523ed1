"""`Run`, what a training leaves on disk; when it saves (`SaveTimer`), and that nobody else does (`run_lock`)."""

import contextlib
import errno
import glob
import inspect
import json
import os
import shlex
import shutil
import signal
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from core.checkpoint import (
    Checkpoint,
    check_state,
    find_checkpoint,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from core.distributed import generator_states, set_generators, wait_for_processes
from core.files import atomic, check_folder, regular, writing
from core.meter import Diverged, EpochMeter
from training.log import RunLog, read_json_lines
from training.optim import load_moments
from utils import InputError, Stopped, one_line, process_count, process_index, seed_everything

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AGREEMENT_STEPS = 10  # steps between two times that the processes agree on whether to save: it waits for the device


class Run:
    """A training run on disk: its lock, its log, its checkpoints, and when it saves and stops.

        with Run(name, args, recipe) as run:        # nobody else writes these files now
            run.start(net, optimizer, device, ...)  # from here on, signals wait for the end of a step
            for epoch in range(run.first_epoch, args.epochs):
                meter = run.begin_epoch(epoch)
                train_epoch(..., meter=meter, saver=run)
                with run.testing(meter):
                    ...
                run.end_epoch(entry)
            run.finish()

    args: the flags, which checkpoints keep. recipe: {flag: default} of the flags that decide what is computed. A
    resumed run must repeat the checkpoint's values; a flag that an older checkpoint lacks had its default.
    resumed: the path of the checkpoint that --resume names, or None. best: see `Checkpoint`.
    """

    def __init__(self, name, args, recipe):
        self.name, self.args, self.recipe = name, args, recipe
        self.best_path, self.last_path = (Path(args.model_path) / f"{name}_{kind}.t" for kind in ("best", "last"))
        self.log_path = Path(args.log_path) / f"{args.dataset}_log" / f"{name}.jsonl"
        self.first_epoch, self.best, self._begun = 0, {"Rank-1": -1.0}, None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_lock(Path(self.args.model_path) / self.name))
            stack.enter_context(run_lock(self.log_path.with_suffix("")))
            self.resumed = self._find_resumed()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace):
        self._stack.__exit__(kind, error, trace)
        if kind is Diverged:
            raise InputError(f"{error}: start a new run ({self.last_path} holds the state before it)") from error

    def start(self, net, optimizer, device, data, steps):
        """Load the checkpoint to resume into net and optimizer, or save a first one; begin the log.

        data: `TrainData`. steps: of an epoch.
        """
        self.net, self.optimizer, self.device = net, optimizer, device
        self.num_images, self.data_digest, self.steps = [*data.num_images], data.digest, steps
        self.timer = self._stack.enter_context(SaveTimer(self.args.save_minutes, device))
        if self.resumed:
            self._load()
        self.log = RunLog(self.log_path.parent, self.name, self.first_epoch - 1 if self.resumed else None)
        self._stack.callback(self.log.close)
        values = {flag: value for flag, value in vars(self.args).items() if flag not in ("method", "dataset")}
        changed = _as_flags(values, [flag for flag in values if values[flag] != self.recipe.get(flag, values[flag])])
        self.log.text(f"{self.name}: the method's recipe{changed and f', but {changed}'}")
        self.log.text(json.dumps(vars(self.args)), shown=False)
        if self.args.resume:
            self.log.text(self._resumed_from())
        self.timer.hold = True
        if self.resumed:
            if not self._begun:
                self._keep(self.first_epoch - 1)  # a kill may have come between the save of the epoch and this
            self._bring_best()
        else:
            # Before the first log entry: a log without a checkpoint then belongs to another run and is never erased.
            self._save_last(-1)

    def begin_epoch(self, epoch):
        """Seed the generators -> `EpochMeter`, not empty if the epoch was begun before the run was resumed."""
        self.epoch = epoch
        # Seeded anew each epoch (the plain seed was the network's), so that a resumed run draws as an unbroken one.
        # Each process augments by draws of its own.
        seed_everything(self.args.seed, epoch + 1, process_index())
        if not self._begun:
            return EpochMeter(self.device)
        meter, generators = self._begun
        self._begun = None
        set_generators(generators, self.device)
        return meter

    def due(self):
        """Whether to `save` after this step."""
        return self.timer.due()

    def save(self, meter):
        """Save within an epoch, measured so far by `meter`; raise Stopped if a signal asks the run to stop."""
        within = {"generators": generator_states(self.device)}
        self._save_last(self.epoch - 1, sums=meter.to_checkpoint(), within=within)
        if self.timer.stop:
            wait_for_processes()
            where = f"in epoch {self.epoch}, after step {meter.step} of {self.steps}"
            raise Stopped(self.timer.stop, f" {where}; {self.last_path} is saved: continue with --resume auto")

    @contextlib.contextmanager
    def testing(self, meter):
        """A block that a signal may break off: the run then saves as after the epoch's last step, and stops."""
        try:
            with self.timer.at_once():
                yield
        except Stopped as stopped:
            self.timer.stop = stopped.number
            self.save(meter)

    def end_epoch(self, entry):
        """Log an epoch's entry, a flat dict, and save. It is the best if its "FC/Rank-1" is the highest so far."""
        epoch, replaced = entry["epoch"], self.best
        self.log.epoch(entry)
        if entry.get("FC/Rank-1", -1) > self.best["Rank-1"]:
            scores = {name.removeprefix("FC/"): value for name, value in entry.items() if name.startswith("FC/")}
            self.best = {"epoch": epoch, **scores}
        # First: a run killed before this line repeats the epoch; one killed after it writes the others when resumed.
        self._save_last(epoch, replaced=replaced)
        self._keep(epoch)

    def finish(self):
        """Log the best epoch -> {"best", "last", "log": paths; "metrics": the best epoch's}."""
        tested = "epoch" in self.best
        if tested:
            scores = f"Rank-1 {self.best['Rank-1']:.1f} % (queries whose person is first), mAP {self.best['mAP']:.1f} %"
            self.log.text(f"best: epoch {self.best['epoch']}, {scores}: {self.best_path}")
        else:
            self.log.text(
                "warning: there is no best checkpoint: no epoch was tested successfully, or its file is gone; test the "
                f"last: --resume {shlex.quote(str(self.last_path))}"
            )
        paths = {"best": self.best_path if tested else None, "last": self.last_path, "log": self.log_path}
        return {kind: path and str(path) for kind, path in paths.items()} | {"metrics": self.best}

    def _keep(self, epoch):
        """Save what is kept of an epoch that has just ended: of the best, and of every so many."""
        if epoch == self.best.get("epoch"):
            self._save(self.best_path, epoch, selection=self.args.select)
        kept = self.last_path.with_name(f"{self.name}_epoch_{epoch}.t")
        if epoch % self.args.save_epoch == 0 and epoch > 0 and not kept.exists():
            self._save(kept, epoch)

    def _save_last(self, epoch, **within):
        self._save(self.last_path, epoch, optimizer=self.optimizer.state_dict(), **within)

    def _save(self, path, epoch, selection="none", **training):
        checkpoint = Checkpoint(
            net=self.net.state_dict(),
            options=self.net.options,
            image_size=(self.args.img_h, self.args.img_w),
            args=vars(self.args),
            epoch=epoch,
            best=self.best,
            selection=selection,
            num_images=self.num_images,
            data_digest=self.data_digest,
            processes=process_count(),
            **training,
        )
        save_checkpoint(checkpoint.to_file(), path)

    def _find_resumed(self):
        """The checkpoint that `--resume` names, or None. Raises InputError where this run would overwrite another."""
        resume, last = self.args.resume, self.last_path
        if resume == "auto":
            path = last if last.exists() else None
        else:
            path = find_checkpoint(resume, self.args.model_path) if resume else None
        if last.exists() and not (path and last.samefile(path)):
            other = f", and --resume {resume} names another file" if path else ""
            raise InputError(
                f"{last}: already exists{other}; continue that run with --resume auto, choose another --model_path and "
                "--log_path, or delete it"
            )
        if not path:
            self._check_kept()
        if read_json_lines(self.log_path) and not path:
            raise InputError(
                f"{self.log_path}: already contains another run's log; delete it or choose another --log_path"
            )
        return path

    def _load(self):
        path, checkpoint = self.resumed, load_training_state(self.resumed)
        self._check_same(checkpoint)
        try:
            self.net.load_state_dict(check_state(checkpoint.net, path))
            load_moments(self.optimizer, checkpoint.optimizer)
            self.first_epoch, self.best = checkpoint.epoch + 1, checkpoint.best
            if checkpoint.within:
                generators = checkpoint.within["generators"]
                set_generators(generators, self.device)  # now, as they may not be what they should
                meter = EpochMeter.from_checkpoint(checkpoint.sums, self.device)
                if not (meter.names and 0 < meter.summed <= meter.step <= self.steps):
                    raise ValueError(f"sums over {meter.summed} of {meter.step} steps")
                self._begun = meter, generators
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{path}: is not a complete ..._last.t ({type(error).__name__}); resume from another"
            ) from error
        self._check_log(checkpoint)
        self._check_kept(checkpoint.epoch, [self.best, checkpoint.replaced or self.best])

    def _check_kept(self, epoch=-1, own=()):
        """Raise InputError for files that this run would report or overwrite, but has not written: kept ones of epochs
        after `epoch`, its last, and a best checkpoint whose `best` is none of `own`."""
        kept = sorted(self.last_path.parent.glob(f"{glob.escape(self.name)}_epoch_*.t"))
        epochs = [file.stem.rpartition("_")[2] for file in kept]
        other = [file for file, n in zip(kept, epochs, strict=True) if n.isdecimal() and int(n) > epoch]
        if self.best_path.exists() and not (own and load_checkpoint(self.best_path).get("best") in own):
            other.append(self.best_path)
        if other:
            raise InputError(f"{other[0]}: already exists, of another run; choose another --model_path, or delete it")

    def _check_log(self, checkpoint):
        """Raise InputError for a log that this run would cut. An epoch is logged before it is saved."""
        entries, best = read_json_lines(self.log_path), checkpoint.best
        later = [entry["epoch"] for entry in entries if entry["epoch"] > checkpoint.epoch + 1]
        other = [e for e in entries if e["epoch"] == best.get("epoch") and e.get("FC/Rank-1") != best["Rank-1"]]
        if later or other:
            raise InputError(
                f"{self.log_path}: goes beyond {self.resumed}, or is of another run; choose another --log_path"
            )

    def _bring_best(self):
        """Copy the best checkpoint from beside the resumed one, if it is not here; without one, choose it anew."""
        beside = self.resumed.with_name(self.best_path.name)
        if self.best["Rank-1"] < 0 or self.best_path.exists():
            return
        if not beside.exists() or load_checkpoint(beside).get("best") != self.best:
            self.log.text(
                f"warning: {beside}, of epoch {self.best['epoch']}, is gone; the best epoch is chosen from epoch "
                f"{self.first_epoch} on"
            )
            self.best = {"Rank-1": -1.0}
        elif process_index() == 0:
            with atomic(self.best_path) as temporary:
                shutil.copyfile(beside, temporary)

    def _check_same(self, checkpoint):
        """Raise InputError unless this run computes what the run of a checkpoint did."""
        path, flags = self.resumed, self.recipe | checkpoint.args
        self.args.weights = flags["weights"]  # what the run started from; not read again
        if other := [flag for flag in sorted(self.recipe) if flags[flag] != getattr(self.args, flag)]:
            saved, used = (_as_flags(values, other) for values in (flags, vars(self.args)))
            raise InputError(
                f"{path}: was saved with {saved}, but this run uses {used}; pass the same values to resume"
            )
        if checkpoint.processes != process_count():
            raise InputError(
                f"{path}: was saved by {checkpoint.processes} processes, but this run has {process_count()}; resume "
                f"with --nproc_per_node={checkpoint.processes}"
            )
        defaults = inspect.signature(type(self.net)).parameters  # of options that are newer than the checkpoint
        for option, value in self.net.options.items():
            if (saved := checkpoint.options.get(option, defaults[option].default)) != value:
                raise InputError(f"{path}: has {option} {saved}, not {value}; resume with the data it was trained on")
        if (checkpoint.num_images or self.num_images) != self.num_images:
            raise InputError(
                f"{path}: was trained on {checkpoint.num_images} images, not {self.num_images}; prepare the same ones"
            )
        if (checkpoint.data_digest or self.data_digest) != self.data_digest:
            raise InputError(f"{path}: was trained on other images; prepare those, or start a new run")

    def _resumed_from(self):
        if not self.resumed:
            return f"no {self.name}_last.t to resume yet: from the start"
        if self.first_epoch >= self.args.epochs:
            return f"resumed {self.resumed}: finished: all {self.args.epochs} epochs"
        begun = f", after step {self._begun[0].step} of {self.steps}" if self._begun else ""
        return f"resumed {self.resumed}: epoch {self.first_epoch}{begun}"


def _as_flags(values, flags):
    words = (values[flag] if isinstance(values[flag], list) else [values[flag]] for flag in flags)
    text = " ".join(f"--{flag} {' '.join(map(str, word)):.200}" for flag, word in zip(flags, words, strict=True))
    return one_line(text)


class SaveTimer:
    """When a training loop is to save, or to save and stop: every `minutes`, and when a signal asks it to stop.

    Within the context, SIGTERM and Ctrl-C raise `Stopped`. While `hold` is set, they wait for `due`, which the loop
    calls after each step: `stop` is then the number of the signal. A second signal ends the process at once, if it
    comes a second later or more (some launchers send each signal twice).
    """

    def __init__(self, minutes, device):
        self.seconds, self.device, self.hold, self.stop, self._received = 60 * minutes, device, False, 0, 0
        self._calls, self._next = 0, time.monotonic() + self.seconds

    def __enter__(self):
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        now = time.monotonic()
        if self._received and now - self._when < 1:
            return
        if self._received:
            os._exit(128 + number)
        self._received, self._when = number, now
        if not self.hold:
            raise Stopped(number)

    def due(self):
        """Whether to save now. Processes agree on it; on GPUs, in every few calls."""
        wishes = [self._received, int(time.monotonic() > self._next)]
        self._calls += 1
        if process_count() > 1:
            if self.device.type == "cuda" and self._calls % AGREEMENT_STEPS:
                return False
            agreed = torch.tensor(wishes, device=self.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            wishes = agreed.tolist()
        self.stop, time_is_up = wishes
        if time_is_up:
            self._next = time.monotonic() + self.seconds
        return bool(self.stop or time_is_up)

    @contextlib.contextmanager
    def at_once(self):
        """A block that changes nothing worth saving. Within it, a signal, or one that is already waiting, raises
        `Stopped` at once. With several processes, all finish the block."""
        if self._received and process_count() == 1:
            raise Stopped(self._received)
        self.hold = process_count() > 1
        try:
            yield
        finally:
            self.hold = True


@contextlib.contextmanager
def run_lock(path, remedy="another --model_path and --log_path"):
    """Keep other processes from writing the files whose names begin with `path`, for as long as the block runs or the
    process lives. Raises InputError when another process holds the lock. All processes but the first need none.

    The lock is a hidden file beside them. It stays: removing it would race with a run that is just opening it.
    """
    path = Path(path)
    check_folder(path)
    lock = path.parent / f".{path.name}.lock"
    if process_index() > 0:
        yield
        return
    try:
        file = regular(lock).open("a+")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{lock}: cannot be opened ({reason}); delete it, or choose {remedy}") from error
    with file:
        try:
            if not fcntl:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            who = file.read() or "place unknown"
            raise InputError(
                f"{path}: another run of this name is writing now ({who}); wait for it, or choose {remedy}"
            ) from error
        except OSError as error:
            print(f"warning: {lock}: cannot be locked ({error.strerror}); do not start a second run of this name")
        with writing(lock):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())  # without a buffer
        yield

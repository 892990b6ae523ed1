"""A training run on disk: its lock, its log, and when it stops and saves."""

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from core.files import atomic, check_folder, writing
from utils import InputError, Stopped, process_count, process_index

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PROCESSES_AGREE = 10  # steps between two times that the processes agree on whether to pause: it waits for the device


class Pauses:
    """When a loop of training is left, to save: every `minutes`, and when a signal asks it to stop.

    Within the context, SIGTERM and Ctrl-C raise `Stopped`. While `hold` is set, they wait for `due`, which is asked
    after each step: `stop` is then the signal's number. A second signal ends the process at once, if it comes a second
    later or more (some launchers send each signal twice).
    """

    def __init__(self, minutes, device):
        self.seconds, self.device, self.hold, self.stop, self._received = 60 * minutes, device, False, 0, 0
        self._asked, self._next = 0, time.monotonic() + self.seconds

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
        """Whether to leave the loop now. Ranks agree on it; on GPUs, every few times that they ask."""
        wanted = [self._received, int(time.monotonic() > self._next)]
        self._asked += 1
        if process_count() > 1:
            if self.device.type == "cuda" and self._asked % PROCESSES_AGREE:
                return False
            agreed = torch.tensor(wanted, device=self.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            wanted = agreed.tolist()
        self.stop, time_is_up = wanted
        if time_is_up:
            self._next = time.monotonic() + self.seconds
        return bool(self.stop or time_is_up)

    @contextlib.contextmanager
    def at_once(self):
        """A block that changes nothing worth saving, within held ones: a signal, also one that waits, raises `Stopped`.
        (Of several processes, all finish it.)"""
        if self._received and process_count() == 1:
            raise Stopped(self._received)
        self.hold = process_count() > 1
        yield
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
        file = lock.open("a+")
    except OSError as error:
        raise InputError(f"{lock}: cannot be opened ({error.strerror}); remove it, or write elsewhere") from error
    with file:
        try:
            if not fcntl:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            who = file.read() or "it does not say where"
            raise InputError(
                f"{path}: another run of this name is writing now ({who}); wait for it, or choose {remedy}"
            ) from error
        except OSError as error:
            print(f"warning: {lock}: cannot be locked ({error.strerror}); do not start a second run of this name")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


class RunLog:
    """The record of a run: a text log (echoed to the console), one JSON line an epoch, and TensorBoard scalars.

    Files: `{folder}/{name}.txt`, `{folder}/{name}.jsonl`, `{folder}/{name}/events.*`. A run that is resumed after
    `resumed_epoch` drops what is past it from JSON lines and scalars, so that each epoch stands there once; a new run
    starts anew. All processes but the first write nothing.
    """

    def __init__(self, folder, name, resumed_epoch=-1):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where a run is logged

        self.json_path = Path(folder) / f"{name}.jsonl"
        self.writes = process_index() == 0
        if not self.writes:
            return
        kept = [entry for entry in read_json_lines(self.json_path) if entry["epoch"] <= resumed_epoch]
        with atomic(self.json_path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self.logger = logging.Logger(name)
        self.logger.addHandler(_TqdmHandler())
        self.logger.addHandler(_FileHandler(Path(folder) / f"{name}.txt", mode="w" if resumed_epoch < 0 else "a"))
        # Purging makes TensorBoard forget the steps of an earlier run of this name.
        self.board = SummaryWriter(Path(folder) / name, purge_step=resumed_epoch + 1)

    def text(self, line):
        if self.writes:
            self.logger.info(line)

    def epoch(self, entry):
        """Append one epoch's values, a flat dict with "epoch" in it, to the JSON lines and the TensorBoard scalars."""
        if not self.writes:
            return
        with writing(self.json_path), self.json_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for key, value in entry.items():
            if isinstance(value, int | float) and key != "epoch":
                self.board.add_scalar(key, value, entry["epoch"])
        self.board.flush()

    def image(self, tag, path, epoch):
        """Show a .png in TensorBoard, too."""
        if self.writes:
            with Image.open(path) as image:
                self.board.add_image(tag, np.asarray(image.convert("RGB")), epoch, dataformats="HWC")

    def close(self):
        if not self.writes:
            return
        self.board.close()
        for handler in self.logger.handlers:
            handler.close()


class _FileHandler(logging.FileHandler):
    """Fails when it cannot write, as the other files do."""

    def handleError(self, record):
        with writing(self.baseFilename):
            raise  # the error that is being handled


class _TqdmHandler(logging.Handler):
    """Prints above a running progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record))
        sys.stdout.flush()  # into a file or a pipe as soon as onto a terminal


def read_json_lines(path):
    """The entries of a log, dicts with an "epoch", from a file that may not exist; anything else in it, such as a line
    cut off by a crash, is left out."""
    entries = []
    for line in path.read_text(errors="replace").split("\n") if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("epoch"), int)]

"""The log of a training run: text, JSON lines, TensorBoard scalars."""

import contextlib
import errno
import json
import os
import shutil
import sys
from inspect import signature
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from core.files import atomic, check_folder, check_output, is_regular, writing
from core.formats import Numbers, checked
from methods import METHODS
from testing.results import METRICS
from utils import one_line, process_index

BOARD_BYTES = 2**20  # more than TensorBoard writes in an epoch without figures
# Signs that a run does not train: from public logs on real images, see docs/training.md.
ACCURACY_FALL = 0.8  # an epoch's accuracy below this share of that of the epoch before
TRIPLET_LIMIT, TRIPLET_STEPS = 2.0, 300  # a weighted triplet loss above this, so many steps after the start


class RunLog:
    """The record of a run: a text log (echoed to the console), one JSON line an epoch, and TensorBoard scalars.

    Files: `{folder}/{name}.txt`, `{folder}/{name}.jsonl`, `{folder}/{name}/events.*`. A run that is resumed after
    `resumed_epoch` drops what is past it from JSON lines and scalars, so that each epoch stands there once; a new run
    starts anew. All processes but the first write nothing. Without TensorBoard, a line says so.
    """

    def __init__(self, folder, name, resumed_epoch=None):
        self.text_path, self.json_path = (Path(folder) / f"{name}.{ending}" for ending in ("txt", "jsonl"))
        self.writes, self.board = process_index() == 0, None
        if not self.writes:
            return
        check_output(self.text_path)
        last = -1 if resumed_epoch is None else resumed_epoch
        kept = [entry for entry in read_json_lines(self.json_path) if entry["epoch"] <= last]
        with atomic(self.json_path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        if resumed_epoch is None:
            self.text_path.unlink(missing_ok=True)
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import: only where a run is logged
        except ImportError:
            self.text("TensorBoard is not installed, so no scalars are written; to get them: pip install tensorboard")
            return
        self.board_path = Path(folder) / name
        self._check_board()
        # Purging makes TensorBoard forget the steps of an earlier run of this name.
        self.board = SummaryWriter(self.board_path, purge_step=last + 1)

    def text(self, line, shown=True):
        if self.writes:
            line = "\n".join(map(one_line, line.split("\n")))
            if shown:
                tqdm.write(line)  # above a running progress bar instead of through it
                sys.stdout.flush()  # into a file or a pipe as soon as onto a terminal
            self._append(self.text_path, line)

    def epoch(self, entry):
        """Append one epoch's values, a flat dict with "epoch" in it, to the JSON lines and the TensorBoard scalars."""
        if not self.writes:
            return
        self._append(self.json_path, json.dumps(entry))
        if self.board:
            self._check_board()
            for key, value in entry.items():
                if isinstance(value, int | float) and key != "epoch":
                    self.board.add_scalar(key, value, entry["epoch"])
            self.board.flush()

    def image(self, tag, path, epoch):
        """Show a .png in TensorBoard, too."""
        if self.board:
            with Image.open(path) as image:
                self.board.add_image(tag, np.asarray(image.convert("RGB")), epoch, dataformats="HWC")

    def close(self):
        if self.board:
            self.board.close()

    def _check_board(self):
        """Raise InputError where TensorBoard cannot write. Its thread would fail later, with a traceback."""
        check_folder(self.board_path / "events")
        with writing(self.board_path):
            if shutil.disk_usage(self.board_path).free < BOARD_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @staticmethod
    def _append(path, line):
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_json_lines(path):
    """The entries of a log, dicts of numbers with an "epoch", and perhaps the text "select", from a file that may not
    exist. Anything else in it is left out, with a warning, but for a last line that was cut off by a crash."""
    entries, others = [], []
    lines = path.read_text(errors="replace").split("\n") if is_regular(path) else []
    for number, line in enumerate(lines, 1):
        with contextlib.suppress(ValueError, RecursionError):
            entry = checked(json.loads(line), dict[str, object], path, "")
            checked({name: value for name, value in entry.items() if name != "select"}, Numbers, path, "")
            if type(entry.get("epoch")) is int:
                entries.append(entry)
                continue
        if number < len(lines):
            others.append(number)
    if others:
        print(
            one_line(f"warning: {path}: line {others[0]} is no epoch of a log and left out ({len(others)} such lines)")
        )
    return entries


def log_epoch(log, title, entry, args, steps):
    """Log the line of an epoch whose entry is not logged yet, and warnings of what it shows. steps: of an epoch."""
    names = ("total", "identity", "triplet", "local", "correct", "accuracy", *METHODS[args.method].terms)
    line = f"{title}  lr {entry['lr']:.4g}" + "".join(f"  {name} {entry[name]:.3f}" for name in names if name in entry)
    if "FC/Rank-1" in entry:
        line += "".join(f"  {metric} {entry[f'FC/{metric}']:.2f}" for metric in METRICS)
    log.text(f"{line}  {entry['images_per_second']:.0f} img/s")
    before = dict(*read_json_lines(log.json_path)[-1:])
    for warning in warnings(entry, before, args, steps):
        log.text(f"warning: {warning}")


def warnings(entry, before, args, steps):
    """What an epoch's entry of the log shows to be wrong, each with what to do.

    before: the entry of the epoch before, or {}. What lasts is said in the first epoch that has it.
    """
    epoch, taken = entry["epoch"], signature(METHODS[args.method].triplet).parameters
    remedy = "lower --lr"
    if "weighting" in taken and args.weighting != "stable":
        remedy = "start anew with --weighting stable"
        if "square" in taken and args.square:
            remedy = "start anew with --square 0"
    if (epoch % args.eval_every == 0 or epoch == args.epochs - 1) and "FC/Rank-1" not in entry:
        # Non-local blocks are cubic in their input, and overflow where running statistics are far from the batches'.
        yield (
            f"no test result for epoch {epoch}: the features are not finite in evaluation; training goes on. This "
            "happens in the first epochs, when batch norm's running statistics lag behind; if it lasts, lower --lr"
        )
    if entry.get("accuracy", 1) < ACCURACY_FALL * before.get("accuracy", 0):
        yield (
            f"the classifier finds {entry['accuracy']:.1%} of the images, after {before['accuracy']:.1%} in the epoch "
            f"before: the run is collapsing; {remedy}"
        )
    due = (epoch - 1) * steps < TRIPLET_STEPS <= epoch * steps  # the first epoch that begins after so many
    if "weighting" in taken and due and entry["triplet"] > TRIPLET_LIMIT:
        yield (
            f"the triplet loss is {entry['triplet']:.3g}; after {TRIPLET_STEPS} steps, a run that trains is below "
            f"{TRIPLET_LIMIT:g}: {remedy}"
        )

    def begins(name):
        return before.get(name, 0) <= 0.5 < entry.get(name, 0)  # a short rest of a resumed epoch has no reading

    distances = "distances within identities {distance_within:.3g}, across {distance_across:.3g}"
    if begins("beyond_clamp") and args.weighting == "published":
        yield (
            f"{entry['beyond_clamp']:.0%} of the anchors are beyond the triplet's clamp and get no gradient from it "
            f"({distances.format(**entry)}): {remedy}"
        )
    if begins("at_ln2"):
        yield (
            f"{entry['at_ln2']:.0%} of the anchors are at ln 2, as near to other people as to their own, where the "
            f"squared triplet has no gradient ({distances.format(**entry)}): {remedy}"
        )

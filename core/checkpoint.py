"""Checkpoint files: their fields, written whole, read without executing anything."""

import pickle
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from core.files import atomic, locate
from utils import InputError, process_index

VERSION = 2


@dataclass(kw_only=True)
class Checkpoint:
    """The fields of a checkpoint of a training run. The file is a dict of them, without those that are None.

    Files of version 1 have no `version`. Fields with a default came later than the first checkpoints; the default is
    what a file without the field means. To add a field, give it such a default. Raise VERSION only if files of this
    version would be misunderstood by code that reads the version before.
    """

    version: int = 1
    net: dict  # GFMNet's state dict
    options: dict  # GFMNet(**options) is the network
    image_size: tuple  # height, width
    args: dict  # flags of the training; a flag that is missing had its default
    epoch: int  # the last finished one, from 0; -1 before the first
    best: dict  # of the best tested epoch so far: "epoch" and its FC metrics; only {"Rank-1": -1.0} before the first
    selection: str | None = None  # the epoch was chosen on "test" or "val" ids; "none": it was not; None: unknown
    num_images: list | None = None  # visible, infrared images that it was trained on; None: unknown
    processes: int = 1  # that trained it, each with a share of the batch
    # Of ..._last.t only:
    optimizer: dict | None = None  # its state dict
    replaced: dict | None = None  # `best` of the file that this epoch's takes the place of, if it is the best so far
    # Of a ..._last.t that was saved within an epoch, `epoch` + 1:
    sums: dict | None = None  # `EpochMeter.to_checkpoint()`
    within: dict | None = None  # "generators": `distributed.generator_states`

    def to_file(self):
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in content.items() if value is not None} | {"version": VERSION}


def save_checkpoint(content, path):
    """Write a checkpoint (dict of tensors, numbers, strings) so that `path` is always whole: the old one or the new.
    All processes but the first write nothing."""
    if process_index() > 0:
        return
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


# Published checkpoints hold their metrics as NumPy scalars and arrays, pickled by NumPy 1: exactly these names load.
_NUMPY_PICKLES = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    *[
        (value.__reduce__()[0], f"numpy.{package}.multiarray.{name}")  # the function that builds such a value
        for name, value in (("scalar", np.float64()), ("_reconstruct", np.empty(0)))
        for package in ("core", "_core")
    ],
]


def load_checkpoint(path):
    """Read a checkpoint, a dict, to the CPU. Nothing in the file is executed: only tensors and plain values load.

    Of the fields of `Checkpoint`, only "net" is sure to be there: published checkpoints have few others.
    Raises InputError when the file is missing, cut off, no checkpoint, of a later version, or holds anything else.
    """
    content = load_weights(path)
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        content = {"net": content}
    if "net" not in content:
        raise InputError(f"{path}: has no 'net', so it is no checkpoint; pass one to --resume")
    flags = content.get("args", {})
    if not (isinstance(flags, dict) and all(isinstance(name, str) for name in flags)):
        raise InputError(f"{path}: its 'args' are not training flags; train again, or use another checkpoint")
    version = content.get("version", 1)
    if isinstance(version, int) and version > VERSION:
        raise InputError(
            f"{path}: has checkpoint version {version}, but this code reads versions up to {VERSION}; update the code"
        )
    return content


def load_training_state(path):
    """Read a ..._last.t -> Checkpoint. Raises InputError when it lacks something, or is of an earlier version."""
    content = load_checkpoint(path)
    if "optimizer" not in content:
        raise InputError(f"{path}: holds no training state; resume from a ..._last.t")
    if content.get("version", 1) != VERSION:
        raise InputError(
            f"{path}: an earlier version of this code began this run, with another order of erasing and one step less "
            "in an epoch; train anew"
        )
    known = {field.name for field in fields(Checkpoint)}
    try:
        return Checkpoint(**{name: value for name, value in content.items() if name in known})
    except TypeError as error:
        raise InputError(f"{path}: is not a complete ..._last.t ({error}); resume from another") from error


def load_weights(path):
    """Read a dict of tensors and plain values, such as a state dict, as `load_checkpoint` does; of a file that has its
    weights under "state_dict", as other projects write them, only these."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; pass the path of an existing one")
    path.open("rb").close()  # what the system has against it is not a matter of its content
    try:
        with torch.serialization.safe_globals(_NUMPY_PICKLES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{path}: cannot be loaded safely ({type(error).__name__}): it is cut off, is not a checkpoint, or holds "
            "more than tensors and plain values; use an earlier one, or train again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of weights; pass a saved state dict")
    return content["state_dict"] if isinstance(content.get("state_dict"), dict) else content


def find_checkpoint(resume, model_path):
    """`--resume` is a path, or the name of a file under `--model_path`."""
    if path := locate(resume, model_path):
        return path
    raise InputError(f"{resume}: no such file, here or under --model_path {model_path}; train first, or pass another")


def check_state(state, path):
    """A state dict, names to tensors -> the same, without the prefix of a wrapped model (DataParallel). Raises
    InputError, naming `path`, for anything else."""
    if not (isinstance(state, dict) and state):
        raise InputError(f"{path}: holds no weights; pass a saved state dict or checkpoint")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise InputError(f"{path}: {name!r:.120} is a {type(value).__name__}, not weights; pass a saved state dict")
    return {name.removeprefix("module."): value for name, value in state.items()}

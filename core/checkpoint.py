"""Checkpoint files: what they hold, written whole, read without executing anything."""

import pickle
from pathlib import Path

import numpy as np
import torch

from core.files import atomic, locate
from utils import InputError, process_index


def save_checkpoint(checkpoint, path):
    """Write a checkpoint (dict of tensors, numbers, strings) so that `path` is always whole: the old one or the new.
    All processes but the first write nothing."""
    if process_index() > 0:
        return
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(checkpoint, file)


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
    """Read a checkpoint to the CPU. Nothing in the file is executed: only tensors and plain values load.

    Raises InputError when the file is missing, cut off, no checkpoint, or holds anything else.
    """
    checkpoint = load_weights(path)
    if "net" not in checkpoint:
        raise InputError(f"{path}: a file without 'net' is no checkpoint of this family; name one with --resume")
    flags = checkpoint.get("args", {})
    if not (isinstance(flags, dict) and all(isinstance(name, str) for name in flags)):
        raise InputError(f"{path}: its 'args' are no training flags; make it again")
    return checkpoint


def load_weights(path):
    """Read a dict of tensors and plain values, such as a state dict, as `load_checkpoint` does."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name an existing one")
    try:
        with torch.serialization.safe_globals(_NUMPY_PICKLES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{path}: cannot be loaded safely ({type(error).__name__}): it is cut off, is no checkpoint, or holds more "
            "than tensors and plain values; take an earlier one, or make it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of weights; name a saved state dict")
    return content


def find_checkpoint(resume, model_path):
    """`--resume` is a path, or the name of a file under `--model_path`."""
    if path := locate(resume, model_path):
        return path
    raise InputError(f"{resume}: no such file, here or under --model_path {model_path}; train first, or name another")


def check_state(state, path):
    """Raise InputError, naming `path`, if `state` is no state dict: names to tensors."""
    if not (isinstance(state, dict) and state):
        raise InputError(f"{path}: holds no weights; name a saved state dict or checkpoint")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise InputError(f"{path}: {name!r:.120} is a {type(value).__name__}, no weights; name a saved state dict")

"""Checkpoint files: their fields, written whole, read without executing anything."""

import re
import warnings
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import numpy as np
import torch
from msgspec import Meta

from core.files import atomic, file_sha256, is_regular, locate
from core.formats import Count, Flags, ImageSize, Moments, Numbers, Tensors, checked
from core.meter import EpochSums
from utils import InputError, process_index

VERSION = 2
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where other projects put the weights in a file
# Of a tensor of weights; others, such as quantised or sparse ones, are no weights of a network here.
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64}


class OptimizerState(TypedDict):
    """What is read of an optimiser's state dict: the number of a parameter -> its moments. The rest follows from the
    flags."""

    state: Annotated[dict[int, Moments], Meta(max_length=10**5)]


Generators = Annotated[list[torch.Tensor], Meta(max_length=10)]  # of a process


class Within(TypedDict):
    generators: Annotated[list[Generators], Meta(max_length=10**4)]  # `distributed.generator_states`


@dataclass(kw_only=True)
class Checkpoint:
    """The fields of a checkpoint of a training run. The file is a dict of them, without those that are None.

    Files of version 1 have no `version`. A default is what a file without the field means: one from before there was
    the field, or other than ..._last.t. To add a field, give it such a default. Raise VERSION only if files of this
    version would be misunderstood by code that reads the version before.
    """

    version: Count = 1
    net: Tensors  # GFMNet's state dict
    # GFMNet(**options) is the network.
    options: dict[str, bool | Count | Annotated[str, Meta(pattern=r"^[\w.-]{1,100}$")]]
    image_size: ImageSize
    args: Flags  # of the training; a flag that is missing had its default
    epoch: Annotated[int, Meta(ge=-1, le=10**6)]  # the last finished one, from 0; -1 before the first
    best: Numbers  # of the best tested epoch so far: "epoch" and its FC metrics; only {"Rank-1": -1.0} before the first
    # The epoch was chosen on "test" or "val" ids; "none": it was not; None: unknown.
    selection: Literal["test", "val", "none"] | None = None
    num_images: list[Count] | None = None  # visible, infrared images that it was trained on; None: unknown
    data_digest: int | None = None  # `TrainData.digest` of these images; None: unknown
    processes: Count = 1  # that trained it, each with a share of the batch
    # Of ..._last.t only:
    optimizer: OptimizerState | None = None
    replaced: Numbers | None = None  # `best` of the file that this epoch's takes the place of, if it is the best so far
    # Of a ..._last.t that was saved within an epoch, `epoch` + 1:
    sums: EpochSums | None = None
    within: Within | None = None

    def to_file(self):
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in content.items() if value is not None} | {"version": VERSION}


# Any of the fields: published checkpoints have few of them.
SomeFields = TypedDict("SomeFields", get_type_hints(Checkpoint, include_extras=True), total=False)  # type: ignore[misc]


def save_checkpoint(content, path):
    """Write a checkpoint (dict of tensors, numbers, strings) so that `path` is always whole: the old one or the new.
    All processes but the first write nothing."""
    if process_index() > 0:
        return
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


# Published checkpoints hold their metrics as NumPy scalars and arrays, pickled by NumPy 1: exactly these names load.
_NUMPY_PICKLES: list[Any] = [
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

    It has the fields of `Checkpoint` that the file has; only "net" is sure to be there: published checkpoints have few
    others. Raises InputError when the file is missing, cut off, no checkpoint, of a later version, or holds anything
    else in these fields.
    """
    content = load_weights(path)
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        content = {"net": content}
    if "net" not in content:
        raise InputError(f"{path}: has no 'net', so it is no checkpoint; pass one to --resume")
    version = checked(content.get("version", 1), Count, f"{path}: version", "use another checkpoint")
    if version > VERSION:
        raise InputError(
            f"{path}: has checkpoint version {version}, but this code reads versions up to {VERSION}; update the code"
        )
    found = checked(content, SomeFields, path, "use another checkpoint, or train again")
    if ("sums" in found) != ("within" in found):
        raise InputError(f"{path}: was saved within an epoch, but lacks its sums or generators; use another checkpoint")
    return found


def load_with_sha256(path):
    """-> (`load_checkpoint`, the SHA-256 of the file). InputError if another file takes its place meanwhile."""
    sha256 = file_sha256(path)
    content = load_checkpoint(path)
    if file_sha256(path) != sha256:
        raise InputError(f"{path}: was replaced while it was read, by a training perhaps; start again, or copy it")
    return content, sha256


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
    checkpoint = checked(content, Checkpoint, f"{path}: is not a complete ..._last.t", "resume from another")
    if not checkpoint.best.keys() >= ({"Rank-1", "mAP"} if "epoch" in checkpoint.best else {"Rank-1"}):
        raise InputError(f"{path}: is not a complete ..._last.t: best has no Rank-1 or mAP; resume from another")
    return checkpoint


def load_weights(path):
    """Read a dict of tensors and plain values, such as a state dict, as `load_checkpoint` does; of a file that has its
    weights under "state_dict" or "model", as other projects write them, only these."""
    path = Path(path)
    if not is_regular(path):
        raise InputError(f"{path}: no such file; pass the path of an existing one")
    path.open("rb").close()  # what the system has against it is not a matter of its content
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # As torch.save writes it: nothing is packed, or there twice. Another one may unpack to any size.
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("holds more than its size")
                if damaged := archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError(f"{damaged} has changed")
        with torch.serialization.safe_globals(_NUMPY_PICKLES), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises anything when a file is damaged
        raise InputError(
            f"{path}: cannot be loaded safely ({type(error).__name__}): it is cut off or damaged, is not a "
            "checkpoint, or holds more than tensors and plain values; use an earlier one, or train again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of weights; pass a saved state dict")
    return next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)


def find_checkpoint(resume, model_path):
    """`--resume` is a path, or the name of a file under `--model_path`."""
    if path := locate(resume, model_path):
        return path
    raise InputError(f"{resume}: no such file, here or under --model_path {model_path}; train first, or pass another")


def check_state(state, path):
    """A state dict, names to tensors -> the same, without the prefixes of a wrapped model (DataParallel, torch.compile,
    Lightning). Raises InputError, naming `path`, for anything else."""
    if not (isinstance(state, dict) and state):
        raise InputError(f"{path}: holds no weights; pass a saved state dict or checkpoint")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise InputError(f"{path}: {name!r:.120} is a {type(value).__name__}, not weights; pass a saved state dict")
        kinds = value.dtype, value.layout, value.device.type
        if value.dtype not in DTYPES or kinds[1:] != (torch.strided, "cpu"):
            raise InputError(
                f"{path}: {name!r:.120} holds {', '.join(map(str, kinds))} values; save it as a dense float32 tensor"
            )
        if value.nbytes - value.untyped_storage().nbytes() > 2**28:  # a view that repeats a number: a copy is large
            raise InputError(f"{path}: {name!r:.120} repeats its values; save it as a dense float32 tensor")
    return {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): value for name, value in state.items()}

"""Features of test images in one .npz file, from this repository or another project.

Arrays, for the modalities "visible" and "infrared": `{modality}/paths` [N], str, relative to the data set's folder, and
`{modality}/{model}/{feature}` [N, C]. Optional: `{modality}/bytes` [N], the sizes of these files, by which other images
are noticed; `origin`, JSON, which says where the features come from. No pickles.
"""

import json
import math
import os
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch

from core.files import atomic, regular
from core.formats import Flags, checked
from datasets import TRAINING_SETS, option_values
from utils import InputError

UNPACKED = 2**30  # bytes that a file may unpack to, whatever its size


class Origin(msgspec.Struct, forbid_unknown_fields=True):
    """Where features come from, for the table; None: unknown."""

    dataset: Literal[*TRAINING_SETS] | None = None
    trial: Literal[*option_values("trial")] | None = None
    selection: Literal["test", "val", "none"] | None = None
    flipped: list[str] | None = None
    checkpoint: str | None = None
    network: str | None = None
    data_path: str | None = None
    demo: bool | None = None
    flags: Flags | None = None


def save_features(path, features, paths, data_path, origin):
    """Write features {modality: {(model, feature): [N, C]}} of images with these paths {modality: [N]}."""
    arrays = {"origin": np.array(json.dumps(origin))}
    for modality, named in features.items():
        arrays[f"{modality}/paths"] = np.array(_relative(paths[modality], data_path))
        arrays[f"{modality}/bytes"] = np.array([os.path.getsize(path) for path in paths[modality]])
        arrays |= {f"{modality}/{'/'.join(name)}": values.cpu().numpy() for name, values in named.items()}
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_features(path):
    """-> ({modality: {"row": {path: row}, "bytes": [N], (model, feature): float32 [N, C]}}, the fields of its
    `Origin`). "bytes" is there if the file has it.

    Nothing in the file is executed. Raises InputError for any other file.
    """
    try:
        with np.load(regular(path), allow_pickle=False) as file:
            unpacked = sum(entry.file_size for entry in file.zip.infolist())
            if unpacked > max(UNPACKED, 20 * os.path.getsize(path)):
                raise ValueError(f"unpacks to {unpacked} bytes")
            if len(set(file.files)) < len(file.files):
                raise ValueError("the same name twice")
            for entry in file.zip.infolist():
                _check_size(file.zip, entry)
            arrays = {name: file[name] for name in file.files}
            origin = json.loads(arrays.pop("origin", np.array("{}")).item())
    except Exception as error:  # the readers raise anything when a file is damaged
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); save it again, as .npz without pickles"
        ) from error
    origin = checked(origin, Origin, f"{path}: origin", "see a file of --features")

    stored = {modality: {"row": _rows(path, modality, arrays)} for modality in ("visible", "infrared")}
    for modality, named in stored.items():
        if (sizes := arrays.pop(f"{modality}/bytes", None)) is not None:
            if sizes.dtype.kind not in "iu" or sizes.shape != (len(named["row"]),):
                raise InputError(f"{path}: {modality}/bytes is not an integer for each image; leave it out")
            named["bytes"] = sizes
    for name, values in arrays.items():
        modality, *labels = name.split("/")
        if modality not in stored or len(labels) != 2 or not all(label and label.isprintable() for label in labels):
            raise InputError(f"{path}: {name!r} is not visible/MODEL/FEATURE or infrared/MODEL/FEATURE; rename it")
        images = len(stored[modality]["row"])
        if values.ndim != 2 or len(values) != images or not values.size or values.dtype.kind not in "fiu":
            raise InputError(
                f"{path}: {name} is {values.dtype} {list(values.shape)}, not numbers [{images}, C]; save one row for "
                f"each of {modality}/paths"
            )
        with np.errstate(over="ignore"):  # infinity is refused below
            values = values.astype(np.float32)
            lengths = np.linalg.norm(values, axis=1)
        usable = np.isfinite(lengths) & (lengths > 1e-6)  # below, float32 loses the direction
        if not usable.all():
            raise InputError(
                f"{path}: row {usable.argmin()} of {name} is too short, too long or not finite; embed that image again"
            )
        stored[modality][tuple(labels)] = torch.from_numpy(values)
    widths = [
        {"/".join(name): values.shape[1] for name, values in named.items() if isinstance(name, tuple)}
        for named in stored.values()
    ]
    if not widths[0] or widths[0] != widths[1]:
        raise InputError(f"{path}: has visible columns {widths[0]}, infrared {widths[1]}; save the same for both")
    return stored, msgspec.structs.asdict(origin)


def _check_size(archive, entry):
    """ValueError for an array that is shorter than its header says: NumPy would reserve that memory first."""
    with archive.open(entry) as member:
        one = np.lib.format.read_magic(member) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError("less than its header says")


def _rows(path, modality, arrays):
    """Take the array of paths -> {path: row}."""
    paths = arrays.pop(f"{modality}/paths", np.array([]))
    if paths.dtype.kind != "U" or paths.ndim != 1 or not paths.size:
        raise InputError(f"{path}: has no array of texts {modality}/paths; add it, with the image of each row")
    paths = paths.tolist()
    row = {file: i for i, file in enumerate(paths)}
    if len(row) < len(paths):
        double = next(file for i, file in enumerate(paths) if row[file] != i)
        raise InputError(f"{path}: {modality}/paths lists {double} twice; list each image once")
    return row


def select_features(path, stored, paths, data_path, device):
    """The features of some images, in their order and of unit length: {modality: {(model, feature): [N, C]}}."""
    features = {}
    for modality, files in paths.items():
        row = stored[modality]["row"]
        relative = _relative(files, data_path)
        if missing := [file for file in relative if file not in row]:
            raise InputError(
                f"{path}: has no {modality} features of {missing[0]} ({len(missing)} of {len(files)} images are "
                f"missing; it has {next(iter(row))}); save features of all images of {data_path} in these searches"
            )
        rows = [row[file] for file in relative]
        if "bytes" in stored[modality]:
            for file, size in zip(files, stored[modality]["bytes"][rows].tolist(), strict=True):
                if os.path.exists(file) and os.path.getsize(file) not in (size, 0):  # empty: in the place of an image
                    raise InputError(f"{path}: was made from another {file}; pass the --data_path it was made from")
        named = ((name, values[rows]) for name, values in stored[modality].items() if isinstance(name, tuple))
        features[modality] = {name: _of_unit_length(values).to(device) for name, values in named}
    return features


def _of_unit_length(values):
    """Rows that have it already stay as they are: in other last digits, near-ties would rank otherwise."""
    lengths = values.norm(dim=1, keepdim=True)
    return torch.where((lengths - 1).abs() < 1e-5, values, values / lengths)


def _relative(files, data_path):
    return [Path(os.path.relpath(file, data_path)).as_posix() for file in files]

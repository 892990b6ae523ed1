"""Features of test images in one .npz file, of this repo or of another project.

Arrays: `{modality}/paths` [N], str, relative to the data set's folder, and `{modality}/{model}/{feature}` [N, C], for
the modalities "visible" and "infrared"; `origin`, JSON, says where they come from. No pickles.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from core.files import atomic
from data_manager import DATA_PATHS, REGDB_TRIALS
from utils import InputError


def save_features(path, features, paths, data_path, origin):
    """Write features {modality: {(model, feature): [N, C]}} of images with these paths {modality: [N]}."""
    arrays = {"origin": np.array(json.dumps(origin))}
    for modality, named in features.items():
        arrays[f"{modality}/paths"] = np.array(_relative(paths[modality], data_path))
        arrays |= {f"{modality}/{'/'.join(name)}": values.cpu().numpy() for name, values in named.items()}
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_features(path):
    """-> ({modality: {"row": {path: row}, (model, feature): float32 [N, C]}}, origin, empty where the file has none).

    Nothing in the file is executed. Raises InputError for a file of anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            origin = json.loads(arrays.pop("origin", np.array("{}")).item())
    except Exception as error:  # the readers raise anything when a file is damaged
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); save it again: an .npz without pickles, its origin JSON"
        ) from error
    check_origin(path, origin)

    stored = {}
    for modality in ("visible", "infrared"):
        paths = arrays.pop(f"{modality}/paths", np.array([])).astype(str).ravel().tolist()
        row = {file: i for i, file in enumerate(paths)}
        if not paths:
            raise InputError(f"{path}: has no array {modality}/paths; it names the image of each row")
        if len(row) < len(paths):
            twice = next(file for i, file in enumerate(paths) if row[file] != i)
            raise InputError(f"{path}: {modality}/paths has {twice} twice; give each image once")
        stored[modality] = {"row": row}
    for name, values in arrays.items():
        modality, *labels = name.split("/")
        if modality not in stored or len(labels) != 2 or not all(label and label.isprintable() for label in labels):
            raise InputError(f"{path}: {name!r} is no visible/MODEL/FEATURE or infrared/MODEL/FEATURE; rename it")
        images = len(stored[modality]["row"])
        if values.ndim != 2 or len(values) != images or not values.size or values.dtype.kind not in "fiu":
            raise InputError(
                f"{path}: {name} is {values.dtype} {list(values.shape)}, not numbers [{images}, C], one row for each "
                f"of {modality}/paths"
            )
        values = values.astype(np.float32)
        lengths = np.linalg.norm(values, axis=1)
        usable = np.isfinite(lengths) & (lengths > 0)
        if not usable.all():
            raise InputError(f"{path}: row {usable.argmin()} of {name} is zero or not finite; embed that image again")
        stored[modality][tuple(labels)] = torch.from_numpy(values)
    widths = [
        {"/".join(name): values.shape[1] for name, values in named.items() if name != "row"}
        for named in stored.values()
    ]
    if not widths[0] or widths[0] != widths[1]:
        raise InputError(
            f"{path}: columns of visible features {widths[0]}, of infrared {widths[1]}; give the same of both"
        )
    return stored, origin


def check_origin(path, origin):
    """Raise InputError unless the origin of features has values that the table can show; all may be missing."""
    wanted = {
        "dataset": lambda value: value in tuple(DATA_PATHS),
        "trial": lambda value: type(value) is int and value in REGDB_TRIALS,
        "selection": lambda value: value in ("test", "val", "none"),
        "flipped": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "demo": lambda value: isinstance(value, bool),
        "flags": lambda value: isinstance(value, dict),
        **dict.fromkeys(("checkpoint", "network", "data_path"), lambda value: isinstance(value, str)),
    }
    if not isinstance(origin, dict):
        raise InputError(f"{path}: its origin is {origin!r}, not a JSON object; --features shows how")
    for name, value in origin.items():
        if name not in wanted:
            raise InputError(f"{path}: its origin has {name!r}, which is none of {', '.join(wanted)}; rename it")
        if value is not None and not wanted[name](value):
            raise InputError(f"{path}: its origin says {name!r} is {value!r}, which is none; --features shows how")


def select_features(path, stored, paths, data_path, device):
    """The features of some images, in their order and of unit length: {modality: {(model, feature): [N, C]}}."""
    features = {}
    for modality, files in paths.items():
        row = stored[modality]["row"]
        relative = _relative(files, data_path)
        if missing := [file for file in relative if file not in row]:
            raise InputError(
                f"{path}: has no {modality} features of {missing[0]} ({len(missing)} of {len(files)} images are "
                f"missing; it has {next(iter(row))}); save those of all images of {data_path} that these flags search"
            )
        rows = torch.tensor([row[file] for file in relative])
        features[modality] = {
            name: F.normalize(values[rows]).to(device) for name, values in stored[modality].items() if name != "row"
        }
    return features


def _relative(files, data_path):
    return [Path(os.path.relpath(file, data_path)).as_posix() for file in files]

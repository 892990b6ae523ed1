"""Features of test images in one .npz file, from this repository or another project.

Arrays, for the modalities "visible" and "infrared": `{modality}/paths` [N], str, relative to the data set's folder, and
`{modality}/{model}/{feature}` [N, C]. `origin`, JSON, says where they come from. No pickles.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from core.datasets import DATASETS, option_values
from core.files import atomic
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
    """-> ({modality: {"row": {path: row}, (model, feature): float32 [N, C]}}, origin, or {} without one).

    Nothing in the file is executed. Raises InputError for any other file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            origin = json.loads(arrays.pop("origin", np.array("{}")).item())
    except Exception as error:  # the readers raise anything when a file is damaged
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); save it again, as .npz without pickles"
        ) from error
    check_origin(path, origin)

    stored = {modality: {"row": _rows(path, modality, arrays)} for modality in ("visible", "infrared")}
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
        raise InputError(f"{path}: has visible columns {widths[0]}, infrared {widths[1]}; save the same for both")
    return stored, origin


def _rows(path, modality, arrays):
    """Take the array of paths -> {path: row}."""
    paths = arrays.pop(f"{modality}/paths", np.array([])).astype(str).ravel().tolist()
    row = {file: i for i, file in enumerate(paths)}
    if not paths:
        raise InputError(f"{path}: has no array {modality}/paths; add it, with the image of each row")
    if len(row) < len(paths):
        double = next(file for i, file in enumerate(paths) if row[file] != i)
        raise InputError(f"{path}: {modality}/paths lists {double} twice; list each image once")
    return row


def check_origin(path, origin):
    """Raise InputError for values in the origin of features that the table cannot show; any may be missing."""
    checks = {
        "dataset": lambda value: value in tuple(DATASETS),
        "trial": lambda value: type(value) is int and value in option_values("trial"),
        "selection": lambda value: value in ("test", "val", "none"),
        "flipped": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "demo": lambda value: isinstance(value, bool),
        "flags": lambda value: isinstance(value, dict),
        **dict.fromkeys(("checkpoint", "network", "data_path"), lambda value: isinstance(value, str)),
    }
    if not isinstance(origin, dict):
        raise InputError(f"{path}: its origin is {origin!r}, not a JSON object; see a file of --features")
    for name, value in origin.items():
        if name not in checks:
            raise InputError(f"{path}: its origin has {name!r}; use only {', '.join(checks)}")
        if value is not None and not checks[name](value):
            raise InputError(f"{path}: its origin has a wrong {name!r}, {value!r}; see a file of --features")


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
        rows = torch.tensor([row[file] for file in relative])
        features[modality] = {
            name: F.normalize(values[rows]).to(device) for name, values in stored[modality].items() if name != "row"
        }
    return features


def _relative(files, data_path):
    return [Path(os.path.relpath(file, data_path)).as_posix() for file in files]

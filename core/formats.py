"""What a file may hold is described once, by types beside its reader, and checked where the file is opened. The code
behind may trust it."""

import json
import warnings
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from core.files import regular
from utils import InputError, one_line

Count = Annotated[int, Meta(ge=0, le=10**12)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]  # finite
Numbers = dict[str, Count | Number]
Side = Annotated[int, Meta(ge=1, le=4096)]
ImageSize = tuple[Side, Side]  # height, width
Text = Annotated[str, Meta(min_length=1, max_length=10_000)]
Value = None | bool | Annotated[int, Meta(ge=-(10**18), le=10**18)] | Number | str
# A pickle may hold one list a million times, which are a million copies here: no list or dict is long.
Values = Annotated[list[Value], Meta(max_length=100)]
Flags = Annotated[dict[str, Value | Values], Meta(max_length=1000)]  # of a program
Tensors = Annotated[dict[str, torch.Tensor], Meta(max_length=10**5)]
Moments = Annotated[dict[str, torch.Tensor], Meta(max_length=10)]  # of a parameter


def checked(value, kind, place, remedy):
    """A value -> the same as a type describes it: without fields that it does not name, sequences as its own.

    Raises InputError, "{place}: {what is wrong}; {remedy}", for any other value.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch's, of a tensor that is asked for fields
            return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{place}: {_reason(error)}; {remedy}") from error
    except Exception as error:  # it asks a tensor for fields, which raises anything
        raise InputError(f"{place}: a tensor stands where fields belong; {remedy}") from error


def read_json(path, kind, remedy):
    """The content of a JSON file, as `checked` gives it. Raises InputError for any other file, and for none."""
    try:
        value = json.loads(Path(regular(path, text=True)).read_text(encoding="utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # text that cannot be written anywhere is a ValueError
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({type(error).__name__}); {remedy}") from error
    return checked(value, kind, path, remedy)


def _reason(error):
    """msgspec's message, "Expected `int`, got `str` - at `$.best.epoch`", as "best.epoch: expected int, got str"."""
    text = one_line(str(error).replace("`", ""))
    message, _, place = text.partition(" - at ")
    place = place.replace("key in $", "a name in $").replace("$.", "").replace("$", "the file")
    return f"{place}{': ' * bool(place)}{message[:1].lower()}{message[1:]}"[:200]

"""Same person or not: which pairs of images a threshold of similarity gets wrong.

A pair is a query and a gallery image that it sees. False positives are the share of the pairs of two people that are
taken for one person, true positives that of the pairs of one person that are recognised.
"""

from typing import Annotated, TypedDict

import numpy as np
from msgspec import Meta

from core.formats import Text, read_json
from datasets import search_title
from testing.results import pair_distances
from utils import InputError

RATES = [10 ** (exponent / 10) for exponent in range(-40, 1)]  # 0.0001 to 1, ten to a power of ten
SHOWN = (0.1, 0.01, 0.001)


def error_rates(features, search, name):
    """One search -> {"same", "different": numbers of pairs; "false_positives": RATES, and for each "true_positives" and
    the least "similarity" that counts as the same person; "equal_error", "equal_error_similarity"}, or None without
    pairs of both kinds. Rates are shares.

    At most a share of RATES of the pairs of two people have that similarity. The equal error rate is the mean of false
    positives and false negatives where they differ least. features, name: as in `results.pair_distances`.
    """
    try:
        same, different = map(np.sort, pair_distances(features, search, name))
    except InputError:
        return None
    allowed = (np.array(RATES) * len(different) + 1e-6).astype(int)  # pairs of two people; 1e-6: 0.1 x 10 is below 1
    limits = np.append(different, np.float32(np.inf))[allowed]  # a distance below it is accepted
    distances = np.concatenate([same, different])
    false = np.searchsorted(different, distances, side="right") / len(different)
    missed = 1 - np.searchsorted(same, distances, side="right") / len(same)
    equal = np.abs(false - missed).argmin()
    return {
        "same": len(same),
        "different": len(different),
        "false_positives": RATES,
        "true_positives": (np.searchsorted(same, limits) / len(same)).tolist(),
        "similarity": np.maximum(np.nextafter(1 - limits, np.float32(2)), -1).tolist(),
        "equal_error": float(false[equal] + missed[equal]) / 2,
        "equal_error_similarity": 1 - float(distances[equal]),
    }


def mean_rates(several):
    """The means of what `error_rates` gives of several searches; of "similarity" the greatest: with it, no search has
    more false positives than its rate."""
    means = {key: np.mean([rates[key] for rates in several], axis=0).tolist() for key in several[0]}
    return means | {"similarity": np.max([rates["similarity"] for rates in several], axis=0).tolist()}


def describe(rates):
    """In one line."""
    parts = []
    for rate in SHOWN:
        i = min(range(len(RATES)), key=lambda i: abs(RATES[i] - rate))
        true, similarity = rates["true_positives"][i], rates["similarity"][i]
        parts.append(f"{100 * true:.1f} % at {100 * rate:g} % false positives (similarity {similarity:.3f})")
    equal = f"equal error rate {100 * rates['equal_error']:.1f} % ({rates['equal_error_similarity']:.3f})"
    return f"Pairs of one person that are recognised: {', '.join(parts)}; {equal}."


Rate = Annotated[float, Meta(ge=0, le=1)]


class Calibration(TypedDict):
    """A file of `testa.py --calibrate`."""

    checkpoint: Text
    sha256: Text  # of the checkpoint
    feature: Text
    data: Text
    setting: Text
    false_positives: Annotated[list[Rate], Meta(min_length=1, max_length=1000)]
    similarity: Annotated[list[Annotated[float, Meta(ge=-1.001, le=1.001)]], Meta(min_length=1, max_length=1000)]


def calibration(path, sha256, data, setting, feature, rates):
    """The content of a file of `--calibrate`, of the checkpoint at `path`."""
    about = {"checkpoint": str(path), "sha256": sha256, "feature": feature, "data": data}
    return about | {"setting": search_title(setting), **rates}


def least_similarity(file, share, sha256, feature):
    """The least similarity with at most this share of false positives, by a file of `--calibrate`. Raises InputError
    for a file of another checkpoint or feature, and for a smaller share than it has."""
    content = read_json(file, Calibration, "make it with testa.py --calibrate")
    if (content["sha256"], content["feature"]) != (sha256, feature):
        raise InputError(f"{file}: is of another checkpoint or feature, {content['checkpoint']}; calibrate this one")
    rates, similarities = content["false_positives"], content["similarity"]
    if len(rates) != len(similarities) or rates != sorted(rates) or similarities != sorted(similarities, reverse=True):
        raise InputError(f"{file}: its rates and similarities do not fit; make it with testa.py --calibrate")
    values = [similarity for rate, similarity in zip(rates, similarities, strict=True) if rate <= share * (1 + 1e-9)]
    if not values:
        raise InputError(f"--false_positives {share}: {file} begins at {rates[0]:g}; pass more")
    return values[-1]

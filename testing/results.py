"""From the matches of a search to metrics, rows of results, the table, and the images behind them.

`scores` is the one place that lists the metrics: log, tables, JSON and page take their columns from it.
"""

from typing import Annotated, Literal, NotRequired, TypedDict

import numpy as np
import torch
from msgspec import Meta

from core.formats import Count, Flags, Number, Text, read_json
from datasets import DATASETS, search_title
from utils import InputError, one_line

CMC_RANKS = (1, 5, 10, 20)  # k of the Rank-k in the full table
METRICS = ("Rank-1", "mAP", "mINP")  # of `scores`, what the short table, the training's log line and sweeps show
# What differs between the trials of a row of results.
OF_A_TRIAL = ("trial", "checkpoint", "network", "queries", "evaluated", "gallery", "chance", "metrics")
PROTOCOL = ("dataset", "mode", "direction", "protocol", "shots")
BASELINES = ("gray pixels", "colour histogram", "HOG", "untrained")  # the models that `testa.py --baselines` adds
FLIPS = {True: "yes", False: "no", None: "unknown"}


class TrialResult(TypedDict):
    """A search of a summary: its own values."""

    queries: Count
    evaluated: Count
    gallery: Count


Curve = Annotated[list[Number], Meta(min_length=1, max_length=1000)]


class Curves(TypedDict):
    cmc: Curve
    precision: NotRequired[Curve]


class Summary(TypedDict):
    """What is read of a row of `summarise`."""

    dataset: Literal[*DATASETS]
    demo: bool | None
    mode: str | None
    direction: Text
    protocol: Text
    shots: Count | None
    trials: Annotated[list[int], Meta(min_length=1)]
    model: Text
    feature: Text
    reranking: Text
    selection: str | None
    images: Text
    mean: dict[str, Number]
    std: dict[str, Number] | None
    curves: Curves
    per_trial: Annotated[list[TrialResult], Meta(min_length=1)]


class Results(TypedDict):
    """What is read of a JSON file of testa.py."""

    flags: Flags
    results: Annotated[list[Summary], Meta(min_length=1)]


def read_results(path):
    """A JSON file of testa.py -> `Results`. Raises InputError for any other file."""
    content = read_json(path, Results, "make it with testa.py --json")
    for row in content["results"]:
        if missing := [name for name in METRICS if name not in row["mean"]]:
            raise InputError(f"{path}: a row has no {missing[0]}; make it with testa.py --json")
        if row["mean"].keys() != (row["std"] or row["mean"]).keys():
            raise InputError(f"{path}: a row has other means than deviations; make it with testa.py --json")
    return content


def scores(matches):
    """`eval_metrics.MatchRanks` -> {metric: percent}."""
    cmc, mean_ap, mean_inp = matches.means(max(CMC_RANKS))
    return {**{f"Rank-{k}": 100 * float(cmc[k - 1]) for k in CMC_RANKS}, "mAP": 100 * mean_ap, "mINP": 100 * mean_inp}


def result_row(search, matches, **labels):
    """The result of one search: its setting, labels, numbers of images, metrics and curves, as plain values.

    chance: Rank-1 of a random order, in percent. curves, in percent: "cmc" at the ranks 1 .. 20, and "precision" at a
    recall of 0, 10 .. 100 %.
    """
    queries = matches.rows.cpu().numpy()
    seen, same = search.sees(queries).numpy(), search.query.ids[queries, None] == search.gallery.ids
    curves = {"cmc": matches.cmc(), "precision": matches.precision_at_recall()}
    return {
        **search.setting,
        **labels,
        "queries": len(search.query.rows),
        "gallery": len(search.gallery.rows),
        "evaluated": len(queries),
        "chance": 100 * float(((seen & same).sum(axis=1) / seen.sum(axis=1)).mean()),
        "metrics": scores(matches),
        "curves": {name: (100 * values).tolist() for name, values in curves.items()},
    }


def summarise(rows):
    """Rows of single searches -> one row for all trials of a setting.

    A row is a `result_row` with the labels "checkpoint" and "network". Rows that agree in all but `OF_A_TRIAL` and
    curves are trials of one setting. A summary has the mean and the population's standard deviation of each metric
    (None for a single trial), the mean curves, and the trials.
    """
    groups = {}
    for row in rows:
        labels = {name: value for name, value in row.items() if name not in (*OF_A_TRIAL, "curves")}
        groups.setdefault(tuple(labels.items()), []).append(row)

    def over_trials(statistic, group):
        return {name: float(statistic([row["metrics"][name] for row in group])) for name in group[0]["metrics"]}

    return [
        {
            **dict(labels),
            "trials": [row["trial"] for row in group],
            "mean": over_trials(np.mean, group),
            "std": over_trials(np.std, group) if len(group) > 1 else None,
            "curves": {
                name: np.mean([row["curves"][name] for row in group], axis=0).tolist() for name in group[0]["curves"]
            },
            "per_trial": [{name: row[name] for name in OF_A_TRIAL} for row in group],
        }
        for labels, group in groups.items()
    ]


def result_title(row):
    """What a row of `summarise` is of, in words: "SYSU-MM01, all-search, ..., 1-shot, 10 trials"."""
    trials = f"trial {row['trials'][0]}" if len({*row["trials"]}) == 1 else f"{len(row['trials'])} trials"
    name = DATASETS[row["dataset"]].title(row["demo"], row["per_trial"][0]["queries"])
    return f"{name}, {search_title(row)}, {trials}"


def leading(models):
    """Of [(model, feature), ...], the one that a test is about: the network's FC, if there is one."""
    return next((name for name in models if name[1] == "FC" and name[0] not in BASELINES), models[-1])


def leading_rows(results):
    """Of the leading model: a row for each protocol, without re-ranking."""
    model, feature = leading([(row["model"], row["feature"]) for row in results])
    return [row for row in results if (row["model"], row["feature"], row["reranking"]) == (model, feature, "none")]


def in_words(results):
    """Rank-1 of the leading model in the first protocol, and what is beside it: two lines."""
    own = leading_rows(results)
    model, mean, trials, beside = own[0]["model"], own[0]["mean"], own[0]["per_trial"], {}
    for row in results:
        plain, of_setting = row["reranking"] == "none", all(row[key] == own[0][key] for key in PROTOCOL)
        if of_setting and row["feature"] != "POOL" and (plain or row["model"] == model):
            beside[row["model"] if plain else row["reranking"]] = row["mean"]["Rank-1"]
    beside["chance"] = np.mean([trial["chance"] for trial in trials])
    queries = f"{trials[0]['evaluated']} {own[0]['direction'].split()[0]} queries"
    kind = "a track" if DATASETS[own[0]["dataset"]].tracks else "an image"
    return [
        f"{mean['Rank-1']:.1f} % of {queries} have {kind} of their person in first place (Rank-1).",
        "Beside it: " + ", ".join(f"{name} {value:.1f}" for name, value in beside.items() if name != model),
    ]


def print_results(results, full=False, files=()):
    """Print `in_words` and a table: of the leading model in each protocol, or, if full, of every row and metric. files:
    that have the rest."""
    print(*map(one_line, in_words(results)), sep="\n")
    own = leading_rows(results)
    model, feature, mean = (own[0][key] for key in ("model", "feature", "mean"))
    shared, columns, rows = table_parts(results if full else own)
    columns = {i: name for i, name in enumerate(columns) if full or name not in ("model", "feature")}
    metrics = {i: name for i, name in enumerate(mean) if full or name in METRICS}
    table = [[*columns.values(), *(f"{name:>7}" for name in metrics.values())]]
    for row in rows:
        numbers = [f"{value:7.2f}" + ("" if std is None else f" ± {std:.2f}") for value, std, _ in row["metrics"]]
        table.append([row["labels"][i] for i in columns] + [numbers[i] for i in metrics])
    widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
    for line in table:
        print(one_line("".join(map(str.ljust, line, widths)).rstrip()))
    if full:
        networks = (f"{trial['checkpoint']} ({trial['network']})" for row in results for trial in row["per_trial"])
        shared["checkpoint"] = ", ".join(dict.fromkeys(networks))
        shared["images"] = ", ".join(dict.fromkeys(row["images"] for row in results))
    else:
        always = ("similarity", "CMC counts", "not seen", "flip", "re-ranking")  # of a data set and a network
        shared = {name: text for name, text in shared.items() if name not in always and text != "–"}
        files = ["--table full", *files]
    of = "; ".join([f"{model} {feature}", *map(": ".join, shared.items())])
    print(one_line(of + (f". {'Also' if full else 'All rows'}: {', '.join(files)}" if files else "")))


def table_parts(results):
    """-> (labels that all rows share {column: text}, the other columns, rows of the table).

    A row is {"labels": texts of its columns, "metrics": [(mean, deviation or None, whether no other is better)]}.
    """
    labels = [row_labels(row) for row in results]
    shared = {
        name: value
        for name, value in labels[0].items()
        if name not in ("model", "feature") and all(other[name] == value for other in labels)
    }
    columns = [name for name in labels[0] if name not in shared]
    rows = []
    for row, texts in zip(results, labels, strict=True):
        rivals = [other for other in results if other is not row and all(other[key] == row[key] for key in PROTOCOL)]
        metrics = [
            (mean, row["std"] and row["std"][name], is_best(mean, [other["mean"][name] for other in rivals]))
            for name, mean in row["mean"].items()
        ]
        rows.append({"labels": [texts[name] for name in columns], "metrics": metrics})
    return shared, columns, rows


def is_best(value, others):
    """Whether there are others and none is better, to the two decimals of the table."""
    return bool(others) and round(value, 2) >= round(max(others), 2)


def row_labels(row):
    """What the numbers of a row mean, in the words of `testa.py`: {column: text}."""
    count, trials = row["per_trial"][0], row["trials"]
    times = f", {len(trials)} times" if len(trials) > 1 else ""  # repetitions of `testa.py --corrupt`
    values = {
        "data": DATASETS[row["dataset"]].title(row["demo"], count["queries"]),
        **{name: row[name] for name in ("mode", "direction", "protocol", "shots")},
        "trials": len(trials) if len({*trials}) > 1 else f"trial {trials[0]}{times}",
        "similarity": row["similarity"],
        "CMC counts": row["cmc_counts"],
        "not seen": row["unseen"],
        "model": row["model"],
        "feature": row["feature"],
        "flip": FLIPS[row["flip_averaging"]],
        "re-ranking": row["reranking"],
        "chosen on": row["selection"],
        "queries": count["queries"],
        "with a match": count["evaluated"],
        "gallery": count["gallery"],
    }
    return {name: "–" if value is None else str(value) for name, value in values.items()}


def choose_queries(matches, search, which, count, seed=0):
    """Some of the queries that have a match: positions in `matches`, a `MatchRanks`.

    which: "worst" or "best" by average precision, "random", or an identity, whose worst queries come first. Equal ones
    keep the order of the queries. Raises InputError when no query of that identity has a match.
    """
    precision = matches.average_precision()
    if which == "random":
        sample = torch.randperm(len(precision), generator=torch.Generator().manual_seed(seed))[:count]
        return sample.sort().values.tolist()
    order = precision.sort(descending=which == "best", stable=True).indices.tolist()
    if which not in ("worst", "best"):
        ids = search.query.ids[matches.rows.cpu().numpy()]
        order = [i for i in order if ids[i] == int(which)]
        if not order:
            others = np.unique(ids).tolist()
            some = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
            raise InputError(f"--which {which}: no query of that identity has a match; choose one of {some}")
    return order[:count]


def rank_images(features, paths, search, name, matches, positions, top=None):
    """The nearest gallery images that some queries see, as plain values.

    Similarities are computed anew: near-ties may rank differently than in `matches`.

    name: of the feature. paths {modality: [N]}: of a `Searches`. matches, positions: as in `choose_queries`. Returns a
    list of {"path", "id", "camera", "modality", "average_precision", "first_match" (its rank among images, from 1),
    "gallery": [{"path", "id", "camera", "similarity", "correct"}, ...]}, with at most `top` images each, or all.
    """
    query, gallery = search.features(features, name)
    rows = matches.rows[positions]
    similarity = query[rows] @ gallery.T
    hidden = ~search.sees(rows.cpu().numpy()).to(similarity.device)
    similarity = similarity.masked_fill(hidden, -torch.inf)
    values, order = (x[:, :top].cpu() for x in similarity.sort(dim=1, descending=True, stable=True))

    def image(images, i):
        path = paths[images.modality][images.shown[i]]
        return {"path": path, "id": int(images.ids[i]), "camera": int(images.cameras[i])}

    precision, rankings = matches.average_precision(), []
    for i, row, similarities, nearest in zip(positions, rows.tolist(), values.tolist(), order.tolist(), strict=True):
        ranking = image(search.query, row) | {"modality": search.query.modality}
        ranking |= {"average_precision": float(precision[i]), "first_match": int(matches.positions[i, 0])}
        found = zip(nearest, similarities, strict=True)
        images = [image(search.gallery, j) | {"similarity": value} for j, value in found if value > -np.inf]
        ranking["gallery"] = [other | {"correct": other["id"] == ranking["id"]} for other in images]
        rankings.append(ranking)
    return rankings


def pair_distances(features, search, name):
    """Cosine distances (0 to 2) of all queries to the gallery images that they see -> (those of one identity, those of
    two identities), NumPy arrays. Raises InputError when there are none of either."""
    query, gallery = search.features(features, name)
    distances, seen = (1 - query @ gallery.T).cpu(), search.sees(np.arange(len(query)))
    same = torch.from_numpy(search.query.ids[:, None] == search.gallery.ids)
    pairs = [distances[seen & of_kind].numpy() for of_kind in (same, ~same)]
    if not all(map(len, pairs)):
        raise InputError("no distances to compare; test on data with a match and images of two identities")
    return pairs

"""Statistics, tables and figures of a sweep."""

import itertools
import math
import textwrap

import numpy as np

from core.files import atomic, save_json
from drawing import figures
from methods import METHODS, Health, Losses
from testing.results import BASELINES, METRICS, read_results, result_title
from utils import InputError

NOTE = (
    "Mean ± standard deviation over the seeds (in brackets: over the trials of a seed), in %. Below: the difference to "
    "the first row, paired by seed, with its 95 % interval (Student's t)."
)
LOGGED = (*Losses._fields, *Health._fields, "lr", *dict.fromkeys(term for m in METHODS.values() for term in m.terms))
LOGGED += tuple(f"{feature}/{metric}" for feature in ("FC", "POOL") for metric in METRICS)


# ---------------------------------------------------------------------------------------------------------- statistics


def network_rows(path):
    """The rows of a JSON file of testa.py that are compared: those of the trained network's FC feature."""
    results = read_results(path)["results"]
    rows = [row for row in results if row["feature"] == "FC" and row["model"] not in BASELINES]
    if not rows:
        raise InputError(f"{path}: has no row of the trained network's FC feature; remove it to test again")
    return rows


def setting_text(result):
    reranked = "" if result["reranking"] == "none" else f", re-ranked by {result['reranking']}"
    epoch = "fixed" if result["selection"] == "none" else f"chosen on {result['selection']} ids"
    model = "" if result["model"] == "trained" else f"{result['model']}; "
    return f"{result_title(result)}; {model}FC{reranked}; epoch {epoch}"


def tabulate(runs, plan):
    """The finished runs as plain values: the plan with "settings", a list of {"setting": in words, "rows": as
    `summarise_row` gives them}, several with `--test --all` and the like, and "failed", a list of runs."""
    unfinished = [run for run in runs if run.failure.exists() and not run.results.exists()]
    failed = [{"row": run.row, "seed": run.seed, **run.failed()} for run in unfinished]
    settings = {}
    for run in runs:
        if run.results.exists():
            seconds = sum(entry.get("seconds", 0) for entry in run.log())
            for result in network_rows(run.results):
                value = {"mean": result["mean"], "trials_std": result["std"], "seconds": seconds}
                settings.setdefault(setting_text(result), {}).setdefault(run.row, {})[str(run.seed)] = value
    if not settings:
        raise InputError("; ".join(["no run has finished", *failure_lines(failed)[:1]]))
    measured = {name for rows in settings.values() for name in rows}
    table = {**plan, "settings": [], "failed": failed}
    for setting, rows in settings.items():
        (first, _), *_ = plan["rows"]
        lines = []
        for name, _ in plan["rows"]:
            if name in rows or name not in measured:  # otherwise it was tested in other settings
                line = summarise_row(rows.get(name, {}), rows.get(first, {}) if name != first else {})
                failures = [run["seed"] for run in failed if run["row"] == name]
                lines.append({"row": name, "failed": failures, **line})
        table["settings"].append({"setting": setting, "rows": lines})
    return table


def failure_lines(failed):
    return [f"{run['row']}, seed {run['seed']} failed: {run['line']}" for run in failed]


def summarise_row(seeds, first):
    """Statistics of one row in one setting.

    seeds: {seed: {"mean": {metric: mean over trials}, "trials_std": {metric: deviation over trials} or None,
    "seconds"}}; first: those of the row to compare with. The value of a seed is its mean over the trials.
    """
    summary = {"seeds": seeds, "metrics": {}, "differences": {}}
    if not seeds:
        return summary
    for metric in METRICS:
        values = {seed: value["mean"][metric] for seed, value in seeds.items()}
        deviations = [value["trials_std"][metric] for value in seeds.values() if value["trials_std"]]
        trials_std = float(np.mean(deviations)) if deviations else None
        summary["metrics"][metric] = {**spread(list(values.values())), "trials_std": trials_std}
        pairs = [values[seed] - first[seed]["mean"][metric] for seed in seeds if seed in first]
        if pairs:
            summary["differences"][metric] = spread(pairs)
    summary["seconds"] = spread([value["seconds"] for value in seeds.values()])
    return summary


def spread(values):
    """Mean, standard deviation (n - 1) and 95 % interval of the mean (Student's t), as plain values.

    Deviation and interval of a single value are None.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "std": None, "interval": None, "count": count}
    from scipy.stats import t  # slow to import

    std = float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "interval": [mean - half, mean + half], "count": count}


def epoch_statistics(runs, values):
    """{value of the logs: {row: (epochs, mean over its finished seeds, mean less and plus the deviation)}}."""
    logs = {}
    for run in runs:
        if run.results.exists():
            logs.setdefault(run.row, []).append(run.log())
    panels = {}
    for value in values:
        for name, entries in logs.items():
            points = {}
            for entry in itertools.chain(*entries):
                if value in entry:
                    points.setdefault(entry["epoch"], []).append(entry[value])
            if points:
                epochs = sorted(points)
                mean = np.array([np.mean(points[epoch]) for epoch in epochs])
                std = np.array([np.std(points[epoch], ddof=1) if len(points[epoch]) > 1 else 0 for epoch in epochs])
                panels.setdefault(value, {})[name] = epochs, mean, mean - std, mean + std
    return panels


# -------------------------------------------------------------------------------------------------------------- output


def write(table, runs, values, out):
    """Print the table; write it as table.md, .tex and .json, and the figures table.png and curves.png."""
    failures = failure_lines(table["failed"])
    text, markdown, latex = [], [], []
    for setting in table["settings"]:
        lines = cells(setting["rows"], len(table["seeds"]))
        text += [setting["setting"], *aligned(lines), ""]
        markdown += [f"**{setting['setting']}**", "", *markdown_table(lines), ""]
        latex += [f"% {setting['setting']}", *latex_table(lines), ""]
    print("\n".join(["", *text, textwrap.fill(NOTE, 120), *failures]))
    notes = [NOTE, *(f"- {line}" for line in failures)]
    for name, lines in (("md", [*markdown, *notes]), ("tex", [*latex, *(f"% {line}" for line in (NOTE, *failures))])):
        with atomic(out / f"table.{name}") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_json(table, out / "table.json")
    figures.save(figures.dot_panels(table["settings"], METRICS), out / "table.png")
    if panels := epoch_statistics(runs, values):
        figure = figures.line_panels(panels, "epoch")
        title = "mean over the seeds ± their standard deviation; scores: of the first trial of the test"
        figure.suptitle(title, fontsize=9)
        figures.save(figure, out / "curves.png")
    print(f"\n{out}/table.md, .tex, .json and .png" + (f"; {out}/curves.png" if panels else ""))
    if failures:
        print("The folder of a failed run contains its full output; --retry continues it.")


def cells(rows, seeds):
    """The table as lists of texts: a head, and for each row its means and below them its differences."""
    lines = [["row", "seeds", *METRICS, "training, s"]]
    for row in rows:
        count = f"{len(row['seeds'])} of {seeds}" + (f", {len(row['failed'])} failed" if row["failed"] else "")
        if not row["seeds"]:
            lines.append([row["row"], count, *["–"] * (len(METRICS) + 1)])
            continue
        means = []
        for metric in row["metrics"].values():
            trials = "" if metric["trials_std"] is None else f" ({metric['trials_std']:.2f})"
            means.append(plus_minus(metric, 2) + trials)
        lines.append([row["row"], count, *means, plus_minus(row["seconds"], 1)])
        if row["differences"]:
            (pairs,) = {difference["count"] for difference in row["differences"].values()}
            count = "1 pair" if pairs == 1 else f"{pairs} pairs"
            lines.append([f"  minus {rows[0]['row']}", count, *map(signed, row["differences"].values()), ""])
    return lines


def plus_minus(values, digits):
    deviation = "" if values["std"] is None else f" ± {values['std']:.{digits}f}"
    return f"{values['mean']:.{digits}f}{deviation}"


def signed(values):
    interval = "" if values["interval"] is None else " [{:+z.2f}, {:+z.2f}]".format(*values["interval"])
    return f"{values['mean']:+z.2f}{interval}"


def aligned(lines):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]


def markdown_table(lines):
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]


def latex_table(lines):
    """A tabular for the package booktabs."""
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
    head, *body = [" & ".join("".join(special.get(c, c) for c in cell) for cell in line) + r" \\" for line in lines]
    columns = "l" + "r" * (len(lines[0]) - 1)
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]

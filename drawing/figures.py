"""Figures: functions from plain values to a matplotlib `Figure`, which `save` writes; `draw_epoch` does both for a test
of a training. No display is needed.

Colours are Okabe and Ito's, which colour-blind readers can distinguish. Colour is never the only difference: lines have
dashes, modalities have markers, and frames of wrong images are dashed.
"""

import base64
import contextlib
import io
import sys
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from PIL import Image

from core.files import atomic, check_output
from core.images import read_image
from datasets import search_title
from testing.results import choose_queries, rank_images, result_title
from training.log import read_json_lines
from utils import InputError, printable, process_index

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 2, 2)))
FRAMES = {
    "correct": {"edgecolor": COLOURS[0], "linestyle": "-"},
    "wrong": {"edgecolor": COLOURS[1], "linestyle": (0, (3, 1.5))},
    "query": {"edgecolor": "black", "linestyle": "-"},
}
# With Chinese, Japanese and Korean characters, on Linux, Windows and macOS; each is found under one of its names.
EAST_ASIAN = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei")
EAST_ASIAN += ("Droid Sans Fallback", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS")
EAST_ASIAN += ("Hiragino Sans GB", "Apple SD Gothic Neo", "Unifont")


def families(installed):
    """Fonts for text, the first that has a character. Of a group, such as "sans-serif", only one is asked."""
    return ["DejaVu Sans", *(name for name in EAST_ASIAN if name in installed), "sans-serif"]


matplotlib.rcdefaults()  # whatever the user's matplotlibrc says: it may ask for LaTeX, which may be missing
matplotlib.rcParams["font.family"] = families({*font_manager.get_font_names()})
matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is no formula
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
matplotlib.rcParams["svg.hashsalt"] = "figure"  # makes ids reproducible
SUFFIXES = (".png", ".svg", ".pdf")
DPI = 150
CROP = (256, 128)  # height, width of a drawn image
TICKS = {"rank": [1, 5, 10, 15, 20], "recall, %": [0, 20, 40, 60, 80, 100]}
UNITS = {"lr": "rate", "seconds": "s", "images_per_second": "images/s"}  # of a log's values that are no loss
UNITS |= dict.fromkeys(("correct", "accuracy", "beyond_clamp", "at_ln2"), "share")
UNITS |= dict.fromkeys(("distance_within", "distance_across"), "distance")
EPOCH_QUERIES, EPOCH_IMAGES = 6, 10  # of the sheet of rankings that training draws


def check_picture(path, flag="--out"):
    """Raise InputError unless a figure can be written to `path`."""
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f"{flag} {path}: is not a .png, .svg or .pdf; choose such a name")
    check_output(path)


def save(figure, path):
    """Write a figure as .png, .svg or .pdf, by the suffix of the path. Text in an .svg stays text."""
    with atomic(path) as temporary, lettering() as missing:
        figure.savefig(temporary, dpi=DPI, format=Path(path).suffix[1:])
    if missing and Path(path).suffix != ".svg":  # whoever shows that has fonts of its own
        remedy = f"install a font that has them, such as {EAST_ASIAN[0]}"
        print(f"note: {path}: shows boxes for {len(missing)} characters without a font here; {remedy}", file=sys.stderr)


@contextlib.contextmanager
def lettering():
    """A block that writes a figure. Gives a set, in the end of Matplotlib's warnings of the characters that it has no
    font for, of which it would print one for each."""
    missing = set()
    with warnings.catch_warnings(record=True) as caught:
        yield missing
    for warning in caught:
        if str(warning.message).startswith("Glyph "):
            missing.add(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class Tile(NamedTuple):
    """An image of a sheet: its file, the lines below it, and its frame: "query", "correct", "wrong" or None."""

    path: str
    caption: str
    frame: str | None = None


def ranking_sheet(rows, title=""):
    """Queries with their ranked gallery images. rows: lists of `Tile`s, the query first, then the nearest images."""
    columns = max(map(len, rows))
    lines = max(tile.caption.count("\n") + 1 for row in rows for tile in row)
    width, height, text = 0.92, 1.6, 0.125 * lines + 0.1  # inches
    whole_width = columns * width + 0.35
    title = _wrapped(title, whole_width)
    legend = "black frame: query; blue, \N{CHECK MARK}: same identity; orange, dashed, \N{MULTIPLICATION SIGN}: another"
    judged = any(tile.frame in ("correct", "wrong") for row in rows for tile in row)
    legend = _wrapped(legend, whole_width) if judged else ""
    top = 0.2 + 0.16 * title.count("\n") + 0.2 * bool(title)
    whole_height = len(rows) * (height + text) + top + 0.1 + 0.15 * (legend.count("\n") + 1)
    figure = Figure(figsize=(whole_width, whole_height))
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            left = 0.1 + j * width + (0.15 if j else 0)  # a gap after the query
            bottom = whole_height - top - (i + 1) * (height + text) + text
            box = np.divide((left, bottom, width - 0.1, height - 0.06), 2 * (whole_width, whole_height))
            panel = figure.add_axes(box, xticks=[], yticks=[])
            panel.imshow(read_image(tile.path, CROP), aspect="auto", interpolation="antialiased")
            panel.set_xlabel(tile.caption, fontsize=7, labelpad=2, linespacing=1.1)
            for spine in panel.spines.values():
                spine.set(visible=tile.frame is not None, linewidth=2.2, **FRAMES.get(tile.frame, {}))
    figure.text(0.1 / whole_width, 1 - 0.1 / whole_height, title, fontsize=9, va="top")
    figure.text(0.1 / whole_width, 0.08 / whole_height, legend, fontsize=7)
    return figure


def data_uri(path):
    """An image file as the data URI of a JPEG of size CROP."""
    buffer = io.BytesIO()
    Image.fromarray(read_image(path, CROP)).save(buffer, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _wrapped(title, width):
    """A text of font size 9 or less in lines that fit into `width` inches."""
    return "\n".join(textwrap.wrap(printable(title), int(width / 0.075)))


def ranking_tiles(ranked):
    """`rank_images`' queries as the rows of a `ranking_sheet`."""
    rows = []
    for query in ranked:
        precision = f"AP {100 * query['average_precision']:.0f} %"
        row = [Tile(query["path"], f"query: {precision}\nid {query['id']}\ncamera {query['camera']}", "query")]
        for image in query["gallery"]:
            frame, mark = ("correct", "\N{CHECK MARK}") if image["correct"] else ("wrong", "\N{MULTIPLICATION SIGN}")
            caption = f"{mark} {image['similarity']:.3f}\nid {image['id']}\ncamera {image['camera']}"
            row.append(Tile(image["path"], caption, frame))
        rows.append(row)
    return rows


def heatmap_sheet(pairs, title):
    """Where the network looks. pairs: a list of (caption, image file, {name: heat [h, w], from 0 to 1}) for each."""
    names = list(pairs[0][0][2])
    parts = len(names) + 1
    columns = parts * max(map(len, pairs))
    width, height, text = 1.05, 1.95, 0.3  # inches
    whole_width = columns * width + 0.5
    title = _wrapped(title, whole_width)
    top = 0.55 + 0.16 * title.count("\n")
    whole_height = len(pairs) * (height + text) + top
    figure = Figure(figsize=(whole_width, whole_height))
    for i, pair in enumerate(pairs):
        for j, (caption, path, heats) in enumerate(pair):
            image = read_image(path, CROP)
            for k, (name, heat) in enumerate([("image", None), *heats.items()]):
                left = 0.1 + (j * parts + k) * width + 0.3 * j
                bottom = whole_height - top - (i + 1) * (height + text) + text
                box = np.divide((left, bottom, 1, height - 0.05), 2 * (whole_width, whole_height))
                panel = figure.add_axes(box, xticks=[], yticks=[])
                fill = {"extent": (0, 1, 1, 0), "aspect": "auto"}
                panel.imshow(image if heat is None else image.mean(axis=2), cmap="gray", vmin=0, vmax=255, **fill)
                if heat is not None:  # over gray: colours of the image would look like heat
                    panel.imshow(heat, cmap="inferno", alpha=0.6, interpolation="bilinear", vmin=0, vmax=1, **fill)
                if i == 0:
                    panel.set_title(name, fontsize=8)
                if k == 0:
                    panel.set_xlabel(caption, fontsize=7.5, loc="left", labelpad=3)
    figure.text(0.1 / whole_width, 1 - 0.1 / whole_height, title, fontsize=9, va="top")
    return figure


def feature_map(points, ids, modalities, title):
    """A map of features: points [N, 2] with identities [N] and modalities [N]. Colour: identity; marker: modality."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    panel = figure.subplots()
    markers = {"visible": "o", "infrared": "^"}
    for number, person in enumerate(np.unique(ids)):
        colour = COLOURS[number % len(COLOURS)]
        look = {"facecolors": colour, "edgecolors": "black", "linewidths": 0.6}
        if number >= len(COLOURS):  # colours repeat as outlines
            look = {"facecolors": "none", "edgecolors": colour, "linewidths": 1.6}
        for modality, marker in markers.items():
            chosen = (ids == person) & (modalities == modality)
            panel.scatter(*points[chosen].T, s=42, marker=marker, **look)
            # Many colours are hard to distinguish: the identity is also written above its points.
            top = points[chosen][points[chosen][:, 1].argmax()]
            panel.annotate(str(person), top, (0, 6), textcoords="offset points", fontsize=7.5, ha="center")
    for modality, marker in markers.items():
        panel.scatter([], [], marker=marker, facecolors="0.7", edgecolors="black", s=42, label=modality)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    panel.set(xticks=[], yticks=[])
    panel.set_title(_wrapped(title, 8), fontsize=9, loc="left")
    return figure


def distance_histograms(pairs, title=""):
    """pairs {label: (distances of the same identity, of two identities)} -> Figure with a panel and an overlap each."""
    figure = Figure(figsize=(4.6 * len(pairs), 3.2), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    both = np.concatenate([values for pair in pairs.values() for values in pair])
    bins = np.linspace(both.min(), both.max(), 61)
    for panel, (label, (same, other)) in zip(panels, pairs.items(), strict=True):
        for values, name, style in ((same, "same identity", 0), (other, "two identities", 1)):
            look = {"color": COLOURS[style], "linestyle": DASHES[style]}
            panel.hist(values, bins, density=True, alpha=0.3, color=COLOURS[style])
            panel.hist(values, bins, density=True, histtype="step", linewidth=1.6, label=name, **look)
        name = f"{_wrapped(label, 4.2)}\n" if label else ""
        panel.set_title(f"{name}overlap {100 * overlap(same, other):.1f} %", fontsize=9, loc="left")
        panel.set(xlabel="cosine distance, query to gallery", yticks=[])
        panel.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(_wrapped(title, 4.6 * len(pairs)), fontsize=9, x=0.01, ha="left")
    return figure


def overlap(a, b):
    """Overlap of two samples, from 0 (a threshold separates them) to 1 (alike): the error rates of both samples at the
    best threshold, added. This is 1 minus the Kolmogorov-Smirnov distance and, if the densities cross once, the area
    under both."""
    values = np.concatenate([a, b])
    below, below_other = (np.searchsorted(np.sort(x), values) / len(x) for x in (a, b))
    return 1 - np.abs(below - below_other).max()


def epoch_curves(runs, values):
    """runs: {label: entries of a `log.RunLog`} -> Figure with a panel for each of `values`, by epoch.

    Raises InputError for a value that no log contains."""
    known = {key for log in runs.values() for entry in log for key, v in entry.items() if not isinstance(v, str)}
    panels = {}
    for value in values:
        if value not in known:
            raise InputError(f"--values {value}: is not a number in these logs; choose from {', '.join(sorted(known))}")
        points = {label: [(e["epoch"], e[value]) for e in entries if value in e] for label, entries in runs.items()}
        panels[value] = {label: tuple(zip(*pairs, strict=True)) for label, pairs in points.items() if pairs}
    return line_panels(panels, "epoch")


def draw_epoch(log, title, tested, test):
    """Write the curves of a training, and of the epoch that was logged last some queries, the same after each epoch,
    with the images nearest to them by FC.

    log: the run's `training.log.RunLog`; tested: a `train_ext_test0.TestResult` of test, a `Searches`.
    """
    if process_index() > 0:
        return
    entries, (search,), matches = read_json_lines(log.json_path), test.searches, tested.matches["FC"]
    curves = epoch_curves({log.json_path.stem: entries}, ["identity", "triplet", "FC/Rank-1", "FC/mAP"])
    chosen = choose_queries(matches, search, "random", EPOCH_QUERIES)
    ranked = rank_images(tested.features, test.paths, search, "FC", matches, chosen, EPOCH_IMAGES)
    ids = {"test": "test ids", "val": "VALIDATION ids"}[search.setting["split"]]
    title = f"{title}: {ids}, {search_title(search.setting)}, trial {search.setting['trial']}; FC"
    sheet = ranking_sheet(ranking_tiles(ranked), title)
    epoch, folder = entries[-1]["epoch"], log.json_path.with_suffix("")
    for tag, figure, name in (("curves", curves, "curves"), ("ranking", sheet, f"ranking_epoch_{epoch}")):
        save(figure, folder / f"{name}.png")
        log.image(tag, folder / f"{name}.png", epoch)


def result_curves(tables, curve, titled=True):
    """tables: {label: rows of `summarise`} -> Figure with a panel for each protocol. FC hides POOL of its table.

    curve: "cmc", by rank, or "precision", by recall. titled: whether panels have titles.
    """
    every = [(label, row) for label, rows in tables.items() for row in rows]
    panels = {}
    for label, row in every:
        alike = [other for _, other in every if other["model"] == row["model"]]
        if row["feature"] == "POOL" and any(other["feature"] == "FC" for other in alike if other in tables[label]):
            continue
        # A name contains what distinguishes the rows of a model, and no more.
        texts = {"feature": row["feature"], "reranking": row["reranking"], "selection": f"chosen on {row['selection']}"}
        texts["images"] = row["images"]
        texts = [text for key, text in texts.items() if text != "none" and len({other[key] for other in alike}) > 1]
        name = ", ".join([label] * (len(tables) > 1) + [row["model"]] + texts)
        panel = panels.setdefault(result_title(row) if titled else "", {})
        if name in panel:
            raise InputError(f"two rows of results have the same name, {name}; draw them separately")
        values = row["curves"][curve]
        panel[name] = np.arange(1, len(values) + 1) if curve == "cmc" else np.linspace(0, 100, len(values)), values
    labels = {"cmc": ("rank", "matching rate, %"), "precision": ("recall, %", "precision, %")}[curve]
    return line_panels(panels, *labels)


def roc_curve(rates):
    """rates: of `verification.error_rates` -> Figure: true by false positives, the latter on a logarithmic axis."""
    percent = [[100 * rate for rate in rates[name]] for name in ("false_positives", "true_positives")]
    figure = line_panels({"": {"FC": percent}}, "false positives, %", "true positives, %")
    (panel,) = figure.axes
    panel.set_xscale("log")
    panel.set_xticks(ticks := [0.01, 0.1, 1, 10, 100], [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set(xlim=(percent[0][0], 100), ylim=(0, 102))  # last: ticks widen it
    return figure


def corruption_curves(table):
    """table: of `corruptions.table` -> Figure with a panel for each kind, mAP by level; level 0 is the clean image."""
    panels = {}
    for kind, values in table.items():
        points = [(level, value) for level, value in enumerate(values) if value is not None]
        clean = (range(len(values)), values[:1] * len(values))
        panels[kind.replace("_", " ")] = {"corrupted": tuple(zip(*points, strict=True)), "without corruption": clean}
    return line_panels(panels, "level", "mAP, %")


def line_panels(panels, x_label, y_label=None):
    """panels {title: {label: (x values, y values, and the lower and upper values of a band, if any)}} -> Figure.

    y_label: of all panels, or None for the unit of what each is titled by. A label looks the same in all panels."""
    panels = {title: {printable(label): line for label, line in lines.items()} for title, lines in panels.items()}
    names = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    # As many names side by side as fit.
    beside = max(1, min(len(names), 48 * columns // (8 + max(map(len, names)))))
    keys = {name: _wrapped(name, 3.2 * columns - 0.6) for name in names}
    below = 0.25 * -(-len(names) // beside) + 0.16 * sum(key.count("\n") for key in keys.values())
    figure = Figure(figsize=(4 * columns, 2.9 * rows + 0.2 + below), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        panel = figure.add_subplot(rows, columns, place)
        for label, (x, y, *band) in lines.items():
            number = names.index(label)
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            panel.plot(x, y, label=label, marker="o" if len(x) < 3 else "." if len(x) < 30 else "", **style)
            if band:
                panel.fill_between(x, *band, color=style["color"], alpha=0.15, linewidth=0)
        panel.set(xlabel=x_label, ylabel=y_label or UNITS.get(title, "%" if "/" in title else "loss"))
        panel.set_title(_wrapped(title, 3.4), fontsize=9)
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
        panel.xaxis.set_major_locator(FixedLocator(TICKS[x_label]) if x_label in TICKS else MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    drawn = {line.get_label(): line for panel in figure.axes for line in panel.lines}
    figure.legend(
        drawn.values(), [keys[name] for name in drawn], loc="outside lower center", ncols=beside, frameon=False
    )
    return figure


def dot_panels(settings, metrics):
    """Settings of a sweep's table -> Figure with a row of panels for each, a panel for each metric: a line for each row
    of the table, with a dot for each seed, and the mean as a stroke on its interval."""
    tables = {setting["setting"]: [row for row in setting["rows"] if row["seeds"]] for setting in settings}
    names = {title: [_wrapped(row["row"], 2.2) for row in rows] for title, rows in tables.items()}
    heights = [1.1 + (0.32 + 0.16 * max(name.count("\n") for name in some)) * len(some) for some in names.values()]
    width = 2.2 + 2.6 * len(metrics)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (title, rows) in zip(parts, tables.items(), strict=True):
        part.suptitle(_wrapped(title, width), fontsize=9, x=0.01, ha="left")
        axes = part.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for panel, metric in zip(axes, metrics, strict=True):
            every, ends = [], []
            for i, row in enumerate(rows):
                values = [seed["mean"][metric] for seed in row["seeds"].values()]
                mean, interval = (row["metrics"][metric][name] for name in ("mean", "interval"))
                every, ends = every + values, ends + values + (interval or [])
                colour = COLOURS[i % len(COLOURS)]
                if interval:
                    panel.plot(interval, [i, i], color=colour, linewidth=2, solid_capstyle="butt")
                panel.plot(mean, i, marker="|", markersize=15, markeredgewidth=2.5, color=colour)
                panel.plot(values, [i] * len(values), "o", markersize=5, mfc="white", mec=colour, zorder=3)
            # A wide interval of a few values would hide them: it is cut at the edge of the panel.
            room = max(1, max(every) - min(every))
            low, high = np.clip([min(ends), max(ends)], min(every) - room, max(every) + room)
            panel.set_xlim(low - 0.05 * room, high + 0.05 * room)
            panel.set(yticks=range(len(rows)), yticklabels=names[title], ylim=(len(rows) - 0.5, -0.5))
            panel.set_title(metric, fontsize=9)
            panel.grid(axis="x", alpha=0.3)
            panel.tick_params(axis="y", length=0)
            panel.spines[["top", "right", "left"]].set_visible(False)
    parts[-1].supxlabel("dot: a seed; stroke: the mean; bar: its 95 % interval, cut at the edge", fontsize=8)
    return figure

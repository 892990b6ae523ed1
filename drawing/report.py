"""A page of test results in one HTML file: tables, figures and ranked images. It needs no server and no network."""

import base64
import hashlib
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from core.files import atomic
from datasets import DATASETS
from drawing import figures
from testing.results import FLIPS
from utils import progress

PROTOCOL = ("dataset", "mode", "direction", "protocol", "shots")
# Black, white and blue of a figure become colours of the page, which suit light and dark.
COLOURS = {"#000000": "currentColor", "#ffffff": "var(--page)", "#0072b2": "var(--correct)"}


def write_page(path, title, results, rankings, rankings_title, plots, settings):
    """Write test results to one self-contained HTML file.

    results: rows of `summarise`. rankings: queries of `rank_images`, the hardest first, with at most ten images each;
    may be empty. rankings_title: their search, feature and trial. plots: {caption: matplotlib Figure}. settings:
    {heading: {name: plain value}}.

    Raises InputError for an image that is missing or cannot be read, and if `path` cannot be written.
    """
    files = dict.fromkeys(image["path"] for query in rankings for image in (query, *query["gallery"]))
    bar = progress(files, desc="embedding images", unit="img", leave=False)
    trials = [trial for row in results for trial in row["per_trial"]]
    common, columns, rows = table_parts(results)
    page = read_template("report.html.j2").render(
        title=title,
        origin={
            "Images": dict.fromkeys(row["images"] for row in results),
            "Checkpoint": dict.fromkeys(f"{trial['checkpoint']} ({trial['network']})" for trial in trials),
        },
        common=common,
        columns=columns,
        metrics=list(results[0]["mean"]),
        rows=rows,
        crop=figures.CROP,
        pictures={file: (f"i{number}", figures.data_uri(file)) for number, file in enumerate(bar)},
        rankings=rankings,
        rankings_title=rankings_title,
        plots={caption: inline_svg(figure, caption, f"f{i}-") for i, (caption, figure) in enumerate(plots.items())},
        content={"settings": settings, "results": results},
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # a file name may not be Unicode


def read_template(name):
    """A Jinja template of this folder, which escapes what is put into it."""
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
    environment.filters |= {"digest": digest, "tail": lambda file: Path(*Path(file).parts[-3:])}
    return environment.get_template(name)


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
    values = {
        "data": DATASETS[row["dataset"]].title(row["demo"], count["queries"]),
        **{name: row[name] for name in ("mode", "direction", "protocol", "shots")},
        "trials": f"trial {trials[0]}" if len(trials) == 1 else len(trials),
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


def inline_svg(figure, caption, prefix):
    """A figure as an <svg> element: its ids begin with `prefix`, its text stays text, its colours are COLOURS."""
    buffer = io.BytesIO()
    with figures.lettering(), matplotlib.rc_context({"svg.hashsalt": "report"}):  # makes ids reproducible
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in (root, *root):
        for child in (*parent.findall("{*}metadata"), *parent.findall("{*}style")):  # a style would apply to the page
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[1]
        for name, value in [*element.attrib.items()]:
            del element.attrib[name]
            value = prefix + value if name == "id" else re.sub(r"(?<=^#)|(?<=url\(#)", prefix, value)
            value = re.sub("|".join(COLOURS), lambda match: COLOURS[match[0]], value)
            element.attrib[name.split("}")[-1]] = value
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": caption}  # the page sets the size
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def digest(script):
    """SHA-256 by which the content security policy allows this script and no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

"""A page of test results in one HTML file: tables, figures and ranked images. It needs no server and no network."""

import base64
import hashlib
import io
import re
from pathlib import Path
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from core.files import atomic
from drawing import figures
from testing.results import in_words, table_parts
from utils import progress

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
    page = read_template(Path(__file__).with_name("report.html.j2")).render(
        title=title,
        words=in_words(results),
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
        plots=[(title, plot, inline_svg(plot, title, f"f{i}-")) for i, (title, plot) in enumerate(plots.items())],
        content={"settings": settings, "results": results},
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # a file name may not be Unicode


def read_template(path):
    """A Jinja template, which escapes what is put into it."""
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(path.parent), **options)
    environment.filters |= {"digest": digest, "tail": lambda file: Path(*Path(file).parts[-3:])}
    return environment.get_template(path.name)


def inline_svg(figure, caption, prefix):
    """A figure as an <svg> element: its ids begin with `prefix`, its text stays text, its colours are COLOURS."""
    buffer = io.BytesIO()
    with figures.lettering():
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

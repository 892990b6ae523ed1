"""Measured results, one JSON file each in records/, and the table of them, docs/records.md.

    python -m tools.records                                      (writes docs/records.md; --check only compares)
    python -m tools.records --add sweep/methods --data SYSU-MM01 --hardware "one RTX 4090" --by "who measured"

`--add` makes a record of each row of a sweep (tools.sweep). A record that lacks something is refused.
"""

import html
import itertools
import os
import re
import shlex
import subprocess
import urllib.parse
from datetime import date
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

from core.files import atomic, save_json
from core.formats import Count, Number, Text, checked, read_json
from testing.results import METRICS
from utils import ArgumentParser, InputError, cli, one_line

ROOT = Path(__file__).parents[1]
REMEDY = "see .github/CONTRIBUTING.md, Records"


class Score(TypedDict):
    mean: Number
    std: Number | None  # over the seeds (n - 1); None for one seed


class Record(TypedDict):
    """One row of the table. All fields are needed."""

    date: Annotated[str, Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    commit: Annotated[str, Meta(pattern=r"^[0-9a-f]{7,40}$")]
    data: Text  # a data set, or "drawn people" and what they are
    real: bool
    row: Text  # the method, and what differs from its recipe, in words
    flags: Text  # of training
    command: Text  # that anybody can run
    scores: Annotated[dict[Text, dict[Text, Score]], Meta(min_length=1)]  # protocol -> metric -> percent
    seeds: Annotated[list[Count], Meta(min_length=1)]
    hardware: Text
    hours: Annotated[float, Meta(ge=0, le=10**6)]  # of training, of one seed
    by: Text
    verdict: NotRequired[Text]  # of tools.reproduce


class Line(TypedDict):
    """What is read of a row of a sweep's table; of one without a finished seed, nothing but its name."""

    row: Text
    seeds: dict[Annotated[str, Meta(pattern=r"^[0-9]{1,9}$")], object]
    metrics: dict[str, Score]
    seconds: NotRequired[Score]


class Setting(TypedDict):
    setting: Text
    rows: list[Line]


class Table(TypedDict):
    """What is read of a sweep's table.json."""

    rows: list[tuple[Text, list[str]]]  # with their flags
    flags: list[str]
    settings: list[Setting]


def get_args_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if docs/records.md is not what would be written")
    parser.add_argument("--folder", type=Path, default=ROOT / "records", help="folder of the records")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "records.md", help="the table")
    group = parser.add_argument_group("a new record")
    group.add_argument("--add", type=Path, metavar="SWEEP", help="folder of a sweep")
    group.add_argument("--data", help="data set, as SYSU-MM01; or what was drawn: 'drawn people, ...'")
    group.add_argument("--hardware", help="processor or GPU, and how many")
    group.add_argument("--by", help="who measured")
    return parser


def main(argv=None):
    """Returns the records, the latest first."""
    args = get_args_parser().parse_args(argv)
    if args.add:
        missing = [flag for flag in ("data", "hardware", "by") if not getattr(args, flag)]
        if missing:
            raise InputError(f"--add {args.add}: a record needs --{missing[0]}")
        for name, record in records_of_sweep(args):
            names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
            file = next(file for file in (args.folder / f"{name}.json" for name in names) if not file.exists())
            save_json(checked(record, Record, name, REMEDY), file)
            print(file)
    records = {file: read_json(file, Record, REMEDY) for file in sorted(args.folder.glob("*.json"))}
    if not records:
        raise InputError(f"{args.folder}: has no records; pass the folder that has them")
    if os.path.realpath(args.page) in map(os.path.realpath, records):
        raise InputError(f"--page {args.page}: is a record; choose another file")
    text = page(dict(sorted(records.items(), key=lambda item: item[1]["date"], reverse=True))).encode(errors="replace")
    if args.check:
        if not args.page.is_file() or args.page.read_bytes() != text:
            raise InputError(f"{args.page}: is not what {args.folder} gives; run: python -m tools.records")
    else:
        with atomic(args.page) as temporary:
            temporary.write_bytes(text)
    return records


def records_of_sweep(args):
    """[(name, `Record`)] of the rows of a sweep that have finished."""
    table = read_json(args.add / "table.json", Table, "run: python -m tools.sweep --table --out SWEEP")
    measured, records = commit(), []
    for row, flags in table["rows"]:
        scores, seeds, hours = {}, set(), 0.0
        for setting in table["settings"]:
            for line in setting["rows"]:
                if line["row"] == row and line["seeds"]:
                    if "seconds" not in line:
                        raise InputError(f"{args.add}: row {row} has no seconds; make the table again with tools.sweep")
                    scores[setting["setting"]] = line["metrics"]
                    seeds |= {int(seed) for seed in line["seeds"]}
                    hours = line["seconds"]["mean"] / 3600
        if scores:
            words = shlex.join([*table["flags"], *flags])
            name = f"{date.today()}_{re.sub(r'[^a-z0-9]+', '_', f'{args.data} {row}'.lower()).strip('_')}"
            record = {
                "date": str(date.today()),
                "commit": measured,
                "data": args.data,
                "real": not any(setting.startswith("demo data") for setting in scores),
                "row": row,
                "flags": words,
                "command": f"python train_ext_test0.py {words} --seed {min(seeds)}",
                "scores": scores,
                "seeds": sorted(seeds),
                "hardware": args.hardware,
                "hours": round(hours, 3),
                "by": args.by,
            }
            records.append((name, record))
    if not records:
        raise InputError(f"{args.add}: no row has finished; run the sweep to its end")
    return records


def git(*arguments):
    """The output of git in this repository; nothing if it fails, or there is no git."""
    try:
        output = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True).stdout
        return output.decode(errors="replace").strip()  # a user's name may be in any encoding
    except OSError:
        return ""


def commit():
    """The commit of this code. Raises InputError if there is none, or if the code differs from it."""
    if changed := git("status", "--porcelain", "--untracked-files=no"):
        raise InputError(f"{changed.split()[-1]}: differs from the last commit, which a record names; commit first")
    if not (name := git("rev-parse", "HEAD")):
        raise InputError(f"{ROOT}: is no git repository, and a record names its commit; clone the code with git")
    return name


def page(records):
    """{file: `Record`} -> the text of docs/records.md."""
    lines = [
        "# Records",
        "",
        "`python -m tools.records` writes this page from [records/](../records). A row's file has flags,",
        "command and all tested protocols. ± is over the seeds. [How to send one](../.github/CONTRIBUTING.md#records).",
    ]
    for real, title in ((True, "Real data"), (False, "Drawn people")):
        lines += ["", f"## {title}", ""]
        rows = [(file, record) for file, record in records.items() if record["real"] == real]
        if not rows:
            lines.append("None yet: the data sets are not available to this project. Send yours.")
            continue
        lines.append(f"| date | data | what | {' | '.join(METRICS)} | seeds | hours a seed | hardware | commit | by |")
        lines.append("|---" * (len(METRICS) + 8) + "|")
        for file, record in rows:
            first = next(iter(record["scores"].values()))
            cells = [score_text(first[metric]) if metric in first else "" for metric in METRICS]
            what = f"[{inert(record['row'])}](../records/{urllib.parse.quote(file.name)})"
            hours = f"{record['hours']:.2g}"
            after = [len(record["seeds"]), hours, record["hardware"], record["commit"][:7], record["by"]]
            line = [inert(record["date"]), inert(record["data"]), what, *cells, *map(inert, after)]
            lines.append(f"| {' | '.join(line)} |")
        protocols = sorted({next(iter(record["scores"])) for _, record in rows})
        lines += ["", "The numbers are those of " + "; ".join(map(inert, protocols)) + "."]
    return "\n".join(lines) + "\n"


def inert(value):
    """A value of a record as text of a table, without markup."""
    return re.sub(r"([|\[\]*_~`\\])", r"\\\1", html.escape(one_line(str(value)), quote=False))


def score_text(score):
    return f"{score['mean']:.1f}" + (f" ± {score['std']:.1f}" if score["std"] is not None else "")


if __name__ == "__main__":
    cli(main)

"""Draw what training has logged.

    python visualize.py curves log/sysu_log/*.jsonl --out curves.png

curves   values of one or several runs by epoch: losses, metrics, the health of the triplet
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from utils import ArgumentParser, InputError, atomic, cli, read_json_lines

# Okabe and Ito's colours, which colour-blind readers tell apart; dashes tell the lines apart without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 2, 2)))


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="values of one or several runs by epoch")
    curves.add_argument("logs", nargs="+", metavar="LOG", help="a run's {name}.jsonl")
    curves.add_argument(
        "--values", nargs="+", default=["total", "correct", "FC/Rank-1"], help="what of a log's entries"
    )
    curves.add_argument("--labels", nargs="+", help="names of the runs (default: those of their files)")
    curves.add_argument("--out", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    return parser


def main(argv=None):
    """Returns the picture's path."""
    args = get_args_parser().parse_args(argv)
    if Path(args.out).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out {args.out}: name a .png, .svg or .pdf")
    if args.labels and len(args.labels) != len(args.logs):
        raise InputError(f"--labels {' '.join(args.labels)}: give one for each of the {len(args.logs)} logs")
    names = [Path(log).stem for log in args.logs]
    labels = args.labels or (names if len(set(names)) == len(names) else args.logs)
    if len(set(labels)) < len(labels):
        raise InputError(f"{' '.join(labels)}: two runs of one name; tell them apart with --labels")
    runs = dict(zip(labels, map(read_log, args.logs), strict=True))
    known = {
        key for entries in runs.values() for entry in entries for key, v in entry.items() if not isinstance(v, str)
    }
    for value in args.values:
        if value not in known:
            raise InputError(f"--values {value}: no number of these logs; they have {', '.join(sorted(known))}")
    figure = draw_curves(runs, args.values)
    with atomic(args.out) as temporary, matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(temporary, dpi=150, format=Path(args.out).suffix[1:])
    print(args.out)
    return args.out


def read_log(path):
    """The entries of a run's JSON lines."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; name a run's .jsonl, which lies under its --log_path")
    entries = read_json_lines(Path(path))
    if not entries:
        raise InputError(f"{path}: has no entry of an epoch; name the .jsonl of a run that has finished one")
    return entries


def draw_curves(runs, values):
    """runs: {label: entries of a log} -> Figure with a panel for each of `values`."""
    # Names side by side if there is room for them, else one below the other.
    columns = len(runs) if sum(len(label) + 8 for label in runs) < 40 * len(values) else 1
    height = 3.1 + 0.25 * len(runs) / columns
    figure = Figure(figsize=(4 * len(values), height), layout="constrained")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for panel, value in zip(panels, values, strict=True):
        for number, (label, entries) in enumerate(runs.items()):
            points = [(entry["epoch"], entry[value]) for entry in entries if value in entry]
            if not points:
                continue
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            panel.plot(
                *zip(*points, strict=True),
                label=label,
                marker="o" if len(points) < 3 else "." if len(points) < 30 else "",
                **style,
            )
        panel.set(title=value, xlabel="epoch")
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    drawn = {line.get_label(): line for panel in panels for line in panel.lines}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


if __name__ == "__main__":
    cli(main)

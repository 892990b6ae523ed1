"""Find a person among your own images.

    python -m tools.search index FOLDER --resume save_model/..._best.t --modality visible --index INDEX
    python -m tools.search watch FOLDER --index INDEX
    python -m tools.search query IMAGE... --modality infrared --index INDEX
    python -m tools.search serve --index INDEX

Features are those of testa.py: image and mirror averaged, FC or POOL. As a library:

    from tools.embedder import Embedder

    embedder = Embedder("save_model/..._best.t", gpu="cpu")  # or an .onnx of tools.export
    features = embedder(["a.jpg", "b.jpg"], "infrared")  # float32 [2, C], of unit length
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from drawing import figures
from model import FEATURES, MODALITIES
from tools.embedder import Embedder  # noqa: F401 (the library)
from tools.search.finder import Finder, describe
from tools.search.indexer import index_folder, list_images, remove_folder
from tools.search.watcher import watch_folder
from utils import ArgumentParser, InputError, bounded, cli, one_line, printable

SHEET_LIMIT = 100  # queries, and images of each, that fit on a sheet


def get_args_parser():
    parser = ArgumentParser(prog="search.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed a folder's images; later, new and changed ones; drop deleted ones")
    watch = commands.add_parser("watch", help="index a folder that grows, within seconds, until it is stopped")
    for command in (index, watch):
        text = "images at any depth; links to folders are not followed"
        command.add_argument("folder", metavar="FOLDER", help=text)
        group = command.add_argument_group("images")
        text = "modality of the images (needed for a new folder)"
        group.add_argument("--modality", choices=MODALITIES, help=text)
        labels = group.add_mutually_exclusive_group()
        text = "what paths below FOLDER say, such as cam{camera}/{track}/{time:%%Y%%m%%d_%%H%%M%%S}_{n}.jpg"
        labels.add_argument("--pattern", help=text)
        labels.add_argument("--csv", metavar="FILE", help="table with the columns path, camera, person, time, track")
        text = "each folder of images is a track, named by its path below FOLDER"
        group.add_argument("--tracks", choices=("folder",), help=text)
        text = "feature after or before the bottleneck (default: FC)"
        group.add_argument("--feature", choices=FEATURES, help=text)
        if command is index:
            group.add_argument("--moved_from", metavar="OLD", help="where FOLDER was when it was indexed")
            text = "on a server, for millions of images: make a graph, with which searches are approximate"
            group.add_argument("--approximate", action="store_true", help=text)
    group = watch.add_argument_group("watched people")
    text = "folder of people: each folder in it, and each image beside them, is one; print new images of them as JSON"
    group.add_argument("--watch_for", metavar="DIR", help=text)
    group.add_argument("--watch_modality", choices=MODALITIES, help="modality of the images in DIR")
    remove = commands.add_parser("remove", help="take a folder out of an index")
    remove.add_argument("folder", metavar="FOLDER", help="all images in it, at any depth, are taken out")
    query = commands.add_parser("query", help="rank the images of an index by cosine similarity to others")
    text = "query images; a folder stands for all its images, which show one person"
    query.add_argument("images", nargs="+", metavar="IMAGE", help=text)
    group = query.add_argument_group("query")
    group.add_argument("--modality", choices=MODALITIES, required=True, help="modality of the query images")
    text = "all query images show one person: use their mean feature, or the best similarity to one of them"
    group.add_argument("--combine", choices=("mean", "best"), help=text)
    group.add_argument("--save", metavar="FILE", help="draw the images on a sheet: .png, .svg or .pdf")
    group.add_argument("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    group = query.add_argument_group("images that are searched")
    group.add_argument("--camera", nargs="+", default=[], help="only these cameras")
    group.add_argument("--from", dest="start", metavar="TIME", help="only from this time on, such as 2026-11-20T14:00")
    group.add_argument("--to", dest="end", metavar="TIME", help="only before this time; or to the end of this day")
    group.add_argument("--gallery_modality", choices=MODALITIES, help="only images of this modality")
    group.add_argument("--folder", help="only images at any depth of this folder")
    group = query.add_argument_group("result")
    group.add_argument("--top", type=bounded(int, 1, 10**6), default=10, help="number of images to find")
    group.add_argument("--page", type=bounded(int, 1, 10**6), default=1, help="2: the next --top images, and so on")
    once = group.add_mutually_exclusive_group()
    text = "show each known person once, by the most similar image"
    once.add_argument("--group", action="store_const", const="person", help=text)
    text = "show tracks in place of images, by the mean feature of a track or by its most similar image"
    once.add_argument("--tracks", dest="group", choices=("mean", "best"), help=text)
    text = "k-reciprocal re-ranking of the hundred most similar images"
    group.add_argument("--rerank", action="store_true", help=text)
    serve = commands.add_parser("serve", help="a local web page to search with, which only this machine can reach")
    serve.add_argument("--port", type=bounded(int, 0, 65535), default=7860, help="port on 127.0.0.1; 0: a free one")
    serve.set_defaults(batch=64, workers=0)  # one image at a time
    for command, text in (
        (query, "leave out images that are less similar"),
        (serve, "draw a line above images that are"),
        (watch, "print images that are not less similar"),
    ):
        group = command.add_argument_group("same person or not")
        least = group.add_mutually_exclusive_group()
        least.add_argument("--min_similarity", type=bounded(float, -1, 1), metavar="S", help=text)
        text = "so that at most this share of other people is taken for the same one; needs --calibration"
        least.add_argument("--false_positives", type=bounded(float, 0, 1), metavar="SHARE", help=text)
        group.add_argument("--calibration", metavar="FILE", help="file of testa.py --calibrate, of the same checkpoint")
    for command in (index, watch, remove, query, serve):
        text = "file, or postgresql://USER@HOST:PORT/DATABASE (password: PGPASSWORD)"
        command.add_argument("--index", required=True, metavar="INDEX", help=text)
    for command in (index, watch, query, serve):
        group = command.add_argument_group("network")
        text = "checkpoint, or an .onnx of tools.export (default: the one that made the index)"
        group.add_argument("--resume", metavar="CKPT", help=text)
        group.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
        if command is not serve:
            group.add_argument("--batch", type=bounded(int, 1, 65536), default=64, help="images per batch")
            text = "loading processes, at most one per core"
            group.add_argument("--workers", type=bounded(int, 0, 1024), default=4, help=text)
    return parser


def main(argv=None):
    """Returns what the command's function returns; `serve` and `watch` run until they are stopped."""
    args = get_args_parser().parse_args(argv)
    run = {"index": run_index, "watch": watch_folder, "remove": run_remove, "query": run_query, "serve": run_serve}
    return run[args.command](args)


def run_index(args):
    counts = index_folder(args)
    for line in counts["unreadable"]:
        print(one_line(f"unreadable: {line}"))
    for path in counts["unlabelled"]:
        print(one_line(f"without labels: {path}"))
    if counts["spread"]:
        some = one_line(", ".join(counts["spread"][:3]))
        print(
            f"note: {len(counts['spread'])} tracks, such as {some}, have images in several folders, but no camera; if "
            "these are of several cameras, name them as {camera} in --pattern, or in the table of --csv"
        )
    if counts["others"]:
        print(one_line(f"left out, as no images by their names: {counts['others']}"))
    print(
        f"{args.index}: {counts['images']} images. Embedded now: {counts['embedded']} ({counts['changed']} changed); "
        f"deleted: {counts['vanished']}; unreadable: {len(counts['unreadable'])}"
    )
    return counts


def run_remove(args):
    print(f"{args.index}: {(count := remove_folder(args))} images removed")
    return count


def run_serve(args):
    from tools.search import page  # the library and the other commands need no server

    return page.serve(args)


def run_query(args):
    """Returns for each image (with --combine, for all) {"queries": paths, "modality", "found": of `Finder`}."""
    given, args.images = args.images, query_images(args)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # keeps warnings out of the JSON
        finder = Finder(args)
        check_sheet(args, finder)
        folder = args.folder and os.path.realpath(args.folder)
        where = finder.read_filter(args.camera, args.gallery_modality, args.start, args.end, folder)
        options = {name: getattr(args, name) for name in ("page", "combine", "rerank", "group")}
        lists = finder(args.images, args.modality, args.top, where=where, **options)
        empty = [not found for found in lists]
        lists = [[image for image in found if image["similarity"] >= finder.least] for found in lists]
    pairs = zip([args.images] if args.combine else [[path] for path in args.images], lists, strict=True)
    results = [{"queries": paths, "modality": args.modality, "found": found} for paths, found in pairs]
    if args.save:
        title = f"{args.modality} queries in {args.index}; {os.path.basename(finder.about['checkpoint'])}"
        figures.save(draw_sheet(results, title), args.save)
    if args.json:
        print(json.dumps(results, indent=1))
        return results
    for result, beyond_last in zip(results, empty, strict=True):
        print(one_line(f"{', '.join(given if args.combine else result['queries'])} ({args.modality})"))
        if not result["found"]:
            kind = "track" if args.group in ("mean", "best") else "image"
            beyond = args.page > 1 and beyond_last
            reason = f"no {kind} has a similarity of {finder.least:.3f}"
            print(f"  none: {f'page {args.page} is beyond the last {kind}' if beyond else reason}")
        for image in result["found"]:
            print(one_line(f"{image['rank']:>4}  {image['similarity']:6.3f}  {image['path']}  {describe(image)}"))
    if args.save:
        print(args.save)
    return results


def query_images(args):
    """The query images, with those of folders in their place. Sets --combine, as a folder is a query of one person."""
    images = []
    for name in args.images:
        files = [name]
        if os.path.isdir(name):
            files, unreadable, *_ = list_images(name)
            if unreadable or not files:
                raise InputError(next(iter(unreadable), f"{name}: contains no image; pass a folder of images"))
            if len(args.images) > 1 and not args.combine:
                raise InputError(f"{name}: is a folder; pass it alone, or --combine if all queries show one person")
            args.combine = args.combine or "mean"
        images += files
    return images


def check_sheet(args, finder):
    """Raise InputError for a sheet that cannot be written or would replace an image."""
    if not args.save:
        return
    figures.check_picture(args.save, "--save")
    if max(len(args.images), args.top) > SHEET_LIMIT:
        raise InputError(f"--save: a sheet has room for {SHEET_LIMIT} queries and --top {SHEET_LIMIT}; reduce them")
    path = os.path.realpath(args.save)
    beside = finder.index.entries(finder.about["version"], os.path.dirname(path))
    if path in map(os.path.realpath, args.images) or path in beside:
        raise InputError(f"--save {args.save}: is a query or an image of the index; choose another file")


def draw_sheet(results, title):
    """The results of `run_query` -> Figure with a row for each query."""
    rows = []
    for result in results:
        rows.append([figures.Tile(path, f"query\n{short_name(path)}", "query") for path in result["queries"]])
        for image in result["found"]:
            value = f"{image['similarity']:.3f}" + (", changed" if image["changed"] else "")
            rows[-1].append(figures.Tile(image["path"], f"{value}\n{short_name(image['path'])}"))
    try:
        return figures.ranking_sheet(rows, title)
    except InputError as error:
        raise InputError(f"--save: an image cannot be drawn ({error}); run index again if it was deleted") from error


def short_name(path, length=16):
    """A file's name and its folder's, cut to their end."""
    name = printable(os.path.join(*Path(path).parts[-2:]))
    return name if len(name) <= length else f"\N{HORIZONTAL ELLIPSIS}{name[1 - length :]}"


if __name__ == "__main__":
    cli(main)

"""Find a person among your own images.

    python -m tools.search index FOLDER --resume save_model/..._best.t --modality visible --out INDEX
    python -m tools.search query IMAGE... --modality infrared --index INDEX
    python -m tools.search serve --index INDEX

index   embeds a folder of images of one modality; a second call embeds new and changed images and drops deleted ones
query   ranks the images of an index by cosine similarity to each given image
serve   the same as a local web page, which only this machine can reach

Features are those of testa.py: image and mirror averaged, FC or POOL. As a library:

    from tools.search import Embedder

    embedder = Embedder("save_model/..._best.t", gpu="cpu")  # or an .onnx of tools.export
    features = embedder(["a.jpg", "b.jpg"], "infrared")  # float32 [2, C], of unit length
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from model import FEATURES, MODALITIES
from tools import figures, search_page
from tools.embedder import Embedder  # noqa: F401 (the library)
from tools.indexer import Finder, index_folder
from utils import ArgumentParser, InputError, bounded, cli

SHEET_LIMIT = 100  # queries, and images of each, that fit on a sheet


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed a folder's images, or those that are new or changed")
    index.add_argument("folder", metavar="FOLDER", help="images at any depth; links to folders are not followed")
    group = index.add_argument_group("index")
    group.add_argument("--modality", choices=MODALITIES, help="modality of the images (needed for a new index)")
    group.add_argument("--feature", choices=FEATURES, help="feature after or before the bottleneck (default: FC)")
    group.add_argument("--out", required=True, metavar="INDEX", help="folder of the index, new or old")
    text = "for millions of images: use inverted lists, which are approximate, from now on"
    group.add_argument("--ivf", action="store_true", help=text)
    query = commands.add_parser("query", help="rank the images of an index by their similarity to others")
    query.add_argument("images", nargs="+", metavar="IMAGE", help="query images")
    group = query.add_argument_group("query")
    group.add_argument("--modality", choices=MODALITIES, required=True, help="modality of the query images")
    group.add_argument("--top", type=bounded(int, 1, 10**6), default=10, help="number of images to find")
    group.add_argument("--save", metavar="FILE", help="draw the images on a sheet: .png, .svg or .pdf")
    group.add_argument("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    serve = commands.add_parser("serve", help="a local web page to search with")
    serve.add_argument("--port", type=bounded(int, 1, 65535), default=7860, help="port on 127.0.0.1")
    serve.set_defaults(batch=64, workers=0)  # one image at a time
    for command in (query, serve):
        command.add_argument("--index", required=True, metavar="INDEX", help="folder that `index` made")
    for command in (index, query, serve):
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
    """Returns the counts of `index_folder` or the results of `run_query`; `serve` runs until it is stopped."""
    args = get_args_parser().parse_args(argv)
    return {"index": run_index, "query": run_query, "serve": run_page}[args.command](args)


def run_index(args):
    counts = index_folder(args)
    for line in counts["unreadable"]:
        print(f"unreadable: {line}")
    print(
        f"{args.out}: {counts['images']} images. Embedded now: {counts['embedded']}; changed since the last call: "
        f"{counts['changed']}; deleted: {counts['vanished']}; unreadable: {len(counts['unreadable'])}"
    )
    return counts


def run_query(args):
    """Returns for each image {"query": path, "modality", "found": as `Finder` gives it}."""
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # keeps warnings out of the JSON
        finder = Finder(args)
        check_sheet(args, finder)
        images = finder(args.images, args.modality, args.top)
    results = [
        {"query": path, "modality": args.modality, "found": ranked}
        for path, ranked in zip(args.images, images, strict=True)
    ]
    if args.save:
        figures.save(draw_sheet(results, finder.about), args.save)
    if args.json:
        print(json.dumps(results, indent=1))
        return results
    for result in results:
        print(f"{result['query']} ({args.modality})")
        for image in result["found"]:
            changed = "  (changed since it was indexed)" if image["changed"] else ""
            print(f"{image['rank']:>4}  {image['similarity']:6.3f}  {image['path']}{changed}")
    if args.save:
        print(args.save)
    return results


def run_page(args):
    search_page.serve(Finder(args), args.port)


def check_sheet(args, finder):
    """Raise InputError for a sheet that cannot be written or would replace an image."""
    if not args.save:
        return
    figures.check_picture(args.save, "--save")
    if max(len(args.images), args.top) > SHEET_LIMIT:
        raise InputError(f"--save: a sheet has room for {SHEET_LIMIT} queries and --top {SHEET_LIMIT}; reduce them")
    path = os.path.realpath(args.save)
    if path in map(os.path.realpath, args.images) or os.path.relpath(path, finder.about["folder"]) in finder.paths:
        raise InputError(f"--save {args.save}: is a query or an image of the index; choose another file")


def draw_sheet(results, about):
    """The results of `run_query` -> Figure with a row for each query."""
    rows = [
        [figures.Tile(result["query"], f"query\n{short_name(result['query'])}", "query")]
        + [
            figures.Tile(image["path"], f"{image['similarity']:.3f}\n{short_name(image['path'])}")
            for image in result["found"]
        ]
        for result in results
    ]
    modality, checkpoint = results[0]["modality"], os.path.basename(about["checkpoint"])
    title = f"{modality} queries in {about['modality']} images of {about['folder']}; cosine similarity; {checkpoint}"
    try:
        return figures.ranking_sheet(rows, printable(title))
    except InputError as error:
        raise InputError(f"--save: an image cannot be drawn ({error}); run index again if it was deleted") from error


def short_name(path, length=16):
    """A file's name and its folder's, cut to their end."""
    name = printable(os.path.join(*Path(path).parts[-2:]))
    return name if len(name) <= length else f"\N{HORIZONTAL ELLIPSIS}{name[1 - length :]}"


def printable(path):
    """Bytes that are not UTF-8 become question marks: Matplotlib cannot draw them."""
    return path.encode(errors="replace").decode()


if __name__ == "__main__":
    cli(main)

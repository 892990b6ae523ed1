"""Find the person of an image among images of your own.

    python -m tools.search index FOLDER --resume save_model/..._best.t --modality visible --out INDEX
    python -m tools.search query IMAGE... --modality infrared --index INDEX
    python -m tools.search serve --index INDEX

index   embeds a folder's images, of one modality; a second call embeds what is new or changed, and drops what is gone
query   ranks the images of an index by cosine similarity to each image given
serve   the same as a local web page, which only this machine can reach

Features are those of testa.py: image and mirror averaged, FC or POOL. As a library:

    from tools.search import Embedder

    embedder = Embedder("save_model/..._best.t")  # or an .onnx of tools.export: no network of PyTorch is built then
    features = embedder(["a.jpg", "b.jpg"], "infrared")  # float32 [2, C], of unit length
"""

import base64
import contextlib
import html
import io
import json
import os
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from ChannelAug import normalise
from core import engine
from core.checkpoint import load_checkpoint
from core.files import file_sha256
from core.run import run_lock
from data_loader import FORMATS, ImageFiles, worker_options
from model import FEATURES, MODALITIES, load_network
from tools import figures
from tools.index import arrange, drop_rows, read_index, save_index
from utils import ArgumentParser, InputError, bounded, cli, progress, select_device

SAVE_MINUTES = 15  # between two saves of an index that is being made
SHEET_LIMIT = 100  # queries, and images of each, that a sheet has room for


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed a folder's images, or those that are new or changed")
    index.add_argument("folder", metavar="FOLDER", help="its images, at any depth; links to folders are not followed")
    index.add_argument("--modality", choices=MODALITIES, help="of the images (needed for a new index)")
    index.add_argument("--feature", choices=FEATURES, help="after or before the bottleneck (default: FC)")
    index.add_argument("--out", required=True, metavar="INDEX", help="folder of the index, new or old")
    index.add_argument(
        "--ivf", action="store_true", help="for millions of images: inverted lists, not quite exact, from now on"
    )
    query = commands.add_parser("query", help="rank the images of an index by their similarity to others")
    query.add_argument("images", nargs="+", metavar="IMAGE")
    query.add_argument("--modality", choices=MODALITIES, required=True, help="of these images")
    query.add_argument("--top", type=bounded(int, 1, 10**6), default=10, help="images to find")
    query.add_argument("--save", metavar="FILE", help="draw them on a sheet: .png, .svg or .pdf")
    query.add_argument("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    serve = commands.add_parser("serve", help="a web page to search with, on this machine alone")
    serve.add_argument("--port", type=bounded(int, 1, 65535), default=7860, help="of 127.0.0.1")
    for command in (index, query, serve):
        command.add_argument(
            "--resume",
            metavar="CKPT",
            help="checkpoint, or an .onnx of tools.export (default: where the index had it from)",
        )
        command.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
    serve.set_defaults(batch=64, workers=0)  # one image at a time
    for command in (query, serve):
        command.add_argument("--index", required=True, metavar="INDEX", help="folder that `index` made")
    for command in (index, query):
        command.add_argument("--batch", type=bounded(int, 1, 65536), default=64, help="images in a batch")
        command.add_argument("--workers", type=bounded(int, 0, 1024), default=4, help="loading processes, one a core")
    return parser


def main(argv=None):
    """Returns what was done or found: see `index_folder` and `query_index`. `serve` goes on until it is stopped."""
    args = get_args_parser().parse_args(argv)
    return {"index": index_folder, "query": query_index, "serve": serve_index}[args.command](args)


# ----------------------------------------------------------------------------------------------------------- embedding


class Embedder:
    """Features of image files by a checkpoint, or by an .onnx of tools.export, which embeds one modality.

    feature: "FC" or "POOL"; gpu: number of the GPU, or "cpu" (ONNX files run on the CPU); batch: images in a batch;
    workers: processes that decode images, where there is more than one batch.

    Attributes: size (height, width) of the images, dim (C), feature, modalities, and sha256 of the checkpoint's file;
    for an ONNX file, of the checkpoint that it was made from. Raises InputError for files that cannot be used.
    """

    def __init__(self, path, feature="FC", gpu="0", batch=64, workers=4):
        self.path, self.feature, self.batch, self.workers = Path(path), feature, batch, workers
        if not self.path.is_file():
            raise InputError(f"{path}: no such file; name a checkpoint, or an .onnx of tools.export")
        if self.path.suffix in (".pt", ".safetensors"):
            raise InputError(
                f"{path}: of the files of tools.export only .onnx ones are searched with; name one, or a checkpoint"
            )
        if self.path.suffix == ".onnx":
            self._load_onnx()
        else:
            self._load_checkpoint(gpu)

    def _load_checkpoint(self, gpu):
        device = select_device(gpu)
        net, self.size = load_network(load_checkpoint(self.path), self.path)
        embed = engine.network_embedding(net.to(device, memory_format=torch.channels_last), device, normalise)
        self._embed = lambda images, modality: embed(images, modality)[self.feature].cpu().numpy()
        self.dim, self.modalities = net.bottleneck.num_features, MODALITIES
        self.sha256 = file_sha256(self.path)

    def _load_onnx(self):
        import onnxruntime  # only here: a checkpoint does without it

        try:
            session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
            about = json.loads(session.get_modelmeta().custom_metadata_map["gfmnet"])
            height, width = about["image_size"]
            prepare = {"uint8": lambda images: images, "normalised": normalise}[about["input"]]
            self.size, self.sha256, self.modalities = (height, width), about["sha256"], (about["modality"],)

            def embed(images, _):
                return session.run(["features"], {"images": prepare(images).contiguous().numpy()})[0]

            self._embed = embed
            self.dim = embed(torch.zeros(1, 3, height, width, dtype=torch.uint8), None).shape[1]
            of = about["feature"]
        except Exception as error:  # onnxruntime raises anything when a file is damaged
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.path}: no ONNX file of tools.export ({type(error).__name__}: {reason}); export it again"
            ) from error
        if of != self.feature:
            raise InputError(f"{self.path}: gives {of} features, not {self.feature}; take the file of {self.feature}")

    def __call__(self, paths, modality):
        """Image files of one modality, "visible" or "infrared" -> float32 [N, C], of unit length.

        Raises InputError for a file that cannot be read.
        """
        features = np.empty((len(paths), self.dim), np.float32)
        for path in paths:
            if not os.path.isfile(path):
                what = "a folder: name its images" if os.path.isdir(path) else "no such image: name an existing one"
                raise InputError(f"{path}: {what}")
        for rows, values, unreadable in self.batches(paths, modality):
            if unreadable:
                raise InputError(unreadable[0])
            features[rows] = values
        return features

    @torch.inference_mode()
    def batches(self, paths, modality):
        """Yields, batch by batch, (rows [B], features float32 [B, C], a line on each file that cannot be read)."""
        if modality not in self.modalities:
            raise InputError(
                f"{self.path}: embeds {' and '.join(self.modalities)} images, not {modality} ones; name the .onnx file "
                "of that modality, of the same checkpoint"
            )
        # One batch is decoded here: starting a process takes longer, and the web page's threads must not fork.
        options = worker_options(self.workers if len(paths) > self.batch else 0)
        loader = DataLoader(_Images(paths, self.size), batch_size=self.batch, collate_fn=_collate, **options)
        with progress(total=len(paths), desc=f"embedding {modality}", unit="img", leave=False) as bar:
            for rows, images, unreadable in loader:
                features = self._embed(images, modality) if rows else np.empty((0, self.dim), np.float32)
                if not np.isfinite(features).all():
                    raise InputError(f"{self.path}: its {self.feature} features are not finite; train at a lower --lr")
                yield rows, features, unreadable
                bar.update(len(rows) + len(unreadable))


class _Images(ImageFiles):
    """Image files; of one that cannot be read, the line that says so."""

    def __getitem__(self, index):
        try:
            return index, super().__getitem__(index)
        except InputError as error:
            return index, str(error)


def _collate(items):
    """-> (rows, uint8 [B, 3, H, W] or None, lines on files that cannot be read)."""
    readable = [(row, image) for row, image in items if not isinstance(image, str)]
    images = default_collate([image for _, image in readable]) if readable else None
    return [row for row, _ in readable], images, [line for _, line in items if isinstance(line, str)]


# --------------------------------------------------------------------------------------------------------------- index


def index_folder(args):
    """Returns {"embedded", "changed", "vanished", "images": counts, "unreadable": lines}."""
    folder, out = Path(args.folder).resolve(), Path(args.out)
    if not folder.is_dir():
        raise InputError(f"{args.folder}: no such folder; name one with images")
    with run_lock(out / "index.json", "another --out"):
        about, vectors = {}, None
        if (out / "index.json").exists():
            about, vectors = read_index(out, mapped=False)
        elif not (args.resume and args.modality):
            raise InputError(f"{out}: there is no index yet; give --resume and --modality to make one")
        embedder = indexing_embedder(args, about, folder)

        found, unreadable, unknown = list_images(folder)
        for path, stamp in about.get("images", {}).items():
            if any(path == place or path.startswith(f"{place}{os.sep}") for place in unknown):
                found[path] = stamp  # for all we know it is still there
        if not found:
            raise InputError(f"{folder}: has no image in it; name a folder with images")
        images = about.get("images", {})
        kept = np.array([found.get(path) == stamp for path, stamp in images.items()], bool)
        changed = sum(path in found for path, keep in zip(images, kept, strict=True) if not keep)
        vanished = int((~kept).sum()) - changed
        if len(kept) and not kept.any() and str(folder) != about["folder"]:
            raise InputError(
                f"{folder}: has none of the images of {out}, whose {about['folder']} is gone; name its place"
            )
        if vectors is None:
            vectors = faiss.IndexFlatIP(embedder.dim)
        elif not kept.all():
            drop_rows(vectors, kept)
            images = {path: images[path] for path, keep in zip(images, kept, strict=True) if keep}
        new = [path for path in found if path not in images]
        places = about.get("folder"), about.get("checkpoint")
        about |= {"folder": str(folder), "modality": args.modality or about.get("modality"), "images": images}
        about |= {"feature": embedder.feature, "image_size": list(embedder.size), "dim": embedder.dim}
        if len(embedder.modalities) > 1 or not os.path.isfile(about.get("checkpoint", "")):  # an .onnx knows one only
            about |= {"checkpoint": str(embedder.path.resolve()), "sha256": embedder.sha256}

        embedded, due = 0, time.monotonic() + 60 * SAVE_MINUTES
        for rows, features, failed in embedder.batches([str(folder / path) for path in new], about["modality"]):
            vectors.add(features)
            images |= {new[row]: found[new[row]] for row in rows}
            unreadable += failed
            embedded += len(rows)
            if time.monotonic() > due:
                save_index(out, about, vectors)
                due = time.monotonic() + 60 * SAVE_MINUTES
        if not images:
            raise InputError(f"{folder}: none of its {len(found)} images can be read: {unreadable[0]}")
        arranged = arrange(vectors) if args.ivf or isinstance(vectors, faiss.IndexIVF) else vectors
        moved = places != (about["folder"], about["checkpoint"])
        if embedded or not kept.all() or arranged is not vectors or moved:
            save_index(out, about, arranged)

    for line in unreadable:
        print(f"unreadable: {shown(line)}")
    print(
        f"{out}: {len(images)} images. Embedded now: {embedded}; changed since the last call: {changed}; "
        f"gone: {vanished}; unreadable: {len(unreadable)}"
    )
    counts = {"embedded": embedded, "changed": changed, "vanished": vanished, "images": len(images)}
    return counts | {"unreadable": unreadable}


def indexing_embedder(args, about, folder):
    """The network for an index, new (about is empty) or old. InputError for flags that do not fit the old one."""
    if not about:
        return Embedder(args.resume, args.feature or "FC", args.gpu, args.batch, args.workers)
    for name in ("modality", "feature"):
        if getattr(args, name) not in (None, about[name]):
            raise InputError(f"--{name} {getattr(args, name)}: {args.out} is of {about[name]}; choose another --out")
    if str(folder) != about["folder"] and os.path.isdir(about["folder"]):  # else it was moved
        raise InputError(f"{folder}: {args.out} is of {about['folder']}; choose another --out")
    return index_embedder(args, about, args.out)


def index_embedder(args, about, index):
    """The network that an index was made with, by --resume or from where it lay."""
    path = args.resume or about["checkpoint"]
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; {index} was made with it: name its new place with --resume")
    embedder = Embedder(path, about["feature"], args.gpu, args.batch, args.workers)
    mine = embedder.sha256, list(embedder.size), embedder.dim
    if mine != (about["sha256"], about["image_size"], about["dim"]):
        raise InputError(
            f"{path}: is not of the checkpoint that {index} was made with, {about['checkpoint']} "
            f"(sha256 {about['sha256'][:12]}...); name that one with --resume, or make an index anew"
        )
    return embedder


def list_images(folder):
    """A folder's images at any depth -> ({path below it: [size, mtime_ns]}, lines on what cannot be read, paths of what
    may still be there).

    Images are the files with a suffix of FORMATS; hidden files and folders, and links to folders, are left out.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    found, unreadable, unknown = {}, [], []

    def no_listing(error):
        unreadable.append(f"{error.filename}: cannot be listed ({error.strerror})")
        unknown.append(os.path.relpath(error.filename, folder))

    for where, folders, names in os.walk(folder, onerror=no_listing):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in suffixes:
                continue
            path = os.path.join(where, name)
            try:
                status = os.stat(path)
            except OSError as error:
                unreadable.append(f"{path}: cannot be read ({error.strerror})")
                if not isinstance(error, FileNotFoundError):
                    unknown.append(os.path.relpath(path, folder))
                continue
            if stat.S_ISREG(status.st_mode):  # reading a pipe would wait
                found[os.path.relpath(path, folder)] = _stamp(status)
    return found, unreadable, unknown


def _stamp(status):
    return [status.st_size, status.st_mtime_ns]


# --------------------------------------------------------------------------------------------------------------- query


class Finder:
    """An index in use: finder(image files, modality, top) -> for each, a list of {"rank", "similarity", "path",
    "changed"}, best first. changed: the file is not the one that was indexed."""

    def __init__(self, args):
        self.about, self.vectors = read_index(args.index)
        self.embedder = index_embedder(args, self.about, args.index)
        self.paths = list(self.about["images"])

    def __call__(self, images, modality, top):
        similarities, rows = self.vectors.search(self.embedder(images, modality), min(top, len(self.paths)))
        return [
            [
                {"rank": rank, "similarity": float(similarity), **self._describe(self.paths[row])}
                for rank, (similarity, row) in enumerate(zip(*ranked, strict=True), 1)
                if row >= 0  # the lists that were searched may hold fewer
            ]
            for ranked in zip(similarities, rows, strict=True)
        ]

    def _describe(self, name):
        path = os.path.join(self.about["folder"], name)
        try:
            changed = _stamp(os.stat(path)) != self.about["images"][name]
        except OSError:
            changed = True
        return {"path": path, "changed": changed}


def query_index(args):
    """Returns a list, for each image {"query": path, "modality", "found": as `Finder` gives it}."""
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # warnings are no JSON
        finder = Finder(args)
        check_sheet(args, finder)
        found = finder(args.images, args.modality, args.top)
    results = [
        {"query": image, "modality": args.modality, "found": images}
        for image, images in zip(args.images, found, strict=True)
    ]
    if args.save:
        figures.save(draw_sheet(results, finder.about), args.save)
    if args.json:
        print(json.dumps(results, indent=1))
        return results
    for result in results:
        print(f"{shown(result['query'])} ({args.modality})")
        for image in result["found"]:
            changed = "  (changed since it was indexed)" if image["changed"] else ""
            print(f"{image['rank']:>4}  {image['similarity']:6.3f}  {shown(image['path'])}{changed}")
    if args.save:
        print(args.save)
    return results


def check_sheet(args, finder):
    """Raise InputError for a sheet that cannot be written, or would replace an image."""
    if not args.save:
        return
    figures.check_picture(args.save, "--save")
    if max(len(args.images), args.top) > SHEET_LIMIT:
        raise InputError(f"--save: a sheet has room for {SHEET_LIMIT} queries and --top {SHEET_LIMIT} at most")
    path = os.path.realpath(args.save)
    if path in map(os.path.realpath, args.images) or os.path.relpath(path, finder.about["folder"]) in finder.paths:
        raise InputError(f"--save {args.save}: is a query, or an image of the index; name another file")


def draw_sheet(results, about):
    """The results of `query_index` -> Figure: a row for each query."""
    rows = [
        [figures.Tile(result["query"], f"query\n{short_name(result['query'])}", "query")]
        + [
            figures.Tile(image["path"], f"{image['similarity']:.3f}\n{short_name(image['path'])}")
            for image in result["found"]
        ]
        for result in results
    ]
    try:
        queries, checkpoint = results[0]["modality"], os.path.basename(about["checkpoint"])
        title = f"{queries} queries in {about['modality']} images of {about['folder']}; cosine similarity; {checkpoint}"
        return figures.ranking_sheet(rows, shown(title))
    except InputError as error:
        raise InputError(f"--save: an image cannot be drawn ({error}); run index again if it has gone") from error


def short_name(path, length=16):
    """A file's name and its folder's, cut to their end."""
    name = shown(os.path.join(*Path(path).parts[-2:]))
    return name if len(name) <= length else f"\N{HORIZONTAL ELLIPSIS}{name[1 - length :]}"


# --------------------------------------------------------------------------------------------------------------- serve

STYLE = """
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem; }
.found figure { margin: 0; }
.found img { width: 100%; aspect-ratio: 1 / 2; display: block; border-radius: 4px; }
.found figcaption { font-size: 0.8rem; line-height: 1.35; overflow-wrap: anywhere; margin-top: 0.3rem; }
"""


def serve_index(args):
    """Show the page until the process is stopped."""
    finder = Finder(args)
    with tempfile.TemporaryDirectory() as uploads, socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", args.port))
            listener.listen()
        except OSError as error:
            raise InputError(f"--port {args.port}: cannot be used ({error.strerror}); choose another") from error
        # Before Gradio is imported: it asks nobody on the internet, and uploads go when the process ends.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "GRADIO_ALLOWED_PATHS": ""}
        import gradio
        import uvicorn
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        page, looks = build_page(finder)
        app = FastAPI(openapi_url=None)
        # Else a page of the internet could have its own name lead here, and read the answers.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        app = gradio.mount_gradio_app(app, page, "/", "127.0.0.1", args.port, footer_links=[], ssr_mode=False, **looks)
        print(f"http://127.0.0.1:{args.port}  (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listener])


def build_page(finder):
    """-> (gradio.Blocks, what its `launch` takes of looks). Images reach the browser as thumbnails in the page: no file
    of the disk is served."""
    import gradio

    def show(upload, modality, top):
        if upload is None:
            return "<p>The most similar images will be here.</p>"
        path, name = upload
        try:
            (found,) = finder([path], modality, top)
        except InputError as error:
            return f'<p role="alert"><b>{html.escape(str(error).replace(path, name or "the image"))}</b></p>'
        return f'<div class="found">{"".join(draw_card(image, about["folder"]) for image in found)}</div>'

    about, choices = finder.about, finder.embedder.modalities
    count, folder = len(finder.paths), html.escape(shown(about["folder"]))
    with gradio.Blocks(title="GFMNet search", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"## GFMNet search\n{count:,} {about['modality']} images of {folder}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=240):
                upload = gradio.Image(label="Image of a person", sources=["upload", "clipboard"], height=320)
                # The file as it was uploaded: `read_image` alone decodes it, and says if it cannot.
                upload.preprocess = lambda payload: payload and (payload.path, payload.orig_name)
                # The other modality than the index's, where there is a choice: that is what the network is for.
                other = next((choice for choice in choices if choice != about["modality"]), choices[0])
                modality = gradio.Radio(choices, value=other, label="Its modality")
                top = gradio.Slider(1, min(100, max(2, count)), value=min(10, count), step=1, label="Images to find")
            with gradio.Column(scale=3):
                found = gradio.HTML(show(None, None, None))
        for event in (upload.change, modality.change, top.change):
            event(show, [upload, modality, top], found, api_visibility="private", trigger_mode="always_last")
    return page, {"theme": gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]), "css": STYLE}


def draw_card(image, folder):
    """One of `Finder`'s images, as HTML: its path below the folder; the whole one where the mouse rests on it."""
    path, name = (html.escape(shown(path)) for path in (image["path"], os.path.relpath(image["path"], folder)))
    try:
        if image["changed"]:
            raise InputError("not the image that was found")
        thumbnail = io.BytesIO()
        Image.fromarray(figures.thumbnail(image["path"])).save(thumbnail, "JPEG", quality=90)
        source = base64.b64encode(thumbnail.getvalue()).decode()
        picture = f'<img src="data:image/jpeg;base64,{source}" alt="{path}">'
    except InputError:
        picture = "<p>This image has gone, or changed; run index again.</p>"
    return (
        f'<figure title="{path}">{picture}<figcaption><b>{image["rank"]}.</b> similarity '
        f"<b>{image['similarity']:.3f}</b><br>{name.replace('/', '/<wbr>')}</figcaption></figure>"
    )


def shown(path):
    """A path or line for people: what is no letter in UTF-8, or would steer a terminal, is replaced."""
    text = os.fsencode(path).decode(errors="replace")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


if __name__ == "__main__":
    cli(main)

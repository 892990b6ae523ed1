"""The web page of `tools.search serve`. No path comes from the browser: an upload becomes a file that the server names,
a folder is compared as text, and the only other files that are opened are images of the index."""

import asyncio
import hmac
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path

import uvicorn
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from drawing import figures
from drawing.report import read_template
from tools.search.finder import Finder, describe
from tools.search.labels import wall_clock
from utils import InputError, Stopped, printable, shortage

TIMELINE = 100  # images on it
UPLOADS, UPLOADED = 20, 64 * 2**20  # images of a query, and bytes of a request
CONNECTIONS, ACCEPTED = 100, 16  # at a time; those that are accepted before the surplus is closed
REQUEST_SECONDS = 120  # in which a request has to arrive, header and body
FIELDS = ("images", "camera", "from", "before", "folder")  # and those of `Page.choices`
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
HEADERS |= {"Connection": "close"}  # `Connection` has a single request
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve(args):
    """Show the page until the process is stopped."""
    finder, port = Finder(args), args.port
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as uploads, socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
            port = listener.getsockname()[1]
        except OSError as error:
            raise InputError(f"--port {port}: cannot be used ({error.strerror}); choose another") from error
        page = Page(finder, uploads, port)
        print(f"http://127.0.0.1:{port}/?token={page.token}  (Ctrl-C stops it)", flush=True)
        number = signal.SIGINT  # asyncio may take it without a word, if nothing is awaited any more
        try:
            server(page).run([listener])
        except Stopped as stop:
            number = stop.number
        except KeyboardInterrupt:
            pass
        shutil.rmtree(uploads, ignore_errors=True)
        print(f"\nserve: stopped by {number.name}", file=sys.stderr, flush=True)
        os._exit(128 + number)  # a search may still be computed, and crash when Python takes its modules away


def server(page):
    flags = {"ws": "none", "lifespan": "off", "log_level": "error", "timeout_graceful_shutdown": 1}
    return Server(uvicorn.Config(page, http=Connection, backlog=ACCEPTED, **flags))


class Server(uvicorn.Server):
    """Says once, in a line, that files have run out: asyncio would print a traceback for each connection."""

    async def serve(self, sockets=None):
        self.told = set()
        asyncio.get_running_loop().set_exception_handler(self._tell)
        await super().serve(sockets)

    def _tell(self, loop, context):
        if not (line := shortage(context.get("exception"))):
            loop.default_exception_handler(context)
        elif line not in self.told:
            print(f"serve: {line}", file=sys.stderr, flush=True)
            self.told.add(line)


class Connection(H11Protocol):
    """A connection is closed if its request has not arrived in time: the server itself would wait for ever."""

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:  # more would leave no open files to the page
            transport.abort()
        self.loop.call_later(REQUEST_SECONDS, self._end_if_late)

    def send_400_response(self, msg):
        super().send_400_response(msg)
        if self.cycle:
            self.cycle.disconnected = True  # it has been answered; a second answer would be an error

    def _end_if_late(self):
        if self.cycle is None or self.cycle.more_body:
            self.transport.abort()


class Page:
    """An ASGI application: GET / is the page, POST /search the images found, as HTML. All else is refused with a line
    of text, and everything without the token. uploads: a folder for those of the search that is computed."""

    def __init__(self, finder, uploads, port):
        self.finder, self.uploads, self.searches = finder, uploads, queue.SimpleQueue()
        self.token, self.cookie = secrets.token_urlsafe(), f"token_{port}"  # browsers send it to all ports
        self.template = read_template(Path(__file__).with_name("page.html.j2"))
        counts, cameras = finder.counts("modality"), [*filter(None, finder.counts("camera"))]
        modalities = finder.embedder.modalities
        # By default the other modality than the index's, if there is a choice.
        other = next((name for name in modalities if name not in counts), modalities[0])
        self.about = {"uri": finder.index.uri, "modalities": modalities, "other": other, "counts": counts}
        self.about |= {"cameras": cameras, "top": min(10, sum(counts.values())), "found": None}
        self.about["tracks"] = any(finder.counts("track"))
        self.choices = {"modality": modalities, "combine": ("mean", "best"), "searched": (None, "", *counts)}
        self.choices |= {"top": [*map(str, range(1, 101))], "page": [*map(str, range(1, 10**4))]}
        self.choices |= {"group": (None, "", "person", "mean", "best"), "rerank": (None, "on")}
        # One thread: the network and the index serve one search at a time. Python does not wait for a daemon when it
        # ends.
        threading.Thread(target=self._search, daemon=True).start()

    async def __call__(self, scope, receive, send):
        nonce = secrets.token_urlsafe()
        try:
            response = await self._answer(Request(scope, receive), nonce)
        except ClientDisconnect:
            return
        except (HTTPException, MultiPartException, ValueError, OSError, asyncio.CancelledError) as error:
            stopped = isinstance(error, OSError | asyncio.CancelledError)
            status = 503 if stopped else getattr(error, "status_code", 400)
            line = getattr(error, "detail", str(error) or "the server has been stopped")
            response = PlainTextResponse(" ".join(printable(line).split())[:500], status)
        response.headers.update(HEADERS | {"Content-Security-Policy": POLICY.format(nonce)})
        await response(scope, receive, send)

    async def _answer(self, request, nonce):
        # Not `request.cookies`: Python takes seconds to read some, and anybody may send them.
        cookie = re.search(rf"(?:^|;) *{self.cookie}=([\w-]*)", request.headers.get("cookie", ""))
        given = request.query_params.get("token") or (cookie[1] if cookie else "")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise HTTPException(403, "token: missing or wrong; open the address that serve has printed")
        # Otherwise a page of the internet could point its own name here and read the answers.
        host = request.headers.get("host", "")
        if host.partition(":")[0] not in ("127.0.0.1", "localhost"):
            raise HTTPException(400, f"Host {host}: is not this machine; open the address that serve has printed")
        if (origin := request.headers.get("origin", f"http://{host}")) != f"http://{host}":
            raise HTTPException(403, f"Origin {origin}: another page may not ask")
        match request.method, request.scope["path"]:
            case "GET" | "HEAD", "/":
                response = HTMLResponse(printable(self.template.render(self.about, nonce=nonce)))
                response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
                return response
            case "POST", "/search":
                return await self._found(request)
            case method, path:
                raise HTTPException(405 if path in ("/", "/search") else 404, f"{method} {path}: is not of this page")

    async def _found(self, request):
        # h11 reads no more than the length that a request gives.
        if "transfer-encoding" in request.headers or int(request.headers.get("content-length", 0)) > UPLOADED:
            raise HTTPException(413, f"images: larger than {UPLOADED >> 20} MiB together; choose fewer")
        kind = request.headers.get("content-type", "none")
        if kind.partition(";")[0] != "multipart/form-data":
            raise HTTPException(415, f"Content-Type {kind}: is not multipart/form-data")
        if "charset" in kind.lower():  # Python knows some that take minutes to decode
            raise HTTPException(415, f"Content-Type {kind}: names a charset; send UTF-8 without naming it")
        async with request.form(max_files=UPLOADS) as form:
            result = Future()
            self.searches.put((form, result))
            return HTMLResponse(await asyncio.wrap_future(result))

    def _search(self):
        while True:
            form, result = self.searches.get()
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(self.search(form))
                except Exception as error:
                    result.set_exception(InputError(line) if (line := shortage(error)) else error)

    def search(self, form):
        """The form of the page -> HTML. InputError for a field that is wrong."""
        for name, value in form.multi_items():
            if name not in (*FIELDS, *self.choices) or isinstance(value, str) == (name == "images"):
                raise InputError(f"{name}: is not such a field; reload the page")
        choice = {name: form.get(name) for name in self.choices}
        for name, value in choice.items():
            if value not in self.choices[name]:
                raise InputError(f"{name} {value}: is not among the choices; reload the page")
        page, top, names = int(choice["page"]), int(choice["top"]), {}
        options = {name: choice[name] or None for name in ("modality", "combine", "rerank", "group")}
        # As text: what the disk has under that name stays unknown.
        below = os.path.abspath(form["folder"]) if form.get("folder") else None
        kept = os.path.isdir(self.uploads)  # some machines clean /tmp
        with tempfile.TemporaryDirectory(dir=self.uploads if kept else None) as folder:
            for number, upload in enumerate(form.getlist("images")):
                path = Path(folder, f"{number}.upload")
                path.write_bytes(upload.file.read())
                names[str(path)] = upload.filename or "the image"
            if not names:
                raise InputError("images: none; choose at least one")
            try:
                times = form.get("from"), form.get("before")
                where = self.finder.read_filter(form.getlist("camera"), choice["searched"], *times, below)
                (found,) = self.finder(list(names), top=max(page * top, TIMELINE), where=where, **options)
            except InputError as error:
                line = str(error).replace("--to ", "before ").removeprefix("--")  # as the form names them
                for path, name in names.items():
                    line = line.replace(path, name)
                raise InputError(line) from error
        page = min(page, -(-len(found) // top))
        shown = found[(page - 1) * top : page * top]
        cards = [(image, picture(image), [*map(picture, image.get("strip", ()))]) for image in shown]
        values = timeline(found[:TIMELINE]) | {"found": cards, "page": page, "describe": describe}
        # An order that is not by similarity has no line.
        values["least"] = -1 if choice["rerank"] else self.finder.least
        return printable(self.template.render(values))


def picture(image):
    """One of `Finder`'s images as a data URI, or None if it is no longer the one that was indexed."""
    try:
        return None if image["changed"] else figures.data_uri(image["path"])
    except InputError:
        return None


def timeline(found):
    """-> {"cameras": names, "ends": first and last time, "dots": [(image, place and shade from 0 to 1, number of its
    camera)], the best last}. Times are those of the index, whatever zone the browser has."""
    times = [datetime.fromisoformat(wall_clock(image["time"])) for image in found]
    cameras = [image["camera"] or "unknown" for image in found]
    names = sorted(set(cameras))
    places, shades = scaled(times), scaled([image["similarity"] for image in found])
    dots = [*zip(found, places, shades, map(names.index, cameras), strict=True)]
    return {"cameras": names, "ends": (min(times), max(times)), "dots": sorted(dots, key=lambda dot: dot[2])}


def scaled(values):
    """Numbers or times -> numbers from 0, the least, to 1."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]

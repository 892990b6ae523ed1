"""The web page of `tools.search serve`, made with Gradio."""

import hmac
import html
import json
import os
import secrets
import socket
import tempfile
import threading
from datetime import datetime
from pathlib import Path

from tools import figures
from tools.finder import Finder, describe, printable
from utils import InputError

TIMELINE = 100  # images on it
STOP_SECONDS = 4  # after a signal, what has not ended by then is broken off
STYLE = """
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem; }
.found figure { margin: 0; }
.found img { width: 100%; aspect-ratio: 1 / 2; display: block; border-radius: 4px; }
.found figcaption { font-size: 0.8rem; line-height: 1.35; overflow-wrap: anywhere; margin-top: 0.3rem; }
"""


def serve(args):
    """Show the page until the process is stopped."""
    finder, port = Finder(args), args.port
    with tempfile.TemporaryDirectory() as uploads, socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
            port = listener.getsockname()[1]
        except OSError as error:
            raise InputError(f"--port {port}: cannot be used ({error.strerror}); choose another") from error
        # Before Gradio is imported: it must not contact its makers, and uploads must go when the process ends.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "GRADIO_ALLOWED_PATHS": ""}
        import gradio
        import uvicorn
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        class Server(uvicorn.Server):
            def handle_exit(self, number, frame):
                timer = threading.Timer(STOP_SECONDS, os._exit, [128 + number])  # if a request does not end
                timer.daemon = True
                timer.start()
                super().handle_exit(number, frame)

        page, looks = build_page(finder)
        app = FastAPI(openapi_url=None)
        # Otherwise a page of the internet could point its own name here and read the answers.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        app = gradio.mount_gradio_app(app, page, "/", "127.0.0.1", port, footer_links=[], ssr_mode=False, **looks)
        token = secrets.token_urlsafe()
        print(f"http://127.0.0.1:{port}/?token={token}  (Ctrl-C stops it)", flush=True)
        config = uvicorn.Config(
            Guard(app, token, port, Path(uploads).resolve()), log_level="warning", timeout_graceful_shutdown=1
        )
        Server(config).run([listener])


class Guard:
    """An ASGI application between the port and the page.

    The port is open to all users of the machine, so only who knows the token gets an answer: from the page's address
    at first, then from a cookie. Gradio copies any file that a request names to where it can be read, and waits for a
    pipe, so requests that name anything but an upload end here.
    """

    def __init__(self, app, token, port, uploads):
        self.app, self.token, self.cookie, self.uploads = app, token.encode(), f"gfmnet_{port}", uploads

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        from starlette.requests import HTTPConnection, Request
        from starlette.responses import PlainTextResponse
        from starlette.websockets import WebSocketClose

        connection, answer = HTTPConnection(scope), send
        if hmac.compare_digest(connection.query_params.get("token", "").encode(), self.token):
            cookie = f"{self.cookie}={self.token.decode()}; HttpOnly; SameSite=Strict; Path=/"

            async def answer(message):
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"set-cookie", cookie.encode())]
                await send(message)

        elif not hmac.compare_digest(connection.cookies.get(self.cookie, "").encode(), self.token):
            text = "open the address that tools.search serve has printed, with its token\n"
            refusal = WebSocketClose() if scope["type"] == "websocket" else PlainTextResponse(text, 403)
            return await refusal(scope, receive, send)
        if connection.headers.get("content-type", "").startswith("multipart/form-data"):  # an upload: it names no file
            return await self.app(scope, receive, answer)
        if scope["type"] == "http" and (body := await Request(scope, receive).body()):
            if not self.names_uploads_only(body):
                return await PlainTextResponse("not an upload\n", 400)(scope, receive, send)
            return await self.app(scope, replay(body, receive), answer)
        return await self.app(scope, receive, answer)

    def names_uploads_only(self, body):
        """Whether every "path" in a body is that of an upload; False for what is not JSON."""
        try:
            values = [json.loads(body)]
        except (ValueError, RecursionError):
            return False
        while values:
            value = values.pop()
            if isinstance(value, dict):
                if isinstance(path := value.get("path"), str) and not self.is_upload(path):
                    return False
                values += value.values()
            elif isinstance(value, list):
                values += value
        return True

    def is_upload(self, path):
        real = Path(os.path.realpath(path.replace("\0", "")))
        return real.is_relative_to(self.uploads) and real.is_file()


def replay(body, receive):
    """An ASGI `receive` for a request whose body has been read."""
    messages = [{"type": "http.request", "body": body}]

    async def receive_again():
        return messages.pop() if messages else await receive()

    return receive_again


def build_page(finder):
    """-> (gradio.Blocks, its theme and CSS). Images reach the browser as thumbnails in the page: no file on disk is
    served."""
    import gradio

    def show(page, uploads, modality, combine, top, group, rerank, *filters):
        """Returns the page's number, the images as HTML, and the hundred best for the timeline."""
        if not uploads:
            return 1, "<p>The most similar images will appear here.</p>", timeline([])
        names = {path: name or "the image" for path, name in uploads}
        options = {"combine": combine, "rerank": rerank, "group": group}
        try:
            options["where"] = finder.read_filter(*filters)
            (found,) = finder(list(names), modality, max(page * top, TIMELINE), **options)
        except InputError as error:
            line = str(error).removeprefix("--")
            for path, name in names.items():
                line = line.replace(path, name)
            return page, f'<p role="alert"><b>{html.escape(line)}</b></p>', timeline([])
        page = max(1, min(page, -(-len(found) // top)))
        cards = "".join(map(draw_card, found[(page - 1) * top : page * top]))
        return page, f'<div class="found">{cards}</div>', timeline(found[:TIMELINE])

    choices, counts = finder.embedder.modalities, finder.counts("modality")
    total = sum(counts.values())
    images = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    with gradio.Blocks(title="GFMNet search", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"## GFMNet search\n{images} images in {html.escape(printable(finder.index.uri))}")
        number = gradio.State(1)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=240):
                upload = gradio.Gallery(
                    label="Images of one person", file_types=["image"], height=220, object_fit="contain"
                )
                # The files as they were uploaded: only `read_image` decodes them, and reports if it cannot.
                upload.preprocess = lambda payload: [
                    (file.image.path, file.image.orig_name) for file in (payload.root if payload else ())
                ]
                # By default the other modality than the index's, if there is a choice.
                other = next((choice for choice in choices if choice not in counts), choices[0])
                modality = gradio.Radio(choices, value=other, label="Their modality")
                combine = gradio.Radio(("mean", "best"), value="mean", label="Several images: mean feature or best")
                cameras = [name for name in finder.counts("camera") if name]
                camera = gradio.Dropdown(cameras, multiselect=True, label="Cameras", visible=bool(cameras))
                searched = gradio.Radio([("both", ""), *counts], value="", label="Search", visible=len(counts) > 1)
                start = gradio.DateTime(label="From", type="string")
                end = gradio.DateTime(label="Before", type="string")
                folder = gradio.Textbox(label="Folder", placeholder="all")
                group = gradio.Checkbox(label="Each known person once")
                rerank = gradio.Checkbox(label="Re-rank the hundred best")
                top = gradio.Slider(1, min(100, max(2, total)), value=min(10, total), step=1, label="Images per page")
            with gradio.Column(scale=3):
                result = gradio.HTML("<p>The most similar images will appear here.</p>")
                with gradio.Row():
                    back, forth = gradio.Button("Previous page"), gradio.Button("Next page")
                times = gradio.ScatterPlot(
                    timeline([]), x="time", y="camera", color="similarity", title="When and where"
                )
        inputs = [upload, modality, combine, top, group, rerank, camera, searched, start, end, folder]
        flags = {"outputs": [number, result, times], "api_visibility": "private", "trigger_mode": "always_last"}
        flags |= {"concurrency_id": "search", "concurrency_limit": 1}
        changes = [getattr(item, "submit" if item is folder else "change") for item in inputs]
        gradio.on(changes, lambda *values: show(1, *values), inputs, **flags)
        back.click(lambda page, *values: show(page - 1, *values), [number, *inputs], **flags)
        forth.click(lambda page, *values: show(page + 1, *values), [number, *inputs], **flags)
    return page, {"theme": gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]), "css": STYLE}


def timeline(found):
    """The time and camera of images, for the plot."""
    import pandas

    rows = []
    for image in found:
        # The plot takes UTC and shows the browser's zone, which is this machine's.
        time = pandas.Timestamp(datetime.fromisoformat(image["time"]).timestamp(), unit="s")
        rows.append((time, image["camera"] or "unknown", image["similarity"]))
    return pandas.DataFrame(rows, columns=["time", "camera", "similarity"])


def draw_card(image):
    """One of `Finder`'s images as HTML: what is known of it, and its path as a tooltip."""
    path, name = html.escape(image["path"]), html.escape(os.path.join(*Path(image["path"]).parts[-2:]))
    try:
        if image["changed"]:
            raise InputError("not the image that was indexed")
        picture = f'<img src="{figures.data_uri(image["path"])}" alt="{path}">'
    except InputError:
        picture = "<p>This image has changed or no longer exists; run index again.</p>"
    return (
        f'<figure title="{path}">{picture}<figcaption><b>{image["rank"]}.</b> similarity '
        f"<b>{image['similarity']:.3f}</b><br>{html.escape(describe(image))}<br>{name.replace('/', '/<wbr>')}"
        "</figcaption></figure>"
    )

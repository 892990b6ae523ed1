"""The web page of `tools.search serve`, made with Gradio."""

import base64
import html
import io
import os
import socket
import tempfile

from PIL import Image

from tools import figures
from utils import InputError

STYLE = """
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem; }
.found figure { margin: 0; }
.found img { width: 100%; aspect-ratio: 1 / 2; display: block; border-radius: 4px; }
.found figcaption { font-size: 0.8rem; line-height: 1.35; overflow-wrap: anywhere; margin-top: 0.3rem; }
"""


def serve(finder, port):
    """Show the page until the process is stopped."""
    with tempfile.TemporaryDirectory() as uploads, socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError as error:
            raise InputError(f"--port {port}: cannot be used ({error.strerror}); choose another") from error
        # Before Gradio is imported: it must not contact its makers, and uploads must go when the process ends.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "GRADIO_ALLOWED_PATHS": ""}
        import gradio
        import uvicorn
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        page, looks = build_page(finder)
        app = FastAPI(openapi_url=None)
        # Otherwise a page of the internet could point its own name here and read the answers.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        app = gradio.mount_gradio_app(app, page, "/", "127.0.0.1", port, footer_links=[], ssr_mode=False, **looks)
        print(f"http://127.0.0.1:{port}  (Ctrl-C stops it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listener])


def build_page(finder):
    """-> (gradio.Blocks, its theme and CSS). Images reach the browser as thumbnails in the page: no file on disk is
    served."""
    import gradio

    def show(upload, modality, top):
        if upload is None:
            return "<p>The most similar images will appear here.</p>"
        path, name = upload
        try:
            (images,) = finder([path], modality, top)
        except InputError as error:
            return f'<p role="alert"><b>{html.escape(str(error).replace(path, name or "the image"))}</b></p>'
        return f'<div class="found">{"".join(draw_card(image, about["folder"]) for image in images)}</div>'

    about, choices = finder.about, finder.embedder.modalities
    count = len(finder.paths)
    with gradio.Blocks(title="GFMNet search", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"## GFMNet search\n{count:,} {about['modality']} images of {_text(about['folder'])}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=240):
                upload = gradio.Image(label="Image of a person", sources=["upload", "clipboard"], height=320)
                # The file as it was uploaded: only `read_image` decodes it, and reports if it cannot.
                upload.preprocess = lambda payload: payload and (payload.path, payload.orig_name)
                # By default the other modality than the index's, if there is a choice.
                other = next((choice for choice in choices if choice != about["modality"]), choices[0])
                modality = gradio.Radio(choices, value=other, label="Its modality")
                top = gradio.Slider(1, min(100, max(2, count)), value=min(10, count), step=1, label="Images to find")
            with gradio.Column(scale=3):
                result = gradio.HTML(show(None, None, None))
        for event in (upload.change, modality.change, top.change):
            event(show, [upload, modality, top], result, api_visibility="private", trigger_mode="always_last")
    return page, {"theme": gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]), "css": STYLE}


def draw_card(image, folder):
    """One of `Finder`'s images as HTML: its path below the folder, and the whole path as a tooltip."""
    path, name = _text(image["path"]), _text(os.path.relpath(image["path"], folder))
    try:
        if image["changed"]:
            raise InputError("not the image that was indexed")
        thumbnail = io.BytesIO()
        Image.fromarray(figures.thumbnail(image["path"])).save(thumbnail, "JPEG", quality=90)
        source = base64.b64encode(thumbnail.getvalue()).decode()
        picture = f'<img src="data:image/jpeg;base64,{source}" alt="{path}">'
    except InputError:
        picture = "<p>This image has changed or no longer exists; run index again.</p>"
    return (
        f'<figure title="{path}">{picture}<figcaption><b>{image["rank"]}.</b> similarity '
        f"<b>{image['similarity']:.3f}</b><br>{name.replace('/', '/<wbr>')}</figcaption></figure>"
    )


def _text(path):
    """A path as HTML text; bytes that are not UTF-8, which JSON cannot hold, become question marks."""
    return html.escape(path.encode(errors="replace").decode())

"""The page of `tools.search serve`: what it finds, what it refuses, how it ends, and its use in a browser."""

import contextlib
import errno
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest

import utils
from conftest import save_network
from drawing import figures
from tests.oracles import plain_embedding
from tools import embedder
from tools.search import __main__ as search
from tools.search import page as search_page
from tools.search.finder import Finder

REPO = Path(utils.__file__).parent
SEARCH_IN_FLOAT32 = """
from tools import embedder
from tools.search import __main__ as search
embedder.computes_bf16 = lambda device: False
"""
SEARCH_FOR_EVER = """
import torch
def search_for_ever(*_):
    print("searching", flush=True)
    while True:
        torch.rand(500, 500) @ torch.rand(500, 500)
embedder.Embedder.__call__ = search_for_ever
"""
FORM = {"modality": "infrared", "combine": "mean", "top": "10", "page": "1"}


@pytest.fixture(scope="module")
def site(sysu_tree, tmp_path_factory):
    """An index of 14 visible images of two folders, with cameras, tracks and times, and its query images."""
    place = tmp_path_factory.mktemp("site")
    gallery = []
    for number, source in enumerate(sorted(sysu_tree.glob("cam[12]/*/*.jpg"))[:14]):
        name = "<b>&${value}{{value}}" if number == 0 else f"{number:02d}"  # a name is text, whatever is in it
        path = place / "images" / "ab"[number % 2] / f"{name}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
        os.utime(path, (10**9, 10**9 + 3000 * number**2))
        gallery.append(path)
    checkpoint, index = save_network(place / "net.t", seed=0), place / "index.db"
    flags = ["--resume", str(checkpoint), "--modality", "visible", "--pattern", "{camera}/{person}.JPG"]
    flags += ["--tracks", "folder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedder, "computes_bf16", lambda device: False)
        search.main(["index", str(place / "images"), "--index", str(index), "--gpu", "cpu", "--workers", "0", *flags])
    queries = sorted(sysu_tree.glob("cam3/*/*.jpg"))[:3]
    return SimpleNamespace(index=index, checkpoint=checkpoint, gallery=gallery, queries=queries)


@pytest.fixture(scope="module")
def running(site, tmp_path_factory):
    """The page on a port of this process -> port, token, uploads (a folder), finder."""
    uploads, listener = tmp_path_factory.mktemp("uploads"), socket.create_server(("127.0.0.1", 0))
    args = search.get_args_parser().parse_args(["serve", "--index", str(site.index), "--gpu", "cpu"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedder, "computes_bf16", lambda device: False)
        finder = Finder(args)
    port = listener.getsockname()[1]
    page = search_page.Page(finder, str(uploads), port)
    server = search_page.server(page)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield SimpleNamespace(port=port, token=page.token, uploads=uploads, finder=finder)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def multipart(fields, uploads=(), kind="multipart/form-data; boundary=xyz"):
    """Pairs (name, text) and (name, file name, bytes) -> (body, headers)."""
    parts = [(f'name="{name}"', str(text).encode()) for name, text in fields]
    parts += [(f'name="{name}"; filename="{file}"', content) for name, file, content in uploads]
    body = b"".join(
        f"--xyz\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode() + content + b"\r\n"
        for about, content in parts
    )
    return body + b"--xyz--\r\n", {"Content-Type": kind}


def ask(running, method, path, body=None, headers=(), cookie=True):
    """-> (status, text, headers) of a request, by default with the page's cookie."""
    cookie = {"Cookie": f"token_{running.port}={running.token}"} if cookie else {}
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, cookie | dict(headers))
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: token_%d=%s\r\nContent-Length: 999\r\n"
        b"Content-Type: multipart/form-data; boundary=xyz\r\n\r\n"
        b'--xyz\r\nContent-Disposition: form-data; name="camera"\r\n\r\n',
    ],
    ids=["header", "body"],
)
def test_a_client_that_sends_byte_by_byte_is_cut_off(start, running, monkeypatch):
    monkeypatch.setattr(search_page, "REQUEST_SECONDS", 0.5)
    start = start.replace(b"%d", str(running.port).encode()).replace(b"%s", running.token.encode())
    with socket.create_connection(("127.0.0.1", running.port), timeout=0.05) as client:
        client.sendall(start)
        begun, answer = time.monotonic(), None
        while answer is None and time.monotonic() - begun < 5:
            with contextlib.suppress(TimeoutError):
                answer = client.recv(100)
                break
            with contextlib.suppress(OSError):
                client.sendall(b"-")
    assert answer == b""
    assert 0.4 < time.monotonic() - begun < 3
    assert ask(running, "GET", "/")[0] == 200


def ask_search(running, paths, more=(), **changes):
    """A search as the browser sends it."""
    fields = [*(FORM | changes).items(), *more]
    return ask(running, "POST", "/search", *multipart(fields, [("images", p.name, p.read_bytes()) for p in paths]))[:2]


def cards(text):
    """[(rank, similarity, path)] of an answer."""
    found = re.findall(r'<figure title="(.*?)">.*?<b>(\d+)\.</b> similarity <b>(.*?)</b>', text, re.DOTALL)
    return [(int(rank), float(similarity), unescape(path)) for path, rank, similarity in found]


def check_cards(answer, site, scores, chosen, first=1):
    """That an answer shows `chosen`, a list of rows of the gallery, with their scores."""
    status, text = answer
    assert status == 200, text
    expected = [(rank, round(float(scores[row]), 3), str(site.gallery[row])) for rank, row in enumerate(chosen, first)]
    assert cards(text) == expected
    assert text.count('<img src="data:image/jpeg;base64,') == len(expected)


def test_the_page_finds_what_a_plain_loop_finds(running, site):
    embed = plain_embedding(site.checkpoint)
    features = np.stack([embed(path, "visible") for path in site.gallery])
    queries = np.stack([embed(path, "infrared") for path in site.queries])
    cameras = np.array([path.parent.name for path in site.gallery])
    scores = features @ queries[0]
    ranked = [int(row) for row in np.argsort(-scores)]
    one = site.queries[:1]
    check_cards(ask_search(running, one), site, scores, ranked[:10])
    check_cards(ask_search(running, one, page="2"), site, scores, ranked[10:], 11)
    check_cards(ask_search(running, one, page="9999"), site, scores, ranked[10:], 11)  # there is no such page
    check_cards(ask_search(running, one, top="3", page="2"), site, scores, ranked[3:6], 4)
    of_b = [row for row in ranked if cameras[row] == "b"]
    check_cards(ask_search(running, one, [("camera", "b")]), site, scores, of_b)
    check_cards(ask_search(running, one, folder=site.gallery[1].parent), site, scores, of_b)
    check_cards(ask_search(running, one, [("camera", "a"), ("camera", "b")]), site, scores, ranked[:10])
    stamp = time.strftime("%Y-%m-%dT%H:%M", time.localtime(site.gallery[7].stat().st_mtime))
    later = [row for row in ranked if site.gallery[row].stat().st_mtime > 10**9 + 3000 * 6**2]
    check_cards(ask_search(running, one, [("from", stamp)]), site, scores, later)
    check_cards(ask_search(running, one, [("before", stamp)]), site, scores, [r for r in ranked if r not in later])
    mean = queries.mean(axis=0) / np.linalg.norm(queries.mean(axis=0))
    check_cards(ask_search(running, site.queries), site, features @ mean, np.argsort(-features @ mean)[:10])
    best = (features @ queries.T).max(axis=1)
    check_cards(ask_search(running, site.queries, combine="best"), site, best, np.argsort(-best)[:10])
    scores = features @ embed(site.queries[0], "visible")
    check_cards(ask_search(running, one, modality="visible"), site, scores, np.argsort(-scores)[:10])


def test_a_line_parts_the_images_that_may_be_the_same_person_from_others(running, site, monkeypatch):
    _, text = ask_search(running, site.queries[:1])
    assert "From here on" not in text
    scores = [similarity for _, similarity, _ in cards(text)]
    monkeypatch.setattr(running.finder, "least", (scores[3] + scores[4]) / 2)
    status, text = ask_search(running, site.queries[:1])
    assert (status, text.count("From here on")) == (200, 1)
    above, below = text.split("From here on")
    assert [len(cards(part)) for part in (above, below)] == [4, 6]
    assert f"below {running.finder.least:.3f}" in text
    assert "From here on" not in ask_search(running, site.queries[:1], rerank="on")[1]
    monkeypatch.setattr(running.finder, "least", -1)
    assert "From here on" not in ask_search(running, site.queries[:1])[1]


def plain_tracks(site, features, query):
    """[(similarity of the mean feature, rows of the gallery)] of the two tracks, best first."""
    tracks = []
    for camera in "ab":
        rows = [row for row, path in enumerate(site.gallery) if path.parent.name == camera]
        mean = features[rows].mean(axis=0)
        tracks.append((float(mean @ query / np.linalg.norm(mean)), rows))
    return sorted(tracks, reverse=True)


def test_a_track_is_one_card_with_a_strip(running, site):
    embed = plain_embedding(site.checkpoint)
    features = np.stack([embed(path, "visible") for path in site.gallery])
    query = embed(site.queries[0], "infrared")
    expected = [
        (rank, round(similarity, 3), str(site.gallery[max(rows, key=lambda row: features[row] @ query)]))
        for rank, (similarity, rows) in enumerate(plain_tracks(site, features, query), 1)
    ]
    status, text = ask_search(running, site.queries[:1], group="mean")
    assert (status, cards(text)) == (200, expected)
    for part, (_, _, path) in zip(text.split("<figure")[1:], expected, strict=True):
        camera = Path(path).parent.name
        rows = [row for row, place in enumerate(site.gallery) if place.parent.name == camera]
        first, last = (time.strftime("%F %T", time.localtime(10**9 + 3000 * rows[i] ** 2)) for i in (0, -1))
        assert re.search(rf"camera {camera}, person .*, track {camera}, 7 images, {first}\S+ to {last}\S+<br>", part)
        strip = re.search(r'<div class="strip">(.*?)</div>', part)[1]
        shown = [0, 1, 2, 4, 5, 6]  # of seven, evenly
        assert re.findall('src="(.*?)"', strip) == [figures.data_uri(site.gallery[rows[i]]) for i in shown]
    assert "the 2 most similar tracks" in text
    best = ask_search(running, site.queries[:1], group="best", top="1")[1]
    assert cards(best) == cards(ask_search(running, site.queries[:1], top="1")[1])
    assert len(cards(ask_search(running, site.queries[:1], [("camera", "b")], group="mean")[1])) == 1
    answer = ask_search(running, site.queries[:1], group="mean", rerank="on")
    assert answer == (400, "rerank orders images, not means of tracks; pass --tracks best, or leave it out")


@pytest.mark.parametrize("gone", [False, True])
def test_an_image_that_is_no_longer_the_indexed_one_is_not_shown(gone, running, site):
    path, stat = site.gallery[3], site.gallery[3].stat()
    content = path.read_bytes()
    try:
        path.unlink() if gone else path.write_bytes(content + b"more")
        status, text = ask_search(running, site.queries[:1], top="14")
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (status, len(cards(text))) == (200, 14)
    (figure,) = re.findall(rf'<figure title="{re.escape(str(path))}">.*?</figure>', text, re.DOTALL)
    assert "This image has changed or no longer exists; run index again." in figure
    assert "<img" not in figure
    assert text.count("<img") == 13


def test_the_timeline_has_the_times_of_the_index(running, site, monkeypatch):
    """Also where clocks are put forward between two of them, and where local time is far from UTC."""
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    times = ["2026-09-26 23:00:00", "2026-09-27 01:00:00+12:00", "2026-09-27 04:00:00+13:00", "2026-09-27 07:00:00"]
    found = [
        {"time": text, "camera": camera, "similarity": similarity}
        for text, camera, similarity in zip(times, ["2", None, "2", "1"], [0.75, 0.5, 1.0, 0.5], strict=True)
    ]
    drawn = search_page.timeline(found)
    monkeypatch.undo()
    time.tzset()
    assert [str(end) for end in drawn["ends"]] == [times[0], times[-1]]
    assert drawn["cameras"] == ["1", "2", "unknown"]
    dots = {image["time"]: rest for image, *rest in drawn["dots"]}
    assert dots == {times[0]: [0, 0.5, 1], times[1]: [0.25, 0, 2], times[2]: [0.625, 1, 1], times[3]: [1, 0, 0]}
    assert drawn["dots"][-1][0] is found[2]  # the best is drawn over the others

    status, text = ask_search(running, site.queries[:1])
    local = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(10**9 + 3000 * number**2)) for number in range(14)]
    expression = r'<circle cx="(.*?)" cy="(.*?)".*?<title>.*?(\d{4}-\d\d-\d\d \S+)[+-]\d\d:\d\d</title>'
    dots = {stamp: (float(x), int(y)) for x, y, stamp in re.findall(expression, text)}
    assert dots == {
        stamp: (pytest.approx(160 + 620 * number**2 / 13**2, abs=0.06), 15 + 30 * (number % 2))
        for number, stamp in enumerate(local)
    }
    assert re.findall(r"<text x.*?>(\d{4}.*?)</text>", text) == [local[0], local[-1]]


def test_everything_needs_the_token(running, monkeypatch):
    def fails(*_):
        raise AssertionError("was asked")

    for name in ("_found", "template"):
        monkeypatch.setattr(search_page.Page, name, fails, raising=False)
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "a"}
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        for path in ("/", "/search", "/etc/passwd", "/?token=", "/?token=%00%ff%ed%a0%80", "/?token=" + "a" * 43):
            for headers in (
                {},
                upgrade,
                {"Cookie": f"token_{running.port}=wrong"},
                {"Cookie": f"token={running.token}; token_{running.port}=\xff"},
                {"Authorization": f"token {running.token}", "Host": "evil.example", "Origin": "http://evil.example"},
            ):
                status, text, answered = ask(running, method, path, None, headers, cookie=False)
                assert (status, answered["set-cookie"]) == (403, None)
                assert method == "HEAD" or text.startswith("token: missing or wrong; open the address")
    # A wrong one in the address counts, whatever the cookie is.
    assert ask(running, "GET", f"/?token={running.token}x")[0] == 403


def test_the_token_becomes_a_cookie_and_the_page_runs_no_other_script(running):
    status, text, headers = ask(running, "GET", f"/?token={running.token}", cookie=False)
    assert status == 200
    assert headers["set-cookie"] == f"token_{running.port}={running.token}; HttpOnly; Path=/; SameSite=strict"
    assert ask(running, "GET", "/")[0] == 200
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    nonce = re.fullmatch(r"'nonce-(\S{43})'", rules["script-src"])[1]
    assert rules == {
        **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
        **dict.fromkeys(("script-src", "style-src"), f"'nonce-{nonce}'"),
        "img-src": "data: blob:",
        "connect-src": "'self'",
    }
    assert re.findall(r"<(?:script|style).*?>", text) == [f'<{tag} nonce="{nonce}">' for tag in ("style", "script")]
    assert nonce not in ask(running, "GET", "/")[1]
    assert not re.search(r"https?:|//\w|style=|\son\w+=|running.token", text)
    assert running.token not in text


def test_other_hosts_and_origins_are_refused(running):
    for headers, status in (
        ({"Host": "evil.example"}, 400),
        ({"Host": f"evil.example:{running.port}"}, 400),
        ({"Host": "[::1"}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://127.0.0.1:{running.port + 1}"}, 403),  # another page of this machine
        ({"Origin": f"http://127.0.0.1:{running.port}"}, 200),
        ({"Host": f"localhost:{running.port}"}, 200),
    ):
        assert ask(running, "GET", "/", None, headers)[0] == status, headers


@pytest.fixture(scope="module")
def opened():
    """A list that gets the names of all files and folders that Python opens, lists, links or copies."""
    names = []

    def note(event, arguments):
        if event in ("open", "os.listdir", "os.scandir", "os.link", "os.symlink", "os.rename", "shutil.copyfile"):
            names.extend(str(name) for name in arguments[:1] if not isinstance(name, int))  # not what is open already

    sys.addaudithook(note)
    return names


def test_no_request_names_a_file(running, site, opened, tmp_path):
    """Paths, pipes, devices and addresses in every field, and as every kind of request."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_text("the secret")
    image, (good, kind) = site.queries[0].read_bytes(), multipart(FORM.items())
    names = [tmp_path / "secret", tmp_path / "pipe", site.queries[0], site.index, "/dev/zero", "/proc/self/environ"]
    names += ["file:///etc/passwd", "http://127.0.0.1:1/x", "../" * 9 + "etc/passwd", running.uploads, "0.upload", "\0"]
    requests = [(method, "/search", good, kind) for method in ("GET", "HEAD", "PUT", "OPTIONS", "DELETE", "TRACE")]
    requests += [("POST", "/", good, kind), ("POST", "/search", None, {}), ("POST", "/search", good, {})]
    requests += [("POST", "/search", good[:-9], kind), ("POST", "/search", b"--xyz", kind)]
    requests += [("POST", "/search", good, {"Content-Type": "multipart/form-data"})]
    requests += [("POST", "/search", b'{"images": "/etc/passwd"}', {"Content-Type": "application/json"})]
    for name in names:
        quoted = quote(str(name), "")
        requests += [("GET", f"/{quoted}", None, {}), ("GET", f"/gradio_api/file={quoted}", None, {})]
        requests += [("GET", f"/search?images={quoted}&folder={quoted}", None, {})]
        encoded = {"Content-Type": "application/x-www-form-urlencoded"}
        requests += [("POST", "/search", f"images={quoted}&modality=infrared".encode(), encoded)]
        requests += [("POST", "/search", *multipart([*FORM.items(), ("images", name)]))]
        requests += [("POST", "/search", *multipart(FORM.items(), [("images", name, str(name).encode())]))]
        for field in (*FORM, "searched", "group", "rerank", "camera", "from", "before", "folder", "index", "path"):
            fields = [*(FORM | {field: name}).items()]
            requests += [("POST", "/search", *multipart(fields, [("images", "a.jpg", image)]))]
            fields = [pair for pair in FORM.items() if pair[0] != field]
            requests += [("POST", "/search", *multipart(fields, [("images", "a", image), (field, str(name), image)]))]
    opened.clear()
    for request in requests:
        status, text, _ = ask(running, *request)
        assert status in (400, 404, 405, 413, 415), (request, text[:200])
        assert "\n" not in text
        assert len(text) <= 500
        assert "the secret" not in text
    others = [name for name in opened if not name.startswith((str(running.uploads), str(site.index)))]
    assert [name for name in others if not name.endswith(".pyc")] == []  # Python's own modules
    assert opened  # uploads
    assert [*running.uploads.iterdir()] == []


def test_a_name_of_an_upload_is_only_text(running, site, opened, tmp_path):
    image = site.queries[0].read_bytes()
    expected = cards(ask_search(running, site.queries[:1])[1])
    (tmp_path / "secret").write_text("the secret")
    opened.clear()
    for name in (tmp_path / "secret", "../../x.jpg", "", "\udcff<b>", "C:\\\\x"):
        body = multipart(FORM.items(), [("images", str(name).encode(errors="replace").decode(), image)])
        status, text, _ = ask(running, "POST", "/search", *body)
        assert (status, cards(text)) == (200, expected)
    shown = [path for _, _, path in expected]
    assert {name for name in opened if not name.startswith((str(running.uploads), str(site.index)))} <= {*shown}
    assert (tmp_path / "secret").read_text() == "the secret"


def test_errors_name_the_fields_of_the_form(running, site):
    for start, end, text in (
        ("2026-11-21", "2026-11-20", "from 2026-11-21 before 2026-11-20: leave no time between; exchange them"),
        ("noon", "", "from noon: is not a time; write it as 2026-11-20 or 2026-11-20T14:30"),
        ("", "noon", "before noon: is not a time; write it as 2026-11-20 or 2026-11-20T14:30"),
    ):
        assert ask_search(running, site.queries[:1], **{"from": start}, before=end) == (400, text)


def test_a_folder_is_compared_as_text(running, site, tmp_path):
    """What a link of the disk points to cannot be asked."""
    (tmp_path / "link").symlink_to(site.gallery[1].parent)
    answer = ask_search(running, site.queries[:1], folder=tmp_path / "link")
    assert answer == (400, f"{site.index}: none of its images fits all filters; leave one out")


@pytest.mark.parametrize("part", ["zz", "-1", "5\r\nab"])
def test_what_is_no_http_writes_nothing_on_the_terminal(part, running, caplog):
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{part}\r\n".encode())
        assert client.recv(99).startswith((b"HTTP/1.1 400", b"HTTP/1.1 403"))
        while client.recv(999):
            pass
    assert not caplog.records


def test_an_error_names_the_upload_in_one_line(running, site):
    body = multipart(FORM.items(), [("images", "b.jpg", b"no image")])
    status, text, _ = ask(running, "POST", "/search", *body)
    assert status == 400
    assert text == "b.jpg: cannot be read as an image (cannot identify image file); replace or remove it"
    # Charsets that give characters which no answer can hold, or take minutes; a line break; and what is too long.
    for charset in ("utf-7", "punycode", "undefined"):
        kind = f"multipart/form-data; boundary=xyz; Charset={charset}"
        body = multipart([*FORM.items(), ("folder", "a-b")], [("images", "a", b"a")], kind)
        status, text, _ = ask(running, "POST", "/search", *body)
        assert (status, text) == (415, f"Content-Type {kind}: names a charset; send UTF-8 without naming it")
    for text in ("a\nb", "a" * 10**5):
        status, answer = ask_search(running, site.queries[:1], [("from", text)])
        assert (status, answer[:6], "\n" in answer, len(answer) <= 500) == (400, "from a", False, True)


def test_it_searches_on_when_somebody_cleans_the_folder_of_uploads(running, site):
    shutil.rmtree(running.uploads)
    assert ask_search(running, site.queries[:1])[0] == 200
    running.uploads.mkdir()


def test_what_the_disk_refuses_is_one_line(running, site, monkeypatch):
    def full(self, content):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert ask_search(running, [SimpleNamespace(name="a", read_bytes=lambda: b"a")])[0] == 503


def test_the_token_in_a_cookie_is_all_that_is_read_of_cookies(running, monkeypatch):
    """Python's own reader takes seconds for some values, which anybody may send."""
    monkeypatch.setattr("http.cookies._unquote", lambda text: pytest.fail("reads cookies"))
    odd = {"Cookie": 'a="' + "\\0" * 9 + '"'}
    assert ask(running, "GET", "/", headers=odd, cookie=False)[0] == 403
    assert ask(running, "GET", "/")[0] == 200


def test_idle_connections_leave_room_for_others(running, monkeypatch):
    monkeypatch.setattr(search_page, "CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 20)) for _ in range(9)]
        closed = 0
        for one in idle[-5:]:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
            closed += 1
        assert closed == 5
    assert ask(running, "GET", "/")[0] == 200


def test_requests_are_limited(running, site):
    image = site.queries[0].read_bytes()
    kind = multipart([])[1]
    status, text, _ = ask(running, "POST", "/search", None, kind | {"Content-Length": str(65 * 2**20)})
    assert (status, text) == (413, "images: larger than 64 MiB together; choose fewer")
    assert ask(running, "POST", "/search", iter([b"a"]), kind | {"Transfer-Encoding": "chunked"})[0] == 413
    both = kind | {"Transfer-Encoding": "chunked", "Content-Length": "1"}
    assert ask(running, "POST", "/search", iter([b"0\r\n\r\n"]), both)[0] == 413
    assert ask_search(running, site.queries[:1] * 20)[0] == 200
    assert ask_search(running, site.queries[:1] * 21) == (400, "Too many files. Maximum number of files is 20.")
    assert ask_search(running, site.queries[:1], [("camera", "a" * 2**21)])[0] == 400
    assert ask_search(running, site.queries[:1], [("camera", "a")] * 1001)[0] == 400
    assert ask(running, "POST", "/search", *multipart(FORM.items(), [("images", "a", image)]))[0] == 200


def start_upload(running, image):
    """A connection on which half of an upload has been sent, and the other half."""
    body, headers = multipart(FORM.items(), [("images", "a.jpg", image)])
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    lines = ["POST /search HTTP/1.1", f"Host: 127.0.0.1:{running.port}", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {headers['Content-Type']}", f"Cookie: token_{running.port}={running.token}"]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2])
    return connection, body[len(body) // 2 :]


def test_a_slow_upload_and_a_long_search_stop_nobody(running, site, monkeypatch):
    image = site.queries[0].read_bytes()
    slow, rest = start_upload(running, image)
    abandoned, _ = start_upload(running, image)
    abandoned.close()
    assert ask_search(running, site.queries[:1])[0] == 200  # another's, meanwhile

    begun, free = threading.Event(), threading.Event()
    embed = embedder.Embedder.__call__

    def waits(*arguments):
        begun.set()
        assert free.wait(20)
        return embed(*arguments)

    monkeypatch.setattr(embedder.Embedder, "__call__", waits)
    answers = []
    other = threading.Thread(target=lambda: answers.append(ask_search(running, site.queries[:1])))
    other.start()
    assert begun.wait(20)
    before = time.monotonic()
    assert ask(running, "GET", "/")[0] == 200
    assert ask(running, "GET", "/", cookie=False)[0] == 403
    assert ask(running, "POST", "/search", None, {"Content-Type": "text/plain"})[0] == 415
    slow.sendall(rest)  # is taken, and its search waits
    assert time.monotonic() - before < 5
    assert answers == []
    free.set()
    other.join(20)
    assert answers[0][0] == 200
    assert slow.recv(100).startswith(b"HTTP/1.1 200")
    slow.close()


# ---------------------------------------------------------------------------------------------------- as a process


@contextlib.contextmanager
def served(index, code="", stop=signal.SIGTERM, **options):
    """tools.search serve as a process -> port, token, and its stdout; after the block, which a signal follows, the
    errors."""
    command = [sys.executable, "-c", f"{SEARCH_IN_FLOAT32}{code}\nsearch.cli(search.main)"]
    command += ["serve", "--index", str(index), "--port", "0", "--gpu", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPO, **pipes, **options) as process:
        timer = threading.Timer(600, process.kill)
        timer.start()
        try:
            address = re.match(r"http://127.0.0.1:(\d+)/\?token=(\S{43})  ", process.stdout.readline())
            assert address, process.communicate()[1]
            yield (server := SimpleNamespace(port=int(address[1]), token=address[2], lines=process.stdout))
            process.send_signal(stop)
            server.errors = process.communicate(timeout=5)[1]
        finally:
            timer.cancel()
            process.kill()
    assert process.returncode == 128 + stop
    assert "Traceback" not in server.errors
    assert server.errors.endswith(f"stopped by {stop.name}\n")


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_while_it_searches(site, tmp_path, stop):
    with served(site.index, SEARCH_FOR_EVER, stop, env=os.environ | {"TMPDIR": str(tmp_path)}) as server:
        upload, _ = start_upload(server, site.queries[0].read_bytes())
        for _ in range(2):  # one is searched for, one waits, and one is not complete
            connection, rest = start_upload(server, site.queries[0].read_bytes())
            connection.sendall(rest)
        assert server.lines.readline() == "searching\n"
        idle = socket.create_connection(("127.0.0.1", server.port))
    assert connection.recv(100).startswith(b"HTTP/1.1 503")
    for end in (upload, connection, idle):
        end.close()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (24, r"serve: too many files are open \(OSError: Too many open files\); raise the limit: ulimit -n 4096\n"),
        pytest.param(256, "", marks=pytest.mark.slow),  # that of macOS
    ],
)
def test_many_connections_fill_no_log(limit, expected, site):
    limited = f"\nimport resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))"
    with served(site.index, limited) as server:
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                for _ in range(2 * limit):
                    client = stack.enter_context(socket.socket())
                    client.setblocking(False)
                    client.connect_ex(("127.0.0.1", server.port))
                time.sleep(0.5)
        assert ask(server, "GET", "/")[0] == 200
    assert re.fullmatch(expected + "\nserve: stopped by SIGTERM\n", server.errors)


# ------------------------------------------------------------------------------------------------------- in a browser


def listening(port):
    """Local addresses, in hexadecimal, of the sockets that listen on a port."""
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]


@pytest.mark.slow
def test_the_page_in_a_browser(site, browser):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    embed = plain_embedding(site.checkpoint)
    features = np.stack([embed(path, "visible") for path in site.gallery])
    with served(site.index) as server:
        assert listening(server.port) == ["0100007F"]
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/?token={server.token}")
        page.goto(f"http://127.0.0.1:{server.port}")  # the cookie
        shown = page.locator(".found figure")
        expect(page.get_by_text("The most similar images will appear here.")).to_be_visible()

        def expect_cards(scores, rows, first=1):
            expect(page.locator(".found b").nth(1)).to_have_text(f"{scores[rows[0]]:.3f}")
            expect(shown).to_have_count(len(rows))
            for rank, row in enumerate(rows, first):
                text = shown.nth(rank - first).inner_text()
                assert text.startswith(f"{rank}. similarity {scores[row]:.3f}\n")
                assert text.strip().endswith("/".join(site.gallery[row].parts[-2:]))

        page.set_input_files("input[type=file]", site.queries[0])
        for modality in ("visible", "infrared"):
            page.get_by_label(modality).first.check()
            scores = features @ embed(site.queries[0], modality)
            expect_cards(scores, np.argsort(-scores)[:10])
        loaded = "every(image => image.complete && image.naturalWidth)"
        assert page.evaluate(f"[...document.querySelectorAll('.found img, #queries img')].{loaded}")
        page.get_by_role("button", name="Next page").click()
        expect_cards(scores, np.argsort(-scores)[10:], 11)
        page.get_by_role("button", name="Previous page").click()
        expect_cards(scores, np.argsort(-scores)[:10])

        page.get_by_label("Show").select_option("mean")
        expect(page.locator(".found figure .strip img")).to_have_count(12)  # of two tracks
        for card, (similarity, _) in zip(
            shown.all(), plain_tracks(site, features, embed(site.queries[0], "infrared")), strict=True
        ):
            assert f"similarity {similarity:.3f}\n" in card.inner_text()
            assert "7 images" in card.inner_text()
        assert page.evaluate(f"[...document.querySelectorAll('.found img')].{loaded}")
        page.get_by_label("Show").select_option("")
        expect_cards(scores, np.argsort(-scores)[:10])

        page.get_by_label("Cameras").select_option("b")
        of_camera = [row for row in np.argsort(-scores) if site.gallery[row].parent.name == "b"]
        expect_cards(scores, of_camera)
        expect(page.get_by_role("img", name="When and where").locator("circle")).to_have_count(len(of_camera))
        page.get_by_label("Folder").fill(str(site.gallery[0].parent))
        page.get_by_label("Folder").press("Enter")
        expect(page.get_by_role("alert")).to_have_text(
            f"{site.index}: none of its images fits all filters; leave one out"
        )
        assert shown.count() == 0
        upload = {"name": "b.jpg", "mimeType": "image/jpeg", "buffer": b"no image"}
        page.get_by_label("Folder").fill("")
        page.set_input_files("input[type=file]", upload)
        expect(page.get_by_role("alert")).to_have_text(
            re.compile(r"^b\.jpg: cannot be read as an image \(cannot identify image file\)")
        )
        refused = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
        assert {*complaints} <= {refused}
        page.close()
    asked = {url.split("/")[2] for url in requests if not url.startswith(("data:", "blob:"))}
    assert asked == {f"127.0.0.1:{server.port}"}

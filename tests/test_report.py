"""The page of results: what stands in it, and what it does in a browser."""

import io
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tools import report
from utils import InputError

METRICS = ("Rank-1", "Rank-5", "Rank-10", "Rank-20", "mAP", "mINP")
HOSTILE = '<img src=x onerror=alert(1)>&"'
CAPTIONS = ("Matching by rank", 'Precision, "id" <b>')
VOID = {"meta", "link", "br", "input", "img"}


def result(number, mode, model, feature, trials=10):
    """A row as `engine.summarise` makes it; its numbers differ from those of other rows and are in no order."""
    mean = {name: (37.123 * (number + 1) * (k + 1)) % 100 for k, name in enumerate(METRICS)}
    count = {"queries": 200, "evaluated": 181 if mode == "indoor" else 200, "gallery": 55 if mode == "indoor" else 1040}
    where = {"checkpoint": "runs/best.t", "network": "resnet18, adp"}
    return {
        "dataset": "sysu",
        "split": "test",
        "mode": mode,
        "direction": "infrared to visible",
        "protocol": "seeded",
        "shots": 1,
        "similarity": "cosine",
        "cmc_counts": "identities",
        "unseen": "camera 2 by queries of camera 3",
        "model": model,
        "feature": feature,
        "flip_averaging": {"pixels": False, "FC": True, "POOL": None}[feature],
        "reranking": "none",
        "selection": None if feature == "pixels" else "val",
        "images": f"/data/{HOSTILE}",
        "demo": True,
        "trials": list(range(trials)),
        "mean": mean,
        "std": {name: value / 30 for name, value in mean.items()} if trials > 1 else None,
        "per_trial": [{"trial": t, **where, **count, "metrics": mean} for t in range(trials)],
    }


MODELS = [("gray pixels", "pixels"), ("</script>", "FC"), ("trained", "POOL"), ("trained", "FC")]
RESULTS = [result(i, mode, *model) for i, (mode, model) in enumerate(itertools.product(("all", "indoor"), MODELS))]
SETTINGS = {
    "Flags of this test": {"all": True, "rerank": [], "resume": HOSTILE},
    "Versions": {"Python": "3.11.2", "PyTorch": "2.11.0"},
}


def figure(color):
    drawn = Figure(figsize=(4, 3))
    panel = drawn.subplots()
    panel.plot([1, 2, 3], [2, 1, 3], color=color, marker="o", label="trained & tested")
    panel.set(xlabel="rank 'one' id=\"x\"")
    panel.legend()
    return drawn


@pytest.fixture(scope="session")
def crops(tmp_path_factory):
    """Images of plain colours, in a folder of a hostile name."""
    folder = tmp_path_factory.mktemp("crops") / HOSTILE
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (40, 90), (20 * i, 250 - 20 * i, 90)).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="session")
def rankings(crops):
    """Nine queries of two cameras and three identities; gallery images come again and again."""
    return [
        {
            "path": str(crops[i % 4]),
            "id": (7, 12, 100)[i % 3],
            "camera": (3, 6)[i % 2],
            "modality": "infrared",
            "average_precision": 0.05 + i / 17,
            "first_match": (i * 4) % 9 + 1,
            "gallery": [
                {
                    "path": str(crops[4 + (i + k) % 8]),
                    "id": 30 + k,
                    "camera": 1 + k % 2,
                    "similarity": 0.912 - k / 37 - i / 100,
                    "correct": (i + k) % 4 == 0,
                }
                for k in range(10 - i)
            ],
        }
        for i in range(9)
    ]


def write(path, rankings, results=RESULTS, figures=True):
    drawn = dict(zip(CAPTIONS, map(figure, ("#0072B2", "black")), strict=True)) if figures else {}
    title = "GFMNet <on> demo data"
    report.write_page(path, title, results, rankings, "all-search, trial 0, FC", drawn, SETTINGS)
    return path.read_text()


@pytest.fixture(scope="session")
def path(tmp_path_factory, rankings):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(path, rankings)
    return path


class Outline(HTMLParser):
    """Checks that elements are closed in order, and keeps the text and the attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), tag
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data.strip())


def test_every_value_stands_in_the_page(path, rankings):
    page = Outline(path.read_text())
    texts = Counter(page.texts)
    for row in RESULTS:
        assert all(texts[f"{value:.2f}"] for value in row["mean"].values())
        assert all(texts[f"±\u00a0{value:.2f}"] for value in row["std"].values())
        for name in ("mode", "model", "feature", "direction", "protocol", "similarity", "unseen", "images"):
            assert texts[row[name]], name
    said = ["200", "181", "1040", "55", "yes", "no", "unknown", "val", "–", "10", "demo data like SYSU-MM01"]
    said += ["runs/best.t (resnet18, adp)", HOSTILE, "3.11.2", "2.11.0", "trained & tested", *CAPTIONS]
    assert [value for value in said if not texts[value]] == []
    for query in rankings:
        assert texts[f"Identity {query['id']}, camera {query['camera']}"]
        assert texts[f"{100 * query['average_precision']:.1f} %"]
        for image in query["gallery"]:
            assert texts[f"id {image['id']}, cam {image['camera']}"]
            assert texts[f"{image['similarity']:.3f}"]
    judged = Counter(image["correct"] for query in rankings for image in query["gallery"])
    assert (texts["✓"], texts["×"]) == (judged[True], judged[False])


def test_ids_are_unique_and_references_meet_them(path):
    page = Outline(path.read_text())
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values()) == 1
    values = [value for _, attrs in page.tags for value in attrs.values() if value]
    wanted = {ref for value in values for ref in re.findall(r"^#([\w-]+)|url\(#([\w-]+)\)", value)}
    wanted = {"".join(ref) for ref in wanted}
    assert len(wanted) > 10
    assert wanted <= set(ids)


def test_the_page_is_one_file_with_each_image_once(path, rankings):
    text = path.read_text()
    files = {image["path"] for query in rankings for image in (query, *query["gallery"])}
    assert text.count("data:image/jpeg") == len(files) == len(set(re.findall('data:image/jpeg[^"]+', text)))
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    assert list(path.parent.iterdir()) == [path]
    page = Outline(text)
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert all(link.startswith(("#", "data:")) for link in links)


def test_names_from_outside_are_text(path):
    page = Outline(path.read_text())
    assert {tag for tag, _ in page.tags if tag in ("img", "b")} == {"b"}
    assert [name for _, attrs in page.tags for name in attrs if name.startswith("on")] == []
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    stored = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL)
    assert json.loads(stored[1]) == {"settings": SETTINGS, "results": RESULTS}


def test_figures_take_the_pages_colours(path):
    text = path.read_text()
    drawings = re.findall(r"<figure>\s*<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert not re.search("#000000|#ffffff|<style|<metadata", drawing)
        assert "stroke: currentColor" in drawing
        assert ">rank 'one' id=\"x\"<" in drawing
    assert "var(--correct)" in drawings[0]
    names = [
        attrs.get("aria-label") for tag, attrs in Outline(text).tags if tag == "svg" and attrs.get("role") == "img"
    ]
    assert names[:2] == list(CAPTIONS)
    assert None not in names


def test_the_best_of_each_protocol_is_marked(path):
    marked = [float(value) for value in re.findall(r'class="number best" data-value="([\d.]+)"', path.read_text())]
    modes = [[row["mean"] for row in RESULTS if row["mode"] == mode] for mode in ("all", "indoor")]
    best = [max(mean[name] for mean in means) for means in modes for name in METRICS]
    assert sorted(marked) == sorted(best)


def test_equal_to_two_decimals_is_equally_good():
    assert report.is_best(50.001, [50.004, 20.0])
    assert not report.is_best(50.001, [50.01])
    assert not report.is_best(50.0, [])


def test_a_single_row_without_figures_and_images(tmp_path):
    text = write(tmp_path / "a.html", [], [result(0, "all", "trained", "FC", trials=1)], figures=False)
    page = Outline(text)
    assert "trial 0" in page.texts
    assert "±" not in "".join(page.texts).replace("Mean ± standard", "")
    assert "best" not in re.findall(r'class="number( best)?"', text)
    assert {attrs.get("id") for _, attrs in page.tags}.isdisjoint({"figures", "queries"})


def test_the_same_results_make_the_same_page(path, rankings, tmp_path):
    assert write(tmp_path / "again.html", rankings) == path.read_text()


def test_missing_images_leave_the_old_page(path, rankings, tmp_path):
    old = tmp_path / "old.html"
    old.write_text("old")
    lost = [rankings[0] | {"path": str(tmp_path / "lost.png")}]
    with pytest.raises(InputError, match=r"lost\.png: no such image"):
        write(old, lost)
    (tmp_path / "lost.png").write_text("no image")
    with pytest.raises(InputError, match=r"lost\.png: cannot be read as an image"):
        write(old, lost)
    assert old.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def open_page(browser, path):
    """open_page(file, **options of a context) -> page; at the end, nothing has been complained of or asked for."""
    contexts, heard = [], []

    def open_one(file=path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append(dialog.message))
        page.on("request", lambda r: heard.append(r.url) if not r.url.startswith(("data:", file.as_uri())) else None)
        page.goto(file.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert heard == []


def cells(page, column):
    """Texts of a column of the table, from top to bottom; those that are filtered away are not there."""
    heads = page.locator("#results thead th").all_inner_texts()
    return page.locator(f"#results tbody tr:visible > :nth-child({heads.index(column) + 1})").all_inner_texts()


def sorter(page, column):
    return page.locator("#results thead").get_by_role("button", name=column, exact=True)


def shown(page):
    """(camera, identity, average precision) of the queries that show, from top to bottom."""
    return page.eval_on_selector_all(
        "#list > li:not([hidden])", "all => all.map(({dataset: d}) => [+d.camera, +d.identity, +d.average])"
    )


def labels(queries):
    return [[query["camera"], query["id"], query["average_precision"]] for query in queries]


def test_images_show(open_page, rankings):
    page = open_page()
    files = {image["path"] for query in rankings for image in (query, *query["gallery"])}
    sizes = page.evaluate(
        """() => Promise.all([...document.querySelectorAll(".sprite image")].map(async (image) => {
            const copy = new Image();
            copy.src = image.href.baseVal;
            await copy.decode();
            return [copy.naturalHeight, copy.naturalWidth];
        }))"""
    )
    assert sizes == [list(report.CROP)] * len(files)
    for tile, image in [(0, rankings[0]), (3, rankings[0]["gallery"][2])]:
        assert_pixel(page.locator(".query").first.locator(".picture").nth(tile), image["path"])


def assert_pixel(picture, file):
    """The middle of what a picture shows is the colour of its file."""
    with Image.open(io.BytesIO(picture.screenshot())) as seen, Image.open(file) as wanted:
        middle = seen.convert("RGB").getpixel((seen.width // 2, seen.height // 2))
        pair = zip(middle, wanted.getpixel((0, 0)), strict=True)
        assert all(abs(a - b) < 6 for a, b in pair)


def test_sorting_by_every_column(open_page):
    page = open_page()
    for column in page.locator("#results thead th").all_inner_texts():
        before = cells(page, column)
        number = column in (*METRICS, "with a match", "gallery")
        key = (lambda text: float(text.split()[0])) if number else str
        head = sorter(page, column)
        for turn in range(2):
            head.click()
            down = turn != (column in METRICS)
            assert cells(page, column) == sorted(before, key=key, reverse=down), column
            assert page.locator("#results [aria-sort]").all_inner_texts() == [column]
            wanted = "descending" if down else "ascending"
            assert page.locator("#results [aria-sort]").get_attribute("aria-sort") == wanted


def test_sorting_keeps_whole_rows_and_the_order_of_equals(open_page):
    page = open_page()
    sorter(page, "mAP").click()
    sorter(page, "mode").click()
    rows = sorted(sorted(RESULTS, key=lambda row: -row["mean"]["mAP"]), key=lambda row: row["mode"])
    for column, name in (("mode", "mode"), ("model", "model"), ("feature", "feature")):
        assert cells(page, column) == [row[name] for row in rows]


def test_rows_are_filtered_by_words(open_page):
    page = open_page()
    page.locator("#words").fill("INDOOR  fc")
    assert set(zip(cells(page, "mode"), cells(page, "feature"), strict=True)) == {("indoor", "FC")}
    assert page.locator("#row-count").inner_text() == "2 of 8 rows"
    page.locator("#words").fill("infrared pixels")  # words that all rows have in common are found, too
    assert cells(page, "feature") == ["pixels", "pixels"]
    page.locator("#words").fill("nobody")
    assert cells(page, "feature") == []
    assert page.locator("#row-count").inner_text().startswith("No row fits")


def test_queries_are_filtered_and_sorted(open_page, rankings):
    page = open_page()
    assert shown(page) == labels(rankings)
    assert page.locator("#query-count").inner_text() == "9 of 9 queries"
    assert page.locator("#camera option").all_inner_texts() == ["all", "3 (5)", "6 (4)"]
    assert page.locator("#identity option").all_inner_texts() == ["all", "7 (3)", "12 (3)", "100 (3)"]
    page.locator("#order").select_option("latest first match")
    assert shown(page) == labels(sorted(rankings, key=lambda query: -query["first_match"]))
    page.locator("#camera").select_option("3")
    page.locator("#order").select_option("identity")
    assert shown(page) == labels(sorted((q for q in rankings if q["camera"] == 3), key=lambda query: query["id"]))
    page.locator("#identity").select_option("12")
    both = [query for query in rankings if (query["camera"], query["id"]) == (3, 12)]
    assert shown(page) == labels(both)
    assert page.locator("#query-count").inner_text() == f"{len(both)} of 9 queries"


def test_no_query_fits(browser, open_page, rankings, tmp_path):
    write(tmp_path / "two.html", rankings[:2])
    page = open_page(tmp_path / "two.html")
    page.locator("#camera").select_option(str(rankings[0]["camera"]))
    page.locator("#identity").select_option(str(rankings[1]["id"]))
    assert shown(page) == []
    assert page.locator("#query-count").inner_text().startswith("No query fits")


FOCUSED = "(({id, innerText, className}) => id || innerText.trim() || className)(document.activeElement)"


def test_the_keyboard_alone_reaches_and_operates_everything(open_page, rankings):
    page = open_page()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        reached.append(page.evaluate(FOCUSED))
        assert outline != "none", reached[-1]
        if reached[-1] == "Settings" and "order" in reached:
            break
    heads = page.locator("#results thead th").all_inner_texts()
    assert reached[:6] == ["Skip to the results", "Results", "Figures", "Queries", "Settings", "theme"]
    assert reached[6] == "words"
    assert reached[8 : 8 + len(heads)] == heads  # after the table's scroller
    rows = [f"Identity {query['id']}, camera {query['camera']}" for query in rankings]
    assert reached[8 + len(heads) :] == ["camera", "identity", "order", *rows, "Settings"]

    page.keyboard.press("Enter")
    assert page.locator("details").get_attribute("open") is not None
    page.locator("#results thead button").last.focus()
    page.keyboard.press("Enter")
    assert page.locator("#results [aria-sort=descending]").inner_text() == METRICS[-1]

    page.locator("h3 button").first.focus()
    for key, place in (("j", 1), ("ArrowDown", 2), ("k", 1), ("ArrowUp", 0), ("j", 1)):
        page.keyboard.press(key)
        assert page.evaluate(FOCUSED) == rows[place]
    page.keyboard.press("Enter")
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    assert page.evaluate(FOCUSED) == "close"
    for key, place in (("ArrowRight", 2), ("j", 3), ("ArrowLeft", 2)):
        page.keyboard.press(key)
        assert dialog.locator("h3").inner_text() == dialog.get_attribute("aria-label") == rows[place]
        assert dialog.locator("output").inner_text() == f"{place + 1} of 9"
    assert dialog.locator(".picture").count() == 1 + len(rankings[2]["gallery"])
    assert dialog.locator(".path").first.inner_text().endswith(f"{HOSTILE}/{Path(rankings[2]['path']).name}")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.locator("h3 button:focus", has_text=rows[2]).wait_for()


def test_the_mouse_enlarges_and_goes_round(open_page, rankings):
    page = open_page()
    page.locator(".query .picture").first.click()
    dialog = page.locator("dialog")
    width = page.locator("#list .picture").first.bounding_box()["width"]
    assert dialog.locator(".picture").first.bounding_box()["width"] > 1.3 * width
    page.locator("#previous").click()
    assert dialog.locator("output").inner_text() == "9 of 9"
    page.locator("#next").click()
    assert dialog.locator("output").inner_text() == "1 of 9"
    page.locator("#close").click()
    assert not dialog.is_visible()


def luminance(rgb):
    linear = [value / 255 / 12.92 if value <= 10.3 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in rgb]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(page, selector, name="color", behind=None):
    """WCAG's contrast ratio of an element's colour with the first opaque background behind it."""
    pair = page.evaluate(
        """([selector, name, behind]) => {
            const element = document.querySelector(selector);
            let back = behind ? document.querySelector(behind) : element;
            while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
            return [getComputedStyle(element)[name], getComputedStyle(back).backgroundColor];
        }""",
        [selector, name, behind],
    )
    light, dark = sorted((luminance([float(v) for v in re.findall(r"[\d.]+", c)[:3]]) for c in pair), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("toggled", [False, True])
def test_contrast(open_page, scheme, toggled):
    page = open_page(color_scheme={"light": "dark", "dark": "light"}[scheme] if toggled else scheme)
    if toggled:
        page.locator("#theme").click()
    assert page.locator("#theme").get_attribute("aria-pressed") == str(scheme == "dark").lower()
    back = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    texts = "h1 h2 h3 .note dt dd label output button select input figcaption th td small summary .bar>a .head>p"
    texts = [*texts.split(), "tbody th", ".tile p", ".tile p span", ".path", "figure svg text"]
    ratios = {selector: contrast(page, selector, "fill" if "svg" in selector else "color") for selector in texts}
    assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}
    shapes = {name: contrast(page, name, "borderTopColor", "html") for name in (".correct svg", ".wrong svg", "select")}
    assert {name: ratio for name, ratio in shapes.items() if ratio < 3} == {}
    assert min(contrast(page, ".correct .mark"), contrast(page, ".wrong .mark")) > 3
    assert page.locator(".wrong .picture").first.evaluate("e => getComputedStyle(e).borderTopStyle") == "dashed"


def test_the_theme_follows_the_system(open_page):
    page = open_page(color_scheme="light")
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("#theme[aria-pressed=true]")


def test_reduced_motion(open_page):
    behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
    assert open_page(reduced_motion="reduce").evaluate(behaviour) == "auto"
    assert open_page(reduced_motion="no-preference").evaluate(behaviour) == "smooth"


@pytest.mark.parametrize("width", [320, 400, 1360])
def test_no_page_is_wider_than_its_screen(open_page, width):
    page = open_page(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    scroller = page.locator(".scroller").evaluate("e => e.scrollWidth > e.clientWidth")
    assert scroller == (width < 1000)
    page.locator("h3 button").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("dialog").evaluate("e => e.scrollWidth <= e.clientWidth")


@pytest.mark.parametrize(("landscape", "width"), [(False, 703), (True, 1031)])  # of A4 less 12 mm at each side, in px
def test_print(open_page, landscape, width):
    page = open_page(color_scheme="dark", viewport={"width": width, "height": 1000})
    pdf = page.pdf(format="A4", landscape=landscape)
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 7
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(":is(.bar, .controls, dialog, input, select):visible").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("details td").first.is_visible()
    assert page.locator(".query").first.evaluate("e => getComputedStyle(e).breakInside") == "avoid"


def test_without_javascript(open_page, rankings):
    page = open_page(java_script_enabled=False)
    assert page.locator("#results tbody tr:visible").count() == len(RESULTS)
    assert page.locator(".picture:visible").count() == sum(1 + len(query["gallery"]) for query in rankings)
    assert_pixel(page.locator(".query").first.locator(".picture").first, rankings[0]["path"])
    assert page.locator("button:visible, input:visible, select:visible").count() == 0

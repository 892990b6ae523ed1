"""The page of results: its content, and its behaviour in a browser."""

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

from conftest import result_row
from drawing import figures, report
from testing.results import is_best
from utils import InputError

METRICS = ("Rank-1", "Rank-5", "Rank-10", "Rank-20", "mAP", "mINP")
HOSTILE = '<img src=x onerror=alert(1)>&"'
CAPTIONS = ("Matching by rank", 'Precision, "id" <b>')
VOID = {"meta", "link", "br", "input", "img"}


def result(number, mode, model, feature, trials=10):
    """A row as `summarise` makes it; its numbers differ from those of other rows and are in no order."""
    mean = {name: (37.123 * (number + 1) * (k + 1)) % 100 for k, name in enumerate(METRICS)}
    count = {"queries": 200, "evaluated": 181 if mode == "indoor" else 200, "gallery": 55 if mode == "indoor" else 1040}
    where = {"checkpoint": "runs/best.t", "network": "resnet18, adp", "chance": 3.25}
    return result_row(
        mode=mode,
        model=model,
        feature=feature,
        flip_averaging={"pixels": False, "FC": True, "POOL": None}[feature],
        selection=None if feature == "pixels" else "val",
        images=f"/data/{HOSTILE}",
        demo=True,
        trials=list(range(trials)),
        mean=mean,
        std={name: value / 30 for name, value in mean.items()} if trials > 1 else None,
        per_trial=[{"trial": t, **where, **count, "metrics": mean} for t in range(trials)],
    )


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


def write(path, rankings, results=RESULTS, plots=True):
    plots = dict(zip(CAPTIONS, map(figure, ("#0072B2", "black")), strict=True)) if plots else {}
    title = "GFMNet <on> demo data"
    report.write_page(path, title, results, rankings, "all-search, trial 0, FC", plots, SETTINGS)
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
    first = f"{37.123 * 2:.1f} % of 200 infrared queries have an image of their person in first place (Rank-1)."
    said += [first, f"Beside it: gray pixels 37.1, trained {37.123 * 4 % 100:.1f}, chance 3.2."]
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
    assert is_best(50.001, [50.004, 20.0])
    assert not is_best(50.001, [50.01])
    assert not is_best(50.0, [])


def test_a_single_row_without_figures_and_images(tmp_path):
    text = write(tmp_path / "a.html", [], [result(0, "all", "trained", "FC", trials=1)], plots=False)
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


@pytest.fixture(scope="module")
def tab(browser, path):
    """The page, opened once; at the end, the browser has reported no error and asked for no other file."""
    page, reports = browser.new_page(), []
    page.on("console", lambda message: reports.append(message.text))
    page.on("pageerror", lambda error: reports.append(str(error)))
    page.on("dialog", lambda dialog: reports.append(dialog.message))
    page.on("request", lambda r: reports.append(r.url) if not r.url.startswith(("data:", path.as_uri())) else None)
    page.goto(path.as_uri())
    yield page
    page.close()
    assert reports == []


@pytest.fixture
def page(tab):
    """The page as it opens."""
    tab.reload()
    return tab


def cells(page, column):
    """Texts of a column of the table, without filtered rows."""
    heads = page.locator("#results thead th").all_inner_texts()
    return page.locator(f"#results tbody tr:visible > :nth-child({heads.index(column) + 1})").all_inner_texts()


def sorter(page, column):
    return page.locator("#results thead").get_by_role("button", name=column, exact=True)


def listed(page):
    """(camera, identity, average precision) of the queries, without filtered ones."""
    return page.eval_on_selector_all(
        "#list > li:not([hidden])", "all => all.map(({dataset: d}) => [+d.camera, +d.identity, +d.average])"
    )


def labels(queries):
    return [[query["camera"], query["id"], query["average_precision"]] for query in queries]


def test_every_image_is_drawn(page, rankings):
    files = {image["path"] for query in rankings for image in (query, *query["gallery"])}
    sizes = page.evaluate(
        """() => Promise.all([...document.querySelectorAll(".sprite image")].map(async (image) => {
            const copy = new Image();
            copy.src = image.href.baseVal;
            await copy.decode();
            return [copy.naturalHeight, copy.naturalWidth];
        }))"""
    )
    assert sizes == [list(figures.CROP)] * len(files)
    for tile, image in [(0, rankings[0]), (3, rankings[0]["gallery"][2])]:
        assert_pixel(page.locator(".query").first.locator(".picture").nth(tile), image["path"])


def assert_pixel(picture, file):
    """The middle of a picture has the colour of its file."""
    with Image.open(io.BytesIO(picture.screenshot())) as screenshot, Image.open(file) as image:
        middle = screenshot.convert("RGB").getpixel((screenshot.width // 2, screenshot.height // 2))
        assert all(abs(a - b) < 6 for a, b in zip(middle, image.getpixel((0, 0)), strict=True))


def test_sorting_by_every_column(page):
    for column in page.locator("#results thead th").all_inner_texts():
        before = cells(page, column)
        number = column in (*METRICS, "with a match", "gallery")
        key = (lambda text: float(text.split()[0])) if number else str
        for turn in range(2):
            sorter(page, column).click()
            descending = turn != (column in METRICS)
            assert cells(page, column) == sorted(before, key=key, reverse=descending), column
            head = page.locator("#results [aria-sort]")
            assert head.all_inner_texts() == [column]
            assert head.get_attribute("aria-sort") == ("descending" if descending else "ascending")
    sorter(page, "mAP").click()  # equal rows of the next column keep this order
    sorter(page, "mode").click()
    rows = sorted(sorted(RESULTS, key=lambda row: -row["mean"]["mAP"]), key=lambda row: row["mode"])
    for column in ("mode", "model", "feature"):
        assert cells(page, column) == [row[column] for row in rows]


def test_rows_and_queries_are_filtered(page, rankings):
    page.locator("#words").fill("INDOOR  fc")
    assert set(zip(cells(page, "mode"), cells(page, "feature"), strict=True)) == {("indoor", "FC")}
    assert page.locator("#row-count").inner_text() == "2 of 8 rows"
    page.locator("#words").fill("infrared pixels")  # finds words that all rows share, too
    assert cells(page, "feature") == ["pixels", "pixels"]
    page.locator("#words").fill("nobody")
    assert cells(page, "feature") == []
    assert page.locator("#row-count").inner_text().startswith("No row matches")

    assert listed(page) == labels(rankings)
    assert page.locator("#query-count").inner_text() == "9 of 9 queries"
    assert page.locator("#camera option").all_inner_texts() == ["all", "3 (5)", "6 (4)"]
    assert page.locator("#identity option").all_inner_texts() == ["all", "7 (3)", "12 (3)", "100 (3)"]
    page.locator("#order").select_option("latest first match")
    assert listed(page) == labels(sorted(rankings, key=lambda query: -query["first_match"]))
    page.locator("#camera").select_option("3")
    page.locator("#order").select_option("identity")
    assert listed(page) == labels(sorted((q for q in rankings if q["camera"] == 3), key=lambda query: query["id"]))
    page.locator("#identity").select_option("12")
    assert listed(page) == labels(query for query in rankings if (query["camera"], query["id"]) == (3, 12))
    assert page.locator("#query-count").inner_text() == f"{len(listed(page))} of 9 queries"


def test_the_keyboard_reaches_everything_and_enlarges_a_query(page, rankings):
    page.keyboard.press("Tab")
    name = "(({id, tagName, innerText}) => id || (tagName === 'DIV' ? tagName : innerText.split('\\n')[0].trim()))"
    reached = []
    while len(reached) < 60 and "Settings" not in reached:
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        reached.append(page.evaluate(f"{name}(document.activeElement)"))
        page.keyboard.press("Tab")
    heads = page.locator("#results thead th").all_inner_texts()
    rows = [f"Identity {query['id']}, camera {query['camera']}" for query in rankings]
    assert reached == ["words", "DIV", *heads, "camera", "identity", "order", *rows, "Settings"]  # the table scrolls

    query = page.locator(".query").nth(2)
    width = query.locator(".picture").first.bounding_box()["width"]
    assert not query.locator(".path").first.is_visible()
    query.locator("summary").focus()
    page.keyboard.press("Enter")
    assert query.locator(".picture").first.bounding_box()["width"] > 1.3 * width
    assert query.locator(".path").first.inner_text().endswith(f"{HOSTILE}/{Path(rankings[2]['path']).name}")
    page.locator("#settings summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#settings td").first.is_visible()


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
def test_contrast_in_the_scheme_of_the_system(page, scheme):
    page.emulate_media(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    texts = "h1 h2 h3 .note dt dd label output th>button select input figcaption th td small summary summary>span"
    texts = [*texts.split(), "tbody th", ".tile p", ".tile p span", ".path", "figure svg text"]
    ratios = {selector: contrast(page, selector, "fill" if "svg" in selector else "color") for selector in texts}
    assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}
    shapes = {name: contrast(page, name, "borderTopColor", "html") for name in (".correct svg", ".wrong svg", "select")}
    assert {name: ratio for name, ratio in shapes.items() if ratio < 3} == {}
    assert min(contrast(page, ".correct .mark"), contrast(page, ".wrong .mark")) > 3
    assert page.locator(".wrong .picture").first.evaluate("e => getComputedStyle(e).borderTopStyle") == "dashed"


def test_no_page_is_wider_than_its_screen(page):
    for width in (320, 400, 1360):
        page.set_viewport_size({"width": width, "height": 800})
        for _ in range(2):
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.locator(".query summary").first.click()  # enlarges, then not
        scrolls = page.locator(".scroller").evaluate("e => e.scrollWidth > e.clientWidth")
        assert scrolls == (width < 1000)


def test_without_javascript(browser, path, rankings):
    page = browser.new_page(java_script_enabled=False)
    page.goto(path.as_uri())
    assert page.locator("#results tbody tr:visible").count() == len(RESULTS)
    assert page.locator(".picture:visible").count() == sum(1 + len(query["gallery"]) for query in rankings)
    page.locator(".query summary").first.click()
    assert page.locator(".query .path").first.is_visible()
    assert page.locator("button:visible, input:visible, select:visible").count() == 0
    page.close()

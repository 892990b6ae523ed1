"""Figures drawn from plain values: what lies where, and that nothing hides anything else."""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from datasets import search_title
from drawing import figures
from test_results import random_search
from test_visualize import plain_overlap
from testing import engine
from testing.results import choose_queries, rank_images
from tools import sweep_tables
from utils import InputError

BLUE, ORANGE, TIMES = "#0072B2", "#D55E00", "\N{MULTIPLICATION SIGN}"
LONG = ("a title that is too long for a single line of the sheet, " * 3).strip()


def texts(parts):
    return [part.get_text().replace("\n", " ") for part in parts if hasattr(part, "get_text")]


def check_page(figure, *titles):
    """Panels follow each other as words do, no text, legend or panel overlaps another, and the margins are small."""
    figure.draw_without_rendering()
    boxes = [panel.bbox for panel in figure.axes]
    assert boxes == sorted(boxes, key=lambda box: (-round(box.y1), box.x0))
    parts = [part for page in (figure, *figure.subfigs) for part in (*page.texts, *page.legends)]
    assert texts(parts)[: len(titles)] == [*titles]
    parts += [part for panel in figure.axes for part in (panel.title, panel._left_title, panel.xaxis.label)]
    boxes += [box for part in parts if (box := part.get_window_extent()).width > 1]
    assert not [pair for pair in itertools.combinations(boxes, 2) if Bbox.intersection(*pair)]
    drawn = Bbox.union([*boxes, *(panel.get_tightbbox() for panel in figure.axes)])
    margins = np.array([drawn.min, figure.bbox.size - drawn.max]) / figure.dpi  # inches
    assert (margins.min() >= 0) & (margins.max() <= 0.45)
    for panel in figure.axes:
        if panel.images:
            assert panel.bbox.height / panel.bbox.width == pytest.approx(256 / 128, rel=0.1)
            assert not [*panel.get_xticks(), *panel.get_yticks()]


@pytest.fixture
def shown(monkeypatch):
    """An image has one colour, the number in its name -> a function: the numbers that panels show."""
    number = lambda path, size: np.full((*size, 3), int(re.search(r"\d+", path)[0]), np.uint8)  # noqa: E731
    monkeypatch.setattr(figures, "read_image", number)
    return lambda panels: [int(panel.images[0].get_array().mean()) for panel in panels]


def test_ranking_sheet(shown):
    image = lambda n, **more: {"path": f"image{n}", "id": n, "camera": n + 1, **more}  # noqa: E731
    near = [image(n, similarity=0.98765 - n / 10, correct=n == 2) for n in (2, 3, 4)]
    ranked = [image(7, average_precision=0.666, gallery=near), image(8, average_precision=1, gallery=near[:1])]
    figure = figures.ranking_sheet(figures.ranking_tiles(ranked), LONG)
    legend = f"black frame: query; blue, \N{CHECK MARK}: same identity; orange, dashed, {TIMES}: another"
    check_page(figure, LONG, legend)
    assert shown(figure.axes) == [7, 2, 3, 4, 8, 2]
    words = ("query: AP 67 %", "\N{CHECK MARK} 0.788", f"{TIMES} 0.688", f"{TIMES} 0.588", "query: AP 100 %")
    captions = [f"{text} id {n} camera {n + 1}" for text, n in zip(words, (7, 2, 3, 4, 8), strict=True)]
    assert texts(panel.xaxis.label for panel in figure.axes) == [*captions, captions[1]]
    for panel, colour in zip(figure.axes, ("black", BLUE, ORANGE, ORANGE, "black", BLUE), strict=True):
        for spine in panel.spines.values():
            assert (spine.get_visible(), spine.get_linestyle() == "-") == (True, colour != ORANGE)
            assert same_color(spine.get_edgecolor(), colour)
    assert np.argmax(np.diff([panel.bbox.x0 for panel in figure.axes[:4]])) == 0  # a gap after the query
    plain = figures.ranking_sheet([[figures.Tile("image1", "query"), *[figures.Tile("image2", "1 of 2\n0.5")] * 2]])
    check_page(plain, "", "")
    assert not [spine for panel in plain.axes for spine in panel.spines.values() if spine.get_visible()]
    for frame in ("correct", "wrong"):
        assert texts(figures.ranking_sheet([[figures.Tile("image1", "", frame)] * 9]).texts)[1] == legend


def test_heat_sheet(shown):
    heats = np.random.default_rng(0).random((4, 2, 6, 3))
    images = [(f"match, rank {n}: id {n}", f"image{n}", dict(zip("ab", heats[n], strict=True))) for n in range(4)]
    figure = figures.heatmap_sheet([images[:2], images[2:]], title := f"{LONG} {LONG} {LONG}")
    check_page(figure, title)
    assert shown(figure.axes) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [panel.get_title() for panel in figure.axes] == ["image", "a", "b"] * 2 + [""] * 6
    for n, panels in enumerate(np.array(figure.axes).reshape(4, 3)):
        assert [panel.get_xlabel() for panel in panels] == [f"match, rank {n}: id {n}", "", ""]
        assert panels[0].images[0].get_array().shape == (*figures.CROP, 3)
        for panel, heat in zip(panels[1:], heats[n], strict=True):
            below, above = panel.images
            np.testing.assert_array_equal(above.get_array(), heat)
            assert (below.get_clim(), above.get_clim()) == ((0, 255), (0, 1))
            assert [*above.get_extent()] == [*below.get_extent()] == [*panel.get_xlim(), *panel.get_ylim()]
            assert same_color(below.to_rgba(255), "white")
            assert sum(above.to_rgba(0)[:3]) < 0.1 < 0.6 < min(above.to_rgba(1)[:3])  # from dark to yellow


def test_feature_map_tells_people_and_modalities_apart():
    points = np.random.default_rng(0).normal(size=(40, 2))
    ids, modalities = np.repeat(np.arange(10) + 100, 4), np.array(["visible", "infrared"] * 20)
    figure = figures.feature_map(points, ids, modalities, LONG)
    check_page(figure)
    (panel,) = figure.axes
    *drawn, visible, infrared = panel.collections
    assert len({*(shapes := [len(entry.get_paths()[0].vertices) for entry in (visible, infrared)])}) == 2
    for i, (dots, text) in enumerate(zip(drawn, panel.texts, strict=True)):
        own = points[4 * (i // 2) + i % 2 :: 2][:2].tolist()
        assert (dots.get_offsets().tolist(), text.get_text()) == (own, str(100 + i // 2))
        assert len(dots.get_paths()[0].vertices) == shapes[i % 2]
        x, y = panel.transData.transform(max(own, key=lambda point: point[1]))  # the number is above it
        box = text.get_window_extent()
        assert (box.x0 + box.x1) / 2 == pytest.approx(x, abs=1)
        assert y < box.y0 < y + 12 < box.y1 < panel.bbox.y1
    assert [len(dots.get_facecolor()) for dots in drawn] == [1] * 2 * 7 + [0] * 2 * 3  # outlines when colours repeat
    looks = [str((dots.get_facecolor(), dots.get_edgecolor())) for dots in drawn]
    assert (looks[::2], len({*looks})) == (looks[1::2], 10)
    assert texts(figure.legends[0].get_texts()) == ["visible", "infrared"]
    assert (texts([panel._left_title]), [*panel.get_xticks(), *panel.get_yticks()]) == ([LONG], [])


def test_histograms_say_which_pairs_are_whose():
    rng = np.random.default_rng(0)
    pairs = {f"network {n}": (rng.normal(0.5, 0.1, 90), rng.normal(1 + n, 0.2, 400)) for n in (0, 1)}
    figure = figures.distance_histograms(pairs, LONG)
    check_page(figure, LONG)
    assert figures.distance_histograms({"": pairs["network 0"]}).axes[0].get_title("left").startswith("overlap ")
    names, entries = ["same identity", "two identities"], figure.legends[0].get_patches()
    assert texts(figure.legends[0].get_texts()) == names
    for panel, (label, both) in zip(figure.axes, pairs.items(), strict=True):
        assert texts([panel._left_title]) == [f"{label} overlap {100 * plain_overlap(*both):.1f} %"]
        assert (panel.get_xlabel(), [*panel.get_yticks()]) == ("cosine distance, query to gallery", [])
        assert panel.get_xlim() == figure.axes[0].get_xlim()
        outlines = [patch for patch in panel.patches if patch.get_label() in names]
        assert outlines[0].get_linestyle() != outlines[1].get_linestyle()
        for outline, values, entry in zip(outlines, both, entries, strict=True):
            colour = outline.get_edgecolor()[:3]
            assert colour == entry.get_edgecolor()[:3]
            bars = [bar for bar in panel.patches if hasattr(bar, "get_x") and bar.get_facecolor()[:3] == colour]
            left, width, height = np.array([(bar.get_x(), bar.get_width(), bar.get_height()) for bar in bars]).T
            counts, _ = np.histogram(values, [*left, left[-1] + width[-1]])
            assert (counts.sum(), outline.get_xy()[:, 1].max()) == (len(values), pytest.approx(max(height)))
            np.testing.assert_allclose(height * width * len(values), counts, atol=1e-9)


def test_lines_of_panels():
    lines = {f"a line with a long name, and points: {n}": (range(n), np.arange(n) - 1.0) for n in (1, 2, 3, 29, 30)}
    band = {"a line with a long name, and points: 2": ([0, 2], [5.0, 6.0], [4.0, 3.0], [7.0, 8.0])}
    figure = figures.line_panels({"total": lines, "FC/mAP": band, "lr": band, "correct": band, LONG: band}, "epoch")
    check_page(figure)
    assert texts(panel.title for panel in figure.axes) == ["total", "FC/mAP", "lr", "correct", LONG]
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss", "%", "rate", "share", "loss"]
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 4)
    assert texts(figure.legends[0].get_texts()) == [*lines]
    total, *others = figure.axes
    assert [line.get_marker() for line in total.lines] == ["o", "o", ".", ".", ""]  # also a single point is seen
    assert total.get_ylim()[0] < -1
    looks = [(line.get_color(), line.get_linestyle()) for line in total.lines]
    assert len({*looks}) == 5
    for panel in others:
        (line,), (area,) = panel.lines, panel.collections
        assert (line.get_color(), line.get_linestyle(), panel.get_ylim()[0]) == (*looks[1], 0)  # as in total
        assert same_color(area.get_facecolor()[0][:3], line.get_color())
        assert {*map(tuple, area.get_paths()[0].vertices)} == {(0, 4), (0, 7), (2, 3), (2, 8)}
        assert (panel.get_xlabel(), {tick % 1 for tick in panel.get_xticks()}) == ("epoch", {0})


@pytest.mark.parametrize("name", ["n" * 240, LONG])
@pytest.mark.filterwarnings("error")  # Matplotlib's, of panels that have no room left
def test_long_names_are_wrapped(name):
    for panels in (1, 4):
        figure = figures.line_panels(
            {str(n): {"a": ([0, 1], [1, 2]), name: ([0, 1], [1, 3])} for n in range(panels)}, ""
        )
        check_page(figure)
        assert texts(figure.legends[0].get_texts())[1].replace(" ", "") == name.replace(" ", "")
        assert figure.axes[0].bbox.height > 2 * figure.dpi
    row = sweep_tables.summarise_row(
        {0: {"mean": {"Rank-1": 5, "mAP": 5, "mINP": 5}, "trials_std": None, "seconds": 1}}, {}
    )
    figure = figures.dot_panels([{"setting": "b", "rows": [{"row": other, **row} for other in ("a", name)]}], ("mAP",))
    check_page(figure)
    ticks = figure.axes[0].get_yticklabels()
    assert texts(ticks)[1].replace(" ", "") == name.replace(" ", "")
    first, second = (tick.get_window_extent() for tick in ticks)
    assert not Bbox.intersection(first, second)


def test_dots_of_a_sweep():
    """Of three rows, the middle one has a single seed, and the last an interval that is cut."""
    values, rows = {"a": [5, 6, 5, 6, 5], "b": [6.5], "c": [5, 10]}, []
    for name, own in values.items():
        means = [{"mean": {"Rank-1": v, "mAP": 2 * v, "mINP": 3 * v}, "trials_std": None, "seconds": 1} for v in own]
        rows.append({"row": name, **sweep_tables.summarise_row(dict(enumerate(means)), {})})
    settings = [{"setting": LONG, "rows": [*rows, {"row": "none", "seeds": {}}]}, {"setting": "b", "rows": rows[:2]}]
    figure = figures.dot_panels(settings, ("Rank-1", "mAP"))
    check_page(figure, LONG, "b", "dot: a seed; stroke: the mean; bar: its 95 % interval, cut at the edge")
    # From the interval's end, but from as far beyond the dots as they lie apart at most; and 5 % of that more.
    limits = {"abc": (0 - 0.25, 15 + 0.25), "ab": (rows[0]["metrics"]["Rank-1"]["interval"][0] - 0.075, 6.5 + 0.075)}
    for n, (panel, names) in enumerate(zip(figure.axes, ("abc", "abc", "ab", "ab"), strict=True)):
        metric, scale = ("Rank-1", "mAP")[n % 2], n % 2 + 1
        assert (panel.get_title(), panel.get_ylim()) == (metric, (len(names) - 0.5, -0.5))
        assert panel.get_xlim() == pytest.approx(scale * np.array(limits[names]))
        for place, name in enumerate(names):
            marks = {line.get_marker(): line for line in panel.lines if {*line.get_ydata()} == {place}}
            assert [*marks["o"].get_xdata()] == [scale * v for v in values[name]]
            found = rows[place]["metrics"][metric]
            bar = marks.get("None")
            assert ([*marks["|"].get_xdata()], bar and [*bar.get_xdata()]) == ([found["mean"]], found["interval"])
            own = {line.get_mec() if m == "o" else line.get_color() for m, line in marks.items()}
            assert own == {figures.COLOURS[place]}
    names = [texts(label for label in panel.get_yticklabels() if label.get_visible()) for panel in figure.axes]
    assert names == [["a", "b", "c"], [], ["a", "b"], []]


@pytest.mark.parametrize(("split", "ids"), [("test", "test ids"), ("val", "VALIDATION ids")])
def test_training_draws_curves_and_rankings(split, ids, shown, tmp_path, monkeypatch):
    features, paths, search = random_search("sysu", 0)
    features = {modality: {"FC": x["FC"], "POOL": -x["FC"]} for modality, x in features.items()}
    setting = {"split": split, "mode": "all", "direction": "infrared to visible", "protocol": "seeded", "shots": 1}
    search = search._replace(setting=search.setting | setting | {"trial": 3})
    matches = {feature: found for (feature, _), found in engine.run_search(features, search).items()}
    chosen = choose_queries(matches["FC"], search, "random", 2)
    ranked = rank_images(features, paths, search, "FC", matches["FC"], chosen, 3)
    numbers = [int(re.search(r"\d+", image["path"])[0]) for query in ranked for image in (query, *query["gallery"])]
    drawn, images, folder = {}, [], tmp_path / "run"
    fakes = {"EPOCH_QUERIES": 2, "EPOCH_IMAGES": 3, "save": lambda figure, path: drawn.update({path: figure})}
    for name, fake in fakes.items():
        monkeypatch.setattr(figures, name, fake)
    log = SimpleNamespace(json_path=tmp_path / "run.jsonl", image=lambda *values: images.append(values))
    entries = [{"epoch": n, "identity": 2, "triplet": 1, "FC/Rank-1": 9, "FC/mAP": 8 + n} for n in range(5)]
    del entries[2]["FC/mAP"]
    log.json_path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    tested = SimpleNamespace(features=features, matches=matches), SimpleNamespace(searches=(search,), paths=paths)
    figures.draw_epoch(log, "epoch 4/9", *tested)
    curves, sheet = drawn.values()
    assert [*drawn] == [folder / "curves.png", folder / "ranking_epoch_4.png"]
    assert images == [("curves", [*drawn][0], 4), ("ranking", [*drawn][1], 4)]
    assert [panel.get_title() for panel in curves.axes] == ["identity", "triplet", "FC/Rank-1", "FC/mAP"]
    assert curves.axes[3].lines[0].get_xydata().tolist() == [[n, 8 + n] for n in (0, 1, 3, 4)]
    assert (curves.axes[3].lines[0].get_label(), curves.axes[3].get_xlabel()) == ("run", "epoch")
    title = f"epoch 4/9: {ids}, {search_title(search.setting)}, trial 3; FC"
    assert (texts(sheet.texts)[0], shown(sheet.axes)) == (title, numbers)
    monkeypatch.setattr(figures, "process_index", lambda: 1)
    figures.draw_epoch(log, "", *tested)
    assert len(images) == 2


def test_what_is_no_character_is_a_question_mark(tmp_path):
    """As in names of files that are not UTF-8."""
    figure = figures.line_panels({"a\udcff": {"b\udcff": ([0, 1], [2.0, 3.0])}}, "epoch")
    figures.save(figure, tmp_path / "f.png")
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert {"a?", "b?"} <= set(texts)


def test_curves_of_corruption_begin_at_the_clean_images():
    """Level 0; a level that no image drew has no point."""
    figure = figures.corruption_curves({"snow": [80.0, 70.0, None, 40.0], "motion_blur": [80.0, 75.0, 60.0, 55.0]})
    snow, blur = figure.axes
    assert [panel.get_title() for panel in (snow, blur)] == ["snow", "motion blur"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in snow.lines}
    assert lines["corrupted"] == [[0, 80], [1, 70], [3, 40]]
    assert lines["without corruption"] == [[0, 80], [1, 80], [2, 80], [3, 80]]
    assert (snow.get_xlabel(), snow.get_ylabel()) == ("level", "mAP, %")


def test_roc_curve_has_false_positives_along_the_axis():
    rates = {"false_positives": [0.001, 0.01, 1.0], "true_positives": [0.3, 0.6, 1.0]}
    (panel,) = figures.roc_curve(rates).axes
    assert [line.get_label() for line in panel.lines] == ["FC"]
    assert panel.get_title() == ""
    np.testing.assert_allclose(panel.lines[0].get_xydata(), [[0.1, 30], [1, 60], [100, 100]])
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("false positives, %", "true positives, %")
    assert (panel.get_xscale(), panel.get_ylim()) == ("log", (0, 102))
    assert panel.get_xlim() == pytest.approx((0.1, 100))
    panel.set_xlim(0.001, 1000)
    ticks = [label.get_text() for label in panel.get_xticklabels()]
    assert dict(zip(ticks, panel.get_xticks(), strict=True)) == {tick: float(tick) for tick in ticks}
    assert ticks == ["0.01", "0.1", "1", "10", "100"]
    assert not len(panel.get_xticks(minor=True))


def test_the_resolution_of_a_picture(tmp_path):
    figures.save(Figure(figsize=(2, 1)), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * figures.DPI, figures.DPI)


def test_a_picture_needs_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/a\.png: cannot write there \(.*file is a file\)"):
        figures.check_picture(tmp_path / "file/a.png")

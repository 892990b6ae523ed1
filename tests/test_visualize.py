"""Pictures of checkpoints and runs: what is drawn, and what is said of bad input."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data_manager
import testa
import train_ext_test0
from conftest import flags, result_row, save_network, search_flags
from drawing import figures
from methods import METHODS
from tests.oracles import plain_embedding
from tools import visualize
from utils import InputError


@pytest.fixture
def logs(tmp_path):
    """Two runs of three epochs; one is tested every second epoch."""
    files = []
    for number in range(2):
        entries = [{"epoch": epoch, "total": 3.0 - epoch - number} for epoch in range(3)]
        for entry in entries[::2] if number else []:
            entry["FC/Rank-1"] = 10.0 * entry["epoch"]
        files.append(tmp_path / f"run{number}.jsonl")
        files[-1].write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return files


def test_a_picture_is_a_file_and_a_dollar_in_a_name_no_formula(logs, tmp_path):
    labels, values = ["--labels", "published weights", "a$_$b"], ["--values", "total", "FC/Rank-1"]
    visualize.main(["curves", *map(str, logs), *labels, *values, "--out", str(tmp_path / "curves.svg")])
    text = (tmp_path / "curves.svg").read_text()
    assert all(f">{word}<" in text for word in ("published weights", "a$_$b", "FC/Rank-1"))


def test_characters_without_a_font_are_one_line(tmp_path, monkeypatch, capsys, recwarn):
    """Not a warning for each, at each place."""
    with matplotlib.rc_context({"font.family": ["DejaVu Sans"]}):
        for suffix in figures.SUFFIXES:
            figures.save(Figure(figsize=(2, 2)), tmp_path / f"plain{suffix}")
            figure = Figure(figsize=(2, 2))
            for place in (0.2, 0.8):
                figure.text(0.1, place, "行人 보행자 a.jpg")
            figures.save(figure, tmp_path / f"out{suffix}")
            error = capsys.readouterr().err
            assert error == "" if suffix == ".svg" else error.count("\n") == 1 and "5 characters" in error
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_installed_fonts_of_east_asia_stand_in_for_missing_characters():
    assert figures.families({"DejaVu Sans", "Carlito"}) == ["DejaVu Sans", "sans-serif"]
    assert figures.families({"Malgun Gothic", "DejaVu Sans"}) == ["DejaVu Sans", "Malgun Gothic", "sans-serif"]


def test_figures_do_not_depend_on_what_matplotlib_is_told(logs, tmp_path):
    """Jupyter names a backend that only its own environment has; LaTeX may be missing."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\n")
    told = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path)}
    command = ["curves", str(logs[0]), "--values", "total", "--out"]
    visualize.main([*command, f"{tmp_path}/plain.png"])
    program = [sys.executable, "-m", "tools.visualize", *command, f"{tmp_path}/told.png"]
    subprocess.run(program, env=os.environ | told, check=True)
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "told.png").read_bytes()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--out", "a.gif"], "--out a.gif: is not a .png"),
        (
            ["--out", "a.png", "--values", "Rank-1"],
            "--values Rank-1: is not a number in these logs; choose from FC/Rank-1, epoch",
        ),
        (["--out", "a.png", "--labels", "one"], "--labels one: pass one for each of the 2"),
    ],
)
def test_bad_flags_are_named(logs, more, words):
    with pytest.raises(InputError, match=words):
        visualize.main(["curves", *map(str, logs), *more])


def test_runs_of_one_name_stay_two(logs, tmp_path):
    (tmp_path / "other").mkdir()
    logs = [logs[0], logs[1].rename(tmp_path / "other" / logs[0].name)]
    out = tmp_path / "a.svg"
    visualize.main(["curves", *map(str, logs), "--values", "FC/Rank-1", "--out", str(out)])
    assert str(logs[1]) in "".join(re.findall(">([^<>\n]+)<", out.read_text()))  # it takes several lines
    with pytest.raises(InputError, match="two files have the same name; distinguish them with --labels"):
        visualize.main(["curves", str(logs[0]), str(logs[0]), "--values", "total", "--out", str(out)])


def test_missing_and_empty_logs_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for name, words in (("none", "no such file"), ("empty", "contains no epoch")):
        with pytest.raises(InputError, match=rf"{name}\.jsonl: .*{words}"):
            visualize.main(["curves", str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / "a.png")])


@pytest.mark.slow
def test_training_draws_after_each_test(sysu_tree, tmp_path):
    more = ("--epochs", "2", "--eval_every", "1")
    result = train_ext_test0.main(flags(sysu_tree, tmp_path, *more, "--figures"))
    folder = Path(result["log"]).with_suffix("")
    assert sorted(file.name for file in folder.glob("*.png")) == [
        "curves.png",
        "ranking_epoch_0.png",
        "ranking_epoch_1.png",
    ]
    board = EventAccumulator(str(folder))
    board.Reload()
    assert [(event.step, event.width > 500) for event in board.Images("ranking")] == [(0, True), (1, True)]
    for event, name in zip(board.Images("ranking"), ("ranking_epoch_0", "ranking_epoch_1"), strict=True):
        with Image.open(folder / f"{name}.png") as file, Image.open(io.BytesIO(event.encoded_image_string)) as shown:
            assert np.array_equal(np.asarray(file.convert("RGB")), np.asarray(shown))
    assert [event.step for event in board.Images("curves")] == [0, 1]

    without = train_ext_test0.main(flags(sysu_tree, tmp_path / "plain", *more))
    assert not list(tmp_path.glob("plain/**/*.png"))
    states = [torch.load(one["last"])["net"] for one in (result, without)]  # drawing changes nothing
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())


# ------------------------------------------------------------------------------------------------------- what is drawn


def plain_overlap(same, other):
    """Of all thresholds: the smallest share of wrong decisions, those of both kinds added."""
    thresholds = [-np.inf, *same, *other]
    errors = [np.mean(same > t) + np.mean(other <= t) for t in thresholds]
    return min(errors + [2 - error for error in errors])


def test_overlap():
    assert figures.overlap(np.arange(9), np.arange(9)) == 1
    rng = np.random.default_rng(0)
    for size in (3, 50, 400):
        for shift in (0, 1):
            same, other = rng.normal(size=size), rng.normal(shift, size=2000)
            assert figures.overlap(same, other) == pytest.approx(plain_overlap(same, other))


def row(model, feature, **more):
    curves = {"cmc": [1.0, 2.0], "precision": [3.0, 2.0, 1.0]}
    return result_row(model=model, feature=feature, curves=curves, **more)


def test_lines_of_results_say_what_tells_them_apart():
    def lines(*rows, **more):
        figure = figures.result_curves({"file": rows, **more}, "cmc")
        titles = [panel.get_title().replace("\n", " ") for panel in figure.axes]
        return dict(zip(titles, [[line.get_label() for line in panel.lines] for panel in figure.axes], strict=True))

    seeded = "SYSU-MM01, all-search, infrared to visible, seeded protocol, 1-shot, trial 0"
    both = [row("trained", feature) for feature in ("POOL", "FC")]
    assert lines(row("gray", "pixels"), *both) == {seeded: ["gray", "trained, FC"]}
    assert lines(both[0]) == {seeded: ["trained"]}  # POOL alone is drawn
    assert lines(both[0], other=[both[1]]) == {seeded: ["file, trained, POOL", "other, trained, FC"]}
    assert lines(row("mine", "global"), row("mine", "local")) == {seeded: ["mine, global", "mine, local"]}
    reranked = row("trained", "FC", reranking="random_walk")
    assert lines(both[1], reranked) == {seeded: ["trained", "trained, random_walk"]}
    chosen = row("trained", "FC", selection="val")
    assert lines(both[1], chosen) == {seeded: ["trained, chosen on test", "trained, chosen on val"]}
    elsewhere = row("trained", "FC", images="/other")
    assert lines(both[1], elsewhere) == {seeded: ["trained, /data", "trained, /other"]}
    assert lines(both[1], other=[both[1]]) == {seeded: ["file, trained", "other, trained"]}
    apart = lines(both[1], row("trained", "FC", trials=[1, 2]), row("trained", "FC", demo=True))
    assert [*apart] == [seeded, seeded.replace("trial 0", "2 trials"), f"demo data like {seeded}"]
    assert [*lines(row("mine", "FC", per_trial=[{"queries": 3802}]))] == [f"data like {seeded}"]
    with pytest.raises(InputError, match="two rows of results have the same name, trained"):
        lines(both[1], both[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network") / "net.t", 0, "sysu")


def draw(command, tree, checkpoint, out, *more):
    return visualize.main([command, *search_flags(tree, checkpoint, "--out", out, *more)])


def embed_test(tree, checkpoint):
    """What the figures of a checkpoint are drawn from."""
    args = visualize.get_args_parser().parse_args(["heatmap", *search_flags(tree, checkpoint, "--out", "a.png")])
    return visualize.embed_test(args, checkpoint)


def test_ranking_shows_what_the_query_may_see(sysu_tree, checkpoint, tmp_path):
    queries = [*zip(*data_manager.process_query_sysu(sysu_tree), strict=True)]
    images = zip(*data_manager.process_gallery_sysu(sysu_tree, trial=4), strict=True)
    asked = int(queries[0][1])
    out = draw("ranking", sysu_tree, checkpoint, tmp_path / "a.svg", "--which", asked, "--gallery", 4, "--top", 3)
    text = re.findall(r">([^<>]*)</(?:text|tspan)", Path(out).read_text())
    embed = plain_embedding(checkpoint)
    gallery, rows = [(embed(path, "visible"), *labels) for path, *labels in images], []
    for path, identity, camera in queries:
        if identity == asked:
            query = embed(path, "infrared")
            seen = [(float(query @ x), i, c) for x, i, c in gallery if not (camera == 3 and c == 2)]
            rows.append(sorted(seen, reverse=True)[:3])
    assert len(rows) > 2
    shown = [
        float(line.split()[1]) for line in text if line[:1] in "\N{CHECK MARK}\N{MULTIPLICATION SIGN}" and line[2:]
    ]
    expected = sorted([round(similarity, 3) for row in rows[:6] for similarity, _, _ in row])
    assert sorted(shown[: len(expected)]) == pytest.approx(expected, abs=1.1e-3)
    marks = sum(line.startswith("\N{CHECK MARK} ") for line in text)
    assert marks == sum(identity == asked for row in rows[:6] for _, identity, _ in row)
    assert "all-search, infrared to visible, seeded protocol, 1-shot, trial 4; FC" in " ".join(text)


def test_heat_is_what_each_place_adds_to_the_similarity(sysu_tree, tmp_path):
    """With average pooling and no bottleneck, the similarity is a mean over places of a product of features."""
    path = save_network(tmp_path / "net.t", 1, "sysu", **METHODS["base"].network)
    tested = embed_test(sysu_tree, path)
    images = [({"path": tested.paths[m][0]}, m) for m in ("infrared", "visible")]
    heats = visualize.pair_heats(tested, images, "POOL")
    maps = []
    for image, modality in images:
        x = visualize.normalise(torch.from_numpy(visualize.read_image(image["path"], tested.size)).movedim(2, 0)[None])
        with torch.no_grad():
            stream = getattr(tested.net, modality)
            maps.append(tested.net.shared(stream(x))[0])
    for i, heat in enumerate(heats):
        other = maps[1 - i].mean(dim=(1, 2))
        added = torch.einsum("chw,c->hw", maps[i], other / other.norm()).relu()
        size = {"size": (96, 48), "mode": "bilinear", "align_corners": False}
        expected = torch.nn.functional.interpolate(added[None, None], **size)[0, 0].numpy()
        expected = (expected - expected.min()) / np.ptp(expected)
        assert list(heat) == ["similarity"]  # this network has no attention
        np.testing.assert_allclose(heat["similarity"], expected, atol=2e-3)


def test_attention_is_afam_s(sysu_tree, checkpoint):
    tested = embed_test(sysu_tree, checkpoint)
    x = torch.rand(1, 3, 96, 48)
    with torch.no_grad():
        features = tested.net.infrared(x)
        both = torch.cat([features.mean(1, keepdim=True), features.max(1, keepdim=True).values], 1)
        expected = 1 / (1 + torch.exp(-torch.conv2d(both, tested.net.attention.spatial.weight, padding=3)))
    np.testing.assert_allclose(visualize.attention_map(tested.net, x, "infrared"), expected[0, 0], atol=1e-6)
    images = [({"path": tested.paths[m][0]}, m) for m in ("infrared", "visible")]
    for heat in visualize.pair_heats(tested, images, "FC"):
        assert list(heat) == ["similarity", "attention"]
        for values in heat.values():
            assert (values.min(), values.max()) == (0, 1)


def test_each_heat_lies_over_its_own_image(sysu_tree, checkpoint, monkeypatch):
    """The pairs that are drawn, against heats computed for each image alone."""
    sheets = []
    monkeypatch.setattr(figures, "heatmap_sheet", lambda pairs, title: sheets.append(pairs))
    more = ["--queries", "1", "--out", "a.png"]
    args = visualize.get_args_parser().parse_args(["heatmap", *search_flags(sysu_tree, checkpoint, *more)])
    args.resume = checkpoint
    visualize.draw_heatmaps(args)
    monkeypatch.undo()
    (query, match) = sheets[0][0]
    tested = embed_test(sysu_tree, checkpoint)
    for (caption, path, heats), modality, name in ((query, "infrared", "query"), (match, "visible", "match")):
        assert caption.startswith(name)
        x = visualize.normalise(torch.from_numpy(visualize.read_image(path, tested.size)).movedim(2, 0)[None])
        attention = visualize.attention_map(tested.net, x, modality)
        np.testing.assert_allclose(heats["attention"], (attention - attention.min()) / np.ptp(attention), atol=1e-5)


@pytest.mark.slow
def test_heat_maps_and_feature_maps_are_drawn_alike_each_time(sysu_tree, checkpoint, tmp_path):
    for command, more in (("heatmap", ["--queries", 2]), ("tsne", ["--people", 3])):
        first, second = (draw(command, sysu_tree, checkpoint, tmp_path / f"{n}.png", *more) for n in "ab")
        with Image.open(first) as a, Image.open(second) as b:
            assert a.size == b.size
            assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_distances_before_and_after(sysu_tree, checkpoint, tmp_path):
    other = save_network(tmp_path / "other.t", 1, "sysu")
    out = draw("distances", sysu_tree, checkpoint, tmp_path / "a.svg", "--resume", checkpoint, other)
    assert re.findall(r">(net\.t|other\.t)<", Path(out).read_text()) == ["net.t", "other.t"]  # of one network each


@pytest.fixture(scope="module")
def results(sysu_tree, checkpoint, tmp_path_factory):
    """(testa.py's results, their .json, the page's folder)."""
    out = tmp_path_factory.mktemp("results")
    more = ["--baselines", "--json", out / "results.json", "--report", out / "page"]
    rows = testa.main(search_flags(sysu_tree, checkpoint, *more))
    return rows, out / "results.json", out / "page"


def test_cmc_curves_show_the_results(results, tmp_path):
    rows, file, _ = results
    assert all(row["curves"]["cmc"][k - 1] == pytest.approx(row["mean"][f"Rank-{k}"]) for row in rows for k in (1, 20))
    figure = figures.result_curves({"a": visualize.read_results(file)["results"]}, "cmc")
    (panel,) = figure.axes
    title = "demo data like SYSU-MM01, all-search, infrared to visible, seeded protocol, 1-shot, 10 trials"
    assert panel.get_title().replace("\n", " ") == title
    fc = {"trained": "trained, FC", "untrained": "untrained, FC"}
    wanted = {fc.get(r["model"], r["model"]): r["curves"]["cmc"] for r in rows if r["feature"] != "POOL"}
    assert {line.get_label(): line.get_ydata().tolist() for line in panel.lines} == wanted
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("rank", "matching rate, %")
    assert all(line.get_xdata().tolist() == list(range(1, 21)) for line in panel.lines)
    (panel,) = figures.result_curves({"a": visualize.read_results(file)["results"]}, "precision", titled=False).axes
    assert (panel.get_title(), panel.get_xlabel(), panel.get_ylabel()) == ("", "recall, %", "precision, %")
    points = len(rows[0]["curves"]["precision"])
    assert all(np.allclose(line.get_xdata(), 100 * np.arange(points) / (points - 1)) for line in panel.lines)
    assert panel.get_xticks().tolist() == [0, 20, 40, 60, 80, 100]  # no recall of 105 %
    assert visualize.main(["curves", str(file), str(file), "--labels", "a", "b", "--out", str(tmp_path / "a.pdf")])


def test_report_is_of_these_results(results):
    rows, _, folder = results
    text = (folder / "report.html").read_text()
    content = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    assert content["results"] == json.loads(json.dumps(rows))
    assert content["settings"]["Flags of this test"]["baselines"] is True
    assert content["settings"]["Flags of the training"] == {"dataset": "sysu"}
    assert content["settings"]["Versions"]["torch"] == torch.__version__
    precision = [float(value) for value in re.findall(r'data-average="([^"]*)"', text)]
    assert precision == sorted(precision)
    assert len(precision) == min(testa.HARDEST, rows[0]["per_trial"][0]["evaluated"])
    assert "trial 0, model trained, feature FC" in text


@pytest.mark.parametrize("content", ["", "[]", '{"results": [{"model": "a"}]}', '{"results": 3}', '{"results": []}'])
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json: .*; make it with testa.py --json"):
        visualize.main(["curves", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.png")])


def test_bad_input_of_the_commands(sysu_tree, checkpoint, results, logs, tmp_path, capsys):
    for command, more, words in (
        ("ranking", ["--which", "9999"], "--which 9999: no query"),
        ("tsne", ["--people", "90"], "--people 90: only 4 have images"),
        ("ranking", ["--trial", "2"], "is an option of RegDB"),
        ("ranking", ["--dataset", "llcm"], "was trained on sysu"),
        ("ranking", ["--dataset", "regdb", "--gallery", "0"], "--gallery is for SYSU-MM01 and LLCM; RegDB draws none"),
        (
            "ranking",
            ["--dataset", "vcm", "--gallery", "2"],
            "--gallery is for SYSU-MM01 and LLCM; HITSZ-VCM draws none",
        ),
        ("distances", ["--resume", "a.t", "b.t", "c.t"], "pass one checkpoint, or two"),
    ):
        with pytest.raises(InputError, match=words):
            draw(command, sysu_tree, checkpoint, tmp_path / "a.png", *more)
    people = sysu_tree / "exp" / "test_id.txt"
    alone = shutil.copytree(sysu_tree, tmp_path / "alone")
    (alone / "exp" / "test_id.txt").write_text(people.read_text().split(",")[0])
    with pytest.raises(InputError, match="images of two identities"):
        draw("distances", alone, checkpoint, tmp_path / "a.png")
    with pytest.raises(InputError, match="not both"):
        visualize.main(["curves", str(logs[0]), str(results[1]), "--out", str(tmp_path / "a.png")])
    with pytest.raises(InputError, match="--values total: is for logs"):
        visualize.main(["curves", str(results[1]), "--values", "total", "--out", str(tmp_path / "a.png")])
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(SystemExit, match="2"):
        visualize.main(["ranking", "--resume", "a", "--out", "a.png", "--which", "-1"])
    assert "-1' is not worst, best, random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "dataset"),
    [
        pytest.param("ranking", "regdb", marks=pytest.mark.slow),
        pytest.param("ranking", "llcm", marks=pytest.mark.slow),
        ("heatmap", "regdb"),
        ("tsne", "llcm"),
        ("distances", "regdb"),
        ("ranking", "vcm"),
        ("tsne", "buptcampus"),
    ],
)
def test_the_other_data_sets(command, dataset, request, tmp_path, capsys):
    few = {"heatmap": ["--queries", "1"], "tsne": ["--people", "2"]}.get(command, [])
    tree = request.getfixturevalue(f"{dataset}_tree")
    more = {"regdb": ["--trial", "1"], "llcm": ["--tvsearch"]}.get(dataset, [])
    path, out = save_network(tmp_path / f"{dataset}.t", 0, dataset), tmp_path / f"{dataset}.svg"
    capsys.readouterr()  # of a tree that is drawn now
    draw(command, tree, path, out, "--dataset", dataset, *more, *few)
    assert capsys.readouterr().out == f"{out}\n"
    setting = {
        "regdb": "RegDB, visible to thermal, standard protocol, trial 1; FC",
        "llcm": "LLCM, infrared to visible, seeded protocol, 1-shot, trial 0; FC",
        "vcm": "HITSZ-VCM, visible to infrared, standard protocol, trial 0; FC",
        "buptcampus": "BUPTCampus, visible to infrared, standard protocol, trial 0; FC",
    }[dataset]
    text = " ".join(re.findall(r">([^<>]*)</(?:text|tspan)", out.read_text()))
    assert f"demo data like {setting}" in text
    if (command, dataset) == ("ranking", "regdb"):  # RegDB's cameras: visible 1, thermal 2
        assert set(re.findall(r"camera (\d)", text)) == {"1", "2"}

"""Pictures of runs: what is drawn, and what is said of bad input."""

import json

import pytest
from PIL import Image

import figures
import visualize
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


def test_curves_show_the_logs(logs):
    runs = {file.stem: visualize.read_log(file) for file in logs}
    figure = figures.epoch_curves(runs, ["total", "FC/Rank-1"])
    total, rank = figure.axes
    assert [(panel.get_title(), panel.get_xlabel()) for panel in figure.axes] == [
        ("total", "epoch"),
        ("FC/Rank-1", "epoch"),
    ]
    assert [line.get_xydata().tolist() for line in total.lines] == [
        [[0, 3], [1, 2], [2, 1]],
        [[0, 2], [1, 1], [2, 0]],
    ]
    assert [line.get_xydata().tolist() for line in rank.lines] == [[[0, 0], [2, 20]]]
    # A run has one look in all panels, and no other run has it.
    looks = [[(line.get_color(), line.get_linestyle()) for line in panel.lines] for panel in figure.axes]
    assert looks[0][1] == looks[1][0] != looks[0][0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run0", "run1"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_files(logs, tmp_path, suffix):
    out = tmp_path / f"curves.{suffix}"
    labels, values = ["--labels", "published weights", "exact"], ["--values", "total", "FC/Rank-1"]
    visualize.main(["curves", *map(str, logs), *labels, *values, "--out", str(out)])
    if suffix == "png":
        with Image.open(out) as image:
            assert image.width == 1200
    else:
        assert all(f">{word}<" in out.read_text() for word in ("published weights", "exact", "FC/Rank-1"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--out", "a.gif"], "--out a.gif: name a .png"),
        (
            ["--out", "a.png", "--values", "Rank-1"],
            "--values Rank-1: no number of these logs; they have FC/Rank-1, epoch",
        ),
        (["--out", "a.png", "--labels", "one"], "--labels one: give one for each of the 2"),
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
    assert f">{logs[1]}<" in out.read_text()
    with pytest.raises(InputError, match="two files of one name; tell them apart with --labels"):
        visualize.main(["curves", str(logs[0]), str(logs[0]), "--values", "total", "--out", str(out)])


def test_missing_and_empty_logs_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for name, words in (("none", "no such file"), ("empty", "no entry of an epoch")):
        with pytest.raises(InputError, match=rf"{name}\.jsonl: .*{words}"):
            visualize.main(["curves", str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / "a.png")])

"""`tools.records`: the table of measured results says what the files say, and an incomplete file is refused."""

import json
import os
import statistics
from types import SimpleNamespace

import pytest

from conftest import exit_status
from tools import records
from utils import InputError

FULL = {
    "date": "2026-01-02",
    "commit": "0123abc",
    "data": "SYSU-MM01",
    "real": True,
    "row": "adp | as it is",
    "flags": "--lr 0.1",
    "command": "python train_ext_test0.py --lr 0.1",
    "scores": {"all-search": {"Rank-1": {"mean": 73.04, "std": 0.5}, "mAP": {"mean": 69.0, "std": None}}},
    "seeds": [0, 1],
    "hardware": "one GPU",
    "hours": 12.3,
    "by": "somebody",
}


def write(folder, **named):
    folder.mkdir(exist_ok=True)
    for name, record in named.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return ["--folder", str(folder), "--page", str(folder / "page.md")]


def test_the_page_of_the_repository_is_up_to_date():
    assert records.main(["--check"])


def test_a_row_says_what_its_file_says(tmp_path):
    later = FULL | {"date": "2026-03-04", "real": False, "data": "drawn people", "scores": {"indoor": {}}}
    last = later | {"date": "2026-05-06"}
    flags = write(tmp_path / "r", a=FULL, b=later, c=last)
    records.main(flags)
    text = (tmp_path / "r" / "page.md").read_text()
    real, drawn = text.split("## Drawn people")
    (line,) = [line for line in real.splitlines() if "adp" in line]
    cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
    what = "[adp / as it is](../records/a.json)"
    assert cells == [
        "2026-01-02",
        "SYSU-MM01",
        what,
        "73.0 ± 0.5",
        "69.0",
        "",
        "2",
        "12",
        "one GPU",
        "0123abc",
        "somebody",
    ]
    head, rule = (row.strip("|").split("|") for row in real.splitlines() if row.startswith("|") and row != line)
    assert len(head) == len(rule) == len(cells)
    assert "The numbers are those of all-search." in real
    dates = [line.split("|")[1].strip() for line in drawn.splitlines() if "adp" in line]
    assert dates == ["2026-05-06", "2026-03-04"]  # the latest first
    assert records.main([*flags, "--check"])
    for other in (text.replace("73.0", "74.0").encode(), b"\xff", None):
        (tmp_path / "r" / "page.md").unlink()
        if other:
            (tmp_path / "r" / "page.md").write_bytes(other)
        with pytest.raises(InputError, match="page.md: is not what .*r gives; run: python -m tools.records"):
            records.main([*flags, "--check"])


@pytest.mark.parametrize("field", FULL)
def test_a_record_without_a_field_is_refused_with_the_field(field, tmp_path, capsys):
    flags = write(tmp_path / "r", a={name: value for name, value in FULL.items() if name != field})
    assert exit_status(records, flags) == 2
    line = capsys.readouterr().err
    assert f"a.json: object missing required field {field}; see .github/CONTRIBUTING.md" in line
    assert not (tmp_path / "r" / "page.md").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("date", "yesterday"),
        ("commit", "main"),
        ("real", 1),
        ("scores", {}),
        ("seeds", []),
        ("hours", -1),
        ("by", ""),
        ("by", "\ud800"),
    ],
)
def test_other_values_are_refused(field, value, tmp_path):
    with pytest.raises(InputError, match=f"a.json: ({field}: |cannot be read as JSON)"):
        records.main(write(tmp_path / "r", a=FULL | {field: value}))


def sweep(folder):
    """A table.json as tools.sweep writes it: two rows, of which one has not finished, in two settings."""
    ranks = {"demo data, all": [60.0, 62.0, 67.0], "demo data, indoor": [70.0, 71.0, 75.0]}
    settings = []
    for setting, values in ranks.items():
        score = {"mean": statistics.mean(values), "std": statistics.stdev(values), "interval": [0.0, 1.0], "count": 3}
        seeds = {str(seed): {"mean": {"Rank-1": value}} for seed, value in enumerate(values)}
        seconds = {"mean": 1800.0, "std": 1.0, "interval": None, "count": 3}
        done = {"row": "plain", "failed": [], "seeds": seeds, "metrics": {"Rank-1": score}, "seconds": seconds}
        other = {"row": "other", "failed": [2], "seeds": {}, "metrics": {}, "differences": {}}
        settings.append({"setting": setting, "rows": [done, other]})
    plan = {"rows": [["plain", ["--lr", "0.2"]], ["other", []]], "flags": ["--data_path", "a b"], "seeds": [0, 1, 2]}
    folder.mkdir()
    (folder / "table.json").write_text(json.dumps(plan | {"settings": settings, "failed": []}))


def test_a_name_in_any_encoding(monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.name")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", os.fsdecode("Jörg".encode("latin-1")))
    assert records.git("config", "user.name") == "J\N{REPLACEMENT CHARACTER}rg"


def test_records_of_a_sweep(tmp_path, monkeypatch):
    """Drawn data is told by what the sweep says of it; a commit is named only if it is what ran."""
    status = b""
    said = lambda words, **_: SimpleNamespace(stdout=status if "status" in words else b"0123abcd\n")  # noqa: E731
    monkeypatch.setattr(records.subprocess, "run", said)
    sweep(tmp_path / "s")
    flags = write(tmp_path / "r")
    (record,) = records.main(
        [*flags, "--add", str(tmp_path / "s"), "--data", "Drawn?", "--hardware", "CPU", "--by", "me"]
    ).values()
    assert record["scores"]["demo data, all"]["Rank-1"] == {"mean": 63.0, "std": pytest.approx(3.6056, abs=1e-4)}
    assert record["scores"]["demo data, indoor"]["Rank-1"]["mean"] == 72.0
    assert (record["seeds"], record["hours"], record["row"], record["real"]) == ([0, 1, 2], 0.5, "plain", False)
    assert record["command"] == "python train_ext_test0.py --data_path 'a b' --lr 0.2 --seed 0"
    assert (tmp_path / "r" / f"{record['date']}_drawn_plain.json").is_file()
    with pytest.raises(InputError, match="--add .*s: a record needs --hardware"):
        records.main([*flags, "--add", str(tmp_path / "s"), "--data", "x"])
    assert record["commit"] == "0123abcd"
    both = records.main([*flags, "--add", str(tmp_path / "s"), "--data", "drawn", "--hardware", "GPU", "--by", "you"])
    assert {one["by"] for one in both.values()} == {"me", "you"}  # no record takes another's place
    damaged = json.loads((tmp_path / "s" / "table.json").read_text())
    line = damaged["settings"][0]["rows"][0]
    for wrong, words in (({"seeds": {"x": 1}}, "expected str matching regex"), ({"seconds": None}, "has no seconds")):
        damaged["settings"][0]["rows"][0] = {name: value for name, value in (line | wrong).items() if value is not None}
        write(tmp_path / "damaged", table=damaged)
        with pytest.raises(InputError, match=words):
            records.main([*flags, "--add", str(tmp_path / "damaged"), "--data", "x", "--hardware", "y", "--by", "z"])
    status = b" M loss.py\n"
    with pytest.raises(InputError, match="loss.py: differs from the last commit"):
        records.main([*flags, "--add", str(tmp_path / "s"), "--data", "x", "--hardware", "y", "--by", "z"])
    with pytest.raises(InputError, match="table.json: cannot be read"):
        records.main([*flags, "--add", str(tmp_path), "--data", "x", "--hardware", "y", "--by", "z"])


def test_a_page_replaces_no_record_and_needs_records(tmp_path):
    write(tmp_path / "r", a=FULL)
    before = (tmp_path / "r" / "a.json").read_bytes()
    with pytest.raises(InputError, match="a.json: is a record; choose another file"):
        records.main(["--folder", str(tmp_path / "r"), "--page", str(tmp_path / "r" / ".." / "r" / "a.json")])
    assert (tmp_path / "r" / "a.json").read_bytes() == before
    (tmp_path / "page.md").write_text("old")
    with pytest.raises(InputError, match="none: has no records; pass the folder that has them"):
        records.main(["--folder", str(tmp_path / "none"), "--page", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == "old"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop: is not what"):
        records.main(["--folder", str(tmp_path / "r"), "--check", "--page", str(tmp_path / "loop")])


def test_what_a_record_says_is_no_markup(tmp_path):
    more = {
        "by": "<b>[me](javascript:1)</b>\nand | you",
        "row": "a_b [x](y)",
        "data": "*d*",
        "scores": {"~s~\n[x](y)": {}},
    }
    flags = write(tmp_path / "r", **{"a) b": FULL | more})
    records.main(flags)
    text = (tmp_path / "r" / "page.md").read_text()
    assert r"| &lt;b&gt;\[me\](javascript:1)&lt;/b&gt;?and \| you |" in text
    assert r"| \*d\* | [a\_b \[x\](y)](../records/a%29%20b.json) |" in text
    assert r"The numbers are those of \~s\~?\[x\](y)." in text

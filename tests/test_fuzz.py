"""Random input: parsers either read it or name the file."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_manager
from testing import features as feature_store
from training.log import RunLog, read_json_lines
from utils import InputError

many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LINES = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.tuples(st.text(max_size=12), st.integers(-5, 10**12)).map(lambda pair: f"{pair[0]} {pair[1]}"),
        st.sampled_from(["a/b.jpg 1", "a b.jpg\t2", "", " ", "../x 1", "/x 1", "a/../../x 3", "x", "1,2,3", "4, 5,"]),
    ),
    max_size=6,
)
TEXTS = st.one_of(
    st.binary(max_size=60),
    st.tuples(LINES, st.sampled_from(["\n", "\r\n", ",", "\r"])).map(
        lambda x: x[1].join(x[0]).encode(errors="replace")
    ),
)


def check_line(error, name):
    assert name in str(error)
    assert "\n" not in str(error)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    (tree / "exp").mkdir()
    (tree / "idx").mkdir()
    return tree


@many
@given(TEXTS)
def test_ids(tree, content):
    (tree / "exp" / "train_id.txt").write_bytes(content)
    try:
        ids = data_manager.read_ids(tree, "train")
    except InputError as error:
        check_line(error, "train_id.txt: ")
        return
    assert ids
    assert len(set(ids)) == len(ids)
    assert sorted(ids) == sorted(
        int(field) for field in content.decode("utf-8-sig").replace("\n", ",").split(",") if field.strip()
    )


@many
@given(TEXTS)
def test_lists(tree, content):
    (tree / "idx" / "l.txt").write_bytes(content)
    try:
        paths, ids = data_manager.read_list(tree, "l")
    except InputError as error:
        check_line(error, "idx/l.txt")
        return
    assert len(paths) == len(ids) > 0
    assert ids.dtype == np.int64
    for path in paths:
        assert os.path.realpath(path).startswith(os.path.realpath(tree) + os.sep)
        os.path.exists(path)  # a name that the system takes


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@many
@given(st.sets(NAMES.filter(lambda name: len(name.encode()) < 200 and name not in (".", "..")), max_size=5))
def test_names_of_images(names):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "cam1" / "0007"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
        expected = [str(folder / name) for name in sorted(names) if not name.startswith(".")]
        if expected:
            assert data_manager.sysu_images(root, [7], [1])[0] == expected
        else:
            with pytest.raises(InputError, match="none of the 1 listed ids"):
                data_manager.sysu_images(root, [7], [1])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["epoch", "total", "trial"]), inner),
    max_leaves=5,
)


@many
@given(st.lists(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30), max_size=5))
def test_logs(tree, lines):
    (tree / "log.jsonl").write_bytes(b"\n".join(lines))
    for entry in read_json_lines(tree / "log.jsonl"):
        assert isinstance(entry["epoch"], int)
    log = RunLog(tree, "log", resumed_epoch=1)  # which drops what it cannot read, and goes on
    log.epoch({"epoch": 2, "total": 1.0})
    log.close()
    entries = read_json_lines(tree / "log.jsonl")
    assert entries[-1] == {"epoch": 2, "total": 1.0}
    assert all(entry["epoch"] <= 1 for entry in entries[:-1])


@many
@given(JSON | st.text(max_size=20))
def test_origins_of_features(tree, origin):
    arrays = {f"{m}/{name}": value for m in ("visible", "infrared") for name, value in FEATURES.items()}
    text = origin if isinstance(origin, str) else json.dumps(origin)
    np.savez(tree / "f.npz", **arrays, origin=np.array(text))
    try:
        _, known = feature_store.load_features(tree / "f.npz")
    except InputError as error:
        check_line(error, "f.npz: ")
        return
    assert isinstance(known, dict)


FEATURES = {"paths": np.array(["a.jpg"]), "mine/FC": np.ones((1, 2), np.float32)}

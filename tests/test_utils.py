"""Flags, devices, checkpoint files, logs."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from core.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from core.files import atomic
from core.run import RunLog, run_lock
from data_loader import worker_options
from utils import InputError


def parser():
    p = utils.ArgumentParser(prog="script.py")
    p.add_argument("--batch_size", type=utils.number(int, 2), default=8)
    p.add_argument("--lr", type=utils.number(float, 0, above=True), default=0.1)
    p.add_argument("--rande", type=utils.number(float, 0, 1), default=0.5)
    return p


@pytest.mark.parametrize("flag", [["--batch_size", "4"], ["--batch-size", "4"], ["--batch-size=4"]])
def test_both_spellings(flag):
    assert parser().parse_args(flag).batch_size == 4


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch_size", "1"),
        ("--batch_size", "-3"),
        ("--batch_size", "2.5"),
        ("--batch_size", "many"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "-1e-3"),
        ("--rande", "1.01"),
        ("--unknown", "1"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([flag + "=" + value])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert flag in error


def run(code, *args):
    repo = Path(utils.__file__).parent
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(repo)}
    )


def test_cli_turns_input_errors_into_one_line():
    code = "import utils\ndef main(): raise utils.InputError('a.jpg: no image; remove it')\nutils.cli(main)"
    result = run(code)
    assert result.returncode == 2
    assert result.stderr == "-c: error: a.jpg: no image; remove it\n"


def test_cli_shows_only_the_error_of_a_loading_process():
    code = (
        "import torch, utils\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 1\n"
        "    def __getitem__(self, i): raise utils.InputError('b.jpg: no image; remove it')\n"
        "utils.cli(lambda: next(iter(torch.utils.data.DataLoader(Data(), num_workers=1))))"
    )
    result = run(code)
    assert result.returncode == 2
    assert result.stderr == "-c: error: b.jpg: no image; remove it\n"


def test_other_errors_keep_their_traceback():
    result = run("import utils\nutils.cli(lambda: 1 / 0)")
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr


def test_device_without_cuda_is_an_error_that_names_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gpu in ("0", "1"):
        with pytest.raises(InputError, match=f"--gpu {gpu}: PyTorch sees no CUDA device here; pass --gpu cpu"):
            utils.select_device(gpu)
    assert utils.select_device("cpu") == torch.device("cpu")


def test_bfloat16_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert utils.select_device("0", "off") == torch.device("cuda", 0)
    with pytest.raises(InputError, match="--amp bf16: Tesla V100 does not compute in bfloat16; pass --amp off"):
        utils.select_device("0", "bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert utils.select_device("0", "bf16") == torch.device("cuda", 0)


def test_ranks_take_a_gpu_each_and_know_their_number_before_they_join(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert utils.process_index() == 5
    assert utils.select_device("0") == torch.device("cuda", 1)
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="rank 2 of this machine has no GPU of its 2; pass --nproc_per_node=2"):
        utils.select_device("0")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert utils.cores() == 2
    assert worker_options(8)["num_workers"] == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert utils.cores() == 64


def test_memory_is_pinned_only_for_a_gpu_that_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        assert worker_options(2)["pin_memory"] == used


def test_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert utils.select_device("0") == torch.device("cuda", 0)
    with pytest.raises(InputError, match="--gpu 1: this machine has one GPU: use --gpu 0"):
        utils.select_device("1")
    for wrong in ("-1", "first", "²"):
        with pytest.raises(InputError, match=f"--gpu {wrong}"):
            utils.select_device(wrong)


def test_seeding_repeats_every_generator():
    def draw(*seed):
        utils.seed_everything(*seed)
        import random

        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(0, 1) == draw(0, 1)
    assert draw(0, 1) != draw(0, 2)
    assert draw(0, 1) != draw(1, 0)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "last.t"
    save_checkpoint({"net": {"a": torch.ones(2)}}, path)
    before = path.read_bytes()

    class Half:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"net": {"a": torch.zeros(1000)}, "rest": Half()}, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.t"]


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/last\.t"):
        save_checkpoint({}, tmp_path / "file" / "last.t")
    with pytest.raises(InputError, match="is a folder"):
        save_checkpoint({}, tmp_path)


def test_published_checkpoints_with_numpy_values_load(tmp_path):
    path = tmp_path / "published.t"
    content = {"net": {"w": torch.ones(2)}, "cmc": np.ones(20), "mAP": np.float64(0.7), "epoch": 3}
    torch.save(content, path)
    loaded = load_checkpoint(path)
    assert loaded["mAP"] == 0.7
    assert np.array_equal(loaded["cmc"], np.ones(20))
    # NumPy 1 wrote the same pickles under numpy.core; the byte strings differ in length, so pickle them unframed.
    old = pickle.dumps(np.float64(0.7), protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    import zipfile

    old_path = tmp_path / "old.t"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old_path, "w") as target:
        for item in source.namelist():
            data = source.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(item, data)
    assert load_checkpoint(old_path)["mAP"] == 0.7


def test_checkpoint_that_runs_code_is_refused(tmp_path):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "crafted.t"
    torch.save({"net": Crafted()}, path)
    with pytest.raises(InputError, match=r"crafted\.t"):
        load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "cut"])
def test_broken_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "broken.t"
    if content == "cut":
        torch.save({"net": {"w": torch.ones(1000)}}, path)
        content = path.read_bytes()[:-300]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.t"):
        load_checkpoint(path)


def test_missing_and_foreign_checkpoints_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.t"):
        load_checkpoint(tmp_path / "none.t")
    torch.save({"state": 1}, tmp_path / "other.t")
    with pytest.raises(InputError, match=r"other\.t.*net"):
        load_checkpoint(tmp_path / "other.t")


def test_checkpoint_is_found_by_path_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.t").touch()
    assert find_checkpoint("a.t", "models") == Path("models/a.t")
    assert find_checkpoint("models/a.t", "models") == Path("models/a.t")
    (tmp_path / "a.t").touch()
    assert find_checkpoint("a.t", "models") == Path("a.t")
    with pytest.raises(InputError, match=r"b\.t.*models"):
        find_checkpoint("b.t", "models")


def test_resumed_log_holds_each_epoch_once(tmp_path):
    log = RunLog(tmp_path, "run")
    for epoch in range(4):
        log.epoch({"epoch": epoch, "loss": 1.0 / (epoch + 1)})
    log.close()
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')  # the process died while writing
    log = RunLog(tmp_path, "run", resumed_epoch=1)
    log.epoch({"epoch": 2, "loss": 5.0})
    log.close()
    entries = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [(entry["epoch"], entry["loss"]) for entry in entries] == [(0, 1.0), (1, 0.5), (2, 5.0)]
    log = RunLog(tmp_path, "run")
    log.close()
    assert (tmp_path / "run.jsonl").read_text() == ""


def test_lock_leaves_runs_alone_whose_names_begin_alike(tmp_path):
    """What another live run writes, and its lock, stay; and it still keeps others out."""
    name = "run_seed_0_9"
    with run_lock(tmp_path / f"{name}_adam"), atomic(tmp_path / f"{name}_adam_last.t") as temporary:
        with run_lock(tmp_path / name), atomic(tmp_path / f"{name}_last.t"):
            assert temporary.exists()
        code = f"from core.run import run_lock\nwith run_lock({str(tmp_path / name)!r} + '_adam'): pass"
        other = run(code)
        assert "InputError" in other.stderr
        assert f"is writing now (process {os.getpid()}" in other.stderr
    assert {file.name for file in tmp_path.glob("*.t")} == {f"{name}_last.t", f"{name}_adam_last.t"}


def test_without_locks_there_is_a_warning(tmp_path):
    """As on Windows, whose Python has no fcntl: everything can be imported, and runs."""
    code = "import sys\nsys.modules['fcntl'] = None\nimport train_ext_test0\n"
    code += "from core import run\nfrom tools import search\n"
    result = run(f"{code}with run.run_lock({str(tmp_path / 'run')!r}): print('runs')")
    warning, runs = result.stdout.splitlines()
    assert "run.lock: cannot be locked (No locks available); do not start a second run of this name" in warning
    assert runs == "runs"


def test_temporaries_of_killed_processes_are_removed_by_the_next_write(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    left = [tmp_path / f".last.t.{host}.{pid}.abc" for pid in (gone.pid, os.getppid())]
    left += [tmp_path / f".last.t_2.{host}.{gone.pid}.abc", tmp_path / f".last.t.elsewhere.{gone.pid}.abc"]
    for file in left:
        file.touch()
    with atomic(tmp_path / "last.t"):
        pass
    assert [file.exists() for file in left] == [False, True, True, True]

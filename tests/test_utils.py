"""The command line, errors, devices, processes and seeds."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pre_process_sysu
import testa
import train_ext_test0
import utils
from conftest import exit_status
from data_loader import worker_options
from tools import demo_data
from utils import InputError


def parser():
    p = utils.ArgumentParser(prog="script.py")
    p.add_argument("--batch_size", type=utils.bounded(int, 2), default=8)
    p.add_argument("--lr", type=utils.bounded(float, 0, above=True), default=0.1)
    p.add_argument("--rande", type=utils.bounded(float, 0, 1), default=0.5)
    return p


def test_a_package_that_is_not_installed_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(utils.sys.modules, "drawing.report", None)
    assert exit_status(testa, ["--resume", "net.t", "--report", tmp_path]) == 2
    error = "drawing.report: is not installed; run: python -m pip install -r tools/requirements.txt\n"
    assert capsys.readouterr().err == f"testa.py: error: {error}"


@pytest.mark.parametrize("flag", [["--batch_size", "4"], ["--batch-size", "4"], ["--batch-size=4"]])
def test_both_spellings(flag):
    assert parser().parse_args(flag).batch_size == 4


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--batch_size", value) for value in ("1", "-3", "2.5", "many", "0x10", "", 40 * "9")],
        *[("--lr", value) for value in ("0", "nan", "inf", "-inf", "1e400", "-1e-3")],
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


@pytest.mark.parametrize("script", [train_ext_test0, testa, pre_process_sysu, demo_data])
def test_every_number_has_bounds(script):
    for action in script.get_args_parser()._actions:
        assert action.choices or action.type not in (int, float), action.dest


class Script:
    """A script whose `main` raises an error."""

    __file__ = "script.py"

    def __init__(self, error):
        self.error = error

    def main(self):
        raise self.error


class BadImage(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        raise InputError("a\nb.jpg: no image; remove it")


def test_an_error_of_a_loading_process_is_its_one_line(capsys):
    with pytest.raises(InputError) as caught:
        next(iter(torch.utils.data.DataLoader(BadImage(), num_workers=1)))
    assert exit_status(Script(caught.value), []) == 2
    assert capsys.readouterr().err == "script.py: error: a?b.jpg: no image; remove it\n"


class BadDisk(BadImage):
    def __getitem__(self, _):
        raise OSError(5, "Input/output error", "a.jpg")


def test_an_error_of_the_system_in_a_loading_process_is_one_line(capsys):
    with pytest.raises(OSError, match="Original Traceback") as caught:
        next(iter(torch.utils.data.DataLoader(BadDisk(), num_workers=1)))
    assert exit_status(Script(caught.value), []) == 2
    line = "[Errno 5] Input/output error: 'a.jpg'; correct this and run again"
    assert capsys.readouterr().err == f"script.py: error: {line}\n"


def test_a_line_break_in_a_name_cuts_nothing_off(capsys):
    assert exit_status(Script(InputError("a\nb.jpg: no image; remove it")), []) == 2
    assert capsys.readouterr().err == "script.py: error: a?b.jpg: no image; remove it\n"


def test_all_kinds_of_spaces_stay_in_a_line():
    assert utils.one_line("a\u3000b\xa0c d\te\x1b[2J\u202e") == "a\u3000b\xa0c d?e?[2J?"


def test_the_status_is_right_where_nothing_can_be_written(monkeypatch):
    def write(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=write))
    with pytest.raises(SystemExit) as stopped:
        utils.ArgumentParser().parse_args(["--bogus"])
    assert stopped.value.code == 2


def test_a_daemon_has_no_streams(monkeypatch):
    """As after >&-, <&- and 2>&-."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    done = []
    utils.cli(lambda: [print("x"), print("y", file=sys.stderr), done.extend(utils.progress([1]))])
    assert done == [1]
    assert exit_status(Script(InputError("a")), []) == 2


def test_other_threads_still_say_what_they_died_of(capsys):
    def die():
        raise MemoryError

    thread = threading.Thread(target=die)
    assert exit_status(SimpleNamespace(__file__="x.py", main=lambda: [thread.start(), thread.join()]), []) == 0
    assert capsys.readouterr().err.endswith("MemoryError\n")


class Ignoring:
    """What is raised when it goes is ignored, as in callbacks of a fork."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_lost_where_python_ignores_what_it_raises(number, capsys):
    done = []

    def main():
        Ignoring(number)
        time.sleep(3)
        done.append(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    try:
        assert exit_status(SimpleNamespace(main=main, __file__="script.py"), []) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert not done
    assert capsys.readouterr().err == f"\nscript.py: stopped by {number.name}\n"


def test_an_error_that_takes_the_place_of_a_signal(capsys):
    def main():
        try:
            raise utils.Stopped(signal.SIGTERM, " somewhere")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9483328 vs 9483224")

    assert exit_status(SimpleNamespace(main=main, __file__="script.py"), []) == 143
    assert capsys.readouterr().err == "\nscript.py: stopped by SIGTERM somewhere\n"


def test_names_of_another_encoding_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert exit_status(Script(None), []) == 2
    line = "script.py: error: file names are read as ascii, not UTF-8; set PYTHONUTF8=1\n"
    assert capsys.readouterr().err == line


def test_help_begins_with_the_first_line_of_the_docstring():
    assert "\nShort.\n" in utils.ArgumentParser(description="Short.\n\nLong.\n").format_help()
    assert "None" not in utils.ArgumentParser(description=None).format_help()  # python -OO


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(Script(ZeroDivisionError()), [])


def test_a_lost_process_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(utils, "process_count", lambda: 2)
    assert exit_status(Script(RuntimeError("Connection closed by peer [1]\nmore")), []) == 2
    line = "script.py: process 0: error: another process has ended; see its own message (Connection closed by peer [1])"
    assert capsys.readouterr().err == f"{line}\n"


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


@pytest.mark.parametrize(
    ("flags", "fast"), [("fma avx2", False), ("avx512_bf16 sha", True), ("amx_bf16 amx_tile", True)]
)
def test_a_cpu_computes_in_bfloat16_if_its_flags_say_so(flags, fast, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(utils.Path, "read_text", lambda path: flags)
    assert utils.computes_bf16(cpu) == fast
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not utils.computes_bf16(cpu)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(utils.Path, "read_text", lambda path: utils.Path("/no/such/file").open().read())
    assert not utils.computes_bf16(cpu)


def test_processes_take_a_gpu_each_and_know_their_index_before_they_join(monkeypatch):
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
    with pytest.raises(InputError, match="process 2 finds only 2 GPUs on this machine; pass --nproc_per_node=2"):
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


@pytest.mark.parametrize(
    ("surplus", "remedy"),
    [
        (["b.t"], "a pattern such as *_best.t must match one file"),
        (["--rseume", "b.t"], "did you mean --resume?"),
        (["--other", "1"], "--help lists the flags"),
    ],
)
def test_surplus_arguments_are_one_line_with_a_remedy(surplus, remedy, capsys):
    parser = utils.ArgumentParser(prog="testa.py")
    parser.add_argument("--resume")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--resume", "a.t", *surplus])
    expected = f"testa.py: error: unrecognized arguments: {' '.join(surplus)} ({remedy})\n"
    assert capsys.readouterr().err == expected

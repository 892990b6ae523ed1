"""What every script shares: errors, command line, device, processes, seed, precision and progress bars."""

import argparse
import contextlib
import difflib
import errno
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import traceback
import unicodedata
import warnings
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import TqdmMonitorWarning, tqdm

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or ONNX Runtime reports to Microsoft what it runs


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the file or flag, the value, the remedy."""


def one_line(text):
    """A text with ? for line breaks, control characters, and others that have no look; all kinds of spaces stay."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else "?" for c in text)


def printable(text):
    """A text with ? for bytes of file names that are not UTF-8: no figure, page or JSON can hold them."""
    return text.encode(errors="replace").decode()


FLAGS = set()  # of this program, for remedies
AMP = ("off", "bf16")  # mixed precision
NO_WORKERS = ("pass", "--workers 0")
SMALLER = ("lower", "--batch_size", "--test_batch", "--batch", "--workers")
# What runs out: how errors say it, what the line says, and what helps, by flags that the program has or without.
SHORTAGES = (
    ("Too many open files|ancdata", "too many files are open", NO_WORKERS, "raise the limit: ulimit -n 4096"),
    ("shared memory|Bus error", "/dev/shm is too small or missing", NO_WORKERS, "enlarge it: docker run --shm-size=8g"),
    ("new thread|Resource temporarily", "no more processes can be started", NO_WORKERS, "raise the limit: ulimit -u"),
    ("CUDA.*out of memory|ALLOC_FAILED", "the GPU's memory is full", SMALLER[:-1], "end other programs on it"),
    ("MemoryError|allocate memory|bad.alloc|create a primitive", "the memory is full", SMALLER, "free some"),
    (r"terminated abruptly|worker \(pid", "a process was killed or could not go on", SMALLER, "free some memory"),
)
REMEDIES = {errno.ENAMETOOLONG: "choose a shorter name", errno.EACCES: "correct its permissions"}


def shortage(error):
    """The line on what has run out, if an error or one that has led to it says so; else None."""
    wrapped = isinstance(error, InputError)  # of a lock that another process holds, for one
    while error:
        text = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, OSError) and any(file.endswith("synchronize.py") for file in files):
            text += " (a semaphore in shared memory)"
        # Others, such as a ValueError, say what the user wrote.
        known = isinstance(error, OSError | RuntimeError | MemoryError) and not type(error).__module__.startswith("PIL")
        known &= not (wrapped and isinstance(error, BlockingIOError))
        for signs, problem, (verb, *flags), remedy in SHORTAGES if known else ():
            if line := next((line for line in text.splitlines() if re.search(signs, line)), None):
                own = ", ".join(flag for flag in flags if flag.split()[0] in FLAGS)
                return f"{problem} ({line.strip(': '):.160}); {f'{verb} {own}, or ' if own else ''}{remedy}"
        error = error.__cause__ or error.__context__


def _message(error):
    """What an error says, without the traceback that comes around it from a loading process."""
    text = str(error).strip()
    if "\nOriginal Traceback (most recent call last):\n" in text:
        *_, text = re.split(rf"\n(?:\w+\.)*{type(error).__name__}: ", text)
    return text


def _line(error):
    """The line for an error that the user can mend; None for any other."""
    if (line := shortage(error)) or isinstance(error, InputError):
        return line or _message(error)
    if isinstance(error, OSError):
        name = error.filename2 or error.filename  # where a file was to be moved, or what cannot be opened
        name = f"{name}: " if name else ""
        return f"{name}{error.strerror or _message(error)}; {REMEDIES.get(error.errno, 'correct this')} and run again"
    if isinstance(error, ModuleNotFoundError):  # of a package that few programs need, and `make demo` does not install
        lists = "-r tools/requirements.txt"
        if error.name in ("imagecorruptions", "numba"):
            lists = "--no-deps -r tools/corruption_requirements.txt"
        return f"{error.name}: is not installed; run: python -m pip install {lists}"
    reason = str(error).strip().split("\n")[0]
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: torch.compile failed ({reason}); leave it out"
    if process_count() > 1 and re.search("Connection (closed|reset)|[Tt]imed out", str(error)):
        return f"another process has ended; see its own message ({reason})"


def cli(main):
    """Run a script's `main`: an error that the user can mend, such as an `InputError`, becomes one line on stderr and
    exit status 2, without a traceback."""
    path = Path(sys.argv[0])
    program = f"{path.parent.name}.py" if path.name == "__main__.py" else path.name  # python -m FOLDER
    FLAGS.clear()
    for name in ("stdin", "stdout", "stderr"):  # of a daemon, or after >&-
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 (it stays open)
    sys.stdout.reconfigure(errors="replace")  # print ? for characters that the terminal cannot show
    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: half-written files are removed
    sys.unraisablehook = _deliver_again
    threading.excepthook = _silent_if_told
    try:
        if sys.getfilesystemencoding() != "utf-8":
            raise InputError(f"file names are read as {sys.getfilesystemencoding()}, not UTF-8; set PYTHONUTF8=1")
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what Python writes when it ends goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt, Stopped) as error:
        if stop := _signal_of(error):
            number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
            print(f"\n{program}: stopped by {number.name}{stop}", file=sys.stderr)
            sys.exit(128 + number)
        if not (line := _line(error)):
            raise
        program += f": process {process_index()}" if process_count() > 1 else ""
        sys.unraisablehook = lambda _: None  # what is half made complains when it is taken down
        sys.exit(_one_line_exit(program, line))
    finally:
        # Loading processes that an error has left. They ignore SIGTERM, by which Python would end them, and wait.
        for child in multiprocessing.active_children():
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would be alarmed
            child.kill()


def begin_loading(_=None):
    """For a loading process. Ctrl-C in a terminal and the SIGTERM of many queues reach all processes, but the main one
    still has a step to finish. `cli` ends the loading processes. They also end by themselves once it is gone.

    One that cannot send a batch, as something has run out, ends without a word: the main process, which would wait for
    the batch for ever, gives the line.
    """
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))


def end_with_the_main_process():
    """For a process of a pool: Ctrl-C goes to all processes, but the main one ends the others, by SIGTERM. If it is
    killed, nobody does: they would wait for work for ever."""
    try:
        threading.Thread(target=_end_after, args=[multiprocessing.parent_process()], daemon=True).start()
    except RuntimeError:  # memory or threads have run out; the pool tells that a process has ended
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_after(process):
    process.join()
    os._exit(1)


@contextlib.contextmanager
def map_processes(function, items, workers):
    """A block with `map` by so many processes, at most one a core (threads would wait for each other), or with 0 by
    this one. They have ended when the block has."""
    if not workers:
        yield map(function, items)
        return
    pool = ProcessPoolExecutor(min(workers, cores()), initializer=end_with_the_main_process)
    try:
        yield (result_of(pool, future) for future in [pool.submit(function, item) for item in items])
    finally:
        pool.shutdown(cancel_futures=True)


def result_of(pool, future):
    """The result of a future of a `ProcessPoolExecutor`. Where no thread can be started, that of the pool dies, and
    Python would wait for ever."""
    while not future.done():
        alive = pool._executor_manager_thread.is_alive()
        if not wait([future], timeout=1).done and not alive:
            raise RuntimeError("can't start new thread")
    return future.result()


class Stopped(BaseException):
    """A signal has stopped the program; the message, if any, says where."""

    def __init__(self, number, where=""):
        super().__init__(where)
        self.number = signal.Signals(number)


def _stop(number, _):
    raise Stopped(number)


def _signal_of(error):
    """The signal that has led to an error, if any: PyTorch, stopped while it writes, raises an error of its own."""
    while error and not isinstance(error, KeyboardInterrupt | Stopped):
        error = error.__context__
    return error


def _deliver_again(ignored):
    """Python ignores what is raised in some callbacks, as those of a fork: a signal that came there comes again."""
    if not isinstance(ignored.exc_value, KeyboardInterrupt | Stopped):
        sys.__unraisablehook__(ignored)
        return
    number = getattr(ignored.exc_value, "number", signal.SIGINT)
    again = threading.Timer(0.1, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _silent_if_told(ended):
    """What has run out for the thread of a pool, `result_of` tells."""
    if type(ended.thread).__module__ != "concurrent.futures.process" or not shortage(ended.exc_value):
        threading.__excepthook__(ended)


def _one_line_exit(program, message):
    with contextlib.suppress(OSError):  # a full disk, where stderr is a file
        print(f"{program}: error: {one_line(message)}", file=sys.stderr)
    return 2


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of the flags that have one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes `--batch-size` where the flag is called `--batch_size`."""

    def __init__(self, description=None, **kwargs):
        """description: a program's docstring, of which --help shows the first line."""
        description = (description or "").partition("\n")[0]  # python -OO has none
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        if other := next((arg for arg in args if printable(arg) != arg), None):
            sys.exit(_one_line_exit(self.prog, f"{other}: is no text in UTF-8, which JSON needs; rename it"))
        for flag, arg in itertools.pairwise(["", *args]):  # of a variable of the shell that is not set
            if not arg or re.fullmatch("--[^=]+=", arg):
                sys.exit(_one_line_exit(self.prog, f"{arg or flag}: has an empty value; give one, or leave it out"))
        FLAGS.update(self._option_string_actions)
        return super().parse_known_args([*map(self._underscored, args)], namespace)

    @staticmethod
    def _underscored(arg):
        flag, equals, value = arg.partition("=")
        return flag[:2] + flag[2:].replace("-", "_") + equals + value if re.match(r"--\w", arg) else arg

    def error(self, message):
        remedy = "--help lists the flags"
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            if unknown[1].title() in ("True", "False"):
                remedy = "a flag without a value is switched on by its name alone"
            elif not unknown[1].startswith("-"):
                remedy = "a pattern such as *_best.t must match one file"
            elif similar := difflib.get_close_matches(unknown[1].split("=")[0], self._option_string_actions, 1, 0.75):
                remedy = f"did you mean {similar[0]}?"
        sys.exit(_one_line_exit(self.prog, f"{message} ({remedy})"))


def bounded(kind, low, high=10**9, above=False):
    """An argparse type: an int or float of at least `low` (strictly more, with `above`) and at most `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ((value > low if above else value >= low) and value <= high):  # NaN is neither
            noun = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {noun} {'above' if above else 'of at least'} {low} and at most {high}"
            )
        return value

    return parse


def check_device(gpu):
    """Raise InputError for a `--gpu` that is not here -> its number, or "cpu". Under `torchrun`, `--gpu` only chooses
    CUDA or the CPU: process i of a machine takes its CUDA device i."""
    if gpu == "cpu":
        return gpu
    if not (gpu.isascii() and gpu.isdigit()):
        raise InputError(f"--gpu {gpu}: give the number of a GPU, or cpu")
    if not torch.cuda.is_available():
        raise InputError(f"--gpu {gpu}: PyTorch sees no CUDA device here; pass --gpu cpu to run on the CPU")
    count = torch.cuda.device_count()
    if dist.is_torchelastic_launched():
        number = int(os.environ["LOCAL_RANK"])
        if number >= count:
            raise InputError(f"process {number} finds only {count} GPUs on this machine; pass --nproc_per_node={count}")
    elif (number := int(gpu)) >= count:
        has = "one GPU: use --gpu 0" if count == 1 else f"{count} GPUs: use --gpu 0 to {count - 1}"
        raise InputError(f"--gpu {gpu}: this machine has {has}")
    return number


def select_device(gpu, amp="off"):
    """`--gpu` ("0", "1", ... or "cpu") -> torch.device. Raises InputError if it is not here, or cannot compute in the
    precision of `--amp`."""
    if (number := check_device(gpu)) == "cpu":
        return torch.device("cpu")
    # Images keep their size, so the search for the fastest convolutions pays. Precision stays PyTorch's: convolutions
    # in TF32 where mixed precision is off, products of features, and so distances, in float32.
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(number)
    device = torch.device("cuda", number)
    if amp == "bf16" and not computes_bf16(device):
        raise InputError(f"--amp bf16: {torch.cuda.get_device_name()} does not compute in bfloat16; pass --amp off")
    return device


def computes_bf16(device):
    """Whether a GPU, or a CPU under Linux, has instructions for bfloat16 (that oneDNN has not been told to ignore);
    without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cores():
    """The processor cores that this process may use: under Slurm or in a container, not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def process_index():
    """This process's number among those that `torchrun` started; known before they have joined."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def seed_everything(*seed):
    """Seed Python, NumPy and PyTorch (all devices) from a tuple of integers, such as (seed, epoch)."""
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def autocast(device, amp):
    """Mixed precision: a context that runs matrix products in bfloat16 (`amp="bf16"`) or changes nothing ("off")."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def full_precision(tensor):
    """What mixed precision made bfloat16, in float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def progress(iterable=None, **kwargs):
    """A tqdm bar; quiet where nobody watches (stderr is not a terminal), and on all processes but the first."""
    warnings.simplefilter("ignore", TqdmMonitorWarning)  # a bar does without its thread
    return tqdm(iterable, dynamic_ncols=True, disable=True if process_index() else None, **kwargs)

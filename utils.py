"""What every script shares: flags, errors, device, seed, precision, checkpoint files, logs and progress bars."""

import argparse
import contextlib
import errno
import glob
import hashlib
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RANKS_AGREE = 10  # steps between two times that the ranks agree on whether to pause: it waits for the device


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the file or flag, the value, the remedy."""


def cli(main):
    """Run a script's `main`: an `InputError` becomes one line on stderr and exit status 2, without a traceback."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without a letter for ± shows a question mark
    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: half-written files are removed
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what Python writes when it ends goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except InputError as error:
        sys.exit(_one_line_exit(Path(sys.argv[0]).name, error))
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().splitlines()[0]
            sys.exit(
                _one_line_exit(Path(sys.argv[0]).name, f"--compile: torch.compile failed ({reason}); leave it out")
            )
        if ranks() == 1 or not re.search("Connection (closed|reset)|[Tt]imed out", str(error)):
            raise
        line = str(error).strip().splitlines()[0]
        name = f"{Path(sys.argv[0]).name}: rank {rank()}"
        sys.exit(_one_line_exit(name, f"another rank has ended; its own lines say why ({line})"))
    except (KeyboardInterrupt, Stopped) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        print(f"\n{Path(sys.argv[0]).name}: stopped by {number.name}{stop}", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        # Loading processes that an error has left. They ignore SIGTERM, by which Python would end them, and wait.
        for child in multiprocessing.active_children():
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would be alarmed
            child.kill()


def leave_signals_to_the_main_process(_=None):
    """For a loading process: a terminal's Ctrl-C, and many a queue's SIGTERM, goes to all processes, but the main one
    has a step to finish. `cli` ends the others, and they end on their own when it is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_with_the_main_process():
    """For a process of a pool: Ctrl-C goes to all processes, but the main one ends the others, by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stopped(BaseException):
    """A signal has stopped the program; the message, if any, says where."""

    def __init__(self, number, where=""):
        super().__init__(where)
        self.number = signal.Signals(number)


def _stop(number, _):
    raise Stopped(number)


class Pauses:
    """When a loop of training is left, to save: every `minutes`, and when a signal asks it to stop.

    Within the context, SIGTERM and Ctrl-C raise `Stopped`. While `hold` is set, they wait for `due`, which is asked
    after each step: `stop` is then the signal's number. A second signal ends the process at once, if it comes a second
    later or more (some launchers send each signal twice).
    """

    def __init__(self, minutes, device):
        self.seconds, self.device, self.hold, self.stop, self._received = 60 * minutes, device, False, 0, 0
        self._asked, self._next = 0, time.monotonic() + self.seconds

    def __enter__(self):
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        now = time.monotonic()
        if self._received and now - self._when < 1:
            return
        if self._received:
            os._exit(128 + number)
        self._received, self._when = number, now
        if not self.hold:
            raise Stopped(number)

    def due(self):
        """Whether to leave the loop now. Ranks agree on it; on GPUs, every few times that they ask."""
        wanted = [self._received, int(time.monotonic() > self._next)]
        self._asked += 1
        if ranks() > 1:
            if self.device.type == "cuda" and self._asked % RANKS_AGREE:
                return False
            agreed = torch.tensor(wanted, device=self.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            wanted = agreed.tolist()
        self.stop, time_is_up = wanted
        if time_is_up:
            self._next = time.monotonic() + self.seconds
        return bool(self.stop or time_is_up)

    @contextlib.contextmanager
    def at_once(self):
        """A block that changes nothing worth saving, within held ones: a signal, also one that waits, raises `Stopped`.
        (Of several ranks, all finish it.)"""
        if self._received and ranks() == 1:
            raise Stopped(self._received)
        self.hold = ranks() > 1
        yield
        self.hold = True


def _one_line_exit(program, message):
    # An error from a loading process arrives with that process's traceback around it: its last line is the error.
    line = str(message).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
    print(f"{program}: error: {line}", file=sys.stderr)
    return 2


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of the flags that have one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes `--batch-size` where the flag is called `--batch_size`."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._underscored(str(arg)) for arg in args], namespace)

    @staticmethod
    def _underscored(arg):
        flag, equals, value = arg.partition("=")
        return flag[:2] + flag[2:].replace("-", "_") + equals + value if re.match(r"--\w", arg) else arg

    def error(self, message):
        sys.exit(_one_line_exit(self.prog, f"{message} (--help lists the flags)"))


def number(kind, low, high=10**9, above=False):
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


def start_ranks(gpu, amp="off"):
    """Join the other ranks if `torchrun` started this process -> `select_device`'s torch.device."""
    device = select_device(gpu, amp)
    if dist.is_torchelastic_launched():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def leave_ranks():
    """Part from the other ranks. Delete `DistributedDataParallel`s first: one that is left as the last owner of the
    process group waits, in its destructor, for a thread that waits for it."""
    wait_for_ranks()
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_ranks():
    """Return when all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()


def rank():
    """This process's number among those that `torchrun` started; known before they have joined."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor):
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def min_over_ranks(tensor):
    """The smallest value of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def share_buffers(net):
    """Give all ranks the first one's running statistics, so that they test the network that is saved."""
    for buffer in net.buffers() if dist.is_initialized() else []:
        dist.broadcast(buffer, 0)


def check_device(gpu):
    """Raise InputError for a `--gpu` that is not here -> its number, or "cpu". Under `torchrun`, `--gpu` only chooses
    CUDA or the CPU: rank r of a machine takes its CUDA device r."""
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
            raise InputError(f"rank {number} of this machine has no GPU of its {count}; pass --nproc_per_node={count}")
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
    if amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--amp bf16: {torch.cuda.get_device_name()} does not compute in bfloat16; pass --amp off")
    return torch.device("cuda", number)


def cores():
    """The processor cores that this process may use: under Slurm or in a container, not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def seed_everything(*seed):
    """Seed Python, NumPy and PyTorch (all devices) from a tuple of integers, such as (seed, epoch)."""
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def generator_states(device):
    """States of PyTorch's generators, of the CPU and of the device, on each rank: what augmentation draws from."""
    mine = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    states = [mine]
    if ranks() > 1:
        states = [None] * ranks()
        dist.all_gather_object(states, mine)
    return states


def set_generators(states, device):
    """Go on drawing where `generator_states` were read."""
    cpu, *cuda = states[rank()]
    torch.set_rng_state(cpu)
    for state in cuda if device.type == "cuda" else []:
        torch.cuda.set_rng_state(state, device)


def autocast(device, amp):
    """Mixed precision: a context that runs matrix products in bfloat16 (`amp="bf16"`) or changes nothing ("off")."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def full_precision(tensor):
    """What mixed precision made bfloat16, in float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def progress(iterable=None, **kwargs):
    """A tqdm bar; quiet where nobody watches (stderr is not a terminal), and on all ranks but the first."""
    return tqdm(iterable, dynamic_ncols=True, disable=True if rank() else None, **kwargs)


# ---------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic(path):
    """Give a temporary path beside `path`; move it there when the block ends, remove it if the block fails.

    What a process that was killed has left there is removed, too. Raises InputError when the disk is full.
    """
    path = Path(path)
    check_output(path)
    mine = f".{path.name}.{socket.gethostname()}."
    for other in path.parent.glob(f"{glob.escape(mine)}*"):
        if not _is_alive(other.name.removeprefix(mine).split(".")[0]):
            other.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{mine}{os.getpid()}.")
    os.close(handle)
    os.chmod(name, 0o666 & ~_umask())
    try:
        with writing(path):
            yield Path(name)
            flush(name)
            os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def flush(path):
    """Have the disk hold what was written: or a power failure could leave a new name with nothing in it."""
    with writing(path), open(path, "r+b") as file:
        os.fsync(file)


def _is_alive(process):
    """Whether another process of this number lives, or may live: Windows, where signal 0 is Ctrl-C, is not asked."""
    if os.name == "nt":
        return True
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()


@contextlib.contextmanager
def writing(path):
    """A block that writes `path`: raises InputError when the disk is full."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save fails again, over the OSError
        if getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{path}: cannot be written ({cause.strerror}); make room there, and go on; what was there before is whole"
        ) from error


def check_output(path):
    """Make the folder of `path`, and raise InputError if no file can be written there: before the work, not after."""
    check_folder(path)
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; name a file")


def check_folder(path):
    """Make the folder of `path`, and raise InputError if nothing can be written there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = next((f"{there} is a file" for there in path.parents if there.is_file()), error.strerror)
        raise InputError(f"{path}: cannot write there ({reason}); choose another folder") from error


@contextlib.contextmanager
def run_lock(path, remedy="another --model_path and --log_path"):
    """Keep other processes from running what is named `path`, for as long as the block runs or the process lives. All
    ranks but the first need no lock. Raises InputError when another process holds it.

    It is a hidden file, which stays: removing it would race with a run that is just opening it.
    """
    path = Path(path)
    check_folder(path)
    lock = path.parent / f".{path.name}.lock"
    if rank() > 0:
        yield
        return
    try:
        file = lock.open("a+")
    except OSError as error:
        raise InputError(f"{lock}: cannot be opened ({error.strerror}); remove it, or write elsewhere") from error
    with file:
        try:
            if not fcntl:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            who = file.read() or "it does not say where"
            raise InputError(
                f"{path}: another run of this name is writing now ({who}); wait for it, or choose {remedy}"
            ) from error
        except OSError as error:
            print(f"warning: {lock}: cannot be locked ({error.strerror}); do not start a second run of this name")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_json(value, path):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def save_checkpoint(checkpoint, path):
    """Write a checkpoint (dict of tensors, numbers, strings) so that `path` is always whole: the old one or the new.
    All ranks but the first write nothing."""
    if rank() > 0:
        return
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(checkpoint, file)


# Published checkpoints hold their metrics as NumPy scalars and arrays, pickled by NumPy 1: exactly these names load.
_NUMPY_PICKLES = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    *[
        (getattr(np._core.multiarray, name), f"numpy.{package}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for package in ("core", "_core")
    ],
]


def load_checkpoint(path):
    """Read a checkpoint to the CPU. Nothing in the file is executed: only tensors and plain values load.

    Raises InputError when the file is missing, cut off, no checkpoint, or holds anything else.
    """
    checkpoint = load_weights(path)
    if "net" not in checkpoint:
        raise InputError(f"{path}: a file without 'net' is no checkpoint of this family; name one with --resume")
    flags = checkpoint.get("args", {})
    if not (isinstance(flags, dict) and all(isinstance(name, str) for name in flags)):
        raise InputError(f"{path}: its 'args' are no training flags; make it again")
    return checkpoint


def load_weights(path):
    """Read a dict of tensors and plain values, such as a state dict, as `load_checkpoint` does."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name an existing one")
    try:
        with torch.serialization.safe_globals(_NUMPY_PICKLES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{path}: cannot be loaded safely ({type(error).__name__}): it is cut off, is no checkpoint, or holds more "
            "than tensors and plain values; take an earlier one, or make it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of weights; name a saved state dict")
    return content


def file_sha256(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(name, folder=""):
    """A file by its path, or by its name in a folder; a path that exists wins. None if there is neither."""
    return next((path for path in (Path(name), Path(folder) / name) if path.is_file()), None)


def find_checkpoint(resume, model_path):
    """`--resume` is a path, or the name of a file under `--model_path`."""
    if path := locate(resume, model_path):
        return path
    raise InputError(f"{resume}: no such file, here or under --model_path {model_path}; train first, or name another")


def check_state(state, path):
    """Raise InputError, naming `path`, if `state` is no state dict: names to tensors."""
    if not (isinstance(state, dict) and state):
        raise InputError(f"{path}: holds no weights; name a saved state dict or checkpoint")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise InputError(f"{path}: {name!r} is a {type(value).__name__}, no weights; name a saved state dict")


class RunLog:
    """The record of a run: a text log (echoed to the console), one JSON line an epoch, and TensorBoard scalars.

    Files: `{folder}/{name}.txt`, `{folder}/{name}.jsonl`, `{folder}/{name}/events.*`. A run that is resumed after
    `resumed_epoch` drops what is past it from JSON lines and scalars, so that each epoch stands there once; a new run
    starts anew. All ranks but the first write nothing.
    """

    def __init__(self, folder, name, resumed_epoch=-1):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where a run is logged

        self.json_path = Path(folder) / f"{name}.jsonl"
        self.writes = rank() == 0
        if not self.writes:
            return
        kept = [entry for entry in read_json_lines(self.json_path) if entry["epoch"] <= resumed_epoch]
        with atomic(self.json_path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self.logger = logging.Logger(name)
        self.logger.addHandler(_TqdmHandler())
        self.logger.addHandler(_FileHandler(Path(folder) / f"{name}.txt", mode="w" if resumed_epoch < 0 else "a"))
        # Purging makes TensorBoard forget the steps of an earlier run of this name.
        self.board = SummaryWriter(Path(folder) / name, purge_step=resumed_epoch + 1)

    def text(self, line):
        if self.writes:
            self.logger.info(line)

    def epoch(self, entry):
        """Append one epoch's values, a flat dict with "epoch" in it, to the JSON lines and the TensorBoard scalars."""
        if not self.writes:
            return
        with writing(self.json_path), self.json_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for key, value in entry.items():
            if isinstance(value, int | float) and key != "epoch":
                self.board.add_scalar(key, value, entry["epoch"])
        self.board.flush()

    def image(self, tag, path, epoch):
        """Show a .png in TensorBoard, too."""
        if self.writes:
            with Image.open(path) as image:
                self.board.add_image(tag, np.asarray(image.convert("RGB")), epoch, dataformats="HWC")

    def close(self):
        if not self.writes:
            return
        self.board.close()
        for handler in self.logger.handlers:
            handler.close()


class _FileHandler(logging.FileHandler):
    """Fails when it cannot write, as the other files do."""

    def handleError(self, record):
        with writing(self.baseFilename):
            raise  # the error that is being handled


class _TqdmHandler(logging.Handler):
    """Prints above a running progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record))
        sys.stdout.flush()  # into a file or a pipe as soon as onto a terminal


def read_json_lines(path):
    """The entries of a log, dicts with an "epoch", from a file that may not exist; anything else in it, such as a line
    cut off by a crash, is left out."""
    entries = []
    for line in path.read_text(errors="replace").split("\n") if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("epoch"), int)]

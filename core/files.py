"""Files that are whole or not there: written beside their place, then moved to it."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from utils import InputError

LARGEST_TEXT = 2**29  # bytes; BUPTCampus's list of its 1.9 million frames may have a fifth of it


@contextlib.contextmanager
def atomic(path):
    """Give a temporary path beside `path`; move it there when the block ends, remove it if the block fails.

    Raises InputError when the disk is full.
    """
    check_output(path)
    temporary = temporary_name(path)
    try:
        with writing(path):
            open(temporary, "xb").close()
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path):
    """A name beside `path` for what will take its place. What killed processes left under such names is removed."""
    path = Path(path)
    # File systems allow 255 bytes; host, process and a random part come after the name.
    name = path.name if len(os.fsencode(path.name)) < 150 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    prefix = f".{name}.{socket.gethostname()}."
    for other in path.parent.glob(f"{glob.escape(prefix)}*"):
        own = re.fullmatch(r"(\d+)\.[0-9a-f]{8}", other.name.removeprefix(prefix))  # not of a host with a longer name
        if own and not _is_alive(own[1]):
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)
    return path.parent / f"{prefix}{os.getpid()}.{secrets.token_hex(4)}"


def flush(path):
    """Wait until the disk holds what was written: otherwise a power failure could leave a name with nothing in it."""
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
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{path}: cannot be written ({cause.strerror}); free some space and run again; the previous file is intact"
        ) from error


def check_output(path):
    """Make the folder of `path`, and raise InputError if no file can be written there: before the work, not after."""
    check_folder(path)
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)  # not `is_dir`, to which a name that is too long is just not there
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: is a folder; name a file")
        if not stat.S_ISREG(status.st_mode):  # a file would take the place of the device or pipe
            raise InputError(f"{path}: is no regular file; name another")
        folder, user = os.stat(Path(path).parent), getattr(os, "geteuid", int)()
        if folder.st_mode & stat.S_ISVTX and user not in (0, status.st_uid, folder.st_uid):  # as in /tmp
            raise InputError(f"{path}: is another user's, who alone may replace it there; name another")


def check_folder(path):
    """Make the folder of `path`, and raise InputError if nothing can be written there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = next((f"{parent} is a file" for parent in path.parents if parent.is_file()), error.strerror)
        raise InputError(f"{path}: cannot write there ({reason}); choose a folder that you may write to") from error


def save_json(value, path):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def file_sha256(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_regular(path):
    """Whether there is a file that is stored: no folder, and nothing that a reader might wait for, as for a pipe, or as
    for the kernel's messages in /proc."""
    return os.path.isfile(path) and not os.path.realpath(path).startswith(("/proc/", "/sys/"))


def regular(path, text=False):
    """`path`, for a reader. OSError if it is there, but neither `is_regular` nor a folder.

    text: it is read whole, so a larger file than any list is an InputError.
    """
    if os.path.exists(path) and not (is_regular(path) or os.path.isdir(path)):
        raise OSError("is no regular file")
    if text and os.path.isfile(path) and os.path.getsize(path) > LARGEST_TEXT:
        raise InputError(f"{path}: has more than {LARGEST_TEXT >> 20} MiB, the most that is read; pass another")
    return path


def locate(name, folder=""):
    """A file by its path, or by its name in a folder; a path that exists wins. None if there is neither.

    A name that no file has may be a pattern such as *_best.t; InputError if several files match it."""
    places = Path(name), Path(folder) / name
    if path := next(filter(is_regular, places), None):
        return path
    found = sorted({path for place in places for path in filter(is_regular, map(Path, glob.glob(str(place))))})
    if len(found) > 1:
        raise InputError(f"{name}: matches {len(found)} files, {', '.join(map(str, found[:4]))}; pass one")
    return found[0] if found else None

"""The address of an index decides what it is."""

import re

from tools.search.file_index import FileIndex
from tools.search.server_index import ServerIndex
from utils import InputError


def open_index(uri, create=False):
    """The index at an address. InputError if there is none (unless `create`) or it cannot be used."""
    if re.match("postgres(ql)?://", uri):
        return ServerIndex(uri, create)
    if "://" in uri:
        raise InputError(f"{uri}: unknown kind of address; pass a file, or postgresql://USER@HOST:PORT/DATABASE")
    return FileIndex(uri, create)

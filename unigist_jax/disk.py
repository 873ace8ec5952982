"""What is said where a file or a folder cannot be read or written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_AGAIN = "free some space, then run the same command again"
_REMEDIES = {
    errno.ENOENT: "name one that is there",
    errno.EEXIST: "it is a file, and a folder is needed; name another path",
    errno.ENOTDIR: "a part of the path is a file, and no folder; name another path",
    errno.EISDIR: "name a file",
    errno.EACCES: "name a path that this user may use",
    errno.EPERM: "name a path that this user may use",
    errno.EROFS: "name a path that can be written to",
    errno.ENOSPC: _AGAIN,
    errno.EDQUOT: _AGAIN,
}


def described(error: OSError) -> str:
    """An error of the operating system with its path and a remedy; one that has no error number in its own words."""
    if error.errno is None or error.filename is None:
        return str(error)
    remedy = _REMEDIES.get(error.errno)
    return f"{error.filename}: {error.strerror}" + (f"; {remedy}" if remedy else "")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file and the remedy in an OSError: of a full disk NumPy says "4863488 requested and 49936 written"."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = _REMEDIES.get(getattr(error, "errno", None), _AGAIN)
        raise OSError(f"{path} cannot be written ({error}); {remedy}") from error


def check_folder(path: str | os.PathLike) -> None:
    """Raises OSError unless a folder is there, or can be made there, and can be written into; makes none."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be a folder: {folder} is a file; name another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {folder} is closed to this user; name another path")


def check_file(path: str | os.PathLike) -> None:
    """Raises OSError unless a file can be written there; writes none."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    check_folder(Path(path).absolute().parent)


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, ends of lines as they are. Raises ValueError naming a file of another kind."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8 or leave it out") from error

"""What is said where a file cannot be written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file and the remedy in an OSError: of a full disk NumPy says "4863488 requested and 49936 written"."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error}); free some space, then run the same command again to go on"
        ) from error

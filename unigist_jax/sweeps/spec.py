"""Sweep files: what they add, what its runs are called, and whether the config takes it.

A sweep file is Python that defines `sweep(add)` and calls `add` once a run with the config fields that differ:

  def sweep(add):
      for ratio in (2, 4, 8):
          add(**{"gist.ratio": ratio})

`add(name="baseline", ...)` gives a run a name of its own.
"""

from __future__ import annotations

import difflib
import re
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unigist_jax.config import RunConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,199}")


class SweptRun(NamedTuple):
    """A run that a sweep file added.

    Attributes:
      name: of its directory, unique in the sweep.
      overrides: values by dotted config field.
    """

    name: str
    overrides: dict[str, Any]


def read_sweep(path: Path) -> list[SweptRun]:
    """The runs of a sweep file, in its order.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it does not define `sweep(add)`, fails, adds nothing, or adds two runs of one name.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no sweep file {path}; name a Python file that defines sweep(add)")
    runs: list[SweptRun] = []

    def add(name: str | None = None, **overrides: Any) -> None:
        name = default_name(overrides) if name is None else str(name)
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a run: up to 200 letters, digits and ._=,+- can; choose one with add(name=…)"
            )
        if any(run.name == name for run in runs):
            raise ValueError(f"two runs are called {name!r}; tell them apart with add(name=…), or leave one out")
        for field, value in overrides.items():
            if not isinstance(value, (bool, int, float, str)):
                raise ValueError(f"{field}={value!r} in run {name!r} is no bool, number or string")
        runs.append(SweptRun(name, overrides))

    try:
        function = runpy.run_path(str(path)).get("sweep")
        if not callable(function):
            raise ValueError("it does not define sweep(add)")
        function(add)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{error}") from error
    if not runs:
        raise ValueError(f"{path}: sweep(add) added no run; call add(**{{'gist.ratio': 8}}) for each")
    return runs


def default_name(overrides: Mapping[str, Any]) -> str:
    """A name from what is overridden: `ratio=8,peak_lr=1e-05`; a field's section is left out where that is clear."""
    last = [field.rpartition(".")[2] for field in overrides]
    shown = [short if last.count(short) == 1 else field for short, field in zip(last, overrides, strict=True)]
    pairs = ",".join(f"{name}={value}" for name, value in zip(shown, overrides.values(), strict=True))
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", pairs) or "base"


def resolve(base: Any, run: SweptRun) -> RunConfig:
    """The config of a run.

    Args:
      base: the sweep's `ml_collections.ConfigDict`; left as it is.
      run: whose overrides to apply.

    Raises:
      ValueError: naming the run, the field and the remedy, for an unknown field or a value that the config refuses.
    """
    config = base.copy_and_resolve_references()
    for field, value in run.overrides.items():
        _check_field(config, run.name, field)
        try:
            config.update_from_flattened_dict({field: value})
        except TypeError as error:
            section, _, key = field.rpartition(".")
            current = type(config[section][key]).__name__ if section else "str"
            raise ValueError(f"run {run.name!r}: {field}={value!r} must be of type {current}") from error
    try:
        return RunConfig.from_dict(config.to_dict())
    except ValueError as error:
        raise ValueError(f"run {run.name!r}: {error}") from error


def override_flag(field: str, value: Any) -> str:
    """The flag of `launch.train` that overrides a field."""
    return f"--config.{field}={value}"


def _check_field(config: Any, name: str, field: str) -> None:
    sections = {name: values for name, values in config.items() if hasattr(values, "keys")}
    fields = [f"{section}.{key}" for section, values in sections.items() for key in values] + ["method"]
    if field in fields:
        return
    same = [known for known in fields if known.rpartition(".")[2] == field.rpartition(".")[2]]
    close = same or difflib.get_close_matches(field, fields, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"fields are written as {fields[0]!r}"
    raise ValueError(f"run {name!r}: there is no config field {field!r}; {hint}")

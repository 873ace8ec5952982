"""What every command does alike: run under absl, choose a platform, and turn bad input into one clear line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

_PLATFORM = flags.DEFINE_string("platform", None, "jax platform to run on: cpu, gpu, tpu (default: what jax finds)")


def run_main(main: Callable[[list[str]], None]) -> None:
    """`app.run` for a command. A ValueError or missing file ends it with its message and exit code 2, no traceback."""

    def wrapped(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments {argv[1:]}; every option is a --flag")
        if _PLATFORM.value:
            import jax

            jax.config.update("jax_platforms", _PLATFORM.value)
        if not flags.FLAGS["verbosity"].present:  # orbax tells its every step at INFO
            logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except (ValueError, FileNotFoundError) as error:
            if logging.level_debug():
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(wrapped)


def define_workdir() -> flags.FlagHolder[str]:
    """The --workdir flag of commands that read a trained run."""
    return flags.DEFINE_string("workdir", None, "work directory of a run trained by launch.train", required=True)


def output_directory(value: str | None, workdir: str, name: str) -> Path:
    """The directory of a command's results, made if absent: `value`, or `name` in the work directory."""
    directory = Path(value) if value else Path(workdir) / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory

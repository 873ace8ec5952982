"""What every command does alike: run under absl, choose a platform, and turn bad input into one clear line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags, logging

if TYPE_CHECKING:
    from jax.sharding import Mesh

_PLATFORM = flags.DEFINE_string("platform", None, "jax platform to run on: cpu, gpu, tpu (default: what jax finds)")
flags.disclaim_key_flags()  # what the functions below define belongs to the command that calls them, and to its --help


def run_main(main: Callable[[list[str]], None]) -> None:
    """`app.run` for a command. A ValueError or a file error ends it with its message and exit code 2, no traceback."""
    flags.adopt_module_key_flags(sys.modules[__name__])

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
        except (ValueError, OSError) as error:
            if logging.level_debug():
                raise
            _fail(error)

    app.run(wrapped, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, but for a config field that does not exist: config_flags lets Python's own error through."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        if not any(arg.startswith("--config.") for arg in argv):
            raise
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        _fail(f"there is no config field {error.args[0]}")


def _fail(error: object) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def define_workdir() -> flags.FlagHolder[str]:
    """The --workdir flag of commands that read a trained model."""
    text = "work directory of launch.train, or directory of a Hugging Face Llama"
    return flags.DEFINE_string("workdir", None, text, required=True)


def define_tensor() -> flags.FlagHolder[int]:
    """The --tensor flag of commands that can spread a model over several devices."""
    return flags.DEFINE_integer("tensor", 1, "devices that share the heads and columns of each layer", lower_bound=1)


def define_chat(text: str) -> tuple[flags.FlagHolder[bool], flags.FlagHolder[str | None]]:
    """The --chat flag, of which `text` tells what it does, and --system."""
    chat = flags.DEFINE_bool("chat", False, f"{text}, by the tokenizer's chat template")
    return chat, flags.DEFINE_string("system", None, "with --chat: the system message")


def check_system(chat: bool, system: str | None) -> None:
    """Raises ValueError for a system message without --chat."""
    if system and not chat:
        raise ValueError(f"--system={system!r} without --chat: plain text has no messages; give --chat too")


def user_message(text: str, system: str | None) -> list[dict[str, str]]:
    """A conversation of one user's message, behind a system message if there is one."""
    messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system else messages


@contextlib.contextmanager
def tensor_mesh(devices: int) -> Iterator[Mesh | None]:
    """The mesh of so many devices, in force within; None for one. Raises ValueError if there are fewer."""
    if devices == 1:
        yield None
        return
    import jax

    from unigist_jax.sharding import make_mesh

    mesh = make_mesh(data=1, tensor=devices, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        yield mesh


def output_directory(value: str | None, workdir: str, name: str) -> Path:
    """The directory of a command's results, made if absent: `value`, or `name` in the work directory."""
    directory = Path(value) if value else Path(workdir) / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory

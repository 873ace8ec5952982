"""What every command does alike: run under absl, choose a platform, and turn bad input into one clear line."""

from __future__ import annotations

import contextlib
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags, logging

from unigist_jax.disk import described

if TYPE_CHECKING:
    from jax.sharding import Mesh

_PATHS = ("document", "input", "output", "workdir")  # flags whose empty value is a slip: "--workdir=$UNSET"
_PLATFORM = flags.DEFINE_string("platform", None, "jax platform to run on: cpu, gpu, tpu (default: what jax finds)")
flags.disclaim_key_flags()  # what the functions below define belongs to the command that calls them, and to its --help


def run_main(main: Callable[[list[str]], None]) -> None:
    """`app.run` for a command. A bad value, file or number ends it with one line and exit code 2, no traceback."""
    flags.adopt_module_key_flags(sys.modules[__name__])

    def wrapped(argv: list[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected arguments {argv[1:]}; every option is a --flag")
        if empty := [name for name in _PATHS if name in flags.FLAGS and flags.FLAGS[name].value == ""]:
            _fail(f"--{empty[0]} is empty; name a path")
        if _PLATFORM.value:
            import jax

            jax.config.update("jax_platforms", _PLATFORM.value)
        if not flags.FLAGS["verbosity"].present:  # orbax tells its every step at INFO
            logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            if logging.level_debug():
                raise
            _fail(described(error) if isinstance(error, OSError) else error)
        except (RuntimeError, AssertionError) as error:  # the latter is jax's for "cuda" without a CUDA plugin
            if "RESOURCE_EXHAUSTED" in str(error) and not logging.level_debug():
                _fail(
                    f"{str(error).splitlines()[0]} Take fewer or shorter sequences, smaller parts (chunk_size, "
                    "batch_size, train.accumulate) or more devices; --verbosity=1 tells where"
                )
            if _has_devices():
                raise
            reason = str(error) or "its plugin is not installed"
            _fail(f"--platform={_PLATFORM.value}: jax finds no such device here ({reason}); leave it out")

    app.run(wrapped, flags_parser=_parse)


def _has_devices() -> bool:
    """Whether jax finds devices on the platform asked for, so that an error is not for want of them."""
    import jax

    try:
        return _PLATFORM.value is None or bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, and a line for what config_flags lets through: Python's errors of a config file and its fields."""
    file = _config_file(argv)
    if file is not None and not Path(file).is_file():
        _fail(f"--config={file}: there is no such file; name a Python file that defines get_config()")
    try:
        return app.parse_flags_with_usage(argv)
    except Exception as error:
        if file is None or isinstance(error, flags.Error):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(file)]
        if isinstance(error, (AttributeError, KeyError)) and not lines and "get_config" not in str(error):
            while error.args and isinstance(error.args[0], Exception):
                error = error.args[0]
            _fail(f"there is no config field {error.args[0]}")
        where = f", line {lines[-1]}," if lines else ""
        _fail(f"--config={file}{where} gives no config ({type(error).__name__}: {error})")


def _config_file(argv: list[str]) -> str | None:
    """The file of --config, given as absl takes it: one dash or two, its value behind = or as the next argument."""
    for arg, following in itertools.zip_longest(argv[1:], argv[2:]):
        name, equals, value = arg.partition("=")
        if name in ("-config", "--config"):
            value = value if equals else following
            return value and value.partition(":")[0]
    return None


def _fail(error: object) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def whole_numbers(flag: flags.FlagHolder[list[str]]) -> list[int]:
    """The numbers of a list flag. Raises ValueError naming it unless each is a whole number of at least 1."""
    if not all(text.strip().isdecimal() and int(text) >= 1 for text in flag.value):
        given = ",".join(flag.value)
        raise ValueError(f"--{flag.name}={given} must be whole numbers of at least 1, such as {flag.default[0]}")
    return [int(text) for text in flag.value]


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


def output_folder(path: str | Path) -> Path:
    """The folder of a command's results, made if absent."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder

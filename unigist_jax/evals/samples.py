"""The samples of an evaluation on disk: one JSON line each, so that it goes on where it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class SampleLog:
    """A file whose first line is the setting, and each further one a sample."""

    def __init__(self, path: Path, setting: Mapping[str, Any]):
        """Opens the file, made if absent; a last line that was cut off is dropped.

        Raises:
          ValueError: if it holds samples of another setting, or is damaged.
        """
        self.path = Path(path)
        self.samples: list[dict[str, Any]] = []
        setting = json.loads(json.dumps(setting))
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = text.split("\n")[:-1]
        try:
            found, *self.samples = map(json.loads, lines) if lines else [setting]
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it to ask its questions again") from error
        if found != setting:
            differing = sorted(name for name in {*found, *setting} if found.get(name) != setting.get(name))
            raise ValueError(
                f"{self.path} holds samples of another setting ({', '.join(differing)} differ); "
                "delete it, or choose another --output"
            )
        partial = self.path.with_name(self.path.name + ".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(_line(x) for x in (setting, *self.samples)), encoding="utf-8")
        os.replace(partial, self.path)

    def add(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends samples, on disk when this returns."""
        self.samples.extend(json.loads(json.dumps(samples)))
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, samples)))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"

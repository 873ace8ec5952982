"""Tables and plots of the benchmarks, made from their raw JSON and put into Markdown files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns without any entry are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command_block(commands: list[str]) -> str:
    """The commands that measured something, as a block of code."""
    return "\n".join(f"    {command}" for command in commands)


def marks(raw: Path, page: Path) -> tuple[str, str]:
    """The lines of a Markdown file around the tables of a raw JSON: they name it, as seen from the page."""
    name = os.path.relpath(raw, page.parent)
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def read_figures(file: Path) -> Any:
    """The raw figures of a benchmark. Raises ValueError naming a file that is no JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} holds no figures of a benchmark ({error}); name its raw JSON") from error


@dataclasses.dataclass(frozen=True)
class Report:
    """How a benchmark's figures are shown.

    Attributes:
      tables: from the raw figures to Markdown.
      plot: from the raw figures to an image, at the path given.
      caption: of the image.
    """

    tables: Callable[[Any], str]
    plot: Callable[[Any, Path], None]
    caption: str

    def write(self, raw: Path, into: Path | None) -> None:
        """Prints the tables of a raw JSON, plots it beside it, and puts both between the marks of a Markdown file.

        Raises:
          ValueError: if the file has not both marks.
        """
        result, image = read_figures(raw), raw.with_suffix(".png")
        text = self.tables(result)
        print(text)
        if into:
            begin, end = marks(raw, into)
            before, begin_found, rest = into.read_text().partition(begin)
            _, end_found, after = rest.partition(end)
            if not (begin_found and end_found):
                raise ValueError(f"{into} needs the lines {begin} and {end}, between which the tables go")
            text += f"\n![{self.caption}]({os.path.relpath(image, into.parent)})\n"
            into.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
        self.plot(result, image)

"""Text, conversations or tokens to packed rows of one length on disk, which training reads by number.

  python -m launch.prepare_data --source=stdlib --tokenizer=runs/tiny/tokenizer.model --ratio=4 --row_length=512 \
      --output=data/stdlib
  python -m launch.train --config=configs/tiny.py --workdir=runs/prepared --config.data.source=data/stdlib

Sources, comma-separated: `stdlib`; files, folders and patterns of .txt, .jsonl and .parquet; folders of MDS shards
(ProLong's data); `hf:NAME[:CONFIG][@SPLIT]` of the Hugging Face hub. Rows of conversations learn the assistant's turns
alone. Interrupted, the same command goes on. docs/training.md tells the whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from absl import flags
from tqdm import tqdm

from launch.flags import run_main
from unigist_jax.data.prepare import Request, prepare
from unigist_jax.data.sources import Reading

_SOURCE = flags.DEFINE_string("source", None, "where documents come from", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer file, or directory of a run or HF model", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "directory of the rows", required=True)
_RATIO = flags.DEFINE_integer("ratio", 16, "raws a unit: a multiple of every ratio to train at", lower_bound=1)
_ROW_LENGTH = flags.DEFINE_integer("row_length", 32768, "raws of a row; longer documents are split", lower_bound=1)
_HELDOUT = flags.DEFINE_float("heldout_fraction", 0.001, "share of the documents kept out of training")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "processes", lower_bound=1)
_PROMPT_COLUMN = flags.DEFINE_string("prompt_column", "", "column of a question, where it is called otherwise")
_RESPONSE_COLUMN = flags.DEFINE_string("response_column", "", "column of its answer")
_PROMPT = flags.DEFINE_string("prompt", "{}", "what the question is set into, at {}")


def main(_: list[str]) -> None:
    reading = Reading(_PROMPT_COLUMN.value, _RESPONSE_COLUMN.value, _PROMPT.value)
    request = Request(_SOURCE.value, _TOKENIZER.value, _RATIO.value, _ROW_LENGTH.value, _HELDOUT.value, reading)
    with tqdm(unit="part") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        manifest = prepare(request, Path(_OUTPUT.value), _WORKERS.value, progress)
    for split, report in manifest["splits"].items():
        print(
            f"{split}: {report['documents']:,} documents, {report['tokens']:,} tokens, {report['targets']:,} of them "
            f"learned, in {report['rows']:,} rows of {manifest['row_length']:,}; {report['padding_share']:.2%} padding"
        )
        print(f"{split}: documents by tokens {json.dumps(report['lengths'])}")
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
    run_main(main)

"""Reads a document into a compressed cache and keeps that as a file, for `launch.generate --cache` to ask about.

python -m launch.compress --workdir=runs/tiny --document=book.txt --output=book.cache
python -m launch.generate --workdir=runs/tiny --cache=book.cache --prompt="Who " --prompt="In the end, "
python -m launch.compress --workdir=path/to/hf_llama --chat --document=book.txt --output=book.cache
python -m launch.generate --workdir=path/to/hf_llama --chat --cache=book.cache --prompt="Who is Ahab?"
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from launch.flags import (
    check_system,
    define_chat,
    define_tensor,
    define_workdir,
    run_main,
    tensor_mesh,
    user_message,
)
from unigist_jax.checkpoints import load_directory
from unigist_jax.disk import check_file, read_text
from unigist_jax.inference import for_inference, full_cache_bytes, prefill
from unigist_jax.inference.cache_file import check_has_gists, save_cache
from unigist_jax.inference.gists import GIST_DTYPES
from unigist_jax.inference.prefill import check_chunk_size

_WORKDIR = define_workdir()
_TENSOR = define_tensor()
_DOCUMENT = flags.DEFINE_string("document", None, "file whose text to read", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "the cache file to write", required=True)
_CHAT, _SYSTEM = define_chat("begin a user's message with the document, which a question is to end")
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", None, "raws of a prefill chunk, a multiple of the ratio")
_GIST_DTYPE = flags.DEFINE_enum("gist_dtype", None, GIST_DTYPES, "round gists to it (default: the compute dtype)")


def main(_: list[str]) -> None:
    with tensor_mesh(_TENSOR.value) as mesh:
        _compress(mesh)


def _compress(mesh: Mesh | None) -> None:
    check_system(_CHAT.value, _SYSTEM.value)
    check_file(_OUTPUT.value)
    text = read_text(_DOCUMENT.value)
    if not text.strip():
        raise ValueError(f"--document={_DOCUMENT.value} holds no text; name a file that does")
    loaded = load_directory(_WORKDIR.value, mesh)
    check_has_gists(loaded.model)
    if _CHUNK_SIZE.value is not None:
        check_chunk_size(_CHUNK_SIZE.value, loaded.model.layout)
    model, tokenizer = for_inference(loaded.model), loaded.tokenizer
    if _CHAT.value:
        ids, _ = tokenizer.encode_cut_chat(user_message(f"{text.rstrip()}\n\n", _SYSTEM.value))
    else:
        ids = tokenizer.encode(text, bos=True)
    tokens = ids.tolist()
    began = time.perf_counter()
    with tqdm(total=len(tokens), unit="token", desc="reading") as bar:
        _, cache = prefill(
            model,
            [tokens],
            chunk_size=_CHUNK_SIZE.value,
            gist_dtype=_GIST_DTYPE.value,
            progress=lambda done: bar.update(done - bar.n),
        )
        cache.length.block_until_ready()
    seconds = time.perf_counter() - began
    save_cache(_OUTPUT.value, cache, model, [tokens], tokenizer.fingerprint, _CHAT.value)
    size, full = Path(_OUTPUT.value).stat().st_size, full_cache_bytes(model.config, len(tokens))
    print(
        f"read {len(tokens):,} tokens in {seconds:.1f} s; wrote {_OUTPUT.value}: {size:,} bytes; "
        f"full attention would hold {full:,} ({full / size:.2f}x)"
    )


if __name__ == "__main__":
    run_main(main)

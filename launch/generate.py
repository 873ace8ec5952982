"""Continues a prompt from the compressed cache, token by token, and tells what the cache holds.

python -m launch.generate --workdir=runs/tiny --prompt="def main(argv):" --max_new_tokens=100
python -m launch.generate --workdir=runs/tiny --prompt_file=long.py --temperature=0.8 --top_p=0.95
python -m launch.generate --workdir=path/to/hf_llama --chat --prompt="Who are you?"
python -m launch.generate --workdir=runs/tiny --cache=book.cache --prompt="Who " --prompt="In the end, "
python -m launch.generate --workdir=path/to/hf_llama --chat --cache=book.cache --prompt="Who is Ahab?"
"""

from __future__ import annotations

from absl import flags
from jax.sharding import Mesh

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
from unigist_jax.data import StreamDecoder, Tokenizer
from unigist_jax.disk import read_text
from unigist_jax.inference import Sampling, for_inference, full_cache_bytes, generate
from unigist_jax.inference.cache_file import load_cache
from unigist_jax.inference.methods import METHODS

_WORKDIR = define_workdir()
_TENSOR = define_tensor()
_PROMPT = flags.DEFINE_multi_string("prompt", None, "text to continue; give it again for a batch of prompts")
_PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", None, "file whose text to continue; likewise")
_CHAT, _SYSTEM = define_chat("give each text as a user's message (with --cache: as the end of one)")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "tokens to generate", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the most likely token each time")
_TOP_K = flags.DEFINE_integer("top_k", 0, "sample among the k most likely tokens; 0: among all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "sample among the fewest tokens of this total probability")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the sampling")
_STOP_TOKENS = flags.DEFINE_multi_integer("stop_token", None, "token id that ends a text, beside the end of text")
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", None, "raws of a prefill chunk, a multiple of the ratio")
_CAPACITY = flags.DEFINE_integer("capacity", None, "raws that the cache can hold (default: what this call needs)")
_CACHE = flags.DEFINE_string("cache", None, "file of launch.compress: each text goes on from its document")
_METHOD = flags.DEFINE_string("method", None, f"one of {', '.join(METHODS)} (default: as the run was trained)")


def main(_: list[str]) -> None:
    with tensor_mesh(_TENSOR.value) as mesh:
        _generate(mesh)


def _generate(mesh: Mesh | None) -> None:
    texts = list(_PROMPT.value or [])
    texts += [read_text(name) for name in _PROMPT_FILE.value or []]
    if not texts:
        raise ValueError("nothing to continue; give --prompt or --prompt_file")
    check_system(_CHAT.value, _SYSTEM.value)
    _check_flags_with_cache()
    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    loaded = load_directory(_WORKDIR.value, mesh)
    model, tokenizer = for_inference(loaded.model), loaded.tokenizer
    cache, read = None, ""
    if _CACHE.value:
        cache, documents, in_message = load_cache(_CACHE.value, model, tokenizer.fingerprint)
        _check_chat(in_message)
        read = f"behind {len(documents[0]):,} tokens of {_CACHE.value}; "
    prompts = [_prompt(tokenizer, text) for text in texts]
    decoders = [StreamDecoder(tokenizer) for _ in prompts]

    def show(sequence: int, token: int) -> None:
        if len(prompts) == 1:
            print(decoders[0].push(token), end="", flush=True)

    result = generate(
        model,
        prompts,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        sampling=sampling,
        stop_tokens=[*tokenizer.stop_ids, *(_STOP_TOKENS.value or [])],
        seed=_SEED.value,
        chunk_size=_CHUNK_SIZE.value,
        capacity=_CAPACITY.value,
        method=_METHOD.value,
        cache=cache,
        on_token=show,
    )
    if len(prompts) == 1:
        print(decoders[0].flush())
    else:
        for text, tokens in zip(texts, result.tokens, strict=True):
            print(f"--- {text[-60:]!r} continues\n{tokenizer.decode(tokens)}")

    capacity = result.cache.capacity
    full = full_cache_bytes(model.config, capacity, len(prompts))
    print(
        f"\n[{loaded.origin}; {read}prompts of {', '.join(str(len(p)) for p in prompts)} tokens, "
        f"{sum(map(len, result.tokens))} generated]\n"
        f"[KV cache for {capacity} tokens a sequence: {result.cache.nbytes:,} bytes; "
        f"full attention would hold {full:,} ({full / result.cache.nbytes:.2f}x)]"
    )


def _check_flags_with_cache() -> None:
    """Raises ValueError for a flag that means nothing behind a cache file."""
    given = {"system": _SYSTEM.value, "chunk_size": _CHUNK_SIZE.value, "capacity": _CAPACITY.value}
    given["method"] = _METHOD.value not in (None, "unigist")
    wrong = [f"--{name}" for name, value in given.items() if value]
    if _CACHE.value and wrong:
        raise ValueError(
            f"{' and '.join(wrong)} with --cache: the document is read already, by unigist; leave that out, or "
            "give the document with --prompt_file"
        )


def _check_chat(in_message: bool) -> None:
    """Raises ValueError unless --chat is given just where the cache file ends within a user's message."""
    if in_message and not _CHAT.value:
        raise ValueError(
            f"{_CACHE.value} ends within a user's message (launch.compress --chat): give --chat, so that the question "
            "ends that message"
        )
    if _CHAT.value and not in_message:
        raise ValueError(
            f"--chat, but {_CACHE.value} holds plain text and no message to end; make it with launch.compress --chat, "
            "or leave --chat out"
        )


def _prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that the model continues."""
    if not _CHAT.value:
        return tokenizer.encode(text, bos=not _CACHE.value).tolist()
    if _CACHE.value:
        return tokenizer.encode_cut_chat(user_message("", None), text)[1].tolist()
    return tokenizer.encode_chat(user_message(text, _SYSTEM.value)).tolist()


if __name__ == "__main__":
    run_main(main)

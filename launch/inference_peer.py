"""Hugging Face transformers as the peer of launch.bench_inference: torch, sdpa, its `generate` and default cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from launch.inference_case import Case, median_round
from unigist_jax.model.hf_config import config_to_hf


def measure_transformers(case: Case) -> dict[str, Any]:
    """A "latency" case: random weights of the same shape, greedy generation, memory as torch's allocator tells it."""
    import torch
    import transformers

    place = "cuda" if torch.cuda.is_available() else "cpu"
    entries = config_to_hf(case.config)
    dtype = getattr(torch, entries["torch_dtype"])
    hf_config = transformers.LlamaConfig(**entries, attn_implementation="sdpa")
    torch.manual_seed(0)
    start, before = time.perf_counter(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(place):
        model = transformers.LlamaForCausalLM(hf_config).eval()
    torch.set_default_dtype(before)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    result = {
        "device": torch.cuda.get_device_name() if place == "cuda" else "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__,
        "weights_s": time.perf_counter() - start, "weights_bytes": weights,
    }  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, case.config.vocab_size, (case.batch, case.context))
    prompts = torch.from_numpy(tokens).to(place)
    cache_bytes = 0

    class Clock(transformers.generation.streamers.BaseStreamer):
        """Is given the prompt first, then each token as soon as it is on the host."""

        def __init__(self, on_token: Callable[[], None]):
            self._calls, self._on_token = 0, on_token

        def put(self, value):
            self._calls += 1
            if self._calls > 1:
                self._on_token()

        def end(self):
            pass

    @torch.inference_mode()
    def run(on_token: Callable[[], None], new_tokens: int = case.new_tokens) -> None:
        nonlocal cache_bytes
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False,
            return_dict_in_generate=True, streamer=Clock(on_token), pad_token_id=0,
        )  # fmt: skip
        cache_bytes = sum(x.nbytes for layer in out.past_key_values.layers for x in (layer.keys, layer.values))

    start = time.perf_counter()
    run(lambda: None, min(case.new_tokens, 10))
    result["first_call_s"] = time.perf_counter() - start
    result |= median_round(case.rounds, run) | {"cache_bytes": cache_bytes}
    if place == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        result["temporary_bytes"] = result["peak_bytes"] - weights - cache_bytes
    return result

"""A model class for EleutherAI's lm-evaluation-harness (`lm_eval`, requirements-eval.txt): any method, any task.

  from lm_eval import simple_evaluate
  from unigist_jax.evals.harness import HarnessModel
  simple_evaluate(HarnessModel(model, tokenizer, method="unigist"), tasks=["hellaswag"], num_fewshot=3)

Prompts are read whole, question included, as the harness gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import LM
from tqdm import tqdm

from unigist_jax.data import Tokenizer
from unigist_jax.evals.scoring import score
from unigist_jax.inference import generate
from unigist_jax.inference.methods import get_method, trained_method
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama

CAPACITY_STEP = 256
MAX_NEW_TOKENS = 256  # where a task does not say


class HarnessModel(LM):
    """A model behind one of `unigist_jax.inference.methods.METHODS`."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        method: str | None = None,
        layout: GistLayout | None = None,
        batch_size: int = 8,
        progress: bool = True,
    ):
        """`method`: None for the one that the model was trained for; `layout` as for `inference.prefill`."""
        super().__init__()
        self._model, self._tokenizer, self._layout = model, tokenizer, layout
        self._name = method or trained_method(model.config, model.layout)
        self._method = get_method(self._name, model)
        self._batch_size, self._progress = batch_size, progress

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log probability of each continuation behind its context, and whether greedy decoding would give it."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            whole = self._encode(context + continuation)
            prompt = self._encode(context)
            if whole[: len(prompt)] != prompt:  # the two would be merged into one token
                whole = prompt + self._tokenizer.encode(continuation).tolist()
            cut = min(len(prompt), len(whole) - 1)
            pairs.append((whole[:cut], whole[cut:]))
        return self._in_order(pairs, self._score_batch)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log probability of each whole text, its first token included."""
        texts = [self._encode(request.args[0]) for request in requests]
        pairs = [(text[:1], text[1:] or [self._tokenizer.eos_id]) for text in texts]
        return [total for total, _ in self._in_order(pairs, self._score_batch)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy text of each request, cut before the first of its stop strings; ValueError if asked to sample."""
        prepared = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0):
                raise ValueError(f"generation is greedy here, and a task asks for {options}; give it do_sample: false")
            until = options.get("until") or []
            until = (until,) if isinstance(until, str) else tuple(until)
            prepared.append((self._encode(context), (until, int(options.get("max_gen_toks", MAX_NEW_TOKENS)))))
        return self._in_order(prepared, self._generate_batch)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, bos=True).tolist()

    def _in_order(self, items: list, run_batch: Any) -> list:
        """`run_batch` over batches of items of nearly equal length; results in the order of the items."""
        order = sorted(range(len(items)), key=lambda index: -len(items[index][0]))
        results: list = [None] * len(items)
        with tqdm(total=len(items), disable=not self._progress, desc=self._name) as bar:
            for start in range(0, len(order), self._batch_size):
                chosen = order[start : start + self._batch_size]
                for index, result in zip(chosen, run_batch([items[index] for index in chosen]), strict=True):
                    results[index] = result
                bar.update(len(chosen))
        return results

    def _prefill(self, prompts: list[list[int]], room: int) -> tuple[Any, Any]:
        needed = max(map(len, prompts)) + room
        capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        return self._method.prefill(self._model, prompts, capacity=capacity, layout=self._layout)

    def _score_batch(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        prompts, continuations = zip(*pairs, strict=True)
        logits, cache = self._prefill(list(prompts), max(map(len, continuations)))
        first = np.asarray(jax.nn.log_softmax(logits))
        scored = score(self._method, self._model, cache, continuations)
        results = []
        for row, tokens, rest in zip(first, continuations, scored, strict=True):
            total = float(row[tokens[0]]) + float(rest.log_probs.sum(dtype=np.float64))
            results.append((total, bool(row.argmax() == tokens[0] and rest.is_best.all())))
        return results

    def _generate_batch(self, items: list[tuple[list[int], tuple[tuple[str, ...], int]]]) -> list[str]:
        prompts = [prompt for prompt, _ in items]
        generated = generate(
            self._model,
            prompts,
            max_new_tokens=max(most for _, (_, most) in items),
            stop_tokens=self._tokenizer.stop_ids,
            layout=self._layout,
            method=self._name,
        )
        texts = []
        for tokens, (_, (until, most)) in zip(generated.tokens, items, strict=True):
            text = self._tokenizer.decode(tokens[:most])
            texts.append(text[: min((text.index(stop) for stop in until if stop in text), default=len(text))])
        return texts

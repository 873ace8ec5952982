"""The run config: what `configs/*.py` may set, its defaults, and its checks.

A config file returns an `ml_collections.ConfigDict` from `get_config()`, usually `default_config()` with a few fields
changed. `RunConfig.from_dict` turns it into frozen dataclasses, and there every value is checked, before any work.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from unigist_jax.context import Placement
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, RopeScaling
from unigist_jax.model.summaries import check_summaries
from unigist_jax.sharding import check_split


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from.

    Attributes:
      source: "stdlib" (the Python standard library's sources), or comma-separated .txt, .jsonl, .parquet files, folders
        or globs, or comma-separated directories of rows that `launch.prepare_data` wrote.
      weights: comma-separated shares of those directories in the batches; empty: by their numbers of rows.
      tokenizer: a sentencepiece model, a Hugging Face tokenizer.json, or a directory with one; empty: that of the
        checkpoint to begin with, if there is one, else one of `vocab_size` pieces is trained. Kept in the workdir.
      vocab_size: pieces of that tokenizer.
      row_length: raws of a packed row, a multiple of the ratio.
      heldout_fraction: share of the documents kept out of training, for evaluation.
      max_documents: reads only so many; 0 reads all.
      recall_weight: share of the rows that are synthetic recall records, 0 to 1.
      recall_records: how many of those to make.
      recall_kinds: comma-separated kinds, which take turns (`unigist_jax.data.recall.RECALL_KINDS`; interleaved rows:
        `unigist_jax.data.recall_rows.INTERLEAVED_KINDS`).
      recall_values: what the values of needles are, "numbers" or "words" (adjective-noun); the test asks for the same.
      recall_digits: digits of a number.
      recall_questions: questions a record, where its context has answers to so many ("multi_key", "json_kv").
      recall_answer_only: takes the loss of recall rows on the answers alone.
      recall_interleaved: recall rows in stretches, each followed by questions (`unigist_jax.data.recall_rows`).
      recall_vocabulary: a tokenizer that is trained here also sees recall sentences, so that their words are pieces.
      join_documents: the documents one behind the other are one text, cut into rows of one document each, which full
        attention by cuDNN needs.
    """

    source: str = "stdlib"
    weights: str = ""
    tokenizer: str = ""
    vocab_size: int = 2048
    row_length: int = 512
    heldout_fraction: float = 0.05
    max_documents: int = 0
    recall_weight: float = 0.0
    recall_records: int = 2048
    recall_kinds: str = "needle"
    recall_values: str = "numbers"
    recall_digits: int = 7
    recall_questions: int = 1
    recall_answer_only: bool = False
    recall_interleaved: bool = False
    recall_vocabulary: bool = False
    join_documents: bool = False

    def __post_init__(self):
        _require(bool(self.source), "data.source is empty; give 'stdlib' or paths of text files")
        _require(self.row_length > 0, f"data.row_length={self.row_length} must be positive")
        _require(
            0 < self.heldout_fraction < 1, f"data.heldout_fraction={self.heldout_fraction} must be between 0 and 1"
        )
        _require(0 <= self.recall_weight <= 1, f"data.recall_weight={self.recall_weight} must be between 0 and 1")
        _require(self.max_documents >= 0, f"data.max_documents={self.max_documents} must be at least 0 (0 reads all)")
        _require(self.recall_questions > 0, f"data.recall_questions={self.recall_questions} must be positive")
        _require(
            self.recall_values in ("numbers", "words"),
            f"data.recall_values={self.recall_values!r} is unknown; choose 'numbers' or 'words'",
        )
        _require(self.recall_digits > 0, f"data.recall_digits={self.recall_digits} must be positive")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up from 0 and a cosine to `final_fraction` of the peak (paper: 1e-5, 256 steps, 0.5).

    `state_dtype` is what the moments are kept in; they are computed in float32.
    """

    peak_lr: float = 1e-3
    warmup_steps: int = 20
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    state_dtype: str = "float32"

    def __post_init__(self):
        _require(
            self.state_dtype in ("float32", "bfloat16"),
            f"optim.state_dtype={self.state_dtype!r} is unknown; choose 'float32' or 'bfloat16'",
        )
        _require(0 < self.peak_lr < math.inf, f"optim.peak_lr={self.peak_lr} must be positive and finite")
        for name in ("b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)} must be at least 0 and below 1")
        _require(self.eps > 0, f"optim.eps={self.eps} must be positive")
        _require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must be at least 0")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} must be at least 0")
        _require(0 <= self.final_fraction <= 1, f"optim.final_fraction={self.final_fraction} must be between 0 and 1")
        _require(self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} must be positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how often, and what is learned.

    Attributes:
      steps, seed: optimizer steps of the run, and what fixes its order of data and its first weights.
      batch_size: rows of a step, over all processes.
      accumulate: parts that a batch is computed in, one after the other; the result is that of the whole batch.
      mixed_ratios: comma-separated divisors of `gist.ratio`, one of which is drawn for each batch; empty: `gist.ratio`
        alone.
      trainable: "all", or "gist": the gist and sink embeddings alone, everything else frozen.
      distill_weight: share of the loss that is the divergence from a full-attention teacher, 0 (none) to 1 (all).
      distill_temperature: of that divergence.
      on_bad_step: "stop" or "skip" at a step whose loss or gradient is not finite, or whose gradient is a spike.
      spike_norm: gradient norm above which a step is a spike; 0: none is.
      max_skips: bad steps in a row after which "skip" stops too.
      log_every, eval_every, checkpoint_every: in steps; `eval_every` 0 never evaluates.
      eval_rows: held-out rows of an evaluation.
      eval_recall_rows: recall records that each evaluation asks for too, at `data.row_length`; 0: none.
      keep_checkpoints: how many of the newest stay.
      loss_chunk: raws a row whose logits exist at a time.
    """

    steps: int = 100
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    mixed_ratios: str = ""
    trainable: str = "all"
    distill_weight: float = 0.0
    distill_temperature: float = 1.0
    on_bad_step: str = "stop"
    spike_norm: float = 0.0
    max_skips: int = 10
    log_every: int = 1
    eval_every: int = 50
    eval_rows: int = 64
    eval_recall_rows: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    loss_chunk: int = 512

    def __post_init__(self):
        at_least = dict.fromkeys(("eval_every", "eval_recall_rows", "spike_norm", "distill_weight"), 0)
        counts = (
            "steps batch_size accumulate max_skips log_every eval_rows checkpoint_every keep_checkpoints loss_chunk"
        )
        for name, bound in {**at_least, **dict.fromkeys(counts.split(), 1)}.items():
            _require(getattr(self, name) >= bound, f"train.{name}={getattr(self, name)} must be at least {bound}")
        for name, allowed in (("trainable", ("all", "gist")), ("on_bad_step", ("stop", "skip"))):
            value = getattr(self, name)
            _require(value in allowed, f"train.{name}={value!r} is unknown; choose one of {allowed}")
        _require(self.distill_weight <= 1, f"train.distill_weight={self.distill_weight} must be at most 1")
        _require(self.distill_temperature > 0, f"train.distill_temperature={self.distill_temperature} must be positive")
        _require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} is not a multiple of train.accumulate={self.accumulate}",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one may be -1 for all that are left (`unigist_jax.sharding`)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


_TINY = dict(
    vocab_size=0, hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32
)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run. `model.vocab_size=0` takes the tokenizer's size (`with_vocab_size`)."""

    model: LlamaConfig
    gist: GistLayout
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig

    def __post_init__(self):
        self.gist.num_units(self.data.row_length)
        _require(
            self.optim.warmup_steps < self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} must be below train.steps={self.train.steps}",
        )
        check_split(self.model, dataclasses.asdict(self.mesh))
        rows, parts = self.mesh.data * self.mesh.fsdp, self.train.accumulate
        _require(
            rows < 1 or self.train.batch_size % (rows * parts) == 0,
            f"train.batch_size={self.train.batch_size} is not a multiple of mesh data * fsdp = {rows}"
            + (f" times train.accumulate={parts}" if parts > 1 else ""),
        )
        _require(
            self.train.distill_weight == 0 or self.mesh.context <= 1,
            f"mesh.context={self.mesh.context}: the teacher of train.distill_weight has full attention, which has no "
            "context parallelism; use fsdp or tensor",
        )
        self.layouts()
        if self.model.attention == "autocompressors":
            check_summaries(self.gist)
        if self.mesh.context > 1:
            _require(
                self.model.attention == "gist",
                f"mesh.context={self.mesh.context} needs model.attention='gist', not {self.model.attention!r}",
            )
            try:
                Placement(self.mesh.context).piece_units(self.gist, self.data.row_length)
            except ValueError as error:
                raise ValueError(f"mesh.context={self.mesh.context}: {error} (data.row_length)") from error

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RunConfig:
        """Checks a (nested) config and freezes it. Raises ValueError for unknown or missing fields and bad values."""
        _check_fields("", config, {*_SECTIONS, "method"}, set(_SECTIONS))
        config = with_method(config)
        return cls(**{name: _build(name, kind, config[name]) for name, kind in _SECTIONS.items()})

    def layouts(self) -> tuple[GistLayout, ...]:
        """The layouts that batches are drawn among, `train.mixed_ratios` or the one of `gist`. Raises ValueError."""
        if not self.train.mixed_ratios:
            return (self.gist,)
        try:
            ratios = [int(text) for text in self.train.mixed_ratios.split(",")]
        except ValueError:
            ratios = [0]
        _require(
            all(ratio > 0 and self.gist.ratio % ratio == 0 for ratio in ratios),
            f"train.mixed_ratios={self.train.mixed_ratios!r} must be comma-separated divisors of "
            f"gist.ratio={self.gist.ratio}, for which rows are packed",
        )
        return tuple(dataclasses.replace(self.gist, ratio=ratio) for ratio in ratios)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, for JSON; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    def with_vocab_size(self, vocab_size: int) -> RunConfig:
        """The run with the model's vocabulary fixed. Raises ValueError if the config asks for a smaller one."""
        asked = self.model.vocab_size
        _require(
            asked == 0 or asked >= vocab_size,
            f"model.vocab_size={asked} is smaller than the tokenizer's {vocab_size}; set it to 0 to take that",
        )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=asked or vocab_size))


TRAINED_METHODS = {  # name: model.attention
    "unigist": "gist",
    "full": "full",
    "activation_beacon": "gist",
    "autocompressors": "autocompressors",
}
METHOD_CHUNK = 2048  # raws of a chunk of the chunk-wise methods, where the config names none (UniGist's comparison)


def with_method(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with what its `method` implies written into `model` and `gist`; without one, as it is.

    "unigist" and "full" have no chunks. "activation_beacon" and "autocompressors" have chunks of `gist.chunk`, and
    "autocompressors" as many summary tokens a chunk as `gist.ratio` wants. Raises ValueError for an unknown method.
    """
    rest = {name: values for name, values in config.items() if name != "method"}
    if config.get("method") is None:
        return rest
    method, known = config["method"], sorted(TRAINED_METHODS)
    _require(method in TRAINED_METHODS, f"method={method!r} is not one that can be trained; choose one of {known}")
    model, gist = dict(config["model"]), dict(config["gist"])
    model["attention"] = TRAINED_METHODS[method]
    if method in ("unigist", "full"):
        gist["chunk"] = 0
    else:
        gist["chunk"] = gist["chunk"] or METHOD_CHUNK
        gist["window"] = gist["chunk"] - gist["ratio"]
    if method == "autocompressors":
        gist["num_sinks"] = gist["chunk"] // gist["ratio"]
    return {**rest, "model": model, "gist": gist}


_SECTIONS = {
    "model": LlamaConfig,
    "gist": GistLayout,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
}


def default_config() -> Any:
    """The default config as an `ml_collections.ConfigDict`: a tiny model on the standard library's sources."""
    from ml_collections import ConfigDict
    from ml_collections.config_dict import placeholder

    defaults = {f.name: f.default for f in dataclasses.fields(LlamaConfig) if f.default is not dataclasses.MISSING}
    defaults["attention_backend"] = placeholder(str)  # None, yet a flag may set it
    config = {
        "method": placeholder(str),  # None: what model.attention and gist say
        "model": {**defaults, **_TINY},
        "gist": dataclasses.asdict(GistLayout()),
        "data": dataclasses.asdict(DataConfig()),
        "optim": dataclasses.asdict(OptimConfig()),
        "train": dataclasses.asdict(TrainConfig()),
        "mesh": dataclasses.asdict(MeshConfig()),
    }
    return ConfigDict(config)


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`section.field: old -> new` for every field in which two nested configs differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += config_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _build(section: str, kind: type, values: Mapping[str, Any]):
    fields = dataclasses.fields(kind)
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    _check_fields(section, values, {f.name for f in fields}, required)
    values = dict(values)
    if values.get("rope_scaling") is not None:
        values["rope_scaling"] = _build(f"{section}.rope_scaling", RopeScaling, values["rope_scaling"])
    return kind(**values)


def _check_fields(section: str, values: Mapping[str, Any], known: set[str], required: set[str]) -> None:
    where = f" in {section!r}" if section else ""
    if not isinstance(values, Mapping):
        raise ValueError(f"a config has fields{where}, not {values!r}; begin with unigist_jax.config.default_config()")
    missing = sorted(required - set(values))
    if missing:
        raise ValueError(f"config fields {missing} are missing{where}; begin with unigist_jax.config.default_config()")
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the fields are {sorted(known)}"
            raise ValueError(f"unknown config field {name!r}{where}{hint}")

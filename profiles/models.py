"""``ModelSpec``: the shape of a decoder-only transformer, and what follows from the shape alone.

Read ``ModelSpec`` first. Names of models live in ``catalogue.py``; which parameter lies where
under a strategy is ``planner.layout``'s; times are ``table.py``'s and ``roofline.py``'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from profiles.errors import ConfigError

HeadKind = Literal["lm", "scalar"]

# Families that the spine's decoder runs; a catalogue row may name others for planning only.
LLAMA_TYPES = frozenset({"llama", "mistral", "qwen2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder: ``num_layers`` blocks of grouped-query attention and a gated feed-forward.

    Shapes: embedding [vocab, hidden]; per block q [num_heads * head_dim, hidden], k and v
    [num_kv_heads * head_dim, hidden], o [hidden, num_heads * head_dim], gate and up
    [ffn, hidden], down [hidden, ffn], two norms [hidden]; final norm [hidden]; head
    [vocab, hidden] (``lm``) or [1, hidden] (``scalar``: critic and reward models).
    """

    name: str
    family: str = "llama"
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied_embedding: bool = False
    head: HeadKind = "lm"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 4096
    qkv_bias: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "ffn",
                      "vocab", "max_positions"):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{value!r} is not a positive whole number", where=f"model {self.name}.{field}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} kv heads evenly",
                where=f"model {self.name}.num_kv_heads",
                remedy="num_heads must be a multiple of num_kv_heads",
            )
        if self.head not in ("lm", "scalar"):
            raise ConfigError(f"'{self.head}' is neither lm nor scalar", where="model.head")

    def with_head(self, head: HeadKind) -> ModelSpec:
        """The same decoder with another head: a critic of an actor's shape."""
        return replace(self, head=head, tied_embedding=self.tied_embedding and head == "lm")

    # ---- counts of parameters -------------------------------------------------------------

    @property
    def attention_parameters(self) -> int:
        """Of one block: q, k, v, o and their biases."""
        q = self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        bias = q + 2 * kv if self.qkv_bias else 0
        return self.hidden * (2 * q + 2 * kv) + bias

    @property
    def ffn_parameters(self) -> int:
        """Of one block: gate, up and down."""
        return 3 * self.hidden * self.ffn

    @property
    def block_parameters(self) -> int:
        """Of one block, norms included."""
        return self.attention_parameters + self.ffn_parameters + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """Final norm and head; a tied head counts its norm only."""
        if self.head == "scalar":
            return 2 * self.hidden
        return self.hidden + (0 if self.tied_embedding else self.vocab * self.hidden)

    @property
    def num_parameters(self) -> int:
        return (
            self.embedding_parameters
            + self.num_layers * self.block_parameters
            + self.head_parameters
        )

    @property
    def output_size(self) -> int:
        """Columns of the head's output: the vocabulary, or one."""
        return self.vocab if self.head == "lm" else 1

    def kv_bytes_per_token(self, *, bytes_per_value: int = 2) -> int:
        """Bytes of key and value of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    # ---- files ----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "model") -> ModelSpec:
        """The inverse of ``to_dict``.

        Raises:
            ConfigError: a field is missing, unknown or out of range; names it.
        """
        known = {field.name for field in fields(cls)}
        for name in data:
            if name not in known:
                raise ConfigError(
                    "unknown field", where=f"{where}.{name}", remedy=f"known: {sorted(known)}"
                )
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"field missing ({error})", where=where) from error


def read_hf_config(path: str | Path, *, head: HeadKind = "lm") -> ModelSpec:
    """The ``ModelSpec`` of a Hugging Face ``config.json`` (the file, or a folder that holds it).

    Raises:
        ConfigError: no such file, not JSON, a needed field missing, or a ``model_type`` that is
            not of the LLaMA kind.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            "no such file", where=str(file), remedy="give a Hugging Face folder or a catalogue name"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"not JSON ({error})", where=str(file)) from None
    if not isinstance(config, dict):
        raise ConfigError("not a JSON object", where=str(file))
    return spec_from_hf(config, head=head, where=str(file), name=file.parent.name or "model")


def spec_from_hf(
    config: Mapping[str, Any], *, head: HeadKind = "lm", where: str = "config.json", name: str
) -> ModelSpec:
    """The ``ModelSpec`` of a parsed Hugging Face config; raises ``ConfigError`` as above."""
    family = config.get("model_type")
    if family not in LLAMA_TYPES:
        raise ConfigError(
            f"model_type {family!r} is not supported",
            where=where,
            remedy=f"supported: {', '.join(sorted(LLAMA_TYPES))}",
        )
    _refuse_what_changes_attention(config, where)

    def need(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(
                f"{key} is {value!r}", where=where, remedy="it must be a whole number"
            )
        return value

    hidden, num_heads = need("hidden_size"), need("num_attention_heads")
    # transformers 5 moved rope_theta into rope_parameters; both forms are in the wild.
    rope = config.get("rope_parameters") or {}
    return ModelSpec(
        name=name,
        family=str(family),
        num_layers=need("num_hidden_layers"),
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or hidden // max(num_heads, 1),
        ffn=need("intermediate_size"),
        vocab=need("vocab_size"),
        tied_embedding=bool(config.get("tie_word_embeddings", False)) and head == "lm",
        head=head,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=need("max_position_embeddings"),
        qkv_bias=family == "qwen2",
        source=where,
    )


def _refuse_what_changes_attention(config: Mapping[str, Any], where: str) -> None:
    """Raise ``ConfigError`` for options that the decoder would silently compute without."""
    for key in ("rope_scaling", "rope_parameters"):  # transformers 5 writes the second
        scaling = config.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"rope type '{kind}' is not supported yet", where=f"{where}: {key}")
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    uses_window = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if window is not None and uses_window and window < longest:
        raise ConfigError(
            f"a sliding window of {window} tokens is not supported yet",
            where=f"{where}: sliding_window",
        )
    if config.get("attention_bias") and config.get("model_type") != "qwen2":
        raise ConfigError(
            "a bias on the attention's output is not supported yet",
            where=f"{where}: attention_bias",
        )

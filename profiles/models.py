"""``ModelSpec``: the shape of a decoder-only transformer, and what follows from the shape alone.

Read ``ModelSpec`` first. Names of models live in ``catalogue.py``, the fields of a Hugging Face
``config.json`` in ``hf_config.py``; which parameter lies where under a strategy is
``planner.layout``'s; times are ``table.py``'s and ``roofline.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import gcd, lcm
from typing import Any, Literal, get_args

from profiles.errors import ConfigError

HeadKind = Literal["lm", "scalar"]
NormKind = Literal["rms", "rms_plus_one", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Positions = Literal["rope", "learned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the ``original_positions`` of pre-training.

    ``linear``: all divided by ``factor``. ``llama3``: those with fewer than ``low_freq_factor``
    turns over the original positions are divided, those with more than ``high_freq_factor`` kept,
    between them interpolated. ``yarn``: the same with ``beta_slow`` and ``beta_fast`` turns, linear
    in the frequency's index, and cosines and sines times ``attention_factor`` (0: it is
    0.1 ln factor + 1).
    Sources: Chen et al. 2023; Llama 3.1's reference code; Peng et al. 2023.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ConfigError(
                f"rope type '{self.kind}' is not supported",
                where="model.rope_scaling",
                remedy="supported: default, linear, llama3, yarn",
            )
        if not self.factor >= 1:
            raise ConfigError(f"{self.factor!r} is not at least 1", where="rope_scaling.factor")
        if self.kind != "linear" and self.original_positions < 1:
            raise ConfigError(
                f"{self.kind} needs the positions of pre-training",
                where="rope_scaling.original_positions",
            )


# Layers are looked at one by one; a larger number is a slip of the pen.
MAX_LAYERS = 10_000
# A thousand times the largest models; counts of values stay below 64 bits.
MAX_PARAMETERS = 2**50


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder: ``num_layers`` blocks of grouped-query attention and a feed-forward.

    Shapes: embedding [vocab, hidden]; per block q [num_heads * head_dim, hidden], k and v
    [num_kv_heads * head_dim, hidden], o [hidden, num_heads * head_dim], gate and up
    [ffn, hidden], down [hidden, ffn], two norms [hidden]; final norm [hidden]; head
    [vocab, hidden] (``lm``) or [1, hidden] (``scalar``: critic and reward models).

    Families differ by switches. ``gated`` False: no gate. ``qk_norm``: RMS norms [head_dim] of
    every head's query and key. ``norm``: ``rms_plus_one`` multiplies by 1 + weight. ``positions``
    ``learned``: a table [max_positions, hidden] is added to the embedding and nothing is rotated.
    ``sliding_window``: a token sees itself and the window - 1 before it; 0: all.
    ``scaled_embedding``: times sqrt(hidden).

    Mixture of experts: the feed-forward is ``num_experts`` of width ``ffn``, of which a router
    [num_experts, hidden] gives each token ``experts_per_token``, weighted by their probabilities
    (``normalize_top_k``: divided by their sum); and one of width ``shared_ffn`` for all tokens,
    times the sigmoid of a gate [1, hidden].
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
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    positions: Positions = "rope"
    max_positions: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    gated: bool = True
    activation: Activation = "silu"
    ffn_bias: bool = False
    scaled_embedding: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_top_k: bool = True
    shared_ffn: int = 0
    source: str = ""

    def __hash__(self) -> int:
        # Equal specs agree in these four, and to hash all fields takes a planner half a second.
        return hash((self.name, self.num_layers, self.hidden, self.head))

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "ffn",
                      "vocab", "max_positions"):  # fmt: skip
            self._check_count(field, least=1)
        for field in ("sliding_window", "num_experts", "experts_per_token", "shared_ffn"):
            self._check_count(field, least=0)
        for field in ("norm_eps", "rope_theta"):
            value = getattr(self, field)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.0 <= value < 1e300:
                raise ConfigError(f"{value!r} is no use", where=f"model {self.name}.{field}")
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(
                f"{self.num_layers} layers", where=f"model {self.name}.num_layers",
                remedy=f"at most {MAX_LAYERS}",
            )  # fmt: skip
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} kv heads evenly",
                where=f"model {self.name}.num_kv_heads",
                remedy="num_heads must be a multiple of num_kv_heads",
            )
        if not self.experts_per_token <= self.num_experts or (
            bool(self.experts_per_token) != bool(self.num_experts)
        ):
            raise ConfigError(
                f"{self.experts_per_token} of {self.num_experts} experts cannot take a token",
                where=f"model {self.name}.experts_per_token",
            )
        for field, choices in (("head", HeadKind), ("norm", NormKind),
                               ("activation", Activation), ("positions", Positions)):  # fmt: skip
            if getattr(self, field) not in get_args(choices):
                raise ConfigError(
                    f"'{getattr(self, field)}' is not one of {', '.join(get_args(choices))}",
                    where=f"model {self.name}.{field}",
                )

        if max(self.num_parameters, self.max_positions) > MAX_PARAMETERS:
            raise ConfigError(
                f"more than {MAX_PARAMETERS:.0e} parameters", where=f"model {self.name}",
                remedy="no such model fits any cluster: is one of its sizes mistyped?",
            )  # fmt: skip

    def _check_count(self, field: str, *, least: int) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            kind = "a positive whole number" if least else "a whole number"
            raise ConfigError(f"{value!r} is not {kind}", where=f"model {self.name}.{field}")

    def with_head(self, head: HeadKind) -> ModelSpec:
        """The same decoder with another head: a critic of an actor's shape."""
        return replace(self, head=head, tied_embedding=self.tied_embedding and head == "lm")

    # ---- counts of parameters -------------------------------------------------------------

    @property
    def attention_parameters(self) -> int:
        """Of one block: q, k, v, o, their biases, and the norms of queries and keys."""
        q = self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        bias = (q + 2 * kv if self.qkv_bias else 0) + (self.hidden if self.o_bias else 0)
        norms = 2 * self.head_dim if self.qk_norm else 0
        return self.hidden * (2 * q + 2 * kv) + bias + norms

    @property
    def ffn_parameters(self) -> int:
        """Of one block: gate, up and down; of all experts, with their router."""
        matrices = 3 if self.gated else 2
        bias = (matrices - 1) * self.ffn + self.hidden if self.ffn_bias else 0
        if not self.num_experts:
            return matrices * self.hidden * self.ffn + bias
        experts = self.num_experts * (matrices * self.hidden * self.ffn + self.hidden)
        shared = matrices * self.hidden * self.shared_ffn + self.hidden if self.shared_ffn else 0
        return experts + shared

    @property
    def active_ffn(self) -> int:
        """Columns of feed-forward that one token passes through."""
        return (self.experts_per_token or 1) * self.ffn + self.shared_ffn

    @property
    def norm_parameters(self) -> int:
        """Of one norm over the hidden states."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def block_parameters(self) -> int:
        """Of one block, norms included."""
        return self.attention_parameters + self.ffn_parameters + 2 * self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the tokens; the positions' are ``position_parameters``."""
        return self.vocab * self.hidden

    @property
    def position_parameters(self) -> int:
        return self.max_positions * self.hidden if self.positions == "learned" else 0

    @property
    def head_parameters(self) -> int:
        """Final norm and head; a tied head counts its norm only."""
        if self.head == "scalar":
            return self.norm_parameters + self.hidden
        return self.norm_parameters + (0 if self.tied_embedding else self.vocab * self.hidden)

    @property
    def num_parameters(self) -> int:
        return (
            self.embedding_parameters
            + self.position_parameters
            + self.num_layers * self.block_parameters
            + self.head_parameters
        )

    @property
    def active_parameters(self) -> int:
        """Those that one token passes through: of the experts, as many as it is given to."""
        idle = self.num_experts - self.experts_per_token
        matrices = 3 if self.gated else 2
        return self.num_parameters - self.num_layers * idle * matrices * self.hidden * self.ffn

    @property
    def output_size(self) -> int:
        """Columns of the head's output: the vocabulary, or one."""
        return self.vocab if self.head == "lm" else 1

    @property
    def decode_is_static(self) -> bool:
        """No shape inside a decode step depends on values, so that it can be a CUDA graph.

        How many rows an expert gets does, and its ranks send each other as many.
        """
        return self.num_experts == 0

    def held_kv_heads(self, tp: int) -> int:
        """Kv heads whose weights a shard holds: kv heads / gcd(kv heads, tp)."""
        return self.num_kv_heads // gcd(self.num_kv_heads, tp)

    def cached_kv_heads(self, tp: int) -> int:
        """Kv heads that a shard attends with, and keeps in its cache.

        kv heads / tp, or 1 where there are fewer of them than shards. Where neither divides the
        other a shard repeats some of those that it holds, so that its heads share them evenly.
        """
        return lcm(self.num_kv_heads, tp) // tp

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
        scaling = data.get("rope_scaling")
        try:
            if isinstance(scaling, Mapping):
                data = {**data, "rope_scaling": RopeScaling(**scaling)}
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"field missing ({error})", where=where) from error

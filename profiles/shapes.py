"""The dimensions that a layer's cost depends on, as text in a table's rows and as a key.

``shape_key`` writes a model's, ``spec_of_shape`` reads them back.
"""

from __future__ import annotations

import re
from typing import Any

from profiles.costs import Component
from profiles.errors import ConfigError, ProfileError
from profiles.models import ModelSpec


def shape_key(spec: ModelSpec) -> str:
    """The per-layer dimensions of a model: models of one width share their rows.

    >>> from profiles.catalogue import MODELS
    >>> shape_key(MODELS["llama-7b"])
    'h4096-q32-k32-d128-f11008-v32000-b0-lm'
    >>> shape_key(MODELS["qwen1.5-moe-a2.7b"])  # of 60 experts 4, and a shared one
    'h2048-q16-k16-d128-f1408-v151936-b1-e60.4.5632-lm'
    """
    letters = "".join(letter for letter, field, value in _SWITCHES if getattr(spec, field) == value)
    switches = f"-{letters}" if letters else ""
    if spec.num_experts:
        switches += f"-e{spec.num_experts}.{spec.experts_per_token}.{spec.shared_ffn}"
    biases = spec.qkv_bias + 2 * spec.o_bias + 4 * spec.ffn_bias
    return (
        f"h{spec.hidden}-q{spec.num_heads}-k{spec.num_kv_heads}-d{spec.head_dim}-f{spec.ffn}"
        f"-v{spec.vocab}-b{biases}{switches}-{spec.head}"
    )


# Letters of a shape for what differs from a LLaMA's block.
_SWITCHES: tuple[tuple[str, str, object], ...] = (
    ("u", "gated", False),
    ("n", "qk_norm", True),
    ("l", "norm", "layer"),
    ("p", "norm", "rms_plus_one"),
    ("a", "positions", "learned"),
)
_SHAPE = re.compile(
    r"h(\d{1,9})-q(\d{1,9})-k(\d{1,9})-d(\d{1,9})-f(\d{1,9})-v(\d{1,9})-b([0-7])"
    r"(?:-([unlpa]+))?(?:-e(\d{1,9})\.(\d{1,9})\.(\d{1,9}))?-(lm|scalar)"
)


def spec_of_shape(shape: str) -> ModelSpec:
    """A one-layer model of a ``shape_key``; raises ``ProfileError`` for other text."""
    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise ProfileError(
            f"{shape!r} is not a shape", where="shape", remedy="write it as table.shape_key does"
        )
    hidden, heads, kv_heads, head_dim, ffn, vocab, biases = (int(match[i]) for i in range(1, 8))
    experts, per_token, shared_ffn = (int(match[i] or 0) for i in range(9, 12))
    switches: dict[str, Any] = {
        field: value for letter, field, value in _SWITCHES if letter in (match[8] or "")
    }
    try:
        return ModelSpec(
            name=shape, num_layers=1, hidden=hidden, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, ffn=ffn, vocab=vocab, qkv_bias=bool(biases & 1),
            o_bias=bool(biases & 2), ffn_bias=bool(biases & 4), num_experts=experts,
            experts_per_token=per_token, shared_ffn=shared_ffn,
            head="lm" if match[12] == "lm" else "scalar", **switches,
        )  # fmt: skip
    except ConfigError as error:
        raise ProfileError(f"{shape!r}: {error}", where="shape") from None


def component_shape(spec: ModelSpec, component: Component) -> tuple[int | str, ...]:
    """The dimensions that a component's cost depends on: a critic's blocks are an actor's."""
    if component == "block":
        return (
            spec.hidden, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.ffn, spec.qkv_bias,
            spec.o_bias, spec.ffn_bias, spec.gated, spec.qk_norm, spec.norm, spec.positions,
            spec.num_experts, spec.experts_per_token, spec.shared_ffn,
        )  # fmt: skip
    if component == "embedding":
        return (spec.hidden, spec.vocab)
    return (spec.hidden, spec.vocab, "lm") if spec.head == "lm" else (spec.hidden, "scalar")

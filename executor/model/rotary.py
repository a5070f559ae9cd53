"""Rotary position embeddings: the angles of positions, and turning queries and keys by them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from profiles.models import ModelSpec, RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Cosines and sines of the tokens' angles, [tokens, 1, head_dim], fp32.

    Coordinates i and i + head_dim / 2 have one angle; the first one's sine is negative.
    """

    cos: Tensor
    sin: Tensor


def rotary_of(positions: Tensor, spec: ModelSpec) -> Rotary | None:
    """Angles position * frequency of every pair of coordinates; None for learned positions."""
    if spec.positions != "rope":
        return None
    frequencies, factor = frequencies_of(spec, positions.device)
    angles = (positions[:, None].float() * frequencies)[:, None, :]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return Rotary(cos=torch.cat((cos, cos), -1), sin=torch.cat((-sin, sin), -1))


def frequencies_of(spec: ModelSpec, device: torch.device) -> tuple[Tensor, float]:
    """theta^(-2 i / head_dim), i < head_dim / 2, as ``rope_scaling`` stretches them [head_dim / 2],

    fp32, and the factor of cosines and sines. Source: Su et al. 2021 (RoFormer), ``RopeScaling``.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (spec.rope_theta ** (exponents / spec.head_dim))
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    kept = _llama3_kept(frequencies, scaling)
    factor = 1.0
    if scaling.kind == "yarn":
        kept = _yarn_kept(spec, scaling, device)
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return frequencies * (kept + (1 - kept) / scaling.factor), factor


def _llama3_kept(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """The share of each frequency that stays, in [0, 1]: linear in its turns."""
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(spec: ModelSpec, scaling: RopeScaling, device: torch.device) -> Tensor:
    """As above, linear in the frequency's index between those of beta_fast and beta_slow turns."""

    def index_of(turns: float) -> float:
        length = scaling.original_positions / (turns * 2 * math.pi)
        return spec.head_dim * math.log(length) / (2 * math.log(spec.rope_theta))

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), spec.head_dim - 1)
    index = torch.arange(spec.head_dim // 2, dtype=torch.float32, device=device)
    return 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """``x`` [tokens, heads, head_dim] with coordinate i and i + head_dim / 2 turned as one pair.

    Halves and not neighbours: Hugging Face's convention, in which checkpoints are stored.
    """
    if rotary is None:
        return x
    if not torch.is_grad_enabled():
        return _turned(x, rotary.cos, rotary.sin)
    out: Tensor = _Rotate.apply(x, rotary.cos, rotary.sin)
    return out


class _Rotate(torch.autograd.Function):
    """Keeps the angles only; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """fp32 inside, the type of ``x`` outside."""
    # Rolled by half, each coordinate stands where its partner was.
    turned = torch.mul(x, cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
    return turned.to(x.dtype)

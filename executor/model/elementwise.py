"""Norms and gated activations with a backward pass of their own.

Such steps cost the passes that they make over memory, and autograd, composing them from simpler
ones, makes and keeps more than they need. These keep their input, and write both halves of a
gate's gradient where they belong. One ``F.rms_norm`` on CUDA is already one kernel each way.
Without gradients autograd is not asked at all: on 16 tokens it adds half of what a norm takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from profiles.models import Activation


@dataclass(frozen=True, slots=True)
class _Derivative:
    """``of`` (x) -> act(x); ``backward`` (grad, x, grad_input=) -> grad * act'(x)."""

    of: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]


_ACTIVATIONS: Mapping[Activation, _Derivative] = {
    "silu": _Derivative(F.silu, torch.ops.aten.silu_backward),
    "gelu": _Derivative(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": _Derivative(
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


def activate(x: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """act(x); ``gated``: [..., 2 n] -> [..., n], act(first half) * second half. Keeps x only."""
    if not gated:
        return _ACTIVATIONS[activation].of(x)
    if not torch.is_grad_enabled():
        return _gated(x, activation)
    out: Tensor = _Gated.apply(x, activation)
    return out


def _gated(x: Tensor, activation: Activation) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return _ACTIVATIONS[activation].of(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x)
        return _gated(x, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        act = _ACTIVATIONS[ctx.activation]
        gate, up = x.chunk(2, dim=-1)
        of_x = torch.empty_like(x)
        of_gate, of_up = of_x.chunk(2, dim=-1)
        torch.mul(grad, act.of(gate), out=of_up)
        act.backward(grad * up, gate, grad_input=of_gate)
        return of_x, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension, in fp32; the type of ``x``.

    ``weight`` [n], or the last dimensions of ``x``.
    """
    if x.is_cuda:
        if weight.dim() == 1 and weight.dtype == x.dtype:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        return (F.rms_norm(x.float(), (x.shape[-1],), None, eps) * weight).to(x.dtype)
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / sqrt(mean x^2 + eps) [..., 1] in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


class _RmsNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean x^2 + eps), y = x r and g the result's gradient:

    dL/dx = r (g w - y mean(g w y)), dL/dw = sum over rows of g y.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, y = grad.to(scale.dtype), x * scale
        product = grad * y
        mean = torch.linalg.vecdot(product, weight.to(scale.dtype))[..., None] / x.shape[-1]
        of_x = (grad * weight).sub_(y.mul_(mean)).mul_(scale).to(x.dtype)
        rows = product.reshape(-1, *weight.shape)
        return of_x, rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None

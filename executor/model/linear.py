"""Linear layers whose weight's gradient goes straight into the flat gradient tensor.

``F.linear``'s backward makes the weight's gradient and autograd adds it to ``.grad``: one more
tensor of the weight's size, and two more passes over it. ``linear`` multiplies into ``.grad``
instead (Megatron-LM calls it gradient accumulation fusion).

``linear_of`` also computes its input again in backward: of what a block keeps for its backward
pass, the inputs of its products are large and cheap to make again: a norm, or an activation times
a gate. So they are dropped (recompute ``selective``); the products' results and the attention's are
kept. Nothing is watched at run time as by torch's selective checkpointing: what is recomputed is
said where it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows whose product MKL computes slower than that of 16: up to 2.1 times, of one thread's fp32
# products of SmolLM2-135M's shapes (Xeon with AVX-512, MKL 2024.2, torch 2.13).
SLOW_ROWS = range(7, 16)


_STALE = "gradient_is_stale"


def overwrite_gradient(weight: Tensor) -> None:
    """Of the next backward passes the first writes over ``weight.grad`` instead of adding to it.

    For a leaf that ``linear`` or ``linear_of`` uses in every pass, and nothing else: it saves a
    pass over its gradient to clear it.
    """
    setattr(weight, _STALE, True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: [..., in] -> [..., out]; backward adds to ``weight.grad`` where there is one.

    A weight without ``.grad``, or with one of another type, is autograd's as always.
    """
    if weight.grad is None or not torch.is_grad_enabled():
        if x.device.type == "cpu" and not x.requires_grad and x.shape[0] in SLOW_ROWS:
            padded = F.pad(x, (0, 0, 0, SLOW_ROWS.stop - x.shape[0]))
            return F.linear(padded, weight, bias)[: x.shape[0]]
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def linear_of(
    make: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *inputs: Tensor | None
) -> Tensor:
    """``linear(make(*inputs), weight, bias)``; backward calls ``make`` again.

    ``make`` must give the same values again, and may communicate: all ranks run backward alike.
    """
    out: Tensor = _LinearOf.apply(make, weight, bias, *inputs)
    return out


def _weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    """grad^T x for autograd to add, or None where it was added to ``weight.grad`` here."""
    flat, rows = grad.flatten(0, -2), x.flatten(0, -2)
    if weight.grad is None:
        return flat.T @ rows
    if getattr(weight, _STALE, False):
        torch.mm(flat.T, rows, out=weight.grad)
        setattr(weight, _STALE, False)
    else:
        weight.grad.addmm_(flat.T, rows)
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            grad @ weight if of_x else None,
            _weight_gradient(weight, grad, x) if of_weight else None,
            grad.flatten(0, -2).sum(0) if ctx.has_bias and of_bias else None,
        )


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, make: Callable[..., Tensor], weight: Tensor, bias: Tensor | None,
        *inputs: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.make, ctx.has_bias = make, bias is not None
        ctx.save_for_backward(weight, *inputs)
        return F.linear(make(*inputs), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        inputs = [
            None if value is None else value.detach().requires_grad_(need)
            for value, need in zip(saved, wanted, strict=True)
        ]
        with torch.enable_grad():
            made = ctx.make(*inputs)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(weight, grad, made.detach())
        of_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        leaves = [value for value in inputs if value is not None and value.requires_grad]
        found = iter(torch.autograd.grad(made, leaves, grad @ weight) if leaves else ())
        of_inputs = [
            next(found) if value is not None and value.requires_grad else None for value in inputs
        ]
        return None, of_weight, of_bias, *of_inputs

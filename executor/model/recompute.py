"""A linear layer whose input is computed again in backward: ``linear_of``.

Of what a block keeps for its backward pass, the inputs of its products are large and cheap to
make again: a norm, or an activation times a gate. So they are dropped (recompute
``selective``); the products' results and the attention's are kept. Nothing is watched at run
time as by torch's selective checkpointing: what is recomputed is said where it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_of(
    make: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *inputs: Tensor | None
) -> Tensor:
    """``F.linear(make(*inputs), weight, bias)``; backward calls ``make`` again.

    ``make`` must give the same values again, and may communicate: all ranks run backward alike.
    """
    out: Tensor = _LinearOf.apply(make, weight, bias, *inputs)
    return out


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
        flat = grad.flatten(0, -2)
        of_weight = flat.T @ made.detach().flatten(0, -2) if ctx.needs_input_grad[1] else None
        of_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        leaves = [value for value in inputs if value is not None and value.requires_grad]
        found = iter(torch.autograd.grad(made, leaves, grad @ weight) if leaves else ())
        of_inputs = [
            next(found) if value is not None and value.requires_grad else None for value in inputs
        ]
        return None, of_weight, of_bias, *of_inputs

"""Linear layers whose weight's gradient goes straight into the flat gradient tensor.

``F.linear``'s backward makes the weight's gradient and autograd adds it to ``.grad``: one more
tensor of the weight's size, and two more passes over it. ``linear`` multiplies into ``.grad``
instead (Megatron-LM calls it gradient accumulation fusion).

``linear_of`` also computes its input again in backward: of what a block keeps for its backward
pass, the inputs of its products are large and cheap to make again: a norm, or an activation times
a gate. So they are dropped (recompute ``selective``); the products' results and the attention's are
kept. Nothing is watched at run time as by torch's selective checkpointing: what is recomputed is
said where it is computed.

While generating, a CPU multiplies few rows by all weights again and again: ``packed_weights`` gives
``linear`` copies in the order in which the kernels read them. Which of torch's two libraries
multiplies by other weights on a CPU is ``_product``'s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# torch multiplies fp32 by MKL, whose best kernels are for Intel's CPUs, or by oneDNN (torch 2.13,
# one thread's products of SmolLM2-135M's shapes). On a Xeon with AVX-512 MKL is the faster one, and
# a packed weight for few rows only, up to 1.7 times: fewer rows read a weight once as it is, for
# more MKL packs it itself. On an EPYC with AVX-512 oneDNN is faster: by a packed weight 1.2 to 3.1
# times, of 1 to 2,048 rows; by another, of 8 to 1,280 rows, 1.0 to 1.6 times in the product and in
# the gradient of its input, mostly 1.1. In the weight's gradient, whose rows it must turn first, it
# is no faster.
PACKED_ROWS_ON_INTEL = range(4, 64)
LEAST_ROWS = 8  # that oneDNN multiplies faster by a weight that is not packed
CPU_INFO = Path("/proc/cpuinfo")

_STALE, _PACKED = "gradient_is_stale", "packed"


@contextmanager
def packed_weights(weights: Iterable[Tensor]) -> Iterator[None]:
    """Within, ``linear`` without gradients has a packed copy of each of ``weights`` [out, in].

    They must not change meanwhile. Nothing but fp32 on a CPU with oneDNN is packed: elsewhere the
    kernels read weights as they are.
    """
    held = [weight for weight in weights if packable(weight)]
    for weight in held:
        pack_weight(weight)
    try:
        yield
    finally:
        for weight in held:
            delattr(weight, _PACKED)


@cache
def onednn_is_faster() -> bool:
    """On this machine than MKL: its CPU is known to be AMD's."""
    return CPU_INFO.is_file() and "AuthenticAMD" in CPU_INFO.read_text(errors="replace")


def packed_rows() -> range:
    """Numbers of rows for which ``linear`` takes the packed copy on this machine."""
    return range(1, sys.maxsize) if onednn_is_faster() else PACKED_ROWS_ON_INTEL


def packable(weight: Tensor) -> bool:
    """Does oneDNN multiply by this weight's kind, and in an order of its own?"""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def pack_weight(weight: Tensor) -> None:
    """Give ``linear`` a copy of ``weight`` as it is now."""
    setattr(weight, _PACKED, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))


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
    if not torch.is_grad_enabled():
        copy = getattr(weight, _PACKED, None)
        if copy is not None and x.shape[0] in packed_rows():
            return _by_onednn(x, copy, bias)
        return _product(x, weight, bias)
    if weight.grad is None:
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] weight^T [in, out] + bias, by the faster library; no gradient."""
    if onednn_is_faster() and packable(weight) and x.numel() >= max(1, LEAST_ROWS * x.shape[-1]):
        return _by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is None or bias.is_contiguous(), bias.stride()  # its stride is not looked at
    product: Tensor = _onednn_linear()(x, weight, bias, "none", [], "")
    return product


@cache
def _onednn_linear() -> Callable[..., Tensor]:
    """The operator's one overload: choosing among all takes longer than a small product."""
    overload: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return overload


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
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.T) if of_x else None,
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
        return _product(make(*inputs), weight, bias)

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
        found = iter(torch.autograd.grad(made, leaves, _product(grad, weight.T)) if leaves else ())
        of_inputs = [
            next(found) if value is not None and value.requires_grad else None for value in inputs
        ]
        return None, of_weight, of_bias, *of_inputs

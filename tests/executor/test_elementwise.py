"""Protects the norm and the gated activation whose backward is ours: values and gradients of
torch's own steps, and what they keep for backward.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from executor.model.elementwise import activate, rms_norm
from profiles.models import Activation

EPS = 1e-5
ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (0, 8)])
def test_a_gated_activation_is_torchs(activation: Activation, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64).requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    wanted = ACTS[activation](gate) * up
    found = activate(x, activation, gated=True)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(wanted)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, weight) for out in (found, wanted)))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_without_a_gate_it_is_the_activation(activation: Activation) -> None:
    x = torch.randn(5, 8)
    assert torch.equal(activate(x, activation, gated=False), ACTS[activation](x))


@pytest.mark.parametrize(
    "shape, weight_shape", [((7, 6), (6,)), ((7, 3, 6), (3, 6)), ((0, 6), (6,))]
)
def test_gradients_of_the_norm_are_those_of_its_formula(
    shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    x = torch.randn(*shape, dtype=torch.float64).requires_grad_()
    weight = torch.randn(*weight_shape, dtype=torch.float64).requires_grad_()
    wanted = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    found = rms_norm(x, weight, EPS)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(wanted)
    ours, torchs = (torch.autograd.grad(out, (x, weight), grad) for out in (found, wanted))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_values_are_the_same_to_the_last_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(5, 8).to(dtype), torch.randn(8).to(dtype)
    trained = rms_norm(x, weight, EPS), activate(x, "silu", gated=True)
    with torch.no_grad():
        alone = rms_norm(x, weight, EPS), activate(x, "silu", gated=True)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(trained, alone))


def test_a_norm_of_bfloat16_is_computed_in_float32() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(64, 256).bfloat16(), torch.rand(256).bfloat16()
    grad = torch.randn(64, 256).bfloat16()

    def both(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = rms_norm(x, weight, EPS)
        assert out.dtype == x.dtype
        return (out, *torch.autograd.grad(out, (x, weight), grad.to(out.dtype)))

    for narrow, wide in zip(both(x, weight), both(x.double(), weight.double()), strict=True):
        # One rounding of the exact result; of sums over rows relative to their own size.
        torch.testing.assert_close(narrow.double(), wide, rtol=2**-8, atol=1e-6)


def test_they_keep_their_input_and_no_more() -> None:
    kept: list[int] = []

    def count(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    x, weight = torch.randn(16, 8).requires_grad_(), torch.randn(8).requires_grad_()
    with saved_tensors_hooks(count, lambda value: value):
        rms_norm(x, weight, EPS)
        assert sorted(kept) == [8, 16, 16 * 8]  # the weight, a scale a row, x
        kept.clear()
        activate(x, "silu", gated=True)
        assert kept == [16 * 8]

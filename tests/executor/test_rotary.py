"""Protects the rotary embedding: pairs of coordinates turn as complex numbers do, and back in
backward; with gradients and without, values are the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from executor.model.rotary import rotary_of, rotate
from tests.executor.small_models import small_spec


def turned_by_complex_numbers(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """(x_i + i x_(i + d / 2)) e^(i angle), float64; ``x`` [tokens, heads, head_dim]."""
    low, high = x.double().chunk(2, dim=-1)
    half = low.shape[-1]
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    out = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((out.real, out.imag), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_coordinates_turn_as_complex_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    spec, positions = small_spec(), torch.tensor([0, 3, 1, 40])
    qkv = torch.randn(4, 5, spec.head_dim).to(dtype).requires_grad_()
    rotary = rotary_of(positions, spec)
    found = rotate(qkv[:, :3], rotary)  # a part of a product's result, as in a block
    wanted = turned_by_complex_numbers(qkv[:, :3], positions, spec.rope_theta)
    assert found.dtype == dtype
    assert found.is_contiguous()
    close = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, wanted.to(dtype), **close)
    grad = torch.randn(found.shape).to(dtype)
    ours, theirs = (torch.autograd.grad(out, qkv, grad.to(out.dtype))[0] for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, **close)
    with torch.no_grad():
        assert torch.equal(rotate(qkv[:, :3], rotary), found)

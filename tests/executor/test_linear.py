"""Protects weight gradients that are added in place: those of ``F.linear``, over several passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from executor.model import linear as linear_module
from executor.model.linear import (
    LEAST_ROWS,
    linear,
    linear_of,
    onednn_is_faster,
    overwrite_gradient,
    packable,
    packed_rows,
    packed_weights,
)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def double_silu(x: Tensor) -> Tensor:
    return F.silu(x) * 2.0


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (1, 3)])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_torch(
    shape: tuple[int, ...], with_bias: bool, recompute: bool
) -> None:
    torch.manual_seed(1)
    x, weight, bias = leaf(*shape), leaf(4, 3), leaf(4) if with_bias else None
    total = torch.randn(4, 3, dtype=torch.float64)
    before = total.clone()
    weight.grad = total
    for _ in range(2):
        if recompute:
            out = linear_of(double_silu, weight, bias, x)
        else:
            out = linear(double_silu(x), weight, bias)
        out.sin().sum().backward()
    assert weight.grad is total  # the very tensor: a view of the flat one
    found = [x.grad, total - before, bias.grad if bias is not None else None]
    x.grad, weight.grad = None, None
    if bias is not None:
        bias.grad = None
    for _ in range(2):
        F.linear(double_silu(x), weight, bias).sin().sum().backward()
    wanted = [x.grad, weight.grad, bias.grad if bias is not None else None]
    for ours, torchs in zip(found, wanted, strict=True):
        assert (ours is None) == (torchs is None)
        if ours is not None:
            torch.testing.assert_close(ours, torchs)


def test_a_weight_without_a_gradient_tensor_is_autograds() -> None:
    x, weight = leaf(5, 3), leaf(4, 3)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(4, 3))
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


def test_nothing_is_done_for_an_input_that_needs_no_gradient() -> None:
    x, weight = torch.randn(5, 3, dtype=torch.float64), leaf(4, 3)
    weight.grad = torch.zeros(4, 3, dtype=torch.float64)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 3))
    assert x.grad is None


@pytest.mark.parametrize("num_rows", [1, 6, 7, 15, 16, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_of_few_rows_are_the_rows_of_a_larger_one(num_rows: int, with_bias: bool) -> None:
    """Some numbers of rows are computed in a product of more rows: which ones must not show."""
    torch.manual_seed(1)
    x, weight = torch.randn(40, 24), torch.randn(10, 24)
    bias = torch.randn(10) if with_bias else None
    out = linear(x[:num_rows], weight, bias)
    assert out.shape == (num_rows, 10)
    torch.testing.assert_close(out, F.linear(x, weight, bias)[:num_rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_product_writes_over_what_was_there(recompute: bool) -> None:
    torch.manual_seed(1)
    x, weight = leaf(5, 3), leaf(4, 3)
    weight.grad = total = torch.full((4, 3), torch.nan, dtype=torch.float64)
    overwrite_gradient(weight)
    for _ in range(2):
        out = linear_of(F.silu, weight, None, x) if recompute else linear(F.silu(x), weight)
        out.sin().sum().backward()
    weight.grad = None
    for _ in range(2):
        F.linear(F.silu(x), weight).sin().sum().backward()
    torch.testing.assert_close(total, weight.grad)


@pytest.mark.skipif(not packable(torch.zeros(1, 1)), reason="a torch without oneDNN")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 7, 16, 63, 64])
def test_packed_weights_give_the_same_product(rows: int, with_bias: bool) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(rows, 24), torch.randn(40, 24)
    bias = torch.randn(40) if with_bias else None
    wanted = F.linear(x, weight, bias)
    with torch.no_grad(), packed_weights([weight]):
        torch.testing.assert_close(linear(x, weight, bias), wanted)


@pytest.mark.skipif(not packable(torch.zeros(1, 1)), reason="a torch without oneDNN")
def test_copies_end_with_their_block_and_gradients_never_use_them() -> None:
    x, weight = torch.randn(8, 24), torch.randn(40, 24)
    with packed_weights([weight]):
        weight += 1.0  # what nobody may do: shows who reads the copy
        with torch.no_grad():
            stale = linear(x, weight)
        assert not torch.allclose(stale, F.linear(x, weight))
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    ("vendor", "rows"),
    [("GenuineIntel", {4, 63}), ("AuthenticAMD", {1, 4, 63, 64, 2048}), ("", {4, 63})],
)
def test_which_rows_take_the_copy_is_the_makers(vendor, rows, monkeypatch, tmp_path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr("executor.model.linear.CPU_INFO", tmp_path / "cpuinfo")
    faster = onednn_is_faster.__wrapped__()
    monkeypatch.setattr("executor.model.linear.onednn_is_faster", lambda: faster)
    assert {n for n in (0, 1, 4, 63, 64, 2048) if n in packed_rows()} == rows


@pytest.mark.skipif(not packable(torch.zeros(1, 1)), reason="a torch without oneDNN")
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (37, 24), (2, 5, 24)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("faster", [False, True])
def test_either_library_gives_the_same_product_and_gradients(
    shape: tuple[int, ...], recompute: bool, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def by_onednn(*args: Tensor) -> Tensor:
        calls.append(args)
        return multiply(*args)

    multiply = linear_module._by_onednn
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: faster)
    monkeypatch.setattr(linear_module, "_by_onednn", by_onednn)
    torch.manual_seed(1)
    x, weight, bias = (torch.randn(s).requires_grad_() for s in (shape, (40, 24), (40,)))
    weight.grad = total = torch.zeros(40, 24)
    if recompute:
        out = linear_of(double_silu, weight, bias, x)
    else:
        out = linear(double_silu(x), weight, bias)
    wanted = F.linear(double_silu(x), weight, bias)
    torch.testing.assert_close(out, wanted)
    with torch.no_grad():
        torch.testing.assert_close(linear(double_silu(x), weight, bias), wanted)
    found = *torch.autograd.grad(out.sin().sum(), (x, bias)), total
    wanted_gradients = torch.autograd.grad(wanted.sin().sum(), (x, bias, weight))
    torch.testing.assert_close(found, wanted_gradients)
    enough = x.numel() >= LEAST_ROWS * 24
    assert len(calls) == (3 if faster and enough else 0)  # forward, backward, without gradients


def test_what_is_not_fp32_on_a_cpu_stays_as_it_is() -> None:
    weight = torch.randn(40, 24, dtype=torch.bfloat16)
    with torch.no_grad(), packed_weights([weight]):
        x = torch.randn(8, 24, dtype=torch.bfloat16)
        assert torch.equal(linear(x, weight), F.linear(x, weight))

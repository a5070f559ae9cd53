"""Protects offload: memory is given back, values and views are as before, what is constant crosses
once, and a run's checkpoints have what lies in the host's memory.
"""

from __future__ import annotations

import pytest
import torch

from executor.buffers import ParameterBuffer
from executor.offload import PIECE_BYTES, Offloadable
from planner.layout import ParameterSlice

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def test_views_are_right_again_when_the_values_are_back() -> None:
    slices = [
        ParameterSlice(name="a", offset=(0, 0), length=(4, 3)),
        ParameterSlice(name="b", offset=(2,), length=(5,)),
    ]
    buffer = ParameterBuffer(slices, dtype=torch.float32, device="cpu")
    buffer.flat.normal_()
    view, before = buffer.view("b"), buffer.flat.clone()
    weights = Offloadable([buffer.flat], constant=True)
    assert weights.offload() == 17 * 4
    assert buffer.flat.untyped_storage().nbytes() == 0
    assert weights.reload() == 17 * 4
    torch.testing.assert_close(buffer.flat, before, rtol=0, atol=0)
    torch.testing.assert_close(view, before[12:], rtol=0, atol=0)
    view.zero_()
    assert buffer.flat[12:].count_nonzero() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece_bytes", [PIECE_BYTES, 1200])
def test_state_comes_back_as_it_went_and_gradients_as_zeros(
    device: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 4,000 bytes of state lie in one piece, or in four of which the last is shorter."""
    monkeypatch.setattr("executor.offload.PIECE_BYTES", piece_bytes)
    state = torch.randn(1000, device=device)
    weight = torch.randn(10, 10, device=device, requires_grad=True)
    gradients = torch.zeros(100, device=device)
    weight.grad = gradients.view(10, 10)
    one = Offloadable([state], [gradients])
    for turn in range(3):
        (weight * 2).sum().backward()
        assert weight.grad.eq(2).all()
        state += turn
        expected = state.clone()
        one.offload()
        assert state.untyped_storage().nbytes() == gradients.untyped_storage().nbytes() == 0
        one.reload()
        assert weight.grad.data_ptr() == gradients.data_ptr()
        assert gradients.eq(0).all()
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_constant_weights_cross_to_the_host_once_and_memory_is_the_devices_again() -> None:
    weights = torch.randn(1 << 24, device="cuda")
    one, held = Offloadable([weights], constant=True), torch.cuda.memory_allocated()
    expected = weights.sum().item()
    assert one.offload() == 4 << 24
    assert held - torch.cuda.memory_allocated() >= 4 << 24
    one.reload()
    assert one.offload() == 0
    one.reload()
    assert weights.sum().item() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_nobodys_before_its_values_have_left() -> None:
    """Copies wait behind a kernel, while others ask for memory of that size and write it."""
    expected = torch.randn(1 << 20)
    for _ in range(3):
        state = expected.cuda()
        one = Offloadable([state])
        torch.cuda._sleep(100_000_000)
        one.offload()
        assert not torch.cuda.current_stream().query()  # nobody has waited
        others = [torch.full_like(expected, 7.0, device="cuda") for _ in range(8)]
        one.reload()
        torch.testing.assert_close(state.cpu(), expected, rtol=0, atol=0)
        assert all(other.eq(7.0).all() for other in others)


def test_a_part_of_a_storage_cannot_leave_alone() -> None:
    with pytest.raises(AssertionError):
        Offloadable([torch.zeros(10)[:5]])

"""Protects flat buffers: views and fused views are the same memory, in the layout's order.

Oracle: the offsets counted by hand over the layout's slices, and torch.cat of single views.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.buffers import ParameterBuffer
from planner.layout import Layout, ParameterSlice
from planner.lending import stored_values
from planner.mesh import DeviceMesh
from tests.executor.small_models import small_spec

SPEC = small_spec(qkv_bias=True, family="qwen2")
LAYOUTS = [
    (Layout(spec=SPEC, mesh=DeviceMesh(0, 4), pp=2, tp=2), rank) for rank in range(4)
] + [(Layout(spec=SPEC, mesh=DeviceMesh(0, 1)), 0)]  # fmt: skip


@pytest.fixture(params=LAYOUTS, ids=[f"{layout.key} rank {rank}" for layout, rank in LAYOUTS])
def buffer(request: pytest.FixtureRequest) -> ParameterBuffer:
    layout, rank = request.param
    found = ParameterBuffer.for_rank(layout, rank, dtype=torch.float32, device="cpu", multiple=64)
    assert found.flat[found.num_values :].eq(0).all()  # the padding alone: the rest has no values
    found.flat.copy_(torch.arange(found.flat.numel()))  # every value is its own address
    return found


def test_views_tile_the_buffer_in_order(buffer):
    address = 0
    for piece in buffer.slices:
        view = buffer.view(piece.name)
        assert view.shape == piece.length
        assert view.flatten().tolist() == list(range(address, address + piece.num_values))
        address += piece.num_values
    assert buffer.num_values == address
    assert buffer.flat.numel() % 64 == 0
    assert 0 <= buffer.flat.numel() - address < 64


def test_fused_views_are_the_single_ones_one_after_the_other(buffer):
    layer = next(name.split(".")[1] for name in buffer.by_name if name.startswith("layers."))
    for group in (("q.weight", "k.weight", "v.weight"), ("gate.weight", "up.weight"),
                  ("q.bias", "k.bias", "v.bias"), ("o.weight",)):  # fmt: skip
        names = [f"layers.{layer}.{name}" for name in group]
        fused = buffer.fused(names)
        assert torch.equal(fused, torch.cat([buffer.view(name) for name in names]))
        fused[-1].fill_(-1)
        assert buffer.view(names[-1])[-1].eq(-1).all()  # the same memory


def test_fused_refuses_parameters_that_are_not_neighbours(buffer):
    names = [name for name in buffer.by_name if name.endswith("q.weight")]
    with pytest.raises(AssertionError, match="not neighbours"):
        buffer.fused([names[0], names[0].replace("q.", "v.")])


def test_views_of_another_flat_tensor_have_the_same_places(buffer):
    gradients = buffer.flat * 2
    for piece in buffer.slices:
        assert torch.equal(buffer.view(piece.name, of=gradients), 2 * buffer.view(piece.name))
    name = next(name for name in buffer.by_name if name.endswith("gate.weight"))
    names = [name, name.replace("gate", "up")]
    assert torch.equal(buffer.fused(names, of=gradients), 2 * buffer.fused(names))


def test_a_box_is_the_part_of_the_whole_parameter_that_was_asked_for(buffer):
    name = next(name for name in buffer.by_name if name.endswith("o.weight"))
    held = buffer.by_name[name]
    offset = (held.offset[0] + 2, held.offset[1] + 1)
    box = buffer.box(ParameterSlice(name=name, offset=offset, length=(3, 4)))
    assert torch.equal(box, buffer.view(name)[2:5, 1:5])
    box.fill_(-7)
    assert buffer.flat.eq(-7).sum() == 12


def test_one_slice_of_a_parameter_on_a_rank():
    piece = ParameterSlice(name="a", offset=(0,), length=(2,))
    with pytest.raises(AssertionError, match="one slice of a parameter"):
        ParameterBuffer([piece, piece], dtype=torch.float32, device="cpu")


def test_what_a_held_slice_covers_is_lent_and_not_stored():
    """One stage of two is there already; of the other tp what is multiplied by itself."""
    whole = Layout(spec=SPEC, mesh=DeviceMesh(0, 2), dp=2)
    stages = Layout(spec=SPEC, mesh=DeviceMesh(0, 2), pp=2)
    source = ParameterBuffer.for_rank(stages, 0, dtype=torch.float32, device="cpu")
    source.flat.copy_(torch.arange(source.flat.numel()))
    borrower = ParameterBuffer.for_rank(whole, 0, dtype=torch.float32, device="cpu", lender=source)
    assert borrower.lent == set(source.by_name)
    assert borrower.num_values + source.num_values == sum(p.num_values for p in borrower.slices)
    names = [f"layers.0.{name}.weight" for name in ("q", "k", "v")]
    assert borrower.fused(names).data_ptr() == source.fused(names).data_ptr()

    shards = Layout(spec=SPEC, mesh=DeviceMesh(0, 2), tp=2)
    other = ParameterBuffer.for_rank(shards, 0, dtype=torch.float32, device="cpu", lender=source)
    kinds = {name.partition(".")[2].partition(".")[2] or name for name in other.lent}
    assert {"o.weight", "down.weight", "embedding.weight"} <= kinds
    assert not kinds & {"q.weight", "k.weight", "v.weight", "gate.weight", "up.weight"}
    for piece in shards.slices(0):
        if piece.name in other.lent:
            part = source.view(piece.name)[tuple(slice(0, n) for n in piece.length)]
            assert torch.equal(other.view(piece.name), part)
            assert other.view(piece.name).data_ptr() == part.data_ptr()
            assert torch.equal(other.fused([piece.name]), part)
    assert other.num_values == stored_values(stages, shards, 0)
    assert stored_values(shards, stages, 1) == sum(
        piece.num_values for piece in stages.slices(1) if "norm" not in piece.name
    ), "halves do not cover wholes"


@given(data=st.data())
def test_a_row_is_where_torch_says_that_a_box_is_contiguous(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    origin = [data.draw(st.integers(0, 3)) for _ in lengths]
    before = ParameterSlice(name="before", offset=(0,), length=(7,))
    whole = ParameterSlice(name="x", offset=tuple(origin), length=tuple(lengths))
    buffer = ParameterBuffer([before, whole], dtype=torch.float32, device="cpu")
    buffer.flat.copy_(torch.arange(buffer.flat.numel()))
    starts = [data.draw(st.integers(0, n - 1)) for n in lengths]
    sizes = [data.draw(st.integers(1, n - a)) for n, a in zip(lengths, starts, strict=True)]
    offset = tuple(o + a for o, a in zip(origin, starts, strict=True))
    piece = ParameterSlice(name="x", offset=offset, length=tuple(sizes))
    box, row = buffer.box(piece), buffer.row(piece)
    assert (row is not None) == box.is_contiguous()
    if row is not None:
        assert torch.equal(buffer.of_row("x", row), box.reshape(-1))

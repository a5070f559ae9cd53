"""Protects layouts: shards are the whole, each value as often as it should be, for every family.

Oracle: boolean masks over whole parameters, and for kv heads the head that a query belongs to.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.stage import stage_shapes, stage_values
from planner.layout import Layout, parameters, repeated_kv_heads, shard
from planner.mesh import DeviceMesh
from planner.strategy import tensor_parallel_problem
from profiles.catalogue import MODELS
from profiles.models import ModelSpec

FAMILIES = ("llama-7b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2b", "gpt2", "phi3-medium",
            "mixtral-8x7b", "qwen1.5-moe-a2.7b")  # fmt: skip


def degrees(spec: ModelSpec) -> list[int]:
    return [tp for tp in (1, 2, 3, 4, 5, 8) if tensor_parallel_problem(spec, tp) is None]


@pytest.mark.parametrize("name", FAMILIES)
def test_shards_are_the_whole_parameter(name: str) -> None:
    """Along the cut dimension every row is held by tp / parts neighbours, in order."""
    spec = replace(MODELS[name], num_layers=1)
    for tp in degrees(spec):
        for parameter in parameters(spec):
            pieces = [shard(parameter, tp, rank) for rank in range(tp)]
            if (dim := parameter.shard_dim) is None:
                assert {piece.length for piece in pieces} == {parameter.shape}
                continue
            rows = Counter(
                row for p in pieces for row in range(p.offset[dim], p.offset[dim] + p.length[dim])
            )
            repeats = tp // parameter.num_parts(tp)
            assert rows == dict.fromkeys(range(parameter.shape[dim]), repeats)
            sizes = {piece.length[dim] for piece in pieces}
            assert max(sizes) - min(sizes) <= 1
            assert [p.offset[dim] for p in pieces] == sorted(p.offset[dim] for p in pieces)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_stage_is_counted_without_listing_its_slices(name: str, head: str) -> None:
    spec = replace(MODELS[name], num_layers=5).with_head(head)  # type: ignore[arg-type]
    for tp in degrees(spec):
        for pp in (1, 2, 3):
            layout = Layout(spec=spec, mesh=DeviceMesh(0, pp * tp), pp=pp, tp=tp)
            for stage, shape in enumerate(stage_shapes(spec, pp)):
                held = [layout.num_values(layout.device(stage, 0, rank)) for rank in range(tp)]
                assert stage_values(spec, shape, tp) == max(held)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen1.5-moe-a2.7b"])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_expert_lies_on_dp_over_ep_ranks(name: str, ep: int) -> None:
    """Oracle: a mask over the whole parameter; everything else is on all dp ranks."""
    spec = replace(MODELS[name], num_layers=1)
    layout = Layout(spec=spec, mesh=DeviceMesh(0, 8), dp=4, tp=2, ep=ep)
    held = Counter((piece.name, piece.offset) for d in range(8) for piece in layout.slices(d))
    for parameter in parameters(spec):
        copies = [count for (name, _), count in held.items() if name == parameter.name]
        whole = parameter.shard_dim is None
        assert set(copies) == {4 // ep if parameter.is_expert else 8 if whole else 4}
        if parameter.is_expert:
            values = sum(
                piece.num_values
                for d in range(8)
                for piece in layout.slices(d)
                if piece.name == parameter.name
            )
            assert values == (4 // ep) * prod(parameter.shape)
    experts = [layout.slices(d)[-1].offset[0] for d in range(0, 8, 2)]
    assert experts == [spec.num_experts // ep * (dp_rank % ep) for dp_rank in range(4)]
    if ep > 1:  # experts last, and nothing after them
        kinds = [parameter.is_expert for parameter in layout.stage_parameters(0)]
        assert kinds == sorted(kinds)


@pytest.mark.parametrize("ep", [2, 4])
def test_a_stage_with_experts_apart_is_counted_without_listing(ep: int) -> None:
    spec = replace(MODELS["qwen1.5-moe-a2.7b"], num_layers=5)
    layout = Layout(spec=spec, mesh=DeviceMesh(0, 16), pp=2, tp=2, dp=4, ep=ep)
    for stage, shape in enumerate(stage_shapes(spec, 2)):
        held = [layout.num_values(layout.device(stage, 1, rank)) for rank in range(2)]
        assert stage_values(spec, shape, 2, ep) == max(held)


@given(
    st.integers(1, 12).flatmap(lambda kv: st.tuples(st.just(kv), st.integers(1, 6))),
    st.integers(1, 12),
)
def test_a_shard_has_the_kv_head_of_each_of_its_queries(heads: tuple[int, int], tp: int) -> None:
    num_kv_heads, group = heads
    num_heads = num_kv_heads * group
    if num_heads % tp:
        return
    spec = ModelSpec(name="x", num_layers=1, hidden=4, num_heads=num_heads, ffn=4, vocab=4,
                     num_kv_heads=num_kv_heads, head_dim=1)  # fmt: skip
    (key,) = (p for p in parameters(spec) if p.name == "layers.0.k.weight")
    for rank in range(tp):
        piece = shard(key, tp, rank)
        held = list(range(piece.offset[0], piece.offset[0] + piece.length[0]))
        assert len(held) == spec.held_kv_heads(tp)
        repeated = repeated_kv_heads(spec, tp, rank)
        used = held if repeated is None else [held[index] for index in repeated]
        assert len(used) == spec.cached_kv_heads(tp)
        local = num_heads // tp
        assert local % len(used) == 0
        for query in range(local):
            wanted = (rank * local + query) // group
            assert used[query // (local // len(used))] == wanted

"""Protects layouts: shards are the whole, each value as often as it should be, for every family.

Oracle: boolean masks over whole parameters, and for kv heads the head that a query belongs to.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

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

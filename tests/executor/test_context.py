"""Protects places: every rank knows its coordinates, and its groups hold the right ranks.

Oracle: ranks whose coordinates agree on all axes but one, by brute force; and sums over gloo.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from executor.context import RankContext, build_contexts, connect_stages, single_process
from planner.layout import Layout
from planner.mesh import DeviceMesh
from tests.executor.small_models import small_spec
from tests.spawn import spawn

TIED, UNTIED = small_spec(tied_embedding=True), small_spec()
ONE_KV_HEAD = small_spec(num_kv_heads=1)
LAYOUTS = (
    Layout(spec=TIED, mesh=DeviceMesh(0, 4), pp=2, tp=2),
    Layout(spec=TIED, mesh=DeviceMesh(0, 4), pp=2, dp=2),
    Layout(spec=UNTIED, mesh=DeviceMesh(0, 4), tp=2, dp=2),
    Layout(spec=UNTIED, mesh=DeviceMesh(2, 2), dp=2),  # half of the ranks are outside
    Layout(spec=UNTIED, mesh=DeviceMesh(3, 1)),
    Layout(spec=UNTIED, mesh=DeviceMesh(0, 4), tp=4),  # each kv head on two shards
    Layout(spec=ONE_KV_HEAD, mesh=DeviceMesh(0, 4), tp=2, dp=2),
)
AXES = ("pp", "dp", "tp")


def places(rank: int, world_size: int) -> list[dict[str, Any] | None]:
    """This rank's place in every layout, with the members of its groups and a sum over each."""
    contexts = build_contexts(LAYOUTS, rank=rank, device=torch.device("cpu"))
    found: list[dict[str, Any] | None] = []
    for layout in LAYOUTS:
        ctx = contexts.get(layout)
        if ctx is None:
            found.append(None)
            continue
        place: dict[str, Any] = {"at": (ctx.pp_rank, ctx.dp_rank, ctx.tp_rank)}
        for axis in ("tp", "kv", "dp", "embedding", "mesh"):
            group = getattr(ctx, f"{axis}_group")
            place[axis] = None if group is None else sorted(dist.get_process_group_ranks(group))
            if group is not None:
                total = torch.tensor([2**rank])
                dist.all_reduce(total, group=group)
                place[f"{axis} sum"] = int(total)
        found.append(place)
    whole = contexts[LAYOUTS[0]]
    assert whole.mesh_group is contexts[LAYOUTS[1]].mesh_group, "one set of ranks, one group"
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[list[dict[str, Any] | None]]:
    return spawn(4, places)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_groups_hold_the_ranks_that_differ_on_one_axis(by_rank, number):
    layout = LAYOUTS[number]
    inside = {rank: found[number] for rank, found in enumerate(by_rank) if found[number]}
    assert set(inside) == set(layout.mesh.devices)
    coordinates = {place["at"]: rank for rank, place in inside.items()}
    assert len(coordinates) == layout.mesh.num_devices
    for rank, place in inside.items():
        members: dict[str, list[int]] = {"mesh": sorted(inside)}
        for number_of_axis, axis in enumerate(AXES):
            others = [i for i in range(3) if i != number_of_axis]
            members[axis] = sorted(
                other for at, other in coordinates.items()
                if all(at[i] == place["at"][i] for i in others)
            )  # fmt: skip
        ends = place["at"][0] in (0, layout.pp - 1)
        members["embedding"] = (
            [r for r in members["pp"] if inside[r]["at"][0] in (0, layout.pp - 1)]
            if layout.spec.tied_embedding and ends
            else [rank]
        )
        heads = layout.spec.num_kv_heads
        members["kv"] = [
            r for r in members["tp"]
            if layout.tp > heads
            and inside[r]["at"][2] * heads // layout.tp == place["at"][2] * heads // layout.tp
        ]  # fmt: skip
        for axis in ("tp", "kv", "dp", "embedding", "mesh"):
            want = members[axis] if len(members[axis]) > 1 else None
            assert place[axis] == want, (layout.key, rank, axis)
            if want:
                assert place[f"{axis} sum"] == sum(2**r for r in want)


def connected(rank: int, world_size: int) -> bool:
    layouts = [
        Layout(spec=UNTIED, mesh=DeviceMesh(0, 4), pp=2, dp=2),
        Layout(spec=UNTIED, mesh=DeviceMesh(0, 3), pp=3),
        Layout(spec=UNTIED, mesh=DeviceMesh(0, 4), tp=2, dp=2),
    ]
    for ctx in build_contexts(layouts, rank=rank, device=torch.device("cpu")).values():
        connect_stages(ctx)
    return True


def test_every_stage_has_its_neighbours_message():
    """On CUDA they are sent before anything else; who has no neighbour sends none."""
    assert all(spawn(4, connected))


def test_a_middle_stage_is_neither_first_nor_last():
    layout = Layout(spec=TIED, mesh=DeviceMesh(4, 6), pp=3, tp=2)
    ends = []
    for rank in layout.mesh.devices:
        ctx = RankContext(layout=layout, rank=rank, device=torch.device("cpu"))
        ends.append((ctx.is_first_stage, ctx.is_last_stage))
        assert ctx.stage_rank(ctx.pp_rank) == rank
        assert [ctx.stage_rank(p) for p in range(3)] == [4 + 2 * p + ctx.tp_rank for p in range(3)]
    first, middle, last = (True, False), (False, False), (False, True)
    assert ends == [first, first, middle, middle, last, last]


def test_one_process_has_no_groups():
    ctx = single_process(LAYOUTS[4])
    assert (ctx.rank, ctx.is_first_stage, ctx.is_last_stage) == (3, True, True)
    assert ctx.tp_group is ctx.dp_group is ctx.embedding_group is ctx.mesh_group is None
    with pytest.raises(AssertionError):
        single_process(LAYOUTS[0])

"""Protects: a rank that only gives weights away goes on while they leave, and changes them after.

Between processes; that the curve is the same as in turns is ``test_staleness.py``'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from executor.buffers import ParameterBuffer
from executor.cross_memory import CrossMemory
from executor.reallocate import carry_out
from executor.reallocation_rounds import make_schedule
from executor.under_way import UnderWay
from executor.worker import Worker
from planner.instructions import Average, Free, Generate, Infer, Instruction, Offload, Train
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.program import Reallocate, compile_plan
from planner.reallocation import reallocate
from planner.trace import TraceSpan, read_trace
from tests.executor.test_reallocate import fill, random_pairs, spec
from tests.executor.test_staleness import ahead
from tests.runs import OVERRIDES, make_plan, run_rank
from tests.spawn import spawn

# ---- messages -----------------------------------------------------------------------------------

STRAIGHT = (
    Layout(spec=spec(), mesh=DeviceMesh(0, 1)),
    Layout(spec=spec(), mesh=DeviceMesh(1, 2), pp=2),
)


def leave_and_say(rank: int, world_size: int) -> list[int]:
    """The giver says that it has gone on, for which the takers wait before they begin.

    Then it sends more of its own, with the tag of all, before it waits. Returns what was received.
    """
    src, dst = STRAIGHT
    store = dist.PrefixStore("said", dist.distributed_c10d._get_default_store())
    schedule = make_schedule(reallocate(src, dst), rank, 1000)
    source, expected = fill(src, rank), fill(dst, rank)
    if source is not None:
        left: list[Callable[[], None]] = []
        assert carry_out(schedule, source, None, left=left) == 0
        later = [dist.isend(torch.tensor([7 + peer]), peer) for peer in (1, 2)]
        store.set("gone on", "")
        for wait in left:
            wait()
        source.flat.fill_(-1.0)  # as training would
        for work in later:
            assert work is not None
            work.wait()
        return [len(left)]
    assert expected is not None
    store.wait(["gone on"])
    target = ParameterBuffer.for_rank(dst, rank, dtype=torch.float32, device="cpu")
    carry_out(schedule, None, target)
    assert torch.equal(target.flat, expected.flat[: target.num_values])
    received = torch.zeros(1, dtype=torch.int64)
    dist.recv(received, 0)
    return received.tolist()


def test_a_giver_does_not_wait_for_takers_and_later_messages_do_not_mix() -> None:
    found = spawn(3, leave_and_say)
    assert found[0] != [0]
    assert found[1:] == [[8], [9]]


def leave_where_possible(rank: int, world_size: int, reads: bool) -> tuple[int, int]:
    """Reallocations that were left under way, and those that did not fit the staging.

    ``reads``: takers read the givers' memory where they may.
    """
    left_behind, waited = 0, 0
    memory = CrossMemory.between_workers() if reads else None
    for src, dst, staging_bytes in random_pairs(30, seed=8):
        source, expected = fill(src, rank), fill(dst, rank)
        if source is None and expected is None:
            continue
        schedule = make_schedule(reallocate(src, dst), rank, staging_bytes // 4)
        left: list[Callable[[], None]] = []
        target = None
        if expected is not None:
            target = ParameterBuffer.for_rank(dst, rank, dtype=torch.float32, device="cpu")
            target.flat.fill_(float("nan"))
        carry_out(schedule, source, target, left=left, memory=memory)
        assert target is None or not left, "who receives waits for it"
        left_behind += bool(left)
        waited += target is None and bool(schedule.phases[0]) and not left
        for wait in left:
            wait()
        if target is not None and expected is not None:
            for piece in target.slices:
                assert torch.equal(target.view(piece.name), expected.view(piece.name)), piece
        if source is not None:
            source.flat.fill_(-1.0)
    return left_behind, waited


@pytest.mark.parametrize("reads", [False, True])
def test_what_is_sent_at_once_arrives_exactly_and_fits_the_staging_or_is_waited_for(
    reads: bool,
) -> None:
    left_behind, waited = (sum(each) for each in zip(*spawn(8, leave_where_possible, reads)))
    assert left_behind
    assert waited or reads, "what is read needs no staging"


def give_to_the_dead(rank: int, world_size: int, folder: str) -> None:
    src, dst = STRAIGHT
    if rank:
        os._exit(3)
    left: list[Callable[[], None]] = []
    try:
        carry_out(make_schedule(reallocate(src, dst), 0, 1000), fill(src, 0), None, left=left)
        for wait in left:
            wait()
    except RuntimeError as error:
        Path(folder, "error").write_text(str(error))
    os._exit(0)


def test_a_taker_that_is_gone_is_an_error_of_the_giver(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died silently"):
        spawn(3, give_to_the_dead, str(tmp_path))
    assert "onnection" in (tmp_path / "error").read_text()


# ---- what a rank does meanwhile -----------------------------------------------------------------

WORDS = [*OVERRIDES, "total_steps=3"]
LATE = 1  # the step
# Rank 0 gives the actor's weights, then reads rewards and references of the step before's answers.
BESIDE = ahead(make_plan(2, "0:d1p1m1:1", overrides=WORDS, actor_gen="1:d1p1m1:1"))


class LateTaker(Worker):
    """In one step rank 1 takes the weights only when rank 0 has gone on with three calls."""

    def _reallocate(self, instruction: Reallocate, counts: dict[str, int]) -> None:
        if self.rank and self.step == LATE:
            self.store.wait(["gone on"], timedelta(seconds=60))
        super()._reallocate(instruction, counts)

    def _infer(self, instruction: Infer, counts: dict[str, int]) -> None:
        super()._infer(instruction, counts)
        if instruction.call == "critic_inf" and self.step == LATE:
            self.store.set("gone on", "")


def run_late(rank: int, world_size: int, folder: str) -> None:
    run_rank(rank, world_size, BESIDE, folder, worker_class=LateTaker)


def one(spans: list[TraceSpan], rank: int, label: str) -> TraceSpan:
    (found,) = [span for span in spans if (span.rank, span.label) == (rank, label)]
    return found


def test_a_rank_that_only_gives_goes_on_with_calls_and_trains_after(tmp_path: Path) -> None:
    spawn(2, run_late, str(tmp_path))
    spans = [span for span in read_trace(tmp_path / "trace") if span.step == LATE]
    taken, given = (one(spans, rank, "reallocate actor") for rank in (1, 0))
    for name in ("rew_inf", "ref_inf", "critic_inf"):
        call = one(spans, 0, name)
        assert given.end_s <= call.start_s
        assert call.end_s < taken.end_s, "it went on before its weights were taken"
    waited = one(spans, 0, "wait for reallocate actor")
    assert (waited.index, waited.kind) == (given.index, "wait")
    assert waited.end_s <= one(spans, 0, "actor_train").start_s, "nothing changes before that"


def test_what_may_change_weights_that_leave_is_held_back() -> None:
    graph = BESIDE.problem.graph
    (sent,) = [i for i in compile_plan(BESIDE).step[0] if isinstance(i, Reallocate)]
    home = sent.source
    held: dict[Instruction, bool] = {
        Train(index=9, call="actor_train"): True,
        Train(index=9, call="critic_train"): False,
        Infer(index=9, call="ref_inf"): False,
        Generate(index=9, call="actor_gen"): False,  # reads them only
        replace(sent, index=9, role="critic"): True,  # has one staging with it
        Offload(index=9, role="actor", layout=home, what="optimizer"): True,
        Offload(index=9, role="ref", layout=home, what="weights"): False,
        Average(index=9, role="ref", of="actor", layout=home, rate=0.1): False,
        Average(index=9, role="actor", of="ref", layout=home, rate=0.1): True,
        Free(index=9, role="actor", layout=sent.destination): False,
    }
    under_way = UnderWay(graph)
    assert not any(map(under_way.holds_back, held))
    done: list[str] = []
    under_way.begin(sent, [lambda: done.append("waited")])
    assert {i: under_way.holds_back(i) for i in held} == held
    under_way.finish()
    assert done == ["waited"]
    assert not any(map(under_way.holds_back, held))

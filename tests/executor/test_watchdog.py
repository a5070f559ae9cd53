"""Protects the watchdog's verdict: the rank at fault is named, not those that wait for it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from executor.out_of_memory import is_out_of_memory, out_of_memory
from executor.watchdog import IDLE, Heart, Position, Watch, partners, read_position
from planner.memory import call_memory
from planner.program import Program, Reallocate, Train, Transfer, compile_plan
from tests.runs import make_plan

# Rank 0 trains what both generate: reallocation, transfers and collectives between them.
PLAN = make_plan(2, "0:d1p1m1:1", actor_gen="0:d2p1m1:1", critic_inf="1:d1p1m1:1",
                 critic_train="1:d1p1m1:1")  # fmt: skip
PROGRAM = compile_plan(PLAN)


def instruction_of(program: Program, rank: int, kind: type, **fields: object) -> int:
    """The index of the first instruction of this kind."""
    found = [
        i
        for i in program.step[rank]
        if isinstance(i, kind) and all(getattr(i, k) == v for k, v in fields.items())
    ]
    return found[0].index


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def watch_in(folder: Path, timeout_s: float = 10.0) -> tuple[Watch, list[Heart]]:
    files = {rank: folder / f"rank{rank}.json" for rank in range(2)}
    hearts = [Heart(file, rank, interval_s=1e6) for rank, file in files.items()]
    return Watch(files, PLAN, PROGRAM, timeout_s=timeout_s), hearts


def test_a_rank_without_work_does_not_hang_however_long_a_step_lasts(
    tmp_path: Path, clock: Clock
) -> None:
    """The plan that a run has gone over to may leave ranks without any."""
    alone = make_plan(1, "0:d1p1m1:1")
    watch, hearts = watch_in(tmp_path)
    watch.follow(alone, compile_plan(alone))
    works = [i.index for i in compile_plan(alone).step[0]]
    for second in range(20):
        clock.now += 1.0
        hearts[0].at(3, 0, works[second % len(works)], "works")
        hearts[1].at(3, 0, -1, IDLE)
        assert watch.look([0, 1]) is None
    clock.now += 11.0
    hearts[0]._write()
    hearts[1]._write()
    hang = watch.look([0, 1])
    assert hang is not None
    assert hang.position.rank == 0


def test_a_silent_rank_is_named_with_those_that_wait_for_it(tmp_path: Path, clock: Clock) -> None:
    watch, hearts = watch_in(tmp_path)
    receives = [i for i in PROGRAM.step[0] if isinstance(i, Transfer) and i.receives]
    waits = receives[0]
    behind = [i.index for i in PROGRAM.step[1] if i.index < waits.index][-1]
    hearts[0].at(3, 0, waits.index, "receive")
    hearts[1].at(3, 0, behind, "actor_gen")
    assert watch.look([0, 1]) is None
    for _ in range(11):
        clock.now += 1.0
        hearts[0]._write()
        hang = watch.look([0, 1])
    assert hang is not None
    assert hang.position.rank == 1
    assert hang.waits_for == ()
    assert [position.rank for position in hang.waiting] == [0]
    assert "no sign of life for 11 s" in hang.sentence()
    assert f"rank 0 waits for it in receive (instruction {waits.index} of step 4)" in (
        hang.sentence()
    )


def test_of_two_that_stand_still_the_cause_is_the_one_that_waits_for_nobody(
    tmp_path: Path, clock: Clock
) -> None:
    """Rank 1 sits in a reward function; both beat."""
    watch, hearts = watch_in(tmp_path)
    realloc = instruction_of(PROGRAM, 0, Reallocate)
    hearts[0].at(3, 0, realloc, "reallocate actor")
    hearts[1].at(2, 0, PROGRAM.step[1][-1].index, "critic_train")
    for _ in range(11):
        assert (hang := watch.look([0, 1])) is None
        clock.now += 1.0
        hearts[0]._write()
        hearts[1]._write()
    hang = watch.look([0, 1])
    assert hang is not None
    assert hang.position.rank == 1
    assert "no progress for 11 s" in hang.sentence()
    assert "rank 0 waits for it in reallocate actor" in hang.sentence()


def test_progress_is_no_hang_however_long_the_run(tmp_path: Path, clock: Clock) -> None:
    watch, hearts = watch_in(tmp_path)
    for step in range(20):
        for heart in hearts:
            heart.at(step, 0, 0, "actor_gen")
        clock.now += 9.0
        assert watch.look([0, 1]) is None


def test_a_rank_that_never_comes_is_a_hang_but_may_take_its_time_to_load(
    tmp_path: Path, clock: Clock
) -> None:
    watch, hearts = watch_in(tmp_path, timeout_s=5.0)
    hearts[0].at(-1, 0, -1, "starting")
    clock.now += 50.0
    hearts[0].at(0, 0, 0, "actor_gen")
    assert watch.look([0, 1]) is None
    clock.now += 11.0
    hearts[0].at(0, 0, 1, "actor_gen")
    hang = watch.look([0, 1])
    assert hang is not None
    assert hang.position == Position(rank=1, step=-1, turn=0, index=-1, label="starting")


def test_partners_are_those_that_the_instruction_communicates_with() -> None:
    for rank in (0, 1):
        for instruction in PROGRAM.step[rank]:
            found = partners(PLAN, instruction, rank)
            assert rank not in found
            if isinstance(instruction, Transfer) and instruction.sends:
                assert not found  # a sender does not wait
            if isinstance(instruction, Train):
                assert not found  # on one rank each
    realloc = next(i for i in PROGRAM.step[1] if isinstance(i, Reallocate))
    assert partners(PLAN, realloc, 1) == {0}


def test_a_position_is_read_back_and_half_a_file_is_none(tmp_path: Path) -> None:
    heart = Heart(tmp_path / "h", 5, interval_s=1e6)
    heart.at(7, 0, 3, "x" * 40)
    found = read_position(tmp_path / "h")
    assert found is not None
    assert (found.rank, found.place, found.beat) == (5, (7, 0, 3), 1)
    (tmp_path / "h").write_bytes((tmp_path / "h").read_bytes()[:30])
    assert read_position(tmp_path / "h") is None


def test_the_estimate_and_the_knob_of_a_call_that_found_no_memory() -> None:
    train = next(i for i in PROGRAM.step[0] if isinstance(i, Train))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("Connection reset by peer"))
    error = out_of_memory(
        PLAN, train, rank=0, step=4, device=torch.device("cpu"), asked=str(caught.value)
    )
    need = call_memory(PLAN.problem, train.call, PLAN.allocations[train.call])
    for name, num_bytes in need.items().items():
        assert (f"{name} " in str(error)) == (num_bytes > 0)
    assert f"(instruction {train.index} of step 5)" in str(error)
    assert error.where == "allocations.actor_train"
    assert error.remedy in str(error)
    assert "micro-batches" in error.remedy  # activations are most of it

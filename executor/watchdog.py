"""Who hangs, and whom the others wait for.

Every rank tells where it is: a small file of its own, written at each instruction and every few
seconds in between (``Heart``). Whoever starts the run reads these files (``Watch``). All ranks
hold the same program, so where each one is says who waits for whom (``partners``): no call that
communicates is watched by itself.

A rank hangs when it gives no sign of life for ``SILENCE_S``, or stays in one instruction longer
than the job's ``hang_timeout_s``. Tensors' messages have a deadline as well, a little later, for a
rank whose watchdog is gone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from planner.mesh import node_grid
from planner.plan import ExecutionPlan
from planner.program import (
    Average,
    ByRank,
    Free,
    Function,
    Instruction,
    Load,
    Offload,
    Program,
    Reallocate,
    Reload,
    Reserve,
    Transfer,
)
from planner.reallocation import reallocate

# No sign of life for so long is a hang whatever the rank does: a beat needs no more than the
# interpreter. Above the stalls of a swapping machine or of a network file system.
SILENCE_S = 60.0
IDLE = "has nothing to do in this step"  # however long that lasts
_FILE_BYTES = 512
_START = (-1, 0, -1)  # the place before the first instruction


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a rank is. ``index`` is the instruction's in the program, -1 between instructions."""

    rank: int
    step: int  # -1: before the first
    turn: int  # of the program in the step: 0, then one for each batch of an evaluation
    index: int
    label: str
    host: str = ""
    pid: int = 0
    beat: int = 0  # counts signs of life

    @property
    def place(self) -> tuple[int, int, int]:
        return (self.step, self.turn, self.index)

    def describe(self) -> str:
        if self.index < 0:
            return self.label
        if self.step < 0:
            return f"{self.label} (instruction {self.index}, before the first step)"
        return f"{self.label} (instruction {self.index} of step {self.step + 1})"


class Heart:
    """Writes this rank's position; a thread repeats it so that silence means something.

    The file is overwritten in place: on a full disk it still beats.
    """

    def __init__(self, file: Path, rank: int, *, interval_s: float) -> None:
        self.file = file
        self.interval_s = interval_s
        self.position = Position(
            rank=rank, step=-1, turn=0, index=-1, label="starting", host=socket.gethostname(),
            pid=os.getpid(),
        )  # fmt: skip
        self._beat = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def at(self, step: int, turn: int, index: int, label: str) -> None:
        """The rank begins something."""
        old = self.position
        self.position = Position(
            rank=old.rank,
            step=step,
            turn=turn,
            index=index,
            label=label,
            host=old.host,
            pid=old.pid,
        )
        self._write()

    def _write(self) -> None:
        with self._lock:
            self._beat += 1
            values = {**asdict(self.position), "beat": self._beat}
            line = json.dumps(values).encode().ljust(_FILE_BYTES)
            # Opened each time: a network file system shows others what was closed.
            handle = os.open(self.file, os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                os.pwrite(handle, line, 0)
            finally:
                os.close(handle)

    def _run(self) -> None:
        while not self._ended.wait(self.interval_s):
            try:
                self._write()
            except OSError:  # of a file system that comes back, or of one that the run ends with
                continue

    def __enter__(self) -> Heart:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:  # fmt: skip
        self._ended.set()
        self._thread.join()


def read_position(file: Path) -> Position | None:
    """None: not there, or just being written."""
    try:
        return Position(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


# ---- who waits for whom -----------------------------------------------------------------------


def partners(plan: ExecutionPlan, instruction: Instruction, rank: int) -> frozenset[int]:
    """The ranks that ``rank`` may wait for in an instruction."""
    if isinstance(instruction, Load | Reserve | Free | Function | Average | Offload | Reload):
        return frozenset()
    if isinstance(instruction, Transfer):
        return frozenset(parcel.peer for parcel in instruction.receives)
    if isinstance(instruction, Reallocate):
        meshes = instruction.source.mesh, instruction.destination.mesh
        grid = node_grid(*meshes, plan.problem.cluster)
        messages = reallocate(
            instruction.source, instruction.destination, devices_per_node=grid.size,
            first_device=grid.first,
        ).messages  # fmt: skip
        ends = [(m.src, m.dst) for m in messages if rank in (m.src, m.dst)]
        return frozenset(end for pair in ends for end in pair) - {rank}
    return frozenset(plan.allocations[instruction.call].mesh.devices) - {rank}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """What the watchdog tells: the rank at fault first, then those who wait."""

    position: Position
    reason: str
    waits_for: tuple[int, ...]
    waiting: tuple[Position, ...]

    def sentence(self) -> str:
        p = self.position
        on = f" on {p.host}" if p.host else ""
        text = f"rank {p.rank}{on} hangs in {p.describe()}: {self.reason}"
        if self.waits_for:
            text += f"; it waits for {_ranks(self.waits_for)}"
        for other in self.waiting:
            text += f"; rank {other.rank} waits for it in {other.describe()}"
        return text


def _programs(program: Program) -> list[tuple[str, ByRank]]:
    """All that ranks may be at, each instruction under a number of its own."""
    found = [("setup", program.setup), ("step", program.step)]
    if program.ahead is not None:
        others = (program.ahead.first, program.ahead.last, program.ahead.alone)
        found += [("step", other) for other in others]
    return found


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class Watch:
    """Looks at all ranks' files again and again; times are of this process's own clock."""

    def __init__(
        self, files: Mapping[int, Path], plan: ExecutionPlan, program: Program, *, timeout_s: float
    ) -> None:
        self.files = files
        self.timeout_s = timeout_s
        self.silence_s = min(SILENCE_S, timeout_s)
        self.follow(plan, program)
        now = time.monotonic()
        nowhere = {
            rank: Position(rank=rank, step=-1, turn=0, index=-1, label="starting") for rank in files
        }
        self.positions: dict[int, Position] = nowhere
        self.heard_s = dict.fromkeys(files, now)
        self.moved_s = dict.fromkeys(files, now)

    def follow(self, plan: ExecutionPlan, program: Program) -> None:
        """What the ranks are at from now on."""
        self.plan = plan
        self.instructions = {
            (kind, rank, i.index): i
            for kind, programs in _programs(program)
            for rank, instructions in programs.items()
            for i in instructions
        }

    def look(self, ranks: Sequence[int]) -> Hang | None:
        """Read the files of ``ranks``, those that have not ended; a hang if there is one."""
        now = time.monotonic()
        for rank in ranks:
            found = read_position(self.files[rank])
            if found is None or found == self.positions[rank]:
                continue
            self.heard_s[rank] = now
            old = self.positions[rank]
            if (found.place, found.label) != (old.place, old.label):
                self.moved_s[rank] = now
            self.positions[rank] = found
        silent = [
            r
            for r in ranks
            if now - self.heard_s[r] > self.silence_s and not self._is_starting(r, now)
        ]
        if silent:
            first = min(silent, key=lambda r: self.heard_s[r])
            reason = f"no sign of life for {now - self.heard_s[first]:.0f} s"
            return self._hang(first, reason + _process_state(self.positions[first]), ranks)
        stuck = [
            r
            for r in ranks
            if now - self.moved_s[r] > self.timeout_s
            and not self._is_starting(r, now)
            and self.positions[r].label != IDLE
        ]
        if stuck:
            first = self._cause(stuck, ranks)
            return self._hang(first, f"no progress for {now - self.moved_s[first]:.0f} s", ranks)
        return None

    def _is_starting(self, rank: int, now: float) -> bool:
        """Before its first instruction a process imports libraries, which may take a minute."""
        start = self.positions[rank].place == _START
        return start and now - self.moved_s[rank] <= max(SILENCE_S, self.timeout_s)

    def _cause(self, stuck: Sequence[int], ranks: Sequence[int]) -> int:
        """The stuck rank that waits for nobody behind it; else the one that is furthest behind."""
        roots = [rank for rank in stuck if not self.waits_for(rank, ranks)]
        return min(roots or stuck, key=lambda rank: (self.positions[rank].place, rank))

    def waits_for(self, rank: int, ranks: Sequence[int]) -> tuple[int, ...]:
        """Its instruction's partners that have not come to it yet, or are in it as well.

        Of several in one instruction, those that give no sign of life are waited for.
        """
        position = self.positions[rank]
        kind = "setup" if position.step < 0 else "step"
        instruction = self.instructions.get((kind, rank, position.index))
        others: frozenset[int] = frozenset(ranks) - {rank}
        if instruction is not None:
            # A transfer's two halves have numbers of their own: the sender's comes first.
            others &= partners(self.plan, instruction, rank)
        elif not position.label.startswith(("writing", "going over")):
            return ()
        behind = {r for r in others if self.positions[r].place < position.place}
        level = {r for r in others if self.positions[r].place == position.place}
        margin = self.silence_s / 2
        silent = {r for r in level if self.heard_s[r] < self.heard_s[rank] - margin}
        if behind or silent or any(self.heard_s[r] > self.heard_s[rank] + margin for r in level):
            return tuple(sorted(behind | silent))
        return tuple(sorted(level))  # each may be at fault

    def _hang(self, rank: int, reason: str, ranks: Sequence[int]) -> Hang:
        waiting = [
            self.positions[other]
            for other in ranks
            if other != rank and rank in self.waits_for(other, ranks)
        ]
        return Hang(
            position=self.positions[rank], reason=reason, waits_for=self.waits_for(rank, ranks),
            waiting=tuple(waiting),
        )  # fmt: skip


def _process_state(position: Position) -> str:
    """What the kernel says of a process of this machine: stopped, or waiting for a disk."""
    if position.host != socket.gethostname():
        return ""
    try:
        stat = Path(f"/proc/{position.pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    state = stat.rpartition(")")[2].split()[0]
    names = {"T": "stopped", "t": "held by a debugger", "D": "waiting for a device", "Z": "dead"}
    return f", its process is {names[state]}" if state in names else ""

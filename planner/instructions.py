"""What a rank does: the instructions of a program, as data.

Every instruction carries its ``index`` in one global order, and a rank's program is a subsequence
of that order, which is why no two ranks can wait for each other (``program_check.py`` verifies
it). ``program.py`` makes programs of plans. Read ``Instruction`` and ``Program``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from planner.graph import CallKind
from planner.layout import Layout
from planner.transfers import Parcel


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Run a GENERATE call on every rank of its mesh, together.

    ``keeps``: its cache stays for the next step's, and what it captured of its decode turns.
    """

    index: int
    call: str
    keeps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Infer:
    """Run an INFER call on every rank of its mesh, together."""

    index: int
    call: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Run a TRAIN call, all its mini-batches, on every rank of its mesh, together."""

    index: int
    call: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """Run a FUNCTION call; ranks do not wait for each other."""

    index: int
    call: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Move ``keys`` from the ranks of ``producer`` to the ranks of ``consumer``.

    A rank has either ``sends`` (right after it ran the producer; it does not wait) or
    ``receives`` (before it runs the consumer; it waits). ``index`` is that of this half; both
    halves carry one ``transfer`` number.
    """

    index: int
    transfer: int
    producer: str
    consumer: str
    keys: tuple[str, ...]
    sends: tuple[Parcel, ...] = ()
    receives: tuple[Parcel, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reallocate:
    """Fill ``destination`` with the role's weights from ``source``, all ranks of both together.

    ``lends``: what a rank holds in ``source`` it may read there, for ``source`` does not change
    while ``destination`` is read. False: ``destination`` is a copy of these weights.
    """

    index: int
    role: str
    source: Layout
    destination: Layout
    lends: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Before the first step: read the role's weights into ``layout`` from its checkpoint."""

    index: int
    role: str
    layout: Layout
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Before the first step: memory for the role in ``destination``, which ``Free`` does not free.

    It comes from ``source`` in every step, which lends what it has if ``lends``.
    """

    index: int
    role: str
    source: Layout
    destination: Layout
    lends: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """The role's weights in ``layout`` are not read again in this step.

    Their memory is free then too, unless it was reserved.
    """

    index: int
    role: str
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """Move the role's weights in ``layout`` towards those of role ``of``, which are there too."""

    index: int
    role: str
    of: str
    layout: Layout
    rate: float


# What leaves a device: a frozen role's weights, or of a trained role the optimizer's state and the
# gradients, which nothing reads but the training. Its weights stay: others read them.
Offloaded = Literal["weights", "optimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """``what`` of the role in ``layout`` leaves the device for the host's memory.

    Weights of a frozen role are there already: they are only dropped. Gradients are not kept.
    """

    index: int
    role: str
    layout: Layout
    what: Offloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """``what`` of the role in ``layout`` comes back from the host; gradients are zero."""

    index: int
    role: str
    layout: Layout
    what: Offloaded


Instruction = (
    Generate | Infer | Train | Function | Transfer | Reallocate | Load | Reserve | Free
    | Average | Offload | Reload
)  # fmt: skip
CALL_INSTRUCTIONS: Mapping[CallKind, type[Generate | Infer | Train | Function]] = {
    CallKind.GENERATE: Generate,
    CallKind.INFER: Infer,
    CallKind.TRAIN: Train,
    CallKind.FUNCTION: Function,
}


ByRank = Mapping[int, tuple[Instruction, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What a run needs beside a step that also works for the next one.

    ``first``: makes what a step reads that no step came before. ``last``: a step that works for
    none after it. ``alone``: a step that makes for itself what it reads; an evaluation's.
    """

    first: ByRank
    last: ByRank
    alone: ByRank


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """``setup`` once, then ``step`` again and again, for each rank; ranks not named do nothing.

    ``ahead``: where calls of a step work for the next one.
    """

    setup: ByRank
    step: ByRank
    ahead: Ahead | None = None

    @property
    def layouts(self) -> tuple[tuple[str, Layout], ...]:
        """Every (role, layout) of the program, in order of first use."""
        found: dict[tuple[str, Layout], None] = {}
        ordered = sorted(
            (i for program in (self.setup, self.step) for ins in program.values() for i in ins),
            key=lambda i: i.index,
        )
        for instruction in ordered:
            if isinstance(instruction, Load):
                found[(instruction.role, instruction.layout)] = None
            elif isinstance(instruction, Reallocate):
                found[(instruction.role, instruction.destination)] = None
        return tuple(found)

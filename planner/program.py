"""``compile_plan``: a plan -> the instructions of every rank for one step.

The program has two interpreters: ``simulate.py`` runs it against a virtual clock, the executor's
worker for real. It is decided entirely before anything starts: which rank computes which
samples, who sends what to whom, and in which order. Every instruction carries its ``index`` in
one global order, and a rank's program is a subsequence of that order, which is why no two ranks
can wait for each other (``program_check.py`` verifies it).

Read ``Instruction`` and ``Program`` first, then ``compile_plan``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from planner.graph import CallKind, ModelFunctionCall, ParameterAverage
from planner.layout import Layout
from planner.plan import ExecutionPlan, validate_plan
from planner.plan_memory import kept_layouts
from planner.transfers import Arrivals, Parcel, plan_transfers, readers_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Run a GENERATE call on every rank of its mesh, together."""

    index: int
    call: str


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
    """Fill ``destination`` with the role's weights from ``source``, all ranks of both together."""

    index: int
    role: str
    source: Layout
    destination: Layout


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

    It comes from ``source`` in every step, which lends what it has.
    """

    index: int
    role: str
    source: Layout
    destination: Layout


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """``setup`` once, then ``step`` again and again, for each rank; ranks not named do nothing."""

    setup: Mapping[int, tuple[Instruction, ...]]
    step: Mapping[int, tuple[Instruction, ...]]

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


# ---- compilation ------------------------------------------------------------------------------


def call_layout(plan: ExecutionPlan, call_name: str) -> Layout | None:
    """Where a call's weights lie; None for a FUNCTION."""
    spec = plan.problem.spec_of(call_name)
    allocation = plan.allocations[call_name]
    return None if spec is None else Layout.of(spec, allocation.mesh, allocation.strategy)


def home_layouts(plan: ExecutionPlan) -> dict[str, tuple[Layout, ...]]:
    """The layouts in which each role's weights stay over steps.

    A trained role lives where it is trained; a frozen one in every layout that reads it.
    """
    homes: dict[str, tuple[Layout, ...]] = {}
    for role in plan.problem.graph.roles:
        train = plan.problem.graph.train_call(role)
        calls = (train,) if train else plan.problem.graph.calls_of(role)
        layouts = (call_layout(plan, call.name) for call in calls)
        homes[role] = tuple(dict.fromkeys(layout for layout in layouts if layout is not None))
    return homes


def what_leaves(call: ModelFunctionCall) -> Offloaded:
    """Of the role of a call that is offloaded."""
    return "optimizer" if call.kind is CallKind.TRAIN else "weights"


class _Compiler:
    """Builds the step's instructions; lives for one ``compile_plan``."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self.plan = plan
        self.problem = plan.problem
        self.graph = plan.problem.graph
        self.homes = home_layouts(plan)
        self.step: dict[int, list[Instruction]] = defaultdict(list)
        self.next_index = 0
        self.position = {call.name: i for i, call in enumerate(self.graph.calls)}

    def index(self) -> int:
        self.next_index += 1
        return self.next_index - 1

    def emit(self, ranks: Iterable[int], instruction: Instruction) -> None:
        for rank in ranks:
            self.step[rank].append(instruction)

    def setup(self) -> dict[int, tuple[Instruction, ...]]:
        loads: dict[int, list[Instruction]] = defaultdict(list)
        offloaded = {
            (call.role, call_layout(self.plan, call.name)): what_leaves(call)
            for call in self.graph.calls
            if self.plan.allocations[call.name].offload
        }
        for role, layouts in self.homes.items():
            trained = self.graph.train_call(role) is not None
            for layout in layouts:
                load = Load(index=self.index(), role=role, layout=layout, trained=trained)
                found: list[Instruction] = [load]
                if (role, layout) in offloaded:
                    what = offloaded[role, layout]
                    found.append(Offload(index=self.index(), role=role, layout=layout, what=what))
                for rank in layout.mesh.devices:
                    loads[rank].extend(found)
        order = sorted(kept_layouts(self.plan), key=lambda held: (held[0], held[1].key))
        for role, layout in order:
            (home,) = self.homes[role]
            reserve = Reserve(index=self.index(), role=role, source=home, destination=layout)
            for rank in layout.mesh.devices:
                loads[rank].append(reserve)
        return {rank: tuple(instructions) for rank, instructions in loads.items()}

    def last_use(self) -> dict[tuple[str, Layout], str]:
        """The last call of the step that reads a borrowed layout, by (role, layout)."""
        last: dict[tuple[str, Layout], str] = {}
        for call in self.graph.step_calls:
            layout = call_layout(self.plan, call.name)
            if call.role is not None and layout is not None:
                if layout not in self.homes[call.role]:
                    last[(call.role, layout)] = call.name
        return last

    def compile_step(self) -> dict[int, tuple[Instruction, ...]]:
        transfers = plan_transfers(self.plan)
        last_use, present = self.last_use(), set[tuple[str, Layout]]()
        received: dict[int, int] = defaultdict(int)  # rank -> receives emitted of its queue
        for call in self.graph.ahead:  # with the weights of the step's beginning
            layout = call_layout(self.plan, call.name)
            held = (call.role, layout) if call.role and layout else None
            if held is not None and held in last_use and held not in present:
                present.add(held)
                self.emit_reallocation(*held)
        for call in self.graph.step_calls:
            mesh = self.plan.allocations[call.name].mesh
            layout = call_layout(self.plan, call.name)
            held = (call.role, layout) if call.role and layout else None
            if held is not None and held in last_use and held not in present:
                present.add(held)
                self.emit_reallocation(*held)
            self.emit_swap(Reload, call)
            self.emit_receives(call, transfers, received)
            self.emit(
                mesh.devices, CALL_INSTRUCTIONS[call.kind](index=self.index(), call=call.name)
            )
            self.emit_swap(Offload, call)
            self.emit_sends(call, transfers)
            if held is not None and last_use.get(held) == call.name:
                role, layout = held
                self.emit(mesh.devices, Free(index=self.index(), role=role, layout=layout))
        for average in self.graph.averages:
            self.emit_average(average)
        return {rank: tuple(instructions) for rank, instructions in self.step.items()}

    def emit_swap(self, kind: type[Offload | Reload], call: ModelFunctionCall) -> None:
        """What the call's allocation keeps in the host's memory comes, or goes."""
        allocation, layout = self.plan.allocations[call.name], call_layout(self.plan, call.name)
        if allocation.offload and call.role is not None and layout is not None:
            self.emit(
                allocation.mesh.devices,
                kind(index=self.index(), role=call.role, layout=layout, what=what_leaves(call)),
            )

    def emit_reallocation(self, role: str, layout: Layout) -> None:
        (home,) = self.homes[role]
        ranks = sorted({*home.mesh.devices, *layout.mesh.devices})
        self.emit(
            ranks,
            Reallocate(index=self.index(), role=role, source=home, destination=layout),
        )

    def emit_average(self, average: ParameterAverage) -> None:
        """Into every layout of the role the trained weights are brought, taken over and dropped."""
        (home,) = self.homes[average.of]
        for layout in self.homes[average.role]:
            if layout != home:
                self.emit_reallocation(average.of, layout)
            own = Average(
                index=self.index(), role=average.role, of=average.of, layout=layout,
                rate=average.rate,
            )  # fmt: skip
            self.emit(layout.mesh.devices, own)
            if layout != home:
                free = Free(index=self.index(), role=average.of, layout=layout)
                self.emit(layout.mesh.devices, free)

    def emit_sends(
        self,
        producer: ModelFunctionCall,
        transfers: Mapping[tuple[str, str], Arrivals],
    ) -> None:
        """Right after the producer, to all its consumers in graph order."""
        for consumer in self.graph.calls:
            parcels = transfers.get((producer.name, consumer.name))
            if parcels is None:
                continue
            sends: dict[int, list[Parcel]] = defaultdict(list)
            for rank in sorted(parcels):
                for parcel in parcels[rank]:
                    sends[parcel.peer].append(Parcel(peer=rank, samples=parcel.samples))
            index = self.index()
            for rank, outgoing in sends.items():
                self.step[rank].append(
                    self.transfer(index, producer.name, consumer.name, sends=tuple(outgoing))
                )

    def emit_receives(
        self,
        consumer: ModelFunctionCall,
        transfers: Mapping[tuple[str, str], Arrivals],
        received: dict[int, int],
    ) -> None:
        """Before the consumer, in the order in which sources send.

        Messages between two ranks are matched by order on some transports, so a rank that
        receives from a late producer first takes what earlier producers have sent it for later
        calls. Those came earlier from the same sender, so it waits no longer for them.
        """
        ordered = sorted(transfers, key=lambda pc: (self.position[pc[0]], self.position[pc[1]]))
        mesh = self.plan.allocations[consumer.name].mesh
        for rank in mesh.devices:
            queue = [pair for pair in ordered if rank in transfers[pair]]
            wanted = [i for i, pair in enumerate(queue) if pair[1] == consumer.name]
            for i in range(received[rank], wanted[-1] + 1 if wanted else 0):
                producer, reader = queue[i]
                arrivals = tuple(transfers[queue[i]][rank])
                self.step[rank].append(
                    self.transfer(self.index(), producer, reader, receives=arrivals)
                )
            if wanted:
                received[rank] = max(received[rank], wanted[-1] + 1)

    def transfer(
        self,
        index: int,
        producer: str,
        consumer: str,
        *,
        sends: tuple[Parcel, ...] = (),
        receives: tuple[Parcel, ...] = (),
    ) -> Transfer:
        number = self.position[producer] * len(self.position) + self.position[consumer]
        keys = readers_of(self.problem, consumer)[producer]
        return Transfer(
            index=index, transfer=number, producer=producer, consumer=consumer, keys=keys,
            sends=sends, receives=receives,
        )  # fmt: skip


def compile_plan(plan: ExecutionPlan) -> Program:
    """The instructions of every rank.

    Raises:
        PlanError: the plan cannot run (see ``validate_plan``).
    """
    validate_plan(plan)
    compiler = _Compiler(plan)
    setup = compiler.setup()
    return Program(setup=setup, step=compiler.compile_step())

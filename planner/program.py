"""``compile_plan``: a plan -> the instructions of every rank for one step.

The program has two interpreters: ``simulate.py`` runs it against a virtual clock, the executor's
worker for real. It is decided entirely before anything starts: which rank computes which
samples, who sends what to whom, and in which order. What the instructions are is
``instructions.py``'s; read ``compile_plan``.

With ``max_staleness`` 1 the generation of a trained role works for the step that follows: at a
step's beginning what it has generated is sent to whoever reads it and the trained weights are
brought to it, and while the step goes on it makes the answers of the next. Nothing is on its way
between two steps, so that a run may be evaluated, saved or ended there (``Ahead``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from planner.graph import CallKind, ModelFunctionCall, ParameterAverage
from planner.instructions import (
    CALL_INSTRUCTIONS,
    Ahead,
    Average,
    ByRank,
    Free,
    Function,
    Generate,
    Infer,
    Instruction,
    Load,
    Offload,
    Offloaded,
    Program,
    Reallocate,
    Reload,
    Reserve,
    Train,
    Transfer,
)
from planner.layout import Layout
from planner.plan import ExecutionPlan, validate_plan
from planner.plan_memory import Held, kept_caches, kept_layouts, read_ahead
from planner.transfers import Arrivals, Parcel, plan_transfers, readers_of

__all__ = [
    "CALL_INSTRUCTIONS",
    "Ahead",
    "Average",
    "ByRank",
    "Free",
    "Function",
    "Generate",
    "Infer",
    "Instruction",
    "Load",
    "Offload",
    "Offloaded",
    "Program",
    "Reallocate",
    "Reload",
    "Reserve",
    "Train",
    "Transfer",
    "call_layout",
    "compile_plan",
    "home_layouts",
    "on_policy",
    "what_leaves",
]


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
    """Builds instructions, numbered from ``first_index`` on; lives for one ``compile_plan``.

    ``caches``: calls whose cache stays.
    """

    def __init__(self, plan: ExecutionPlan, caches: frozenset[str], first_index: int = 0) -> None:
        self.plan, self.caches = plan, caches
        self.problem = plan.problem
        self.graph = plan.problem.graph
        self.homes = home_layouts(plan)
        self.step: dict[int, list[Instruction]] = defaultdict(list)
        self.next_index = first_index
        self.position = {call.name: i for i, call in enumerate(self.graph.calls)}
        self.apart = read_ahead(plan)

    def index(self) -> int:
        self.next_index += 1
        return self.next_index - 1

    def emit(self, ranks: Iterable[int], instruction: Instruction) -> None:
        for rank in ranks:
            self.step[rank].append(instruction)

    def setup(self, kept: frozenset[Held]) -> dict[int, tuple[Instruction, ...]]:
        """Before the first step; ``kept``: borrowed layouts whose memory stays."""
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
        for role, layout in sorted(kept, key=lambda held: (held[0], held[1].key)):
            (home,) = self.homes[role]
            reserve = Reserve(
                index=self.index(), role=role, source=home, destination=layout,
                lends=(role, layout) not in self.apart,
            )  # fmt: skip
            for rank in layout.mesh.devices:
                loads[rank].append(reserve)
        return {rank: tuple(instructions) for rank, instructions in loads.items()}

    def last_use(self, calls: Sequence[ModelFunctionCall]) -> dict[tuple[str, Layout], str]:
        """The last of ``calls`` that reads a borrowed layout, by (role, layout)."""
        last: dict[tuple[str, Layout], str] = {}
        for call in calls:
            layout = call_layout(self.plan, call.name)
            if call.role is not None and layout is not None:
                if layout not in self.homes[call.role]:
                    last[(call.role, layout)] = call.name
        return last

    def compile_step(
        self, calls: Sequence[ModelFunctionCall], *, whole: bool = True
    ) -> dict[int, tuple[Instruction, ...]]:
        """``calls`` in their order; ``whole``: with data from call to call, and the averages.

        What calls that work ahead have made in the step before is sent first of all, and taken
        before any weights move: nobody then waits for a rank that waits for its weights.
        """
        self.step = defaultdict(list)
        ahead = {call.name for call in self.graph.ahead}
        transfers = plan_transfers(self.plan) if whole else {}
        made = {pair: arrivals for pair, arrivals in transfers.items() if pair[0] in ahead}
        own = {pair: arrivals for pair, arrivals in transfers.items() if pair[0] not in ahead}
        self.emit_made(made)
        last_use, present = self.last_use(calls), set[tuple[str, Layout]]()
        received: dict[int, int] = defaultdict(int)  # rank -> receives emitted of its queue
        for call in calls:
            if call.name in ahead:  # with the weights of the step's beginning
                self.emit_borrowing(call, last_use, present)
        for call in calls:
            mesh = self.plan.allocations[call.name].mesh
            self.emit_borrowing(call, last_use, present)
            self.emit_swap(Reload, call)
            self.emit_receives(call, own, received)
            self.emit(mesh.devices, self.instruction_of(call))
            self.emit_swap(Offload, call)
            self.emit_sends(call, own)
            layout = call_layout(self.plan, call.name)
            if call.role and layout and last_use.get((call.role, layout)) == call.name:
                self.emit(mesh.devices, Free(index=self.index(), role=call.role, layout=layout))
        for average in self.graph.averages if whole else ():
            self.emit_average(average)
        return {rank: tuple(instructions) for rank, instructions in self.step.items()}

    def instruction_of(self, call: ModelFunctionCall) -> Instruction:
        if call.kind is CallKind.GENERATE:
            return Generate(index=self.index(), call=call.name, keeps=call.name in self.caches)
        return CALL_INSTRUCTIONS[call.kind](index=self.index(), call=call.name)

    def emit_borrowing(
        self,
        call: ModelFunctionCall,
        last_use: Mapping[tuple[str, Layout], str],
        present: set[tuple[str, Layout]],
    ) -> None:
        """The weights that a call borrows are brought, unless they are ``present``."""
        layout = call_layout(self.plan, call.name)
        held = (call.role, layout) if call.role and layout else None
        if held is not None and held in last_use and held not in present:
            present.add(held)
            self.emit_reallocation(*held)

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
            Reallocate(
                index=self.index(), role=role, source=home, destination=layout,
                lends=(role, layout) not in self.apart,
            ),
        )  # fmt: skip

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

    def emit_made(self, transfers: Mapping[tuple[str, str], Arrivals]) -> None:
        """All of ``transfers``: every rank sends what it has to, then takes what is sent to it."""
        for call in self.graph.ahead:
            self.emit_sends(call, transfers)
        order = sorted(transfers, key=lambda pc: (self.position[pc[0]], self.position[pc[1]]))
        for producer, consumer in order:
            index, arrivals = self.index(), transfers[producer, consumer]
            for rank in sorted(arrivals):
                parcels = tuple(arrivals[rank])
                self.step[rank].append(self.transfer(index, producer, consumer, receives=parcels))

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


def on_policy(plan: ExecutionPlan) -> ExecutionPlan:
    """The same plan, generation always with the newest weights."""
    graph = replace(plan.problem.graph, max_staleness=0)
    return replace(plan, problem=replace(plan.problem, graph=graph))


def compile_plan(plan: ExecutionPlan) -> Program:
    """The instructions of every rank.

    Raises:
        PlanError: the plan cannot run (see ``validate_plan``).
    """
    validate_plan(plan)
    kept, graph = kept_layouts(plan), plan.problem.graph
    caches = kept_caches(plan, kept)
    compiler = _Compiler(plan, caches)
    setup = compiler.setup(kept)
    if not graph.ahead:
        return Program(setup=setup, step=compiler.compile_step(graph.calls))
    first = compiler.compile_step(graph.ahead, whole=False)
    step = compiler.compile_step(graph.step_calls)
    last = compiler.compile_step([call for call in graph.calls if call not in graph.ahead])
    alone = _Compiler(on_policy(plan), caches, compiler.next_index)
    return Program(
        setup=setup, step=step,
        ahead=Ahead(first=first, last=last, alone=alone.compile_step(graph.calls)),
    )  # fmt: skip

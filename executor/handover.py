"""From one plan to another between two steps: what a rank holds goes where the new plan wants it.

``go_over`` is the entry: all ranks of the run together, with the worker of the old plan and one of
the new that holds nothing yet. Everything goes rank to rank, role by role, and what has gone is
given back before the next comes. Nothing that a step computes on is other than before, so the run
goes on as under the old plan. Whether it may go over is ``switch.py``'s.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.coming import made_by
from executor.optimizer_moves import States, move_states, states_of
from executor.reallocate import execute
from executor.results import reporting_rank
from executor.run import equal_nodes
from executor.worker import Worker
from planner.layout import Layout
from planner.optimizer_state import StateLayout, StateSection, reallocate_state
from planner.plan import ExecutionPlan
from planner.program import Offload, Reserve, Transfer, home_layouts
from planner.reallocation import Reallocation, reallocate
from planner.transfers import Parcel, handed_over


def go_over(old: Worker, new: Worker, step: int) -> int:
    """Before ``step``: ``new`` takes what ``old`` holds; returns the bytes that this rank received.

    ``old`` is of no use afterwards, and its process groups are gone.
    """
    assert old.problem.graph == new.problem.graph, "what is computed stays the same"
    new.step, new.turn = step, (step, 0)
    old.weights.drop_reserved()
    old.generation.kept.clear()
    moves = _Moves(old, new, step)
    setup = new.program.setup.get(new.rank, ())
    received = 0
    for role in new.problem.graph.roles:
        new.on_instruction(*new.turn, -1, f"going over to another plan: {role}")
        trained = new.problem.graph.train_call(role) is not None
        received += moves.trained(role) if trained else moves.frozen(role)
        _give_back(new.device)
        new.carry_out([i for i in setup if isinstance(i, Offload) and i.role == role])
    new.carry_out([i for i in setup if isinstance(i, Reserve)])
    new.on_instruction(*new.turn, -1, "going over to another plan")
    _functions(old, new, step)
    _coming(old, new)
    new.versions.first = step
    groups = {id(group): group for ctx in old.contexts.values() for group in ctx.groups}
    dist.barrier()
    for group in groups.values():
        dist.destroy_process_group(group)
    return received


def _give_back(device: torch.device) -> None:
    gc.collect()  # a model's parts know each other
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was freed is in blocks of the old layout's sizes


def _functions(old: Worker, new: Worker, step: int) -> None:
    """What functions keep is the same on all ranks of their call; those of the new plan need it."""
    for call in old.problem.graph.calls:
        function = old.functions[call.name]
        if hasattr(function, "state"):
            key = f"handover/{step}/{call.name}"
            if old.rank == reporting_rank(old.plan.allocations[call.name], call):
                old.store.set(key, json.dumps(function.state()))
            new.functions[call.name].restore(json.loads(old.store.get(key)))


def _coming(old: Worker, new: Worker) -> None:
    """Answers that were made ahead: to the ranks that would have made them under the new plan."""
    new.step_data.works_for = old.step_data.works_for
    if old.step_data.works_for is None:
        return
    values = new.step_data.coming.values = old.step_data.coming.values
    new.exchange.store = new.step_data.coming
    for number, call in enumerate(new.problem.graph.ahead):
        arrivals = handed_over(old.plan, new.plan, call)
        sends = tuple(
            Parcel(peer=rank, samples=parcel.samples)
            for rank, parcels in arrivals.items()
            for parcel in parcels
            if parcel.peer == new.rank
        )
        new.exchange.run(
            Transfer(
                index=-1, transfer=number, producer=call.name, consumer=call.name,
                keys=call.outputs, sends=sends, receives=tuple(arrivals.get(new.rank, ())),
            )
        )  # fmt: skip
        new.exchange.finish()
        wanted: set[tuple[str, int]] = set()
        if new.rank in new.plan.allocations[call.name].mesh:
            wanted = set(made_by(new, call).values())
        for key in call.outputs:
            held = values.get(key, {})
            values[key] = {n: value for n, value in held.items() if (key, n) in wanted}
    new.exchange.store = new.samples


class _Moves:
    """Roles' weights and state from the one worker to the other; each method is for all ranks."""

    def __init__(self, old: Worker, new: Worker, step: int) -> None:
        self.old, self.new, self.step = old, new, step
        self.rank = new.rank
        self.before, self.after = home_layouts(old.plan), home_layouts(new.plan)
        plans = old.plan, new.plan
        self.per_node = max(equal_nodes(plan).devices_per_node for plan in plans)

    # ---- trained roles --------------------------------------------------------------------------

    def trained(self, role: str) -> int:
        """Masters, moments and counts; the weights follow from the masters."""
        old, new = self.old.weights, self.new.weights
        src, dst = (_state_layout(worker.plan, role) for worker in (self.old, self.new))
        old.bring_back(role)
        buffer = old.buffers.pop((role, src.layout), None)
        trainer = old.trainers.pop(role, None)
        key = f"handover/{self.step}/{role}"
        states = None
        if trainer is not None:
            optimizer = trainer.optimizer
            if self.rank == src.layout.mesh.first:
                counts = {"steps": optimizer.steps, "updates": int(optimizer.count)}
                self.old.store.set(key, json.dumps(counts))
            states = states_of(optimizer)
            del optimizer
        del trainer  # with its gradients
        received = 0
        if src != dst:
            buffer = None  # where masters are the weights, these hold its memory
            _give_back(self.new.device)
            buffer, states, received = self._moved(src, dst, states)
        if buffer is not None and states is not None:
            told = json.loads(self.old.store.get(key))
            sections = [
                dict(zip(states, each, strict=True)) for each in zip(*states.values(), strict=True)
            ]
            new.adopt(role, dst.layout, buffer, sections).go_on(**told)
        return received

    def _moved(
        self, src: StateLayout, dst: StateLayout, states: States | None
    ) -> tuple[ParameterBuffer | None, States | None, int]:
        weights, here = self.new.weights, self.rank in dst.layout.mesh
        made: list[ParameterBuffer] = []

        def buffer() -> ParameterBuffer:
            if not made:
                made.append(weights.new_buffer(dst.layout, multiple=dst.layout.dp))
            return made[0]

        def allocate(name: str, section: StateSection) -> Tensor:
            if name == "weight" and weights.dtype == torch.float32:
                return buffer().flat[section.own[0] : section.own[1]]
            values = section.own[1] - section.own[0]
            return torch.zeros(values, dtype=torch.float32, device=self.new.device)

        plan = reallocate_state(src, dst, devices_per_node=self.per_node)
        found, received = move_states(
            plan, states, allocate, rank=self.rank, staging_bytes=weights.staging_bytes,
            memory=weights.memory,
        )  # fmt: skip
        return buffer() if here else None, found, received

    # ---- frozen roles ---------------------------------------------------------------------------

    def frozen(self, role: str) -> int:
        """Into each layout of the new plan, unless it is one of the old plan's; and averages."""
        old, new = self.old.weights, self.new.weights
        old.bring_back(role)
        averaged = any(average.role == role for average in self.new.problem.graph.averages)
        received = 0
        for layout in self.after[role]:
            if layout in self.before[role]:
                continue
            plan = self._nearest(self.before[role], layout)
            if self.rank not in plan.src.mesh and self.rank not in layout.mesh:
                continue
            source = old.buffers.get((role, plan.src))
            average = old.averages.get((role, plan.src))
            if source is not None and average is not None:
                source = source.with_values(average)
            target = None
            if self.rank in layout.mesh:
                dtype = torch.float32 if averaged else new.dtype
                target = new.new_buffer(layout, dtype=dtype)
            received += execute(
                plan, source, target, rank=self.rank, staging_bytes=new.staging_bytes,
                memory=new.memory,
            )  # fmt: skip
            if target is not None:
                new.keep(role, layout, target, averaged=averaged)
        for layout in self.before[role]:
            buffer = old.buffers.pop((role, layout), None)
            average = old.averages.pop((role, layout), None)
            if buffer is not None and layout in self.after[role]:
                new.buffers[role, layout] = buffer
                if average is not None:
                    new.averages[role, layout] = average
        return received

    def _nearest(self, sources: Sequence[Layout], layout: Layout) -> Reallocation:
        """From which of the layouts that hold the same the least has to be sent."""
        plans = [reallocate(source, layout, devices_per_node=self.per_node) for source in sources]
        return min(plans, key=lambda plan: sum(m.num_values for m in plan.messages))


def _state_layout(plan: ExecutionPlan, role: str) -> StateLayout:
    call = plan.problem.graph.train_call(role)
    assert call is not None, role
    (home,) = home_layouts(plan)[role]
    return StateLayout(layout=home, zero=plan.allocations[call.name].strategy.zero)

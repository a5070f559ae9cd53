"""``Weights``: what one rank holds of every role: buffers, gradients, optimizers, averages.

One method for each kind of instruction that moves or changes weights; each returns the bytes that
it moved. What the weights are used for is ``worker.py``'s, which messages bring them
``planner.reallocation``'s, and what a buffer looks like ``buffers.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.context import RankContext
from executor.cross_memory import CrossMemory
from executor.model.hf_load import load as load_folder
from executor.model.random_weights import init_random
from executor.model.transformer import DecoderStage
from executor.offload import Offloadable
from executor.parallel.optimizer import Adam, AdamConfig
from executor.reallocate import carry_out
from executor.reallocation_rounds import Schedule, make_schedule
from executor.run import Run
from executor.training import Trainer
from planner.layout import Layout
from planner.memory import STAGING_BYTES
from planner.mesh import node_grid
from planner.program import Average, Free, Load, Offload, Reallocate, Reload, Reserve
from planner.reallocation import reallocate
from profiles.hardware import DeviceKind


class Weights:
    """By (role, layout): the values; by role: who trains it. ``contexts``: the rank's places.

    ``staging_bytes``, ``most_rounds`` and ``memory`` of reallocations, as ``execute`` and
    ``carry_out`` have them.
    """

    def __init__(
        self, run: Run, contexts: Mapping[Layout, RankContext], *, rank: int,
        device: torch.device, dtype: torch.dtype, staging_bytes: int | None = None,
        most_rounds: int | None = None, memory: CrossMemory | None = None,
    ) -> None:  # fmt: skip
        self.run = run
        self.problem = run.plan.problem
        self.contexts = contexts
        self.rank = rank
        self.device = device
        self.dtype = dtype
        kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
        self.staging_bytes = staging_bytes or STAGING_BYTES[kind]
        self.most_rounds = most_rounds
        self.memory = memory
        self.buffers: dict[tuple[str, Layout], ParameterBuffer] = {}
        self.reserved: dict[tuple[str, Layout], ParameterBuffer] = {}
        self.schedules: dict[tuple[Layout, Layout], Schedule] = {}
        self.staging: Tensor | None = None  # of a CPU that has reserved memory
        self.stages: dict[tuple[str, Layout, bool], DecoderStage] = {}
        self.trainers: dict[str, Trainer] = {}
        # Averages in fp32, flat as the buffer of (role, layout), which they may be.
        self.averages: dict[tuple[str, Layout], Tensor] = {}
        self.offloadable: dict[tuple[str, Layout], Offloadable] = {}

    def stage(self, role: str, layout: Layout, *, sequence_parallel: bool = False) -> DecoderStage:
        """The model without gradients in a layout whose weights are here.

        It is the same one as long as they stay, or come back to memory that is kept for them.
        """
        key = (role, layout, sequence_parallel)
        if key not in self.stages:
            self.stages[key] = DecoderStage(
                self.contexts[layout], self.buffers[role, layout],
                sequence_parallel=sequence_parallel,
            )  # fmt: skip
        return self.stages[key]

    # ---- loading ------------------------------------------------------------------------------

    def load(self, load: Load) -> int:
        """Read this rank's slices of a checkpoint, or draw them."""
        buffer = self.new_buffer(load.layout, multiple=load.layout.dp if load.trained else 1)
        self.buffers[load.role, load.layout] = buffer
        self._fill(load.role, buffer)
        if load.trained:
            self.trainers[load.role] = self._trainer(load.role, load.layout, buffer)
        if any(average.role == load.role for average in self.problem.graph.averages):
            self.averages[load.role, load.layout] = buffer.flat.float()
        return buffer.flat.numel() * buffer.flat.element_size()

    def new_buffer(
        self, layout: Layout, *, multiple: int = 1, lender: ParameterBuffer | None = None,
        dtype: torch.dtype | None = None,
    ) -> ParameterBuffer:  # fmt: skip
        """Memory for this rank's part of a layout; of trained roles ``multiple`` is dp."""
        return ParameterBuffer.for_rank(
            layout, self.rank, dtype=dtype or self.dtype, device=self.device, multiple=multiple,
            lender=lender,
        )  # fmt: skip

    def _fill(self, role: str, buffer: ParameterBuffer) -> None:
        spec, path = self.problem.models[role], self.run.model_path(role)
        if path is None:
            init_random(buffer, spec, seed=self.run.config.seed)
        else:
            load_folder(buffer, Path(path), spec, seed=self.run.config.seed)

    def _trainer(
        self, role: str, layout: Layout, buffer: ParameterBuffer,
        states: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Trainer:  # fmt: skip
        call = self.problem.graph.train_call(role)
        assert call is not None, role
        strategy = self.run.plan.allocations[call.name].strategy
        context = self.contexts[layout]
        gradients = torch.zeros(buffer.flat.numel(), dtype=torch.float32, device=self.device)
        stage = DecoderStage(
            context, buffer, gradients=gradients, recompute=strategy.recompute,
            sequence_parallel=strategy.sequence_parallel,
        )  # fmt: skip
        model = self.run.config.models()[role]
        config = AdamConfig(
            lr=model.lr,
            betas=(model.beta1, model.beta2),
            eps=model.eps,
            weight_decay=model.weight_decay,
            warmup_steps=model.warmup_steps,
            total_steps=self.run.config.total_steps * call.num_optimizer_steps,
            schedule=model.schedule,
            max_grad_norm=model.max_grad_norm,
        )
        optimizer = Adam(
            context, buffer, gradients, config, zero=strategy.zero, partial=stage.partial,
            early=self.problem.cluster.kind == "cuda", states=states,
        )  # fmt: skip
        return Trainer(gradients=gradients, stage=stage, optimizer=optimizer)

    # ---- from another plan's ------------------------------------------------------------------

    def adopt(
        self, role: str, layout: Layout, buffer: ParameterBuffer,
        states: Sequence[Mapping[str, Tensor]],
    ) -> Adam:  # fmt: skip
        """A trained role whose state has come; its optimizer, which is to ``go_on``."""
        self.buffers[role, layout] = buffer
        self.trainers[role] = self._trainer(role, layout, buffer, states)
        return self.trainers[role].optimizer

    def keep(self, role: str, layout: Layout, buffer: ParameterBuffer, *, averaged: bool) -> None:
        """A frozen role whose weights have come; ``averaged``: ``buffer`` has its fp32 average."""
        if averaged:
            self.averages[role, layout] = buffer.flat
            if self.dtype != torch.float32:
                buffer = self.new_buffer(layout)
                buffer.flat.copy_(self.averages[role, layout])
        self.buffers[role, layout] = buffer

    def drop_reserved(self) -> None:
        """Give back what stays empty between steps."""
        self.reserved.clear()
        self.stages.clear()
        self.staging = None

    def bring_back(self, role: str) -> None:
        """All of a role is on the device from here on."""
        for key in [key for key in self.offloadable if key[0] == role]:
            one = self.offloadable.pop(key)
            if one.away:
                one.reload()

    # ---- between device and host --------------------------------------------------------------

    def offload(self, offload: Offload) -> int:
        """Bytes that crossed to the host's memory, which has what the instruction names."""
        key = (offload.role, offload.layout)
        if key not in self.offloadable:
            self.offloadable[key] = self._offloadable(offload)
        return self.offloadable[key].offload()

    def reload(self, reload: Reload) -> int:
        """Bytes that came back."""
        return self.offloadable[reload.role, reload.layout].reload()

    def _offloadable(self, offload: Offload) -> Offloadable:
        if offload.what == "weights":
            return Offloadable([self.buffers[offload.role, offload.layout].flat], constant=True)
        trainer = self.trainers[offload.role]
        return Offloadable(trainer.optimizer.own_state, [trainer.gradients])

    @contextmanager
    def all_here(self) -> Iterator[None]:
        """Between steps: what is in the host's memory is on the device meanwhile."""
        away = [one for one in self.offloadable.values() if one.away]
        for one in away:
            one.reload()
        yield
        for one in away:
            one.offload()

    # ---- between layouts ----------------------------------------------------------------------

    def reserve(self, reserve: Reserve) -> None:
        """Memory for what ``reallocate`` will bring in every step, at one address for the run."""
        source = self.buffers.get((reserve.role, reserve.source))
        self.reserved[reserve.role, reserve.destination] = self.new_buffer(
            reserve.destination, lender=source if reserve.lends else None
        )
        if self.problem.cluster.kind == "cpu" and self.staging is None:
            # CUDA's allocator keeps what was freed; here it would be mapped and touched anew.
            num_values = self.staging_bytes // self.dtype.itemsize
            self.staging = torch.empty(num_values, dtype=self.dtype, device=self.device)

    def reallocate(self, instruction: Reallocate) -> tuple[int, list[Callable[[], None]]]:
        """Bring a role into another layout; returns the bytes that this rank received.

        And what waits for sends that are left behind (``carry_out``). On CUDA there are none: two
        communicators of NCCL that are busy at once may hang where ranks began them in two orders.
        """
        role, layout = instruction.role, instruction.destination
        source = self.buffers.get((role, instruction.source))
        target = None
        if self.rank in layout.mesh:
            lender = source if instruction.lends else None
            target = self.reserved.get((role, layout)) or self.new_buffer(layout, lender=lender)
            self.buffers[role, layout] = target
        key = (instruction.source, layout)
        if key not in self.schedules:
            grid = node_grid(instruction.source.mesh, layout.mesh, self.problem.cluster)
            plan = reallocate(*key, devices_per_node=grid.size, first_device=grid.first)
            num_values = self.staging_bytes // self.dtype.itemsize
            self.schedules[key] = make_schedule(plan, self.rank, num_values)
        left: list[Callable[[], None]] = []
        received = carry_out(
            self.schedules[key], source, target, staging=self.staging,
            most_rounds=self.most_rounds,
            left=left if self.problem.cluster.kind == "cpu" else None, memory=self.memory,
        )  # fmt: skip
        return received, left

    def free(self, free: Free) -> None:
        """What ``reallocate`` brought is not read again; its memory goes unless it is reserved."""
        key = (free.role, free.layout)
        del self.buffers[key]
        if key not in self.reserved:
            for split in (False, True):
                self.stages.pop((*key, split), None)

    def average(self, instruction: Average) -> None:
        """A small step is lost in a bf16 weight, so that the average is kept in fp32."""
        key = (instruction.role, instruction.layout)
        own, other = self.buffers[key], self.buffers[instruction.of, instruction.layout]
        for piece in own.slices:
            average = own.view(piece.name, of=self.averages[key])
            average.lerp_(other.view(piece.name).float(), instruction.rate)
        own.flat.copy_(self.averages[key])

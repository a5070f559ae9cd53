"""``realexec check``: a rank's program without its devices, its peers or its numbers.

Read ``check_rank``. The worker of a run is put on torch's fake process group, whose collectives
do nothing, and given weights without values (fake tensors): shapes, types and storage are as in a
run, so every instruction is really carried out, and what it holds is counted. What decides
control flow (token ids, lengths) is real and at its longest, as the memory model takes it: prompts
differ, and so do answers, whatever is made of them, as what begins alike is computed once. A
number that would come out of a model reads as 1, so no answer ends before its limit, and experts
get equal shares of the tokens. A GPU's decode graphs hold their memory and do nothing.

A 70B plan for 128 GPUs runs here in one process, rank kind by rank kind: ranks whose instructions
differ in their place in tp and dp only are one kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from executor.buffers import ParameterBuffer
from executor.coming import made_by
from executor.cuda_graph import Action, Capture, GraphPool
from executor.dataset import Item
from executor.generate.caches import shares
from executor.generate.kv_cache import Turn
from executor.generation import Generation
from executor.model.attention import PackedLengths
from executor.model.transformer import DecoderStage
from executor.offload import Offloadable
from executor.run import Run, functions_of
from executor.storage_count import StorageCount
from executor.text import TextCodec
from executor.trace import TraceWriter
from executor.training import Passes
from executor.transfer import Exchange
from executor.versions import Versions
from executor.weights import Weights
from executor.worker import Worker, label_of
from planner.graph import DataKey, ModelFunctionCall
from planner.layout import Layout
from planner.memory import RESERVE_BYTES, STAGING_BYTES
from planner.plan import Allocation, ExecutionPlan
from planner.plan_memory import plan_memory
from planner.program import (
    Function,
    Generate,
    Infer,
    Instruction,
    Load,
    Offload,
    Program,
    Reallocate,
    Reserve,
    Train,
    Transfer,
)
from planner.transfers import Parcel

_aten, _mkldnn = torch.ops.aten, torch.ops.mkldnn
# Rounds of a reallocation that are carried out: two are under way at once, the others hold as much.
SAMPLED_ROUNDS = 2
# Turns of generation that are carried out in all layers: those that bring prompts, the first of the
# others and every so many of them; the rest differs in the cache's size, which grows without them.
SAMPLED_TURNS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One kind of rank: bytes at its fullest moment, as counted and as the memory model says.

    Both without the framework's reserve. ``peak_at``: the instruction at that moment; ``by``: the
    peak of each instruction.
    """

    ranks: tuple[int, ...]
    peak_bytes: int
    planned_bytes: int
    peak_at: str
    by: Mapping[str, int]

    @property
    def error(self) -> float:
        """(planned - counted) / counted."""
        return self.planned_bytes / self.peak_bytes - 1.0


def rank_kinds(plan: ExecutionPlan, program: Program) -> list[tuple[int, ...]]:
    """Ranks that do the same in the same stages, first ranks first; without idle ranks.

    Whom they exchange samples with may differ.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for rank in range(plan.num_devices):
        every = (*program.setup.get(rank, ()), *program.step.get(rank, ()))
        own = [i for i in every if not isinstance(i, Transfer)]
        if own:
            kinds.setdefault(tuple(_place(plan, i, rank) for i in own), []).append(rank)
    return [tuple(ranks) for ranks in kinds.values()]


def _place(plan: ExecutionPlan, instruction: Instruction, rank: int) -> object:
    """What of an instruction makes ranks unlike: its kind and the stages that the rank is in."""

    def stage(layout: Layout) -> object:
        return layout.key, layout.coordinates(rank)[0] if rank in layout.mesh else None

    kind = type(instruction).__name__
    if isinstance(instruction, Generate | Infer | Train | Function):
        allocation = plan.allocations[instruction.call]
        pp_rank, _, _ = allocation.strategy.coordinates(rank - allocation.mesh.first)
        return kind, instruction.call, pp_rank
    if isinstance(instruction, Reallocate | Reserve):
        return kind, instruction.role, stage(instruction.source), stage(instruction.destination)
    if isinstance(instruction, Load):
        return kind, instruction.role, stage(instruction.layout)
    return kind


def check_rank(run: Run, program: Program, ranks: Sequence[int], folder: Path) -> RankReport:
    """Carry out setup and one step of the first of ``ranks``."""
    plan, rank = run.plan, ranks[0]
    watch = _Watch()
    with _fake_world(rank, plan.num_devices), TraceWriter(folder, rank) as trace, watch:
        worker = _FakeWorker(run, program, rank=rank, watch=watch, trace=trace)
        worker.setup()
        worker.run_step(0)
    label, peak = max(watch.peaks.items(), key=lambda item: item[1])
    reserve = RESERVE_BYTES[plan.problem.cluster.kind]
    return RankReport(
        ranks=tuple(ranks), peak_bytes=peak, peak_at=label, by=dict(watch.peaks),
        planned_bytes=plan_memory(plan)[rank].total - reserve,
    )  # fmt: skip


@contextmanager
def _fake_world(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Watch(StorageCount):
    """Makes new tensors of floats fake besides."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        first = args[0] if args else None
        if func is torch.ops.c10d.alltoall_base_.default and not isinstance(first, FakeTensor):
            args[0].copy_(args[1])  # counts with values: others send as many rows as this rank
        if isinstance(first, FakeTensor):
            if func is _aten._local_scalar_dense.default:
                return 1.0 if first.dtype.is_floating_point else 1
            if func is _aten.unbind.int and first.dtype == torch.float64:
                # What was chosen in a turn becomes a list, number by number.
                return torch.ones(first.shape, dtype=first.dtype).unbind(*args[1:])
            if func is _aten.bincount.default:
                num_bins = kwargs.get("minlength", (*args, 0, 0)[2])
                return torch.tensor(shares(first.numel(), num_bins))  # with values
            if func is _mkldnn._reorder_linear_weight.default:
                return torch.empty_like(first)
            if func is _mkldnn._linear_pointwise.default:
                return F.linear(first, args[1], args[2])
            if func in _INDEXED:
                args = (first, _places(args[1]), *args[2:])
        return self._new(func, args, kwargs) if _makes_new(func) else func(*args, **kwargs)

    def _new(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """What an operator makes of nothing: floats without values, all else as it is."""
        with self.fake:
            made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.dtype.is_floating_point:
            return made
        return func(*args, **kwargs)


@cache
def _makes_new(func: Any) -> bool:
    """An operator that takes no tensor: what it gives is new."""
    return not any("Tensor" in str(argument.type) for argument in func._schema.arguments)


_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks with values as the places where they are true: how many these are must be known."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            found.append(index)
        else:
            found += index.nonzero().unbind(1)
    return found


class _FakeWorker(Worker):
    """A worker whose weights have no values and whose peers do not answer."""

    def __init__(
        self, run: Run, program: Program, *, rank: int, watch: _Watch, trace: TraceWriter
    ) -> None:
        super().__init__(
            run, program, rank=rank, device=torch.device("cpu"), functions=functions_of(run),
            data=_Longest(run), text=TextCodec(None), store=dist.HashStore(), trace=trace,
        )  # fmt: skip
        kind = run.plan.problem.cluster.kind
        self.weights = _FakeWeights(
            run, self.contexts, rank=rank, device=self.device,
            dtype=torch.bfloat16 if kind == "cuda" else torch.float32,
            staging_bytes=STAGING_BYTES[kind], most_rounds=SAMPLED_ROUNDS, watch=watch,
        )  # fmt: skip
        self.watch = watch
        self.generation = _FakeGeneration(run, self.device, watch)
        self.exchange = _Unanswered(self)
        self.versions = _Untold(self.store, rank)

    def _carry_out(self, instruction: Instruction) -> None:
        self.watch.begin(label_of(instruction))
        super()._carry_out(instruction)

    def _passes(self, call: ModelFunctionCall, allocation: Allocation) -> Passes:
        whole = super()._passes(call, allocation)
        return _FirstMiniBatch(**{f.name: getattr(whole, f.name) for f in fields(whole)})

    def run_step(self, step: int, *, last: bool = False) -> None:
        """As if what works ahead had worked for this step: the step itself shows what it holds."""
        data = self.step_data
        for call in self.problem.graph.ahead:
            if self.rank in self.plan.allocations[call.name].mesh:
                for key, sequence in made_by(self, call).values():
                    data.coming.values.setdefault(key, {})[sequence] = self.longest(
                        self.problem.graph.key(key), sequence
                    )
        data.works_for = step
        super().run_step(step, last=last)

    def longest(self, key: DataKey, sequence: int) -> Tensor:
        """Values of a key for one sequence at its longest."""
        if key.per == "token" and key.dtype == "int64":
            return _token_ids(self.run, sequence // self.problem.workload.group_size, sequence)
        length = self.problem.workload.max_tokens if key.per == "token" else 1
        dtype = torch.int64 if key.dtype == "int64" else torch.float32
        return torch.full((length,), self.run.config.prompt_len, dtype=dtype)

    def _generate(self, instruction: Generate, counts: dict[str, int]) -> None:
        super()._generate(instruction, counts)
        call = self.problem.graph.call(instruction.call)
        store = self.step_data.coming if call in self.problem.graph.ahead else self.samples
        for name in call.outputs:
            key, held = self.problem.graph.key(name), store.values.get(name, {})
            if key.per == "token" and key.dtype == "int64":
                held.update({sequence: self.longest(key, sequence) for sequence in held})


def _token_ids(run: Run, group: int, answer: int) -> Tensor:
    """[prompt_len + response_len]: groups have unlike prompts, and every answer is another."""
    lengths = torch.tensor([run.config.prompt_len, run.config.response_len])
    return torch.tensor([group, answer]).repeat_interleave(lengths)


class _Untold(Versions):
    """Who trains is not there to tell."""

    def hear(self, instruction: Reallocate, *, step: int) -> None:
        pass


class _FakeWeights(Weights):
    """No values, and few turns of generation."""

    def __init__(self, *args: Any, watch: _Watch, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = watch

    def _offloadable(self, offload: Offload) -> Offloadable:
        # A CPU's memory is the host's.
        leaves = self.problem.cluster.kind != "cpu"
        return _FakeOffloadable(super()._offloadable(offload), self.watch, leaves=leaves)

    def _fill(self, role: str, buffer: ParameterBuffer) -> None:
        pass

    def stage(self, role: str, layout: Layout, *, sequence_parallel: bool = False) -> DecoderStage:
        stage = super().stage(role, layout, sequence_parallel=sequence_parallel)
        if not isinstance(stage, _FewTurns):
            stage = _FewTurns(stage)
            self.stages[role, layout, sequence_parallel] = stage
        return stage


class _FakeOffloadable(Offloadable):
    """Nothing moves, but the device's memory is counted without what is away."""

    def __init__(self, real: Offloadable, watch: _Watch, *, leaves: bool) -> None:
        super().__init__(real.kept, real.cleared)
        self.watch = watch
        tensors = (*real.kept, *real.cleared)
        self.num_bytes = sum(x.untyped_storage().nbytes() for x in tensors) if leaves else 0

    def offload(self) -> int:
        self.watch.hold(-self.num_bytes)
        return 0

    def reload(self) -> int:
        self.watch.hold(self.num_bytes)
        return 0


class _FirstMiniBatch(Passes):
    """One optimizer step, which stands for all: the others hold what it holds."""

    def mini_batches(self, epoch: int, dp: int) -> list[list[list[int]]]:
        return super().mini_batches(0, dp)[:1] if epoch == 0 else []


class _FakeGeneration(Generation):
    """Captures, where the plan is for GPUs."""

    def __init__(self, run: Run, device: torch.device, watch: _Watch) -> None:
        super().__init__(run, device)
        self.watch = watch
        self.captures = run.plan.problem.cluster.kind == "cuda"

    def capture(self, stage: DecoderStage, pool: GraphPool) -> Capture | None:
        assert isinstance(stage, _FewTurns), stage
        return _FakeCapture(self.watch, stage) if self.captures else None


class _FakeCapture:
    """A ``Capture`` whose graphs do nothing, and hold what the largest of them needs: the first,

    as no answer ends before its limit.
    """

    def __init__(self, watch: _Watch, stage: _FewTurns) -> None:
        self.watch, self.stage, self.pool = watch, stage, _Pool(watch)

    def __call__(self, action: Action) -> Action:
        if not self.pool.num_bytes:
            self.stage.turns = 0  # this one is carried out
        self.pool.hold(self.watch.most_during(action))
        pool = self.pool
        return lambda: pool  # as a graph keeps its memory


class _Pool:
    """Memory that graphs share, as long as one of them is there."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """At least so many bytes."""
        self.watch.hold(max(0, num_bytes - self.num_bytes))
        self.num_bytes = max(num_bytes, self.num_bytes)

    def __del__(self) -> None:
        self.watch.hold(-self.num_bytes)


class _FewTurns(DecoderStage):
    """A stage that carries out some turns of decoding only; memory is the same in the others."""

    def __init__(self, stage: DecoderStage) -> None:
        self.__dict__ = stage.__dict__
        self.turns = 0

    def forward(
        self, inputs: Tensor, packed: PackedLengths, cache: Any = None, *, block_done: Any = None
    ) -> Tensor:
        if isinstance(cache, Turn) and cache.prompts is None:
            self.turns += 1
            if self.turns % SAMPLED_TURNS != 1:
                shape = (packed.num_tokens, self.spec.hidden)
                return torch.empty(shape, dtype=self.buffer.flat.dtype)
        return super().forward(inputs, packed, cache, block_done=block_done)


@dataclass
class _Longest:
    """Data at its longest, as ``_token_ids`` of every sequence."""

    run: Run
    num_prompts: int | None = field(default=None, init=False)

    def batch(self, step: int, batch_size: int) -> list[Item]:
        config = self.run.config
        each = {"prompts": 0, "answers": 1, "pairs": 2}[self.run.algorithm.data]
        lengths = config.prompt_len, config.response_len
        rows = [
            [_token_ids(self.run, group, group * each + k).split(lengths) for k in range(each or 1)]
            for group in range(batch_size)
        ]
        return [
            Item(
                record={"id": "", "prompt": ""},
                prompt=row[0][0],
                answers=tuple(answer for _, answer in row[:each]),
            )
            for row in rows
        ]


class _Unanswered(Exchange):
    """Transfers whose senders are not there: everything arrives at its longest."""

    def __init__(self, worker: _FakeWorker) -> None:
        super().__init__(worker.samples)
        self.worker = worker

    def _receive(self, parcel: Parcel, keys: Sequence[DataKey], number: int) -> int:
        pieces = self.store.pieces(parcel.samples, keys)
        size = 0
        for key, sequence in pieces:
            value = self.worker.longest(key, sequence)
            self.store.values.setdefault(key.name, {})[sequence] = value
            size += value.numel() * key.bytes_per_value
        return size

"""``Worker``: one rank's interpreter of its program.

``setup`` loads the weights, then ``run_step`` carries out the rank's instructions of a step, one
short method for each kind of instruction. Nothing is decided here: what, where and in which
order is the program's; the mathematics of a call is the algorithm's (``calls.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from executor.batch import SequenceBatch, balanced_groups
from executor.context import RankContext, build_contexts
from executor.cross_memory import CrossMemory
from executor.dataset import Prompts
from executor.generation import Generation
from executor.metrics import REWARDS, evaluation_moment, post, post_samples, shows_samples
from executor.model.hf_save import save
from executor.out_of_memory import is_out_of_memory, out_of_memory
from executor.parallel.pipeline import forward_only
from executor.results import (
    DivergedError,
    check_finite,
    generation_statistics,
    mean_outputs,
    reporting_rank,
)
from executor.run import Run
from executor.step_data import StepData
from executor.text import TextCodec
from executor.trace import TraceWriter
from executor.training import Passes, evaluate, train
from executor.transfer import Exchange
from executor.under_way import UnderWay
from executor.versions import Versions
from executor.weights import Weights
from planner.graph import CallKind, ModelFunctionCall
from planner.labels import label_of
from planner.layout import Layout
from planner.plan import Allocation
from planner.program import (
    Average,
    ByRank,
    Free,
    Function,
    Generate,
    Infer,
    Instruction,
    Load,
    Offload,
    Program,
    Reallocate,
    Reload,
    Reserve,
    Train,
    Transfer,
    call_layout,
)
from planner.transfers import samples_of

# Beyond the steps of any run: the noise of an evaluation's answers is its own.
EVALUATION_STEPS = 1 << 40


class Worker:
    """The state of one rank over a run: its weights and the samples of the step."""

    def __init__(
        self,
        run: Run,
        program: Program,
        *,
        rank: int,
        device: torch.device,
        functions: Mapping[str, Any],
        data: Prompts,
        text: TextCodec,
        store: dist.Store,
        trace: TraceWriter,
        on_instruction: Callable[[int, int, int, str], None] = lambda *where: None,
        message_deadline: timedelta | None = None,
        memory: CrossMemory | None = None,
    ) -> None:
        self.run = run
        self.plan = run.plan
        self.problem = run.plan.problem
        self.program = program
        self.rank = rank
        self.device = device
        self.functions = functions
        self.data = data
        self.text = text
        self.store = store
        self.trace = trace
        self.on_instruction = on_instruction
        self.step = 0
        self.turn = (-1, 0)  # step, -1 before the first; 0, or 1 + the batch of an evaluation
        self.moment = "0"  # what the numbers of the step are posted under
        self.evaluating = False
        self.versions = Versions(store, rank)
        layouts = dict.fromkeys(layout for _, layout in program.layouts)
        self.contexts = build_contexts(layouts, rank=rank, device=device, timeout=message_deadline)
        self.weights = Weights(
            run, self.contexts, rank=rank, device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, memory=memory,
        )  # fmt: skip
        self.generation = Generation(run, device)
        self.step_data = StepData(self.problem, data, device)
        self.samples = self.step_data.samples
        self.exchange = Exchange(self.samples)
        self.under_way = UnderWay(self.problem.graph)
        self.handlers: dict[type, Callable[[Any, dict[str, int]], None]] = {
            Load: self._load,
            Generate: self._generate,
            Infer: self._infer,
            Train: self._train,
            Function: self._function,
            Transfer: self._transfer,
            Reallocate: self._reallocate,
            Reserve: self._reserve,
            Free: self._free,
            Average: self._average,
            Offload: self._offload,
            Reload: self._reload,
        }

    # ---- the interpreter ----------------------------------------------------------------------

    def setup(self) -> None:
        """Read the weights of every layout that stays."""
        self.carry_out(self.program.setup.get(self.rank, ()))

    def run_step(self, step: int, *, last: bool = False) -> None:
        """Carry out this rank's instructions of a step; ``last``: none follows.

        Where calls work ahead, those of a step that none came before work for it first.
        """
        self.step, self.moment = step, str(step)
        self.turn = (step, 0)
        ahead = self.program.ahead
        if ahead is None:
            self.step_data.begin(step)
            self._carry_out_all(self.program.step)
            return
        if self.step_data.works_for != step:
            self._work_for(step, ahead.first)
        self.step_data.begin(step)
        self.step_data.take_coming()
        if last:
            self._carry_out_all(ahead.last)
        else:
            self._work_for(step + 1, self.program.step)

    def _work_for(self, step: int, program: ByRank) -> None:
        """Carry out ``program``, whose calls that work ahead do so for ``step``."""
        self.step_data.look_ahead(step)
        self._carry_out_all(program)

    def evaluate(self, step: int, data: Prompts, index: int) -> None:
        """After ``step``: what its instructions make of batch ``index`` of other data, untrained.

        Nothing changes but the metrics, which are posted under ``evaluation_moment``. Answers to
        a batch are drawn with the same noise in every evaluation.
        """
        self.step, self.moment = EVALUATION_STEPS + index, evaluation_moment(step, index)
        self.turn = (step, 1 + index)
        self.step_data.begin(index, data)
        self.evaluating = True
        ahead = self.program.ahead
        self._carry_out_all(self.program.step if ahead is None else ahead.alone)
        self.evaluating = False

    def carry_out(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            self._carry_out(instruction)

    def _carry_out_all(self, program: ByRank) -> None:
        self.carry_out(program.get(self.rank, ()))
        self._finish_sends()
        self.exchange.finish()
        self.samples.clear()

    def _carry_out(self, instruction: Instruction) -> None:
        if self.under_way.holds_back(instruction):
            self._finish_sends()
        kind = type(instruction).__name__.lower()
        with self._at(instruction, kind, label_of(instruction)) as counts:
            self._handle(instruction, counts)

    def _finish_sends(self) -> None:
        """Wait for what a reallocation has left under way."""
        instruction = self.under_way.instruction
        if instruction is not None:
            with self._at(instruction, "wait", f"wait for {label_of(instruction)}"):
                self.under_way.finish()

    @contextmanager
    def _at(self, instruction: Instruction, kind: str, label: str) -> Iterator[dict[str, int]]:
        """The watchdog knows of it meanwhile; its span may get counts. Evaluations leave none."""
        evaluating = "evaluating: " if self.evaluating else ""
        self.on_instruction(*self.turn, instruction.index, evaluating + label)
        if self.evaluating:
            yield {}
            return
        with self.trace.span(
            step=self.step, index=instruction.index, kind=kind, label=label
        ) as counts:
            yield counts

    def _handle(self, instruction: Instruction, counts: dict[str, int]) -> None:
        try:
            self.handlers[type(instruction)](instruction, counts)
            if self.device.type == "cuda":
                # Not the whole device: what is offloaded leaves beside the next instruction.
                torch.cuda.current_stream(self.device).synchronize()
        except FloatingPointError as error:  # of answers' logits
            raise DivergedError(
                f"{error} (step {self.turn[0] + 1})", where=label_of(instruction),
                remedy="check the weights it began with, or lower their lr and --resume",
            ) from error  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(
                self.plan, instruction, rank=self.rank, step=self.turn[0], device=self.device,
                asked=str(error),
            ) from error  # fmt: skip

    # ---- weights ------------------------------------------------------------------------------

    def _load(self, load: Load, counts: dict[str, int]) -> None:
        counts["num_bytes"] = self.weights.load(load)

    def _reallocate(self, instruction: Reallocate, counts: dict[str, int]) -> None:
        told = self.program.ahead is not None and not self.evaluating
        if told:
            self.versions.tell(instruction, step=self.step)
        counts["num_bytes"], left = self.weights.reallocate(instruction)
        self.under_way.begin(instruction, left)
        if told:
            self.versions.hear(instruction, step=self.step)

    def _reserve(self, instruction: Reserve, counts: dict[str, int]) -> None:
        self.weights.reserve(instruction)

    def _free(self, free: Free, counts: dict[str, int]) -> None:
        self.weights.free(free)

    def _average(self, instruction: Average, counts: dict[str, int]) -> None:
        if not self.evaluating:
            self.weights.average(instruction)

    def _offload(self, offload: Offload, counts: dict[str, int]) -> None:
        counts["num_bytes"] = self.weights.offload(offload)

    def _reload(self, reload: Reload, counts: dict[str, int]) -> None:
        counts["num_bytes"] = self.weights.reload(reload)

    # ---- data ---------------------------------------------------------------------------------

    def _transfer(self, transfer: Transfer, counts: dict[str, int]) -> None:
        counts["num_bytes"] = self.exchange.run(transfer)

    def _place(self, name: str) -> tuple[ModelFunctionCall, Allocation, int]:
        """A call, its allocation and this rank's data-parallel rank in it."""
        allocation = self.plan.allocations[name]
        _, dp_rank, _ = allocation.strategy.coordinates(self.rank - allocation.mesh.first)
        return self.problem.graph.call(name), allocation, dp_rank

    def _share(
        self, call: ModelFunctionCall, allocation: Allocation, dp_rank: int
    ) -> Sequence[int]:
        return samples_of(self.problem, call, allocation.strategy.dp)[dp_rank]

    def _context_of(self, name: str) -> tuple[RankContext, Layout]:
        layout = call_layout(self.plan, name)
        assert layout is not None, name
        return self.contexts[layout], layout

    # ---- calls --------------------------------------------------------------------------------

    def _generate(self, instruction: Generate, counts: dict[str, int]) -> None:
        call, allocation, dp_rank = self._place(instruction.call)
        assert call.role is not None
        _, layout = self._context_of(call.name)
        held, items, step = self.step_data, self.step_data.items, self.step
        ahead = not self.evaluating and call in self.problem.graph.ahead
        if ahead:
            assert held.works_for is not None, call.name
            items, step = held.coming_items, held.works_for
        sequences = self.samples.sequences(
            self._share(call, allocation, dp_rank), held.group_size(call)
        )
        whole = self.problem.workload.group_size
        generate = self.generation.engine(instruction, self.weights.stage(call.role, layout))
        batch = generate(
            [items[sequence // whole].prompt.to(self.device) for sequence in sequences],
            samples=sequences,
            params=self.functions[call.name].sampling(self.text.stop_token_ids),
            seed=self.run.config.seed,
            step=step,
            num_groups=allocation.num_micro_batches,
            max_rows=allocation.generation_batch or None,
        )
        counts["num_tokens"] = batch.num_tokens
        statistics = generation_statistics(batch, self.contexts[layout])
        if not ahead:
            self.samples.put(batch, call)
            self._report(call, statistics)
            return
        held.coming.put(batch, call)
        if self._tells(call):
            statistics["staleness"] = float(step - self.versions.of(call.role, layout))
            post(self.store, str(step), call.name, statistics)

    def _infer(self, instruction: Infer, counts: dict[str, int]) -> None:
        call, allocation, dp_rank = self._place(instruction.call)
        assert call.role is not None
        context, layout = self._context_of(call.name)
        stage = self.weights.stage(
            call.role, layout, sequence_parallel=allocation.strategy.sequence_parallel
        )
        function = self.functions[call.name]
        batch = self.step_data.gather(call, self._share(call, allocation, dp_rank))
        parts = balanced_groups(
            batch.lengths, self.step_data.group_size(call), allocation.num_micro_batches
        )
        micro_batches = [batch.select(part) for part in parts]

        def read(hidden: Tensor, micro_batch: SequenceBatch) -> Mapping[str, Tensor]:
            found: Mapping[str, Tensor] = function.read(stage.head, hidden, micro_batch, context)
            return found

        results = forward_only(stage, micro_batches, read=read)
        counts["num_tokens"] = batch.num_tokens
        means: dict[str, float] = {}
        if results is not None:
            for micro_batch, values in zip(micro_batches, results, strict=True):
                self.samples.put(self.step_data.with_outputs(call, micro_batch, values), call)
            means = mean_outputs(self.problem.graph, call, results, context)
        self._report(call, means)
        if self._tells(call):
            self._show_samples(call)

    def _function(self, instruction: Function, counts: dict[str, int]) -> None:
        call, allocation, dp_rank = self._place(instruction.call)
        batch = self.step_data.gather(call, self._share(call, allocation, dp_rank))
        own = self.text.with_answers(
            [self.step_data.item(sample) for sample in batch.samples], batch
        )
        values = self.functions[call.name].run(batch, own)
        counts["num_tokens"] = batch.num_tokens
        if isinstance(values, SequenceBatch):  # sequences of its own: a choice among those given
            self.samples.put(values, call)
            values = {}
        else:
            self.samples.put(self.step_data.with_outputs(call, batch, values), call)
        means = {key: float(value.double().mean()) for key, value in values.items()}
        # Ranks of a function never wait for each other: each tells its own share.
        post(self.store, self.moment, call.name, means, part=dp_rank, weight=batch.num_sequences)
        if dp_rank == 0:
            self._show_samples(call)

    def _passes(self, call: ModelFunctionCall, allocation: Allocation) -> Passes:
        return Passes(
            call=call, batch_size=self.problem.workload.batch_size,
            group_size=self.step_data.group_size(call),
            num_micro_batches=allocation.num_micro_batches,
            seed=self.run.config.seed, step=self.step,
        )  # fmt: skip

    def _train(self, instruction: Train, counts: dict[str, int]) -> None:
        call, allocation, dp_rank = self._place(instruction.call)
        assert call.role is not None
        function = self.functions[call.name]
        own = self.step_data.gather(call, self._share(call, allocation, dp_rank))
        passes = self._passes(call, allocation)
        counts["num_tokens"] = own.num_tokens
        trainer = self.weights.trainers[call.role]
        if not self.evaluating:
            statistics = train(trainer, function, own, passes)
            self.versions.trained(call.role, trainer.stage.ctx.layout, self.step + 1)
            check_finite(call, statistics, self.step)
            self._report(call, statistics)
        elif any(other.kind is CallKind.GENERATE for other in self.problem.graph.calls):
            self._report(call, {})  # of sampled answers the rewards are what counts
        else:
            self._report(call, *evaluate(trainer, function, own, passes))

    # ---- results ------------------------------------------------------------------------------

    def _tells(self, call: ModelFunctionCall) -> bool:
        """This is the first rank that holds the call's results."""
        return self.rank == reporting_rank(self.plan.allocations[call.name], call)

    def _report(
        self, call: ModelFunctionCall, values: Mapping[str, float], weight: float = 1.0
    ) -> None:
        if self._tells(call):
            post(self.store, self.moment, call.name, values, weight=weight)

    def _show_samples(self, call: ModelFunctionCall) -> None:
        """Leave the first answers and their rewards, if the step is one of ``samples_every``."""
        config = self.run.config
        if REWARDS not in call.outputs or self.evaluating or not shows_samples(config, self.step):
            return
        table = self.step_data.rewarded(self.step, config.num_samples, self.text)
        post_samples(self.store, self.step, table)

    def save(self, folder: Path) -> list[Path]:
        """Write every trained role as a Hugging Face folder ``<role>/<folder>``; all ranks."""
        written = []
        for role, trainer in self.weights.trainers.items():
            target, source = self.run.output / role / folder, self.run.model_path(role)
            save(
                trainer.stage.ctx,
                trainer.stage.buffer,
                target,
                self.problem.models[role],
                source_folder=Path(source) if source else None,
            )
            written.append(target)
        return written

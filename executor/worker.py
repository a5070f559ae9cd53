"""``Worker``: one rank's interpreter of its program.

``setup`` loads the weights, then ``run_step`` carries out the rank's instructions of a step, one
short method for each kind of instruction. Nothing is decided here: what, where and in which
order is the program's; the mathematics of a call is the algorithm's (``calls.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from executor.batch import SequenceBatch, balanced_groups
from executor.buffers import ParameterBuffer
from executor.context import RankContext, build_contexts
from executor.dataset import Item, Prompts
from executor.generate.engine import generate
from executor.metrics import REWARDS, evaluation_moment, post, post_samples, shows_samples
from executor.model import hf_weights
from executor.model.transformer import DecoderStage
from executor.out_of_memory import is_out_of_memory, out_of_memory
from executor.parallel.optimizer import Adam, AdamConfig
from executor.parallel.pipeline import forward_only
from executor.reallocate import execute
from executor.run import Run
from executor.text import TextCodec
from executor.trace import TraceWriter
from executor.training import Passes, Trainer, evaluate, sum_over_dp, train
from executor.transfer import Exchange, SampleStore
from planner.graph import CallKind, ModelFunctionCall
from planner.labels import label_of
from planner.layout import Layout
from planner.plan import Allocation
from planner.program import (
    Average,
    Free,
    Function,
    Generate,
    Infer,
    Instruction,
    Load,
    Program,
    Reallocate,
    Train,
    Transfer,
    call_layout,
)
from planner.reallocation import reallocate
from planner.transfers import producing_ranks, samples_of
from profiles.errors import ConfigError, UserError

# Beyond the steps of any run: the noise of an evaluation's answers is its own.
EVALUATION_STEPS = 1 << 40


class DivergedError(UserError):
    """A loss or a gradient is infinite or not a number: going on would learn nothing."""


class Worker:
    """The state of one rank over a run: buffers by (role, layout), trainers by role, samples."""

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
    ) -> None:
        self.run = run
        self.plan = run.plan
        self.problem = run.plan.problem
        self.program = program
        self.rank = rank
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.staging_bytes: int | None = None  # of reallocations; None: the device's
        self.functions = functions
        self.data = data
        self.text = text
        self.store = store
        self.trace = trace
        self.on_instruction = on_instruction
        self.step = 0
        self.turn = (-1, 0)  # step, -1 before the first; 0, or 1 + the batch of an evaluation
        self.moment = "0"  # what the numbers of the step are posted under
        self.items: Sequence[Item] = ()  # the data of the step, a group each
        self.evaluating = False
        layouts = dict.fromkeys(layout for _, layout in program.layouts)
        self.contexts = build_contexts(layouts, rank=rank, device=device, timeout=message_deadline)
        self.buffers: dict[tuple[str, Layout], ParameterBuffer] = {}
        self.stages: dict[tuple[str, Layout, bool], DecoderStage] = {}
        self.trainers: dict[str, Trainer] = {}
        # Averages in fp32, flat as the buffer of (role, layout), which they may be.
        self.averages: dict[tuple[str, Layout], Tensor] = {}
        self.samples = SampleStore(self.problem.graph, device, self.problem.workload.group_size)
        self.exchange = Exchange(self.samples)
        self.handlers: dict[type, Callable[[Any, dict[str, int]], None]] = {
            Load: self._load,
            Generate: self._generate,
            Infer: self._infer,
            Train: self._train,
            Function: self._function,
            Transfer: self._transfer,
            Reallocate: self._reallocate,
            Free: self._free,
            Average: self._average,
        }

    # ---- the interpreter ----------------------------------------------------------------------

    def setup(self) -> None:
        """Read the weights of every layout that stays."""
        for instruction in self.program.setup.get(self.rank, ()):
            self._carry_out(instruction)

    def run_step(self, step: int) -> None:
        """Carry out this rank's instructions of a step."""
        self.step, self.moment = step, str(step)
        self.turn = (step, 0)
        self.items = self.data.batch(step, self.problem.workload.batch_size)
        self._carry_out_all()

    def evaluate(self, step: int, data: Prompts, index: int) -> None:
        """After ``step``: what its instructions make of batch ``index`` of other data, untrained.

        Nothing changes but the metrics, which are posted under ``evaluation_moment``. Answers to
        a batch are drawn with the same noise in every evaluation.
        """
        self.step, self.moment = EVALUATION_STEPS + index, evaluation_moment(step, index)
        self.turn = (step, 1 + index)
        self.items = data.batch(index, self.problem.workload.batch_size)
        self.evaluating = True
        self._carry_out_all()
        self.evaluating = False

    def _carry_out_all(self) -> None:
        for instruction in self.program.step.get(self.rank, ()):
            self._carry_out(instruction)
        self.exchange.finish()
        self.samples.clear()

    def _carry_out(self, instruction: Instruction) -> None:
        label = label_of(instruction)
        evaluating = "evaluating: " if self.evaluating else ""
        self.on_instruction(*self.turn, instruction.index, evaluating + label)
        if self.evaluating:
            self._handle(instruction, {})
            return
        kind = type(instruction).__name__.lower()
        with self.trace.span(
            step=self.step, index=instruction.index, kind=kind, label=label
        ) as counts:
            self._handle(instruction, counts)

    def _handle(self, instruction: Instruction, counts: dict[str, int]) -> None:
        try:
            self.handlers[type(instruction)](instruction, counts)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(
                self.plan, instruction, rank=self.rank, step=self.turn[0], device=self.device,
                asked=str(error),
            ) from error  # fmt: skip

    # ---- weights ------------------------------------------------------------------------------

    def _buffer(
        self, role: str, layout: Layout, *, multiple: int = 1,
        lender: ParameterBuffer | None = None,
    ) -> ParameterBuffer:  # fmt: skip
        buffer = ParameterBuffer.for_rank(
            layout, self.rank, dtype=self.dtype, device=self.device, multiple=multiple,
            lender=lender,
        )  # fmt: skip
        self.buffers[(role, layout)] = buffer
        return buffer

    def _load(self, load: Load, counts: dict[str, int]) -> None:
        zero_multiple = load.layout.dp if load.trained else 1
        buffer = self._buffer(load.role, load.layout, multiple=zero_multiple)
        spec, path = self.problem.models[load.role], self.run.model_path(load.role)
        if path is None:
            hf_weights.init_random(buffer, spec, seed=self.run.config.seed)
        else:
            hf_weights.load(buffer, Path(path), spec, seed=self.run.config.seed)
        counts["num_bytes"] = buffer.flat.numel() * buffer.flat.element_size()
        if load.trained:
            self.trainers[load.role] = self._trainer(load.role, load.layout, buffer)
        if any(average.role == load.role for average in self.problem.graph.averages):
            self.averages[load.role, load.layout] = buffer.flat.float()

    def _trainer(self, role: str, layout: Layout, buffer: ParameterBuffer) -> Trainer:
        call = self.problem.graph.train_call(role)
        assert call is not None, role
        strategy = self.plan.allocations[call.name].strategy
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
            context, buffer, gradients, config, zero=strategy.zero, partial=stage.partial
        )
        return Trainer(gradients=gradients, stage=stage, optimizer=optimizer)

    def _reallocate(self, instruction: Reallocate, counts: dict[str, int]) -> None:
        role, destination = instruction.role, instruction.destination
        plan = reallocate(
            instruction.source,
            destination,
            devices_per_node=self.problem.cluster.devices_per_node,
        )
        source = self.buffers.get((role, instruction.source))
        target = None
        if self.rank in destination.mesh:
            target = self._buffer(role, destination, lender=source)
        counts["num_bytes"] = execute(
            plan, source, target, rank=self.rank, staging_bytes=self.staging_bytes
        )

    def _free(self, free: Free, counts: dict[str, int]) -> None:
        del self.buffers[(free.role, free.layout)]
        for split in (False, True):
            self.stages.pop((free.role, free.layout, split), None)

    def _average(self, instruction: Average, counts: dict[str, int]) -> None:
        """A small step is lost in a bf16 weight, so that the average is kept in fp32."""
        if self.evaluating:
            return
        key = (instruction.role, instruction.layout)
        own, other = self.buffers[key], self.buffers[instruction.of, instruction.layout]
        for piece in own.slices:
            average = own.view(piece.name, of=self.averages[key])
            average.lerp_(other.view(piece.name).float(), instruction.rate)
        own.flat.copy_(self.averages[key])

    def _stage(self, role: str, layout: Layout, *, sequence_parallel: bool = False) -> DecoderStage:
        """The model without gradients in a layout whose weights are here."""
        key = (role, layout, sequence_parallel)
        if key not in self.stages:
            self.stages[key] = DecoderStage(
                self.contexts[layout], self.buffers[role, layout],
                sequence_parallel=sequence_parallel,
            )  # fmt: skip
        return self.stages[key]

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

    def _group_size(self, call: ModelFunctionCall) -> int:
        """Sequences of a group that the call works on."""
        return self.problem.workload_of(call.name).group_size

    def _gather(self, call: ModelFunctionCall, groups: Sequence[int]) -> SequenceBatch:
        """The call's inputs of these groups, those of the data set among them."""
        names = [k for k in call.inputs if k in self.problem.graph.source_keys and k != "prompts"]
        if names:
            self._read_data(names, groups)
        return self.samples.gather(groups, call, self._group_size(call))

    def _read_data(self, names: Sequence[str], groups: Sequence[int]) -> None:
        """Keep ``sequences`` and ``prompt_lengths`` of these groups of the data set."""
        items = self.items
        sequences = self.samples.sequences(groups, self.problem.workload.group_size)
        rows = [
            (items[group].prompt, answer) for group in groups for answer in items[group].answers
        ]
        batch = SequenceBatch(
            samples=tuple(sequences),
            lengths=tuple(len(prompt) + len(answer) for prompt, answer in rows),
            per_token={"sequences": torch.cat([part for row in rows for part in row])},
            per_sequence={"prompt_lengths": torch.tensor([len(prompt) for prompt, _ in rows])},
        )
        for name in names:
            self.samples.put_key(batch, name, batch.get(name))

    def _context_of(self, name: str) -> tuple[RankContext, Layout]:
        layout = call_layout(self.plan, name)
        assert layout is not None, name
        return self.contexts[layout], layout

    # ---- calls --------------------------------------------------------------------------------

    def _generate(self, instruction: Generate, counts: dict[str, int]) -> None:
        call, allocation, dp_rank = self._place(instruction.call)
        assert call.role is not None
        _, layout = self._context_of(call.name)
        sequences = self.samples.sequences(
            self._share(call, allocation, dp_rank), self._group_size(call)
        )
        whole = self.problem.workload.group_size
        batch = generate(
            self._stage(call.role, layout),
            [self.items[sequence // whole].prompt.to(self.device) for sequence in sequences],
            samples=sequences,
            params=self.functions[call.name].sampling(self.text.stop_token_ids),
            seed=self.run.config.seed,
            step=self.step,
            num_groups=allocation.num_micro_batches,
            max_rows=allocation.generation_batch or None,
        )
        self.samples.put(batch, call)
        counts["num_tokens"] = batch.num_tokens
        self._report(call, self._generation_statistics(batch, self.contexts[layout]))

    def _generation_statistics(
        self, batch: SequenceBatch, context: RankContext
    ) -> dict[str, float]:
        answers = batch.num_tokens - float(batch.get("prompt_lengths").sum())
        sums = torch.tensor(
            [batch.num_sequences, answers, float(batch.get("finished").sum())],
            dtype=torch.float64,
        )
        count, tokens, finished = sum_over_dp(context)(sums).tolist()
        return {"response_tokens": tokens / count, "finished": finished / count}

    def _infer(self, instruction: Infer, counts: dict[str, int]) -> None:
        call, allocation, dp_rank = self._place(instruction.call)
        assert call.role is not None
        context, layout = self._context_of(call.name)
        stage = self._stage(
            call.role, layout, sequence_parallel=allocation.strategy.sequence_parallel
        )
        function = self.functions[call.name]
        batch = self._gather(call, self._share(call, allocation, dp_rank))
        parts = balanced_groups(batch.lengths, self._group_size(call), allocation.num_micro_batches)
        micro_batches = [batch.select(part) for part in parts]

        def read(hidden: Tensor, micro_batch: SequenceBatch) -> Mapping[str, Tensor]:
            found: Mapping[str, Tensor] = function.read(stage.head, hidden, micro_batch, context)
            return found

        results = forward_only(stage, micro_batches, read=read)
        counts["num_tokens"] = batch.num_tokens
        means: dict[str, float] = {}
        if results is not None:
            for micro_batch, values in zip(micro_batches, results, strict=True):
                self.samples.put(self._with_outputs(call, micro_batch, values), call)
            means = self._mean_outputs(call, results, context)
        self._report(call, means)
        if self._tells(call):
            self._show_samples(call)

    def _item(self, sample: int) -> Item:
        return self.items[sample // self.problem.workload.group_size]

    def _with_outputs(
        self, call: ModelFunctionCall, batch: SequenceBatch, values: Mapping[str, Tensor]
    ) -> SequenceBatch:
        """``batch`` with what the call's function found of it.

        Raises:
            ConfigError: a value of a sequence is not finite; names the prompt's line.
        """
        per = {call.inner_name(k): self.problem.graph.key(k).per for k in call.outputs}
        for name, value in values.items():
            if per[name] == "sequence" and not torch.isfinite(value).all():
                place = int((~torch.isfinite(value)).nonzero()[0])
                item = self._item(batch.samples[place])
                raise ConfigError(
                    f"{call.name} finds {name} {float(value[place])} for an answer to this prompt",
                    where=item.where or f"sample {batch.samples[place]}",
                    remedy=f"mend the line, or the weights of {call.role or call.name}",
                )
        return batch.with_values(
            per_token={k: v for k, v in values.items() if per[k] == "token"},
            per_sequence={k: v for k, v in values.items() if per[k] == "sequence"},
        )

    def _mean_outputs(
        self, call: ModelFunctionCall, results: Sequence[Mapping[str, Tensor]], context: RankContext
    ) -> dict[str, float]:
        """Mean of each per-sequence output over the whole batch."""
        means = {}
        for key in call.outputs:
            if self.problem.graph.key(key).per == "sequence":
                name = call.inner_name(key)
                values = torch.cat([result[name] for result in results]).double()
                sums = torch.stack([values.sum(), torch.tensor(float(len(values)))])
                total, count = sum_over_dp(context)(sums).tolist()
                means[key] = total / count
        return means

    def _function(self, instruction: Function, counts: dict[str, int]) -> None:
        call, allocation, dp_rank = self._place(instruction.call)
        batch = self._gather(call, self._share(call, allocation, dp_rank))
        own = self.text.with_answers([self._item(sample) for sample in batch.samples], batch)
        values = self.functions[call.name].run(batch, own)
        counts["num_tokens"] = batch.num_tokens
        if isinstance(values, SequenceBatch):  # sequences of its own: a choice among those given
            self.samples.put(values, call)
            values = {}
        else:
            self.samples.put(self._with_outputs(call, batch, values), call)
        means = {key: float(value.double().mean()) for key, value in values.items()}
        # Ranks of a function never wait for each other: each tells its own share.
        post(self.store, self.moment, call.name, means, part=dp_rank, weight=batch.num_sequences)
        if dp_rank == 0:
            self._show_samples(call)

    def _passes(self, call: ModelFunctionCall, allocation: Allocation) -> Passes:
        return Passes(
            call=call, batch_size=self.problem.workload.batch_size,
            group_size=self._group_size(call), num_micro_batches=allocation.num_micro_batches,
            seed=self.run.config.seed, step=self.step,
        )  # fmt: skip

    def _train(self, instruction: Train, counts: dict[str, int]) -> None:
        call, allocation, dp_rank = self._place(instruction.call)
        assert call.role is not None
        function = self.functions[call.name]
        own = self._gather(call, self._share(call, allocation, dp_rank))
        passes = self._passes(call, allocation)
        counts["num_tokens"] = own.num_tokens
        trainer = self.trainers[call.role]
        if not self.evaluating:
            statistics = train(trainer, function, own, passes)
            self._check_finite(call, statistics)
            self._report(call, statistics)
        elif any(other.kind is CallKind.GENERATE for other in self.problem.graph.calls):
            self._report(call, {})  # of sampled answers the rewards are what counts
        else:
            self._report(call, *evaluate(trainer, function, own, passes))

    def _check_finite(self, call: ModelFunctionCall, statistics: Mapping[str, float]) -> None:
        """Raise ``DivergedError`` where the loss or the gradients are not numbers any more."""
        for name in ("loss", "grad_norm"):
            value = statistics.get(name, 0.0)
            if not isfinite(value):
                raise DivergedError(
                    f"{name} is {value} in step {self.step + 1}; no checkpoint has these weights",
                    where=call.name,
                    remedy=f"lower {call.role}.lr or {call.role}.max_grad_norm and --resume",
                )

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
        config, held = self.run.config, self.samples.values
        if REWARDS not in call.outputs or self.evaluating or not shows_samples(config, self.step):
            return
        table = []
        for sample in sorted(held[REWARDS])[: config.num_samples]:
            ids = held["sequences"][sample].tolist()
            start, item = int(held["prompt_lengths"][sample]), self._item(sample)
            prompt = item.record.get("prompt") or self.text.decode(ids[:start])
            table.append(
                {"step": self.step, "sample": sample, "where": item.where, "prompt": prompt,
                 "answer": self.text.decode(ids[start:]), "reward": float(held[REWARDS][sample])}
            )  # fmt: skip
        post_samples(self.store, self.step, table)

    def save(self, folder: Path) -> list[Path]:
        """Write every trained role as a Hugging Face folder ``<role>/<folder>``; all ranks."""
        written = []
        for role, trainer in self.trainers.items():
            target, source = self.run.output / role / folder, self.run.model_path(role)
            hf_weights.save(
                trainer.stage.ctx,
                trainer.stage.buffer,
                target,
                self.problem.models[role],
                source_folder=Path(source) if source else None,
            )
            written.append(target)
        return written


def reporting_rank(allocation: Allocation, call: ModelFunctionCall) -> int:
    """The first rank of the last stage of the first replica."""
    s = allocation.strategy
    return producing_ranks(call, s, allocation.mesh.first)[0][-1] - (s.tp - 1)

"""A TRAIN call on one rank: passes over the batch, mini-batches, optimizer steps.

Read ``train``. Which prompts form a mini-batch, and in which order, follows from the batch size
and (seed, step, pass) alone, never from the plan; so every plan takes the same optimizer steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from executor.batch import SequenceBatch, balanced_groups
from executor.context import RankContext
from executor.model.transformer import DecoderStage
from executor.parallel.data import gather
from executor.parallel.optimizer import Adam
from executor.parallel.pipeline import forward_only, train_1f1b
from planner.graph import ModelFunctionCall
from planner.transfers import split_evenly

Statistics = dict[str, float]


@dataclass(slots=True)
class Trainer:
    """A trained role's gradients and optimizer on this rank."""

    gradients: Tensor
    stage: DecoderStage
    optimizer: Adam


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How a call goes through its ``batch_size`` groups of ``group_size`` sequences each."""

    call: ModelFunctionCall
    batch_size: int
    group_size: int
    num_micro_batches: int
    seed: int
    step: int

    def order(self, epoch: int) -> list[int]:
        """The groups in the order of a pass: the first as they come, later ones shuffled."""
        if epoch == 0:
            return list(range(self.batch_size))
        # A text as a seed mixes all three; torch's generator keeps 32 bits of a number.
        seed = random.Random(f"{self.seed} {self.step} {epoch}").getrandbits(32)
        rng = torch.Generator().manual_seed(seed)
        found: list[int] = torch.randperm(self.batch_size, generator=rng).tolist()
        return found

    def mini_batches(self, epoch: int, dp: int) -> list[list[list[int]]]:
        """``[mini_batch][dp_rank]``: the groups of each rank; of the first pass those that
        ``planner.program.assign_samples`` gives it."""
        order = self.order(epoch)
        runs = split_evenly(self.batch_size, self.call.num_mini_batches)
        return [
            [[order[run.start + i] for i in part] for part in split_evenly(len(run), dp)]
            for run in runs
        ]


def train(trainer: Trainer, function: Any, own: SequenceBatch, passes: Passes) -> Statistics:
    """All optimizer steps of a call on this rank's share ``own`` of the batch.

    Collective over the role's mesh. Returns the call's statistics: the loss's (on the last stage)
    are means over all that they count, not over mini-batches; the optimizer's over its steps.
    """
    ctx = trainer.stage.ctx
    batch = function.prepare(own, sum_over_dp(ctx))
    call, dp = passes.call, ctx.layout.dp
    held = [g for mini in passes.mini_batches(0, dp) for g in mini[ctx.dp_rank]]
    means = _Means()
    for epoch in range(call.num_epochs):
        if epoch == 1 and dp > 1:  # from here on any rank may need any group
            batch = gather_over_dp(batch, ctx)
            held = [
                g for rank in range(dp) for mini in passes.mini_batches(0, dp) for g in mini[rank]
            ]
        place = {group: i * passes.group_size for i, group in enumerate(held)}
        for shares in passes.mini_batches(epoch, dp):
            starts = [place[group] for group in shares[ctx.dp_rank]]
            rows = [start + k for start in starts for k in range(passes.group_size)]
            stopped = _optimizer_step(trainer, function, batch.select(rows), passes, means)
            if stopped:
                return means.all(num_steps=call.num_optimizer_steps)
    return means.all(num_steps=call.num_optimizer_steps)


def evaluate(
    trainer: Trainer, function: Any, own: SequenceBatch, passes: Passes
) -> tuple[Statistics, float]:
    """(the loss and its statistics on the last stage, what they were divided by); nothing trained.

    Collective over the role's mesh.
    """
    stage, total = trainer.stage, sum_over_dp(trainer.stage.ctx)
    batch = function.prepare(own, total)
    denominator = total(function.count(batch))
    parts = balanced_groups(batch.lengths, passes.group_size, passes.num_micro_batches)

    def read(hidden: Tensor, micro: SequenceBatch) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = function.loss(
            stage.head, hidden, micro, denominator, stage.ctx
        )[1]
        return found

    results = forward_only(stage, [batch.select(part) for part in parts], read=read)
    return {} if results is None else summed(results, total), float(denominator.flatten()[0])


def _optimizer_step(
    trainer: Trainer, function: Any, mini_batch: SequenceBatch, passes: Passes, means: _Means
) -> bool:
    """One optimizer step on a mini-batch in micro-batches; True where it was not taken."""
    stage, total = trainer.stage, sum_over_dp(trainer.stage.ctx)
    denominator = total(function.count(mini_batch))
    parts = balanced_groups(mini_batch.lengths, passes.group_size, passes.num_micro_batches)

    def loss(hidden: Tensor, micro: SequenceBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        found: tuple[Tensor, Mapping[str, Tensor]] = function.loss(
            stage.head, hidden, micro, denominator, stage.ctx
        )
        return found

    stage.clear_gradients()
    results = train_1f1b(
        stage, [mini_batch.select(part) for part in parts], loss=loss,
        block_done=trainer.optimizer.block_done,
    )  # fmt: skip
    trainer.optimizer.all_done()
    statistics = {} if results is None else summed(results, total)
    if getattr(function, "may_stop", False):
        stops = results is not None and function.stops(statistics)
        if _told_by_last_stage(stops, stage.ctx):
            trainer.optimizer.forget()
            return True
    means.add(statistics, denominator)
    means.add_step(trainer.optimizer.step())
    return False


def summed(
    results: Sequence[Mapping[str, Tensor]], total: Callable[[Tensor], Tensor]
) -> Statistics:
    """Sums of each statistic over micro-batches and data-parallel ranks."""
    names = sorted(results[0])
    sums = torch.stack(
        [torch.stack([r[name].detach().double() for r in results]).sum() for name in names]
    )
    return dict(zip(names, total(sums).tolist(), strict=True))


class _Means:
    """Means of a call's statistics over its mini-batches, each weighted by what it counts."""

    def __init__(self) -> None:
        self.sums: Statistics = {}
        self.weights: Statistics = {}
        self.steps: list[Mapping[str, float]] = []

    def add(self, statistics: Statistics, denominator: Tensor) -> None:
        of_loss, of_others = (denominator.flatten()[i].item() for i in (0, -1))
        for name, value in statistics.items():
            weight = of_loss if name == "loss" else of_others
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def add_step(self, statistics: Mapping[str, float]) -> None:
        self.steps.append(statistics)

    def all(self, *, num_steps: int) -> Statistics:
        """Also ``stopped``: the share of ``num_steps`` that was left out, where some was."""
        found = {
            name: total / self.weights[name] if self.weights[name] else 0.0
            for name, total in self.sums.items()
        }
        for name in self.steps[0] if self.steps else ():
            found[name] = sum(step[name] for step in self.steps) / len(self.steps)
        if len(self.steps) < num_steps:
            found["stopped"] = 1.0 - len(self.steps) / num_steps
        return found


# ---- communication ----------------------------------------------------------------------------


def sum_over_dp(context: RankContext) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor over the data-parallel ranks of a layout."""

    def total(value: Tensor) -> Tensor:
        if context.dp_group is None:
            return value
        summed = value.detach().clone().to(context.device)
        dist.all_reduce(summed, group=context.dp_group)
        return summed.to(value.device)

    return total


def _told_by_last_stage(said: bool, ctx: RankContext) -> bool:
    """What the first rank of the last stage said, on all ranks of the layout."""
    if ctx.mesh_group is None:
        return said
    word = torch.tensor([float(said)], device=ctx.device)
    dist.broadcast(word, src=ctx.layout.device(ctx.layout.pp - 1, 0, 0), group=ctx.mesh_group)
    return bool(word.item())


def gather_over_dp(batch: SequenceBatch, ctx: RankContext) -> SequenceBatch:
    """The sequences of all data-parallel ranks, in the order of the ranks, on each of them."""
    if ctx.dp_group is None:
        return batch
    group, device = ctx.dp_group, ctx.device
    own = torch.tensor([batch.num_sequences, batch.num_tokens], device=device)
    sizes = gather(own, group)

    def gathered(value: Tensor, counts: list[int]) -> Tensor:
        # All ranks send as many rows; what is beyond their own has no meaning.
        rest = max(counts) - value.shape[0]
        padded = F.pad(value.to(device), (0, rest)).contiguous()
        parts = gather(padded, group)
        return torch.cat([part[:count] for part, count in zip(parts, counts)]).to(value.device)

    sequences, tokens = ([int(size[i]) for size in sizes] for i in (0, 1))
    numbers = gathered(
        torch.tensor([batch.samples, batch.lengths], dtype=torch.int64).T.flatten(),
        [2 * n for n in sequences],
    )
    samples, lengths = numbers.reshape(-1, 2).T.tolist()
    return SequenceBatch(
        samples=tuple(samples),
        lengths=tuple(lengths),
        per_token={name: gathered(value, tokens) for name, value in batch.per_token.items()},
        per_sequence={name: gathered(v, sequences) for name, v in batch.per_sequence.items()},
    )

"""What a call tells of its outcome: means over all ranks, and whether they are numbers at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.context import RankContext
from executor.training import sum_over_dp
from planner.graph import DataflowGraph, ModelFunctionCall
from planner.plan import Allocation
from planner.transfers import producing_ranks
from profiles.errors import UserError


class DivergedError(UserError):
    """A loss, gradient or logit is infinite or not a number: going on would learn nothing."""


def generation_statistics(batch: SequenceBatch, context: RankContext) -> dict[str, float]:
    """Mean answer tokens and share of answers that a stop token ended; collective over dp."""
    answers = batch.num_tokens - float(batch.get("prompt_lengths").sum())
    sums = torch.tensor(
        [batch.num_sequences, answers, float(batch.get("finished").sum())], dtype=torch.float64
    )
    count, tokens, finished = sum_over_dp(context)(sums).tolist()
    return {"response_tokens": tokens / count, "finished": finished / count}


def mean_outputs(
    graph: DataflowGraph, call: ModelFunctionCall, results: Sequence[Mapping[str, Tensor]],
    context: RankContext,
) -> dict[str, float]:  # fmt: skip
    """Mean of each per-sequence output over the whole batch; collective over dp."""
    means = {}
    for key in call.outputs:
        if graph.key(key).per == "sequence":
            name = call.inner_name(key)
            values = torch.cat([result[name] for result in results]).double()
            sums = torch.stack([values.sum(), values.new_tensor(float(len(values)))])
            total, count = sum_over_dp(context)(sums).tolist()
            means[key] = total / count
    return means


def check_finite(call: ModelFunctionCall, statistics: Mapping[str, float], step: int) -> None:
    """Raise ``DivergedError`` where the loss or the gradients are not numbers any more."""
    for name in ("loss", "grad_norm"):
        value = statistics.get(name, 0.0)
        if not isfinite(value):
            raise DivergedError(
                f"{name} is {value} in step {step + 1}; no checkpoint has these weights",
                where=call.name,
                remedy=f"lower {call.role}.lr or {call.role}.max_grad_norm and --resume",
            )


def reporting_rank(allocation: Allocation, call: ModelFunctionCall) -> int:
    """The first rank of the last stage of the first replica."""
    s = allocation.strategy
    return producing_ranks(call, s, allocation.mesh.first)[0][-1] - (s.tp - 1)

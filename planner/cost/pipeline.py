"""Micro-batches through the stages of a pipeline: forward only and 1F1B.

The first micro-batch passes every stage; then the slowest stage sets the pace:
``sum over stages + (m - 1) * slowest``. With equal stages this is the usual
``(m + pp - 1) * stage``. 1F1B has the same length as all-forward-all-backward, it only holds fewer
activations. Source: Narayanan et al. 2021 (Megatron-LM), section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from planner.cost.stage import ZERO, Priced, StageCost, StageShape

PARTS = (
    "compute", "tensor_parallel", "pipeline_bubble", "pipeline_p2p", "data_parallel", "optimizer",
    "prefill", "decode",
)  # fmt: skip


LinkClass = Literal["intra", "inter"]


@dataclass(frozen=True, slots=True)
class StagesAlike:
    """``count`` stages of one shape that reach the next over the same links; none after the last.

    Of 80 stages three or four are unlike, whatever goes through them.
    """

    shape: StageShape
    links: frozenset[LinkClass]
    count: int


@dataclass(frozen=True, slots=True)
class PipelinePass:
    """One kind of micro-batch: its cost on each of the unlike stages, in their order.

    ``hops``: seconds from a stage to the next, of one message each way where there is a backward
    pass; ``ZERO`` after the last. ``count``: micro-batches of this kind.
    """

    stages: Sequence[StageCost]
    hops: Sequence[Priced]
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What other systems do with a pipeline; the defaults are the executor's.

    ``virtual_stages``: a device holds so many parts of the model (interleaved 1F1B). The bubble
    is divided by them; a micro-batch goes round all devices as many times. Source:
    Narayanan et al. 2021 (Megatron-LM), section 2.2.2. ``scatter_hops``: tensor shards, which
    hold the same hidden states, send a part each, and gather what they receive (section 4.1).
    ``early_sums``: on GPUs gradients are summed over replicas while backward goes on.
    """

    virtual_stages: int = 1
    scatter_hops: bool = False
    early_sums: bool = True


EXECUTOR = Schedule()


def pipeline_parts(
    passes: Sequence[PipelinePass], counts: Sequence[int], schedule: Schedule = EXECUTOR
) -> Mapping[str, Priced]:
    """Parts of the whole pipeline's seconds: compute, tensor_parallel, bubble and p2p.

    ``passes``: kinds of micro-batches, the longest first. ``counts``: stages of each unlike one.
    Compute and collectives are the busiest stage's; the bubble is what this stage waits while the
    others fill and drain. A hop is not overlapped: the executor waits for what it receives before
    it computes on it.
    """
    used = [p for p in passes if p.count > 0]
    if not used:
        return {}
    longest, rounds = used[0], schedule.virtual_stages
    seconds = [a.seconds + b.seconds for a, b in zip(longest.stages, longest.hops, strict=True)]
    busiest = seconds.index(max(seconds))
    compute = tensor_parallel = p2p = bubble = ZERO
    for kind in used:
        stage, hop = kind.stages[busiest], kind.hops[busiest]
        compute = compute + stage.compute * kind.count
        tensor_parallel = tensor_parallel + stage.tensor_parallel * kind.count
        p2p = p2p + hop * (kind.count * rounds)
        if rounds > 1 and busiest > 0 and busiest == len(counts) - 1:  # the last gives to the first
            p2p = p2p + kind.hops[-2] * (kind.count * (rounds - 1))
    for index, (stage, hop, count) in enumerate(zip(longest.stages, longest.hops, counts)):
        others = count - (index == busiest)
        if others:
            bubble = bubble + (stage.compute + stage.tensor_parallel) * (others / rounds)
            p2p = p2p + hop * others
    return {
        "compute": compute, "tensor_parallel": tensor_parallel, "pipeline_bubble": bubble,
        "pipeline_p2p": p2p,
    }  # fmt: skip


def micro_batch_sizes(num_sequences: int, num_micro_batches: int) -> tuple[tuple[int, int], ...]:
    """(sequences, number of micro-batches of that many), larger ones first.

    >>> micro_batch_sizes(10, 4)
    ((3, 2), (2, 2))
    """
    small, larger = divmod(num_sequences, num_micro_batches)
    return ((small + 1, larger), (small, num_micro_batches - larger if small else 0))

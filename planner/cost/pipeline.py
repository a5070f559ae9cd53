"""Micro-batches through the stages of a pipeline: forward only and 1F1B.

The first micro-batch passes every stage; then the slowest stage sets the pace:
``sum over stages + (m - 1) * slowest``. With equal stages this is the usual
``(m + pp - 1) * stage``. 1F1B has the same length as all-forward-all-backward, it only holds fewer
activations. Source: Narayanan et al. 2021 (Megatron-LM), section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.cost.stage import ZERO, Priced, StageCost

PARTS = (
    "compute", "tensor_parallel", "pipeline_bubble", "pipeline_p2p", "data_parallel", "optimizer",
    "prefill", "decode",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PipelinePass:
    """One kind of micro-batch: its cost on each stage, and ``hops`` between neighbours.

    ``hops[s]``: seconds between stages s and s + 1, of one message each way where there is a
    backward pass. ``count``: micro-batches of this kind.
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
    """

    virtual_stages: int = 1
    scatter_hops: bool = False


EXECUTOR = Schedule()


def pipeline_parts(
    passes: Sequence[PipelinePass], schedule: Schedule = EXECUTOR
) -> Mapping[str, Priced]:
    """Parts of the whole pipeline's seconds: compute, tensor_parallel, bubble and p2p.

    ``passes``: kinds of micro-batches, the longest first. Compute and collectives are the
    busiest stage's; the bubble is what this stage waits while the others fill and drain. A hop is
    not overlapped: the executor waits for what it receives before it computes on it.
    """
    used = [p for p in passes if p.count > 0]
    if not used:
        return {}
    longest = unlike_stages(used[0].stages, [*used[0].hops, ZERO])
    busiest = max(longest, key=lambda part: part.stage.seconds + part.hop.seconds)
    rounds = schedule.virtual_stages
    compute = tensor_parallel = p2p = ZERO
    for kind in used:
        stage, hop = kind.stages[busiest.first], [*kind.hops, ZERO][busiest.first]
        compute = compute + stage.compute * kind.count
        tensor_parallel = tensor_parallel + stage.tensor_parallel * kind.count
        p2p = p2p + hop * (kind.count * rounds)
        if rounds > 1 and busiest.first == len(kind.hops):  # the last stage gives to the first
            p2p = p2p + kind.hops[-1] * (kind.count * (rounds - 1))
    bubble = ZERO
    for part in longest:
        others = part.count - (part is busiest)
        bubble = bubble + (part.stage.compute + part.stage.tensor_parallel) * (others / rounds)
        p2p = p2p + part.hop * others
    return {
        "compute": compute, "tensor_parallel": tensor_parallel, "pipeline_bubble": bubble,
        "pipeline_p2p": p2p,
    }  # fmt: skip


@dataclass(slots=True)
class StagesAlike:
    """``count`` stages of one cost, each with a ``hop`` after it; ``first``: the first of them."""

    stage: StageCost
    hop: Priced
    first: int
    count: int


def unlike_stages(stages: Sequence[StageCost], hops: Sequence[Priced]) -> list[StagesAlike]:
    """Stages with their hops by what they cost: of 80 stages three or four are unlike.

    Costs are told apart by identity, which the cost model keeps for equal questions.
    """
    found: dict[tuple[int, int], StagesAlike] = {}
    for index, (stage, hop) in enumerate(zip(stages, hops, strict=True)):
        alike = found.get((id(stage), id(hop)))
        if alike is None:
            found[id(stage), id(hop)] = StagesAlike(stage, hop, index, 1)
        else:
            alike.count += 1
    return list(found.values())


def micro_batch_sizes(num_sequences: int, num_micro_batches: int) -> tuple[tuple[int, int], ...]:
    """(sequences, number of micro-batches of that many), larger ones first.

    >>> micro_batch_sizes(10, 4)
    ((3, 2), (2, 2))
    """
    small, larger = divmod(num_sequences, num_micro_batches)
    return ((small + 1, larger), (small, num_micro_batches - larger if small else 0))

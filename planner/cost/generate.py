"""Seconds of a GENERATE call: prefill, then one decode step for every further token.

The sequences of a data-parallel rank go in ``num_micro_batches`` groups, so that several pipeline
stages have work at once. The first token comes out of prefill. A decode step's context grows by
one token a step; its seconds are summed by the trapezoid rule over a few contexts, which is exact
where they are linear in the context. Where ``generation_batch`` does not hold all sequences they go
in waves; where answers differ in length ``decode.py`` says which rows are live when.

On GPUs a dense model's decode steps are CUDA graphs, and priced so by ``profiles``
(``decode_graph`` rows of a profile). Rows that the engine adds to round them (at most a quarter)
and the graphs' captures, some ten a call, are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from planner.cost.decode import schedule
from planner.cost.model import CostModel
from planner.cost.pipeline import PipelinePass, micro_batch_sizes, pipeline_parts
from planner.cost.stage import (
    MAX_PROMPT_TOKENS,
    ZERO,
    Pass,
    Priced,
    expert_ranks,
    packed_values,
    stage_shapes,
)
from planner.plan import Allocation, Workload
from profiles.models import ModelSpec

TOKEN_ID_BYTES = 8


def generate_parts(
    spec: ModelSpec,
    workload: Workload,
    allocation: Allocation,
    model: CostModel,
    *,
    most_points: int = 9,
) -> Mapping[str, Priced]:
    """``prefill`` and ``decode`` of the busiest data-parallel rank.

    ``most_points``: contexts at which a decode step is priced; 9 leave an error far below that
    of the layers' costs, since those are piecewise smooth in the context.
    """
    num_sequences = ceil(workload.batch_size / allocation.strategy.dp) * workload.group_size
    if len(set(workload.response_lengths)) > 1:
        return _unlike_lengths(spec, workload, allocation, model, num_sequences)
    prefill, decode = ZERO, _packing(spec, allocation, model)
    for rows, count in waves(num_sequences, allocation.generation_batch):
        prefill = prefill + _prefill(spec, workload, allocation, model, rows) * count
        wave = _decode(spec, workload, allocation, model, rows, most_points=most_points)
        decode = decode + wave * count
    return {"prefill": prefill, "decode": decode}


def waves(num_sequences: int, generation_batch: int) -> Sequence[tuple[int, int]]:
    """(sequences at once, how often): answers of one length end together, so all rows are free.

    ``generation_batch`` 0: all at once.

    >>> waves(10, 4)
    [(4, 2), (2, 1)]
    """
    rows = min(generation_batch or num_sequences, num_sequences)
    whole, rest = divmod(num_sequences, rows)
    return [(rows, whole), *([(rest, 1)] if rest else [])]


def _unlike_lengths(
    spec: ModelSpec, workload: Workload, allocation: Allocation, model: CostModel,
    num_sequences: int,
) -> Mapping[str, Priced]:  # fmt: skip
    """Rows leave as their answers end, and waiting prompts take their places.

    Prompts that enter later are priced as a pass of their own, which reads the weights once more
    than the executor's, where they enter a decode step.
    """
    rows = min(allocation.generation_batch or num_sequences, num_sequences)
    plan = schedule(workload.response_lengths, num_sequences, rows)
    prefill, decode = ZERO, _packing(spec, allocation, model)
    for entering, count in plan.entries.items():
        prefill = prefill + _prefill(spec, workload, allocation, model, entering) * count
    for stretch in plan.stretches:
        context = max(1, round(workload.expected_prompt_tokens + stretch.answered))
        live = max(1, round(stretch.rows))
        decode = decode + _turn(spec, allocation, model, live, context) * stretch.turns
    return {"prefill": prefill, "decode": decode}


def _packing(spec: ModelSpec, allocation: Allocation, model: CostModel) -> Priced:
    """Copies of the weights in the order in which a CPU decodes: three passes over the memory,

    one to read and, as a cache writes, two to write.
    """
    s, device = allocation.strategy, model.cluster.device
    most = max(
        packed_values(spec, shape, s.tp, device.kind) for shape in set(stage_shapes(spec, s.pp))
    )
    if not most:
        return ZERO
    return Priced.modelled(3.0 * most * model.value_bytes / device.memory_bytes_per_s)


def _turn(
    spec: ModelSpec, allocation: Allocation, model: CostModel, rows: int, context: int
) -> Priced:
    """One token for each of ``rows`` sequences, in the allocation's groups.

    A group passes all stages and its tokens go back to the first, before its next step; a stage
    serves all groups in turn. The longer of the two is the turn: with equal stages
    max(groups, pp) * stage.
    """
    group = ceil(rows / min(allocation.num_micro_batches, rows))
    s = allocation.strategy
    through, slowest = model.once(
        ("decode", spec, allocation.mesh, s.pp, s.tp, s.ep, group, context),
        lambda: _decode_round(spec, allocation, model, group, context),
    )
    return max(through, slowest * ceil(rows / group), key=lambda cost: cost.seconds)


def _decode(
    spec: ModelSpec, workload: Workload, allocation: Allocation, model: CostModel, rows: int, *,
    most_points: int,
) -> Priced:  # fmt: skip
    """All tokens of ``rows`` sequences but the first ones."""
    steps = max(0.0, workload.expected_response_tokens - 1.0)
    if steps == 0:
        return ZERO
    contexts = _contexts(workload.expected_prompt_tokens, steps, most_points)
    rounds = [_turn(spec, allocation, model, rows, context) for context in contexts]
    return _mean(contexts, rounds) * steps


def _prefill(
    spec: ModelSpec,
    workload: Workload,
    allocation: Allocation,
    model: CostModel,
    num_sequences: int,
) -> Priced:
    """The prompts' forward pass; the head sees the last token of each sequence's prompt only.

    Sequences of a group share their prompt's pass. Prompts enter in turns of at most
    ``MAX_PROMPT_TOKENS`` tokens.
    """
    s, tokens = allocation.strategy, workload.expected_prompt_tokens
    alike = model.stages_alike(spec, allocation)
    most_at_once = max(1, int(MAX_PROMPT_TOKENS // tokens))
    num_prompts = ceil(num_sequences / workload.group_size)
    groups = min(allocation.num_micro_batches, num_prompts)
    turns = max(groups, ceil(num_prompts / most_at_once))
    kinds = []
    for prompts, count in micro_batch_sizes(num_prompts, turns):
        size = max(1, round(prompts * tokens))
        cost = model.stages.passes(
            spec, ("prefill",), tp=s.tp, size=size, length=max(1, round(tokens)),
            rows=min(prompts * workload.group_size, num_sequences),
            experts=expert_ranks(allocation.mesh, s),
        )  # fmt: skip
        hops = model.hops(alike, float(size) * spec.hidden * model.value_bytes)
        kinds.append(PipelinePass([cost.of(stages.shape) for stages in alike], hops, count))
    total = ZERO
    for part in pipeline_parts(kinds, [stages.count for stages in alike]).values():
        total = total + part
    return total


def _contexts(prompt: float, steps: float, most_points: int) -> list[int]:
    """Whole numbers from the first decode step's context to the last one's, evenly spaced."""
    first, last = prompt + 1.0, prompt + steps
    count = max(1, most_points - 1)
    points = (first + (last - first) * i / count for i in range(count + 1))
    return sorted({max(1, round(point)) for point in points})


def _decode_round(
    spec: ModelSpec, allocation: Allocation, model: CostModel, group: int, context: int
) -> tuple[Priced, Priced]:
    """One token for ``group`` sequences: through all stages and back, and on the slowest stage."""
    s = allocation.strategy
    alike = model.stages_alike(spec, allocation)
    decode: Pass = "decode_alone" if model.rests_beside(allocation.mesh) else "decode"
    whole = model.stages.passes(
        spec, (decode,), tp=s.tp, size=group, length=context,
        experts=expert_ranks(allocation.mesh, s),
    )  # fmt: skip
    hops, all_hops = model.once(
        ("decode hops", spec, allocation.mesh, s.pp, s.dp * s.tp, group),
        lambda: _decode_hops(spec, allocation, model, group),
    )
    costs = [whole.of(stages.shape) for stages in alike]
    seconds = [cost.seconds + hop.seconds for cost, hop in zip(costs, hops, strict=True)]
    busiest = seconds.index(max(seconds))
    slowest = costs[busiest].compute + costs[busiest].tensor_parallel + hops[busiest]
    return whole.whole_model(spec.num_layers) + all_hops, slowest


def _decode_hops(
    spec: ModelSpec, allocation: Allocation, model: CostModel, group: int
) -> tuple[Sequence[Priced], Priced]:
    """From each of ``stages_alike`` to the next, from the last back to the first; and of all."""
    s, alike = allocation.strategy, model.stages_alike(spec, allocation)
    hops = model.hops(alike, float(group) * spec.hidden * model.value_bytes)
    first = allocation.mesh.first
    hops[-1] = Priced.of(
        model.collectives.p2p(TOKEN_ID_BYTES * group, first + s.rank(s.pp - 1, 0, 0), first)
    )
    total = ZERO
    for stages, hop in zip(alike, hops, strict=True):
        total = total + hop * stages.count
    return hops, total


def _mean(contexts: Sequence[int], values: Sequence[Priced]) -> Priced:
    """Mean over the contexts by the trapezoid rule."""
    if len(contexts) == 1:
        return values[0]
    total, span = ZERO, contexts[-1] - contexts[0]
    for i in range(len(contexts) - 1):
        width = contexts[i + 1] - contexts[i]
        total = total + (values[i] + values[i + 1]) * (width / 2.0 / span)
    return total

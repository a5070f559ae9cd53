"""Protects: a pipeline computes what one process computes, in bounded memory, and never hangs.

Oracles: the same batch through a whole model on one process; for the schedule, a simulation in
which a transfer ends only when both sides have come to it (the strictest any backend is).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import get_args

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from executor.batch import SequenceBatch, balanced_parts
from executor.buffers import ParameterBuffer
from executor.context import RankContext, build_contexts, single_process
from executor.model.transformer import DecoderStage
from executor.parallel import data
from executor.parallel.pipeline import (
    Action,
    forward_only,
    schedule_1f1b,
    schedule_forward,
    train_1f1b,
    transfers,
)
from executor.parallel.tensor import vocab_parallel_log_probs
from planner.layout import Layout, ParameterSlice
from planner.mesh import DeviceMesh
from planner.strategy import Recompute
from profiles.models import ModelSpec
from tests.spawn import spawn

SPEC = ModelSpec(name="t", num_layers=5, hidden=16, num_heads=4, num_kv_heads=2, head_dim=4,
                 ffn=24, vocab=32)  # fmt: skip
TIED = ModelSpec(name="t", num_layers=2, hidden=16, num_heads=4, num_kv_heads=2, head_dim=4,
                 ffn=24, vocab=32, tied_embedding=True)  # fmt: skip

stages = st.integers(1, 6).flatmap(lambda pp: st.tuples(st.just(pp), st.integers(0, pp - 1)))


@given(stages, st.integers(0, 12))
def test_schedule_runs_every_micro_batch_once_each_way_in_order(
    place: tuple[int, int], num_micro_batches: int
) -> None:
    pp, stage = place
    actions = schedule_1f1b(pp, stage, num_micro_batches)
    for what in ("forward", "backward"):
        assert [i for w, i in actions if w == what] == list(range(num_micro_batches))
    under_way = peak = 0
    for what, index in actions:
        under_way += 1 if what == "forward" else -1
        peak = max(peak, under_way)
        assert what == "forward" or actions.index(("forward", index)) < actions.index((what, index))
    assert peak == min(num_micro_batches, pp - stage)


Steps = list[set[tuple[int, int, int]]]  # per wait: (from stage, to stage, micro-batch)


def steps_of(pp: int, stage: int, actions: tuple[Action, ...]) -> Steps:
    found: Steps = []
    for give, take in transfers(pp, stage, actions):
        sent = {(stage, give[0], give[1])} if give else set()
        found.append(sent | ({(take[0], stage, take[1])} if take else set()))
    return found


def hangs(todo: list[Steps]) -> bool:
    """Each stage posts one step at a time; a transfer ends once both its ends have posted it."""
    while True:
        for steps in todo:
            while steps and not steps[0]:
                steps.pop(0)
        posted = [steps[0] if steps else set() for steps in todo]
        met = [t for stage, mine in enumerate(posted) for t in mine
               if t[0] == stage and t in posted[t[1]]]  # fmt: skip
        if not met:
            return any(todo)
        for transfer in met:
            posted[transfer[0]].discard(transfer)
            posted[transfer[1]].discard(transfer)


@given(st.integers(1, 6), st.integers(0, 12))
def test_no_stage_waits_for_ever(pp: int, num_micro_batches: int) -> None:
    train = [steps_of(pp, s, schedule_1f1b(pp, s, num_micro_batches)) for s in range(pp)]
    infer = [steps_of(pp, s, schedule_forward(num_micro_batches)) for s in range(pp)]
    assert not hangs(train)
    assert not hangs(infer)


def test_the_simulation_sees_the_hang_of_sending_before_receiving() -> None:
    todo: list[Steps] = []
    for stage in range(2):
        apart: Steps = []
        for step in steps_of(2, stage, schedule_1f1b(2, stage, 3)):
            apart += [{t for t in step if t[0] == stage}, {t for t in step if t[0] != stage}]
        todo.append(apart)
    assert hangs(todo)


# ---- against one process ----------------------------------------------------------------------


def filled(ctx: RankContext) -> ParameterBuffer:
    """Weights that depend on a parameter's name and place only."""
    layout = ctx.layout
    buffer = ParameterBuffer.for_rank(layout, ctx.rank, dtype=torch.float32, device="cpu")
    for shape in layout.stage_parameters(ctx.pp_rank):
        generator = torch.Generator().manual_seed(zlib.crc32(shape.name.encode()))
        whole = torch.randn(shape.shape, generator=generator) * 0.2
        whole = whole + 1.0 if "norm" in shape.name else whole
        buffer.view(shape.name).copy_(whole[box(buffer.by_name[shape.name])])
    return buffer


def box(piece: ParameterSlice) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))


def whole_batch() -> SequenceBatch:
    lengths = (5, 3, 7, 2, 4, 6)
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(SPEC.vocab, (2, sum(lengths)), generator=generator)
    return SequenceBatch(
        samples=tuple(range(6)), lengths=lengths, per_token={"sequences": ids, "targets": targets}
    )


def trained(
    ctx: RankContext,
    batch: SequenceBatch,
    num_micro_batches: int,
    *,
    recompute: Recompute = "none",
    sequence_parallel: bool = False,
) -> tuple[ParameterBuffer, Tensor, float | None, list[Tensor] | None, list[SequenceBatch]]:
    """(buffer, gradients, summed loss, log-probabilities by micro-batch, micro-batches)."""
    buffer = filled(ctx)
    gradients = torch.zeros_like(buffer.flat)
    stage = DecoderStage(
        ctx, buffer, gradients=gradients, recompute=recompute, sequence_parallel=sequence_parallel
    )
    total = whole_batch().num_tokens
    parts = [batch.select(p) for p in balanced_parts(batch.lengths, num_micro_batches)]

    def log_probs(hidden: Tensor, micro_batch: SequenceBatch) -> Mapping[str, Tensor]:
        assert hidden.shape == (micro_batch.num_tokens, ctx.layout.spec.hidden)
        logits = stage.head(hidden)
        return {"log_probs": vocab_parallel_log_probs(logits, micro_batch.get("targets"), ctx)}

    def loss(hidden: Tensor, micro_batch: SequenceBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        value = -log_probs(hidden, micro_batch)["log_probs"].sum() / total
        return value, {"tokens": torch.tensor(float(micro_batch.num_tokens))}

    read = forward_only(stage, parts, read=log_probs)
    assert not gradients.any(), "forward only leaves the gradients alone"
    results = train_1f1b(stage, parts, loss=loss)
    for name in stage.partial:
        data.all_reduce(buffer.view(name, of=gradients).flatten(), ctx.tp_group)
    if ctx.is_last_stage:
        assert read is not None
        assert results is not None
        assert [r["tokens"].item() for r in results] == [p.num_tokens for p in parts]
        summed = sum(r["loss"].item() for r in results)
        return buffer, gradients, summed, [r["log_probs"] for r in read], parts
    assert read is None
    assert results is None
    return buffer, gradients, None, None, parts


def compare(rank: int, world_size: int, cases: list[tuple[Layout, int, Recompute]]) -> int:
    contexts = build_contexts(
        dict.fromkeys(layout for layout, _, _ in cases), rank=rank, device=torch.device("cpu")
    )
    compared = 0
    for layout, num_micro_batches, recompute in cases:
        if rank not in layout.mesh:
            continue
        ctx, label = contexts[layout], f"{layout.key} m={num_micro_batches} {recompute=}"
        batch = whole_batch()
        mine = batch.select(balanced_parts(batch.lengths, layout.dp)[ctx.dp_rank])
        buffer, gradients, loss, log_probs, parts = trained(
            ctx, mine, num_micro_batches, recompute=recompute,
            sequence_parallel=num_micro_batches % 2 == 0,
        )  # fmt: skip
        alone = single_process(Layout(spec=layout.spec, mesh=DeviceMesh(rank, 1)))
        expected_buffer, expected, _, _, _ = trained(alone, batch, 1)
        data.all_reduce(gradients, ctx.dp_group, bucket_bytes=1000)
        if ctx.embedding_group is not None:
            data.all_reduce(
                buffer.view("embedding.weight", of=gradients).flatten(), ctx.embedding_group
            )
        for piece in buffer.slices:
            wanted = expected_buffer.view(piece.name, of=expected)[box(piece)]
            found = buffer.view(piece.name, of=gradients)
            assert wanted.abs().max() > 0, piece.name
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=f"{label} {piece}")
            compared += 1
        if log_probs is not None and loss is not None:
            _, _, mine_loss, mine_log_probs, _ = trained(alone, mine, 1)
            assert mine_loss is not None
            assert mine_log_probs is not None
            assert abs(loss - mine_loss) < 1e-5, label
            by_sequence = mine_log_probs[0].split(mine.lengths)
            for part, values in zip(parts, log_probs):
                wanted = torch.cat([by_sequence[mine.samples.index(s)] for s in part.samples]
                                   or [torch.zeros(0)])  # fmt: skip
                torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5, msg=label)
    return compared


def layout(spec: ModelSpec, pp: int, tp: int, dp: int, first: int = 0) -> Layout:
    return Layout(spec=spec, mesh=DeviceMesh(first, pp * tp * dp), pp=pp, tp=tp, dp=dp)


def test_gradients_losses_and_results_equal_those_of_one_process() -> None:
    """Uneven stages, fewer micro-batches than stages, and (dp 2, m 5; m 8) empty ones."""
    shapes = [
        layout(SPEC, 1, 1, 1, first=2),
        layout(SPEC, 2, 1, 1, first=1),
        layout(SPEC, 3, 1, 1),
        layout(SPEC, 2, 1, 2),
        layout(SPEC, 2, 2, 1),
        layout(SPEC, 4, 1, 1),
        layout(TIED, 2, 1, 2),
    ]
    how = get_args(Recompute)
    cases = [(shape, m, how[(m + i) % 3]) for i, shape in enumerate(shapes) for m in range(1, 6)]
    cases += [(shapes[0], 8, "full"), (shapes[4], 8, "full")]
    assert all(spawn(4, compare, cases))

"""Protects: gradients that are summed while backward goes on are the gradients that it leaves.

Oracle: the same steps with all sums at the end. Of two replicas sums have one order, so weights are
equal bit by bit; of three they are close.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from executor.batch import SequenceBatch
from executor.buffers import ParameterBuffer
from executor.context import RankContext, build_contexts
from executor.model.transformer import DecoderStage
from executor.parallel import data
from executor.parallel.optimizer import Adam, AdamConfig
from executor.parallel.overlap import EarlySums, make_buckets
from executor.parallel.pipeline import train_1f1b
from executor.parallel.tensor import vocab_parallel_log_probs
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.strategy import Recompute
from profiles.models import ModelSpec
from tests.executor.small_models import random_buffer
from tests.spawn import spawn

SPEC = ModelSpec(name="t", num_layers=5, hidden=8, num_heads=4, num_kv_heads=2, head_dim=2,
                 ffn=12, vocab=14, tied_embedding=True, qkv_bias=True)  # fmt: skip
CONFIG = AdamConfig(lr=0.01, max_grad_norm=1.0)
STEPS = 3
# Of each step the sequences' lengths, by micro-batch; a replica has those from its rank on by dp.
LENGTHS = (((5, 3, 7), (2, 4, 6)), ((4, 4, 4), (3, 1, 2)), ((6, 2, 3), (5,)))


def micro_batches(ctx: RankContext, step: int) -> list[SequenceBatch]:
    """This replica's; in the last step of some replicas the last micro-batch is empty."""
    found = []
    for number, lengths in enumerate(LENGTHS[step]):
        mine = lengths[ctx.dp_rank :: ctx.layout.dp]
        generator = torch.Generator().manual_seed(100 * step + 10 * number + ctx.dp_rank)
        ids, targets = torch.randint(SPEC.vocab, (2, sum(mine)), generator=generator)
        tokens = {"sequences": ids, "targets": targets}
        found.append(SequenceBatch(samples=tuple(range(len(mine))), lengths=mine, per_token=tokens))
    return found


def weights_after(
    ctx: RankContext, *, zero: int, recompute: Recompute, split: bool, early: bool
) -> torch.Tensor:
    """The flat weights after STEPS; all that could be was begun before backward was over."""
    layout = ctx.layout
    buffer = ParameterBuffer.for_rank(
        layout, ctx.rank, dtype=torch.float32, device="cpu", multiple=layout.dp
    )
    source = random_buffer(layout, ctx.rank)
    for piece in buffer.slices:
        buffer.view(piece.name).copy_(source.view(piece.name))
    gradients = torch.zeros_like(buffer.flat)
    stage = DecoderStage(
        ctx, buffer, gradients=gradients, recompute=recompute, sequence_parallel=split
    )
    adam = Adam(ctx, buffer, gradients, CONFIG, zero=zero, partial=stage.partial, early=early)

    def loss(hidden: torch.Tensor, batch: SequenceBatch) -> tuple[torch.Tensor, dict[str, object]]:
        logits = stage.head(hidden)
        return -vocab_parallel_log_probs(logits, batch.get("targets"), ctx).sum() / 20, {}

    for step in range(STEPS):
        parts = micro_batches(ctx, step)
        stage.clear_gradients()
        train_1f1b(stage, parts, loss=loss, block_done=adam.block_done)  # type: ignore[arg-type]
        if adam.early is not None:
            begun = adam.early.started
            assert len(adam.early.buckets) > 1 or layout.pp > 1
            assert begun == (len(adam.early.buckets) if parts[-1].num_tokens else 0), begun
        adam.all_done()
        assert adam.step()["skipped"] == 0.0
    return buffer.flat


Case = tuple[Layout, int, Recompute, bool]


def follow(rank: int, world_size: int, cases: list[Case]) -> int:
    data.BUCKET_BYTES = 2000  # a block or two
    contexts = build_contexts(
        dict.fromkeys(layout for layout, *_ in cases), rank=rank, device=torch.device("cpu")
    )
    compared = 0
    for layout, zero, recompute, split in cases:
        if rank not in layout.mesh:
            continue
        found, expected = (
            weights_after(contexts[layout], zero=zero, recompute=recompute, split=split, early=e)
            for e in (True, False)
        )
        label = f"{layout.key} {zero=} {recompute=} {split=}"
        if layout.dp == 2:
            assert torch.equal(found, expected), label
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=label)
        compared += 1
    return compared


def test_weights_are_those_of_sums_at_the_end() -> None:
    def layout(pp: int, tp: int, dp: int, spec: ModelSpec = SPEC) -> Layout:
        return Layout(spec=spec, mesh=DeviceMesh(0, pp * tp * dp), pp=pp, tp=tp, dp=dp)

    untied = replace(SPEC, tied_embedding=False)
    cases: list[Case] = [
        (layout(1, 1, 2), 0, "none", False),
        (layout(1, 1, 2), 1, "selective", False),
        (layout(1, 1, 2, untied), 1, "full", False),
        (layout(2, 1, 2), 0, "none", False),
        (layout(2, 1, 2), 1, "none", False),
        (layout(1, 2, 2), 0, "selective", True),
        (layout(1, 2, 2), 1, "none", True),
        (layout(1, 1, 3), 0, "none", False),
        (layout(1, 1, 3), 1, "none", False),
        (layout(1, 1, 4), 1, "none", False),
    ]
    assert all(spawn(4, follow, cases))


@pytest.mark.parametrize("bucket_bytes", [1, 900, 3000, 10**9])
def test_buckets_have_every_block_once_in_the_order_of_backward(bucket_bytes: int) -> None:
    layout = Layout(spec=SPEC, mesh=DeviceMesh(0, 2), pp=2)
    for rank in range(2):
        buffer = random_buffer(layout, rank)
        layers = layout.layers(rank)
        buckets = make_buckets(buffer, layers, bucket_bytes=bucket_bytes, value_bytes=4)
        firsts = [bucket.first for bucket in buckets]
        assert firsts == sorted(firsts, reverse=True)
        assert firsts[-1] == 0
        names = [name for bucket in buckets for name in bucket.names]
        assert sorted(names) == sorted(p.name for p in buffer.slices if "layers." in p.name)
        for after, before in pairwise(buckets):
            assert before.within[1] == after.within[0]
        for bucket in buckets[:-1]:
            assert 4 * (bucket.within[1] - bucket.within[0]) >= bucket_bytes


def test_a_bucket_is_ready_when_backward_has_left_its_first_block() -> None:
    layout = Layout(spec=SPEC, mesh=DeviceMesh(0, 1))
    buffer = random_buffer(layout, 0)
    buckets = make_buckets(buffer, range(5), bucket_bytes=1, value_bytes=4)
    sums = EarlySums(buffer.flat, buckets, None, zero=0)  # type: ignore[arg-type]
    assert [b.first for b in sums.ready(4)] == [4]
    assert [b.first for b in sums.ready(4)] == []
    assert [b.first for b in sums.ready(2)] == [3, 2]
    assert [b.first for b in sums.ready(0)] == [1, 0]

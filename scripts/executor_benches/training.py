"""A training step over unequal lengths, beside transformers under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from executor.batch import SequenceBatch
from executor.buffers import ParameterBuffer
from executor.context import build_contexts
from executor.model import hf_load
from executor.model.transformer import DecoderStage
from executor.parallel.optimizer import Adam, AdamConfig
from executor.parallel.pipeline import train_1f1b
from executor.parallel.tensor import vocab_parallel_log_probs
from executor_benches.turns import WORLD, Row, take_turns
from planner.layout import Layout
from planner.mesh import DeviceMesh
from profiles.catalogue import resolve_model
from profiles.models import ModelSpec

# (prompt, answer) tokens of the sequences trained on; each process has one half.
TRAINED = tuple((20 + 37 * i % 90, 10 + 53 * i % 170) for i in range(16))


def training(rank: int, path: Path, repeats: int) -> list[Row]:
    """Next-token loss of answers only, over all answer tokens of both processes."""
    spec = resolve_model(str(path))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(spec.vocab, (p + a,), generator=generator) for p, a in TRAINED]
    mine = range(rank, len(TRAINED), WORLD)
    answers = sum(a for _, a in TRAINED)
    ours = our_training(rank, path, spec, [rows[i] for i in mine], mine, answers)
    peer = ddp_training(path, [rows[i] for i in mine], mine, answers)
    first = torch.stack((ours(), peer()))
    dist.all_reduce(first)
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-4)
    ours_s, peer_s = take_turns((ours, peer), repeats)
    tokens = sum(p + a for p, a in TRAINED)
    note = (
        f"{tokens / ours_s:.0f} and {tokens / peer_s:.0f} tokens/s; first loss "
        f"{float(first[0]):.4f} and {float(first[1]):.4f}"
    )
    row = Row(
        subject="training step", peer="transformers + DDP, AdamW", ours_s=ours_s, peer_s=peer_s,
        note=note,
    )  # fmt: skip
    return [row]


def our_training(
    rank: int, path: Path, spec: ModelSpec, rows: Sequence[Tensor], mine: Sequence[int],
    answers: int,
) -> Callable[[], Tensor]:  # fmt: skip
    """A step of the executor, packed; gives this process's share of the loss."""
    layout = Layout(spec=spec, mesh=DeviceMesh(0, WORLD), dp=WORLD)
    ctx = build_contexts([layout], rank=rank, device=torch.device("cpu"))[layout]
    buffer = ParameterBuffer.for_rank(layout, rank, dtype=torch.float32, device="cpu")
    hf_load.load(buffer, path, spec, seed=0)
    gradients = torch.zeros_like(buffer.flat)
    stage = DecoderStage(ctx, buffer, gradients=gradients)
    adam = Adam(ctx, buffer, gradients, AdamConfig(lr=1e-6, eps=1e-8), zero=0)
    batch = SequenceBatch(
        samples=tuple(mine), lengths=tuple(len(row) for row in rows),
        per_token={"sequences": torch.cat(list(rows))}, per_sequence={},
    )  # fmt: skip
    places, targets = answer_places(batch.lengths, [TRAINED[i][0] for i in mine], batch.token_ids)

    def loss(hidden: Tensor, micro: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = stage.head(hidden[places])
        return -vocab_parallel_log_probs(logits, targets, ctx).sum() / answers, {}

    def step() -> Tensor:
        stage.clear_gradients()
        results = train_1f1b(stage, [batch], loss=loss)
        adam.step()
        assert results is not None
        return results[0]["loss"].detach()

    return step


def answer_places(
    lengths: Sequence[int], prompts: Sequence[int], ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(places in the packed row whose next token is an answer's, those tokens)."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    places = torch.cat([
        torch.arange(start + prompt - 1, start + length - 1)
        for start, prompt, length in zip(starts, prompts, lengths, strict=True)
    ])  # fmt: skip
    return places, ids[places + 1]


def ddp_training(
    path: Path, rows: Sequence[Tensor], mine: Sequence[int], answers: int
) -> Callable[[], Tensor]:
    """The same with padding; DDP takes the mean over processes of what each gives."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for place, index in enumerate(mine):
        labels[place, : TRAINED[index][0]] = -100

    def step() -> Tensor:
        optimizer.zero_grad()
        # As Trainer does it: the sum over answer tokens by the number of all processes' tokens.
        out = parallel(
            input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=answers
        )
        (out.loss * WORLD).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return out.loss.detach()

    return step

"""Protects tensor parallelism: two shards over gloo compute what one process computes.

Oracle: the same functions of whole rows with torch's own softmax, and the one-process stage
(which ``test_transformer`` holds against transformers).
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.context import RankContext, build_contexts, single_process
from executor.model.attention import pack
from executor.model.transformer import DecoderStage
from executor.parallel import tensor as tp_functions
from executor.parallel.tensor import (
    Region,
    copy_to_tp,
    gather_vocab,
    reduce_from_tp,
    vocab_parallel_embedding,
    vocab_parallel_entropy,
    vocab_parallel_log_probs,
)
from planner.layout import Layout, shard
from planner.mesh import DeviceMesh
from planner.strategy import Recompute
from profiles.models import ModelSpec
from tests.executor.small_models import (
    LENGTHS,
    random_buffer,
    random_ids,
    single_layout,
    single_stage,
    small_spec,
)
from tests.spawn import spawn

SPECS = (
    small_spec(),
    small_spec(tied_embedding=True),
    small_spec(family="qwen2", qkv_bias=True),
    small_spec(head="scalar"),
)
VOCAB, ROWS = 64, 12


def logits_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    logits = 4 * torch.randn(ROWS, VOCAB, generator=generator)
    logits[0] += 1e4  # exp would overflow without the maximum
    logits[1] = -1e4
    logits[1, 40] = 1e4  # the whole mass on one shard
    logits[5, VOCAB // 2 :] = float("-inf")  # one shard ruled out
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets[5] = 3
    targets[:4] = torch.tensor([0, 40, VOCAB // 2 - 1, VOCAB // 2])  # the shards' edges
    return logits, targets


def expected_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by torch's softmax."""
    log_p = logits.float().log_softmax(-1)
    terms = log_p.exp() * log_p.clamp(min=-1e30)  # 0 where the logit is -inf
    return log_p.gather(1, targets[:, None])[:, 0], -terms.sum(-1)


def objective(values: Tensor) -> Tensor:
    """Another weight for every row."""
    return (values * torch.arange(1.0, len(values) + 1)).sum()


def stage_results(ctx: RankContext, recompute: Recompute) -> dict[str, Any]:
    """Values and gradients of one stage: the same code for one shard and for two."""
    buffer = random_buffer(ctx.layout, ctx.rank)
    gradients = torch.zeros_like(buffer.flat)
    stage = DecoderStage(ctx, buffer, gradients=gradients, recompute=recompute)
    spec, ids = ctx.layout.spec, random_ids(ctx.layout.spec)
    out = stage.head(stage.forward(ids, pack(LENGTHS)))
    if spec.head == "scalar":
        whole, values = out.detach(), out
    else:
        whole, values = gather_vocab(out, ctx), vocab_parallel_log_probs(out, ids.roll(-1), ctx)
    loss = objective(values)
    loss.backward()
    grads = {p.name: buffer.view(p.name, of=gradients) for p in buffer.slices}
    return {"output": whole, "values": values.detach(), "loss": loss.item(), "grads": grads}


def function_results(ctx: RankContext) -> dict[str, Tensor]:
    """Every function on this shard's part of the same whole inputs."""
    logits, targets = logits_and_targets()
    part = logits.chunk(2, dim=1)[ctx.tp_rank].clone().requires_grad_()
    log_probs = vocab_parallel_log_probs(part, targets, ctx)
    (log_probs_grad,) = torch.autograd.grad(objective(log_probs), part)
    entropy = vocab_parallel_entropy(part, ctx)
    (entropy_grad,) = torch.autograd.grad(objective(entropy), part)

    table = torch.arange(VOCAB * 3.0).view(VOCAB, 3)
    weight = table.chunk(2)[ctx.tp_rank].clone().requires_grad_()
    region = Region(ctx=ctx, num_tokens=len(targets), split_tokens=False)
    rows = vocab_parallel_embedding(targets, weight, region)
    (weight_grad,) = torch.autograd.grad(objective(rows.sum(1)), weight)

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (copy_grad,) = torch.autograd.grad((copy_to_tp(x, ctx) * (ctx.tp_rank + 1)).sum(), x)
    reduced = reduce_from_tp(x * (ctx.tp_rank + 1), ctx)
    (reduce_grad,) = torch.autograd.grad(reduced.sum(), x)
    return {
        "log_probs": log_probs.detach(), "log_probs_grad": log_probs_grad,
        "entropy": entropy.detach(), "entropy_grad": entropy_grad,
        "embedding": rows.detach(), "embedding_grad": weight_grad,
        "gathered": gather_vocab(part, ctx), "copy_grad": copy_grad,
        "reduced": reduced.detach(), "reduce_grad": reduce_grad,
    }  # fmt: skip


def two_shards(rank: int, world_size: int) -> dict[str, Any]:
    """Everything that the tests below look at, in one start of two processes."""
    layouts = [Layout(spec=spec, mesh=DeviceMesh(0, world_size), tp=2) for spec in SPECS]
    contexts = build_contexts(layouts, rank=rank, device=torch.device("cpu"))
    found: dict[str, Any] = {"functions": function_results(contexts[layouts[0]])}
    tp_functions.BLOCK_VALUES = 100  # rows in many blocks
    found["blocked"] = function_results(contexts[layouts[0]])
    for number, layout in enumerate(layouts):
        for recompute in get_args(Recompute):
            found[f"stage {number} {recompute}"] = stage_results(contexts[layout], recompute)
    return found


@pytest.fixture(scope="module")
def shards() -> list[dict[str, Any]]:
    return spawn(2, two_shards)


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("number", range(len(SPECS)))
def test_two_shards_compute_what_one_process_computes(shards, number, recompute):
    spec: ModelSpec = SPECS[number]
    expected = stage_results(single_process(single_layout(spec)), recompute)
    wholes = {p.name: p for p in single_layout(spec).stage_parameters(0)}
    for tp_rank, found in enumerate(shards):
        result = found[f"stage {number} {recompute}"]
        for key in ("output", "values", "loss"):
            torch.testing.assert_close(result[key], expected[key], atol=1e-4, rtol=1e-5, msg=key)
        assert result["grads"].keys() == wholes.keys()
        for name, grad in result["grads"].items():
            box = shard(wholes[name], 2, tp_rank)
            index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.length))
            want = expected["grads"][name]
            scale = float(want.abs().max())
            torch.testing.assert_close(
                grad, want[index], atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("run", ["functions", "blocked"])
def test_functions_of_a_split_vocabulary(shards, run):
    logits, targets = logits_and_targets()
    logits.requires_grad_()
    log_probs, entropy = expected_rows(logits, targets)
    (log_probs_grad,) = torch.autograd.grad(objective(log_probs), logits, retain_graph=True)
    (entropy_grad,) = torch.autograd.grad(objective(entropy), logits)
    for tp_rank, found in enumerate(shards):
        result = found[run]
        torch.testing.assert_close(result["log_probs"], log_probs.detach())
        torch.testing.assert_close(result["entropy"], entropy.detach(), atol=1e-5, rtol=1e-5)
        for key, grad in (("log_probs_grad", log_probs_grad), ("entropy_grad", entropy_grad)):
            want = grad.chunk(2, dim=1)[tp_rank]
            torch.testing.assert_close(result[key], want, atol=1e-5, rtol=1e-4, msg=key)
        assert torch.equal(result["gathered"], logits.detach())


def test_the_embedding_of_a_split_vocabulary(shards):
    _, targets = logits_and_targets()
    table = torch.arange(VOCAB * 3.0).view(VOCAB, 3).requires_grad_()
    rows = F.embedding(targets, table)
    (grad,) = torch.autograd.grad(objective(rows.sum(1)), table)
    for tp_rank, found in enumerate(shards):
        assert torch.equal(found["functions"]["embedding"], rows)
        assert torch.equal(found["functions"]["embedding_grad"], grad.chunk(2)[tp_rank])


def test_what_is_copied_forward_is_summed_backward_and_the_reverse(shards):
    for tp_rank, found in enumerate(shards):
        result = found["functions"]
        assert result["copy_grad"].tolist() == [3.0, 3.0]  # 1 + 2
        assert result["reduced"].tolist() == [3.0, 6.0]
        assert result["reduce_grad"].tolist() == [tp_rank + 1.0] * 2


PLACE = single_process(Layout(spec=small_spec(), mesh=DeviceMesh(0, 1)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), vocab=st.integers(1, 40))
def test_one_shard_is_log_softmax_and_sends_nothing(seed, rows, vocab):
    generator = torch.Generator().manual_seed(seed)
    logits = (10 * torch.randn(rows, vocab, generator=generator)).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    expected = expected_rows(logits, targets)
    results = (
        vocab_parallel_log_probs(logits, targets, PLACE),
        vocab_parallel_entropy(logits, PLACE),
    )
    for result, want in zip(results, expected):
        torch.testing.assert_close(result, want, atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(objective(result), logits)
        (want_grad,) = torch.autograd.grad(objective(want), logits, retain_graph=True)
        torch.testing.assert_close(grad, want_grad, atol=1e-5, rtol=1e-4)


def test_bf16_logits_give_fp32_rows_and_bf16_gradients():
    logits, targets = logits_and_targets()
    logits = logits[2:].bfloat16().requires_grad_()
    log_probs, entropy = expected_rows(logits, targets[2:])
    for result, want in (
        (vocab_parallel_log_probs(logits, targets[2:], PLACE), log_probs),
        (vocab_parallel_entropy(logits, PLACE), entropy),
    ):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, want, atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(objective(result), logits)
        (want_grad,) = torch.autograd.grad(objective(want), logits, retain_graph=True)
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, want_grad, atol=1e-2, rtol=2e-2)


def test_a_token_that_is_ruled_out_adds_no_entropy_and_no_nan():
    logits = torch.zeros(1, 4)
    logits[0, 3] = float("-inf")
    logits.requires_grad_()
    entropy = vocab_parallel_entropy(logits, PLACE)
    torch.testing.assert_close(entropy, torch.tensor([3.0]).log())
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(grad, torch.zeros(1, 4), atol=1e-6, rtol=0)


def test_no_rows_give_no_values():
    empty = torch.zeros(0, 8, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    result = vocab_parallel_log_probs(empty, targets, PLACE)
    assert result.shape == (0,)
    result.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 8)


def test_single_stage_and_its_buffer_agree_on_the_shard():
    """The one-process oracle holds whole parameters."""
    stage = single_stage(SPECS[0])
    assert isinstance(stage.buffer, ParameterBuffer)
    assert {p.name: p.shape for p in stage.ctx.layout.stage_parameters(0)} == {
        piece.name: piece.length for piece in stage.buffer.slices
    }


def test_gradients_of_embedding_rows_are_added_where_they_belong() -> None:
    torch.manual_seed(1)
    weight = torch.randn(7, 3, dtype=torch.float64).requires_grad_()
    total = torch.randn(7, 3, dtype=torch.float64)
    before, ids = total.clone(), torch.tensor([2, 5, 2, 2, 0])
    weight.grad = total
    for _ in range(2):
        tp_functions._rows(ids, weight).sin().sum().backward()
    assert weight.grad is total
    weight.grad = None
    for _ in range(2):
        F.embedding(ids, weight).sin().sum().backward()
    torch.testing.assert_close(total - before, weight.grad)
    weight.grad = None
    tp_functions._Rows.apply(ids, weight).sum().backward()
    torch.testing.assert_close(weight.grad.sum(1), 3.0 * torch.bincount(ids, minlength=7).double())

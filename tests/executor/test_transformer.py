"""Protects the decoder: transformers' own models are the oracle for logits, losses, gradients.

Also that pipeline stages chained by hand are the whole model, that packing changes nothing, and
that backward adds into the flat gradient tensor in place, whatever its type.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.model.attention import pack
from executor.model.rotary import rotary_of
from executor.model.transformer import DecoderStage, block_forward, normalize
from executor.parallel.tensor import vocab_parallel_log_probs
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.strategy import Recompute
from profiles.models import ModelSpec
from tests.executor.small_models import (
    FAMILY_SPECS,
    LENGTHS,
    hf_gradients,
    hf_logits,
    hf_twin,
    random_buffer,
    random_ids,
    single_stage,
    small_spec,
    stage_place,
)

SPECS = {
    "grouped": small_spec(),
    "multi-head": small_spec(num_kv_heads=4),
    "one kv head": small_spec(num_kv_heads=1, num_layers=1),
    "tied": small_spec(tied_embedding=True),
    "qwen2": small_spec(family="qwen2", qkv_bias=True, norm_eps=1e-6),
    **FAMILY_SPECS,
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return request.param


def next_token_loss(stage: DecoderStage, hidden: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-probability of the next token, within sequences."""
    keep = torch.cat([torch.arange(n) < n - 1 for n in LENGTHS])
    logits = stage.head(hidden[keep])
    return -vocab_parallel_log_probs(logits, ids.roll(-1)[keep], stage.ctx).mean()


def hf_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    parts = zip(hf_logits(model, ids).split(LENGTHS), ids.split(LENGTHS))
    rows = [F.cross_entropy(logits[:-1], part[1:], reduction="sum") for logits, part in parts]
    return torch.stack(rows).sum() / sum(n - 1 for n in LENGTHS)


def test_logits_equal_transformers(spec):
    stage = single_stage(spec)
    ids = random_ids(spec)
    logits = stage.head(stage.forward(ids, pack(LENGTHS)))
    assert not logits.requires_grad
    expected = hf_logits(hf_twin(stage), ids)
    assert expected.abs().max() > 1  # else the tolerance would say nothing
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_loss_and_gradients_equal_transformers(spec, recompute):
    stage = single_stage(spec, train=True, recompute=recompute)
    ids, model = random_ids(spec), hf_twin(stage)
    loss = next_token_loss(stage, stage.forward(ids, pack(LENGTHS)), ids)
    expected = hf_loss(model, ids)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    theirs = hf_gradients(model, spec)
    for piece in stage.buffer.slices:
        mine = stage.buffer.view(piece.name, of=stage.gradients)
        grad = theirs.view(piece.name)
        # Without rotation a key's bias shifts all scores of a query alike.
        flat = piece.name.endswith("k.bias") and spec.positions == "learned"
        assert flat or grad.abs().max() > 1e-6, piece.name
        torch.testing.assert_close(mine, grad, atol=2e-5, rtol=1e-4, msg=piece.name)


def test_backward_adds_to_the_flat_gradients_in_place():
    stage = single_stage(small_spec(tied_embedding=True), train=True)
    ids = random_ids(stage.spec)
    places = [leaf.grad.data_ptr() for leaf in stage.leaves]
    after = []
    for _ in range(2):
        next_token_loss(stage, stage.forward(ids, pack(LENGTHS)), ids).backward()
        after.append(stage.gradients.clone())
    assert [leaf.grad.data_ptr() for leaf in stage.leaves] == places
    torch.testing.assert_close(after[1], 2 * after[0])
    stage.gradients.zero_()
    assert all(leaf.grad.abs().sum() == 0 for leaf in stage.leaves)


def test_gradients_wider_than_the_weights_sum_in_their_own_type():
    spec = small_spec()
    exact = single_stage(spec, train=True)
    buffer = random_buffer(exact.ctx.layout, dtype=torch.bfloat16)
    gradients = torch.zeros(buffer.flat.shape, dtype=torch.float32)
    stage = DecoderStage(exact.ctx, buffer, gradients=gradients)
    ids = random_ids(spec)
    for each in (exact, stage, stage):
        next_token_loss(each, each.forward(ids, pack(LENGTHS)), ids).backward()
    assert all(leaf.grad is None for leaf in stage.leaves)
    once, twice = exact.gradients, gradients
    assert F.cosine_similarity(once, twice, dim=0) > 0.99
    assert 1.9 < twice.norm() / once.norm() < 2.1
    # A bf16 sum would lose the small addend: 1 + 2^-10 is 1 there.
    gradients.fill_(0.0)
    leaf = stage.layers[0].o.weight
    view = stage.buffer.view("layers.0.o.weight", of=gradients)
    for value in (1.0, 2.0**-10):
        (leaf.float().sum() * value).backward()
    assert torch.equal(view, torch.full_like(view, 1 + 2.0**-10))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pp", [2, 3])
def test_stages_chained_by_hand_are_the_whole_model(pp, tied):
    spec = small_spec(tied_embedding=tied)
    whole = single_stage(spec, train=True)
    ids, packed = random_ids(spec), pack(LENGTHS)
    loss = next_token_loss(whole, whole.forward(ids, packed), ids)
    loss.backward()

    layout = Layout(spec=spec, mesh=DeviceMesh(0, pp), pp=pp)
    stages = []
    for rank in range(pp):
        buffer = random_buffer(layout, rank)
        gradients = torch.zeros_like(buffer.flat)
        stages.append(DecoderStage(stage_place(layout, rank), buffer, gradients=gradients))
    hidden = ids
    for stage in stages:
        hidden = stage.forward(hidden, packed)
    chained = next_token_loss(stages[-1], hidden, ids)
    torch.testing.assert_close(chained, loss)
    chained.backward()

    total: dict[str, Tensor] = {}
    for stage in stages:
        for piece in stage.buffer.slices:
            grad = stage.buffer.view(piece.name, of=stage.gradients)
            # The trainer sums the two copies of a tied embedding.
            total[piece.name] = total.get(piece.name, 0) + grad
    for name, grad in total.items():
        torch.testing.assert_close(grad, whole.buffer.view(name, of=whole.gradients), msg=name)
    assert set(total) == set(whole.buffer.by_name)


def test_packing_changes_no_sequence():
    stage = single_stage(small_spec())
    ids = random_ids(stage.spec)
    packed = stage.forward(ids, pack(LENGTHS))
    alone = [stage.forward(part, pack(part.shape)) for part in ids.split(LENGTHS)]
    torch.testing.assert_close(packed, torch.cat(alone))


def test_scalar_head_scores_every_token_in_fp32():
    spec = small_spec(head="scalar")
    stage = single_stage(spec, train=True)
    hidden = stage.forward(random_ids(spec), pack(LENGTHS))
    scores = stage.head(hidden)
    expected = hidden @ stage.buffer.view("head.weight")[0]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected)
    scores.sum().backward()
    grad = stage.buffer.view("head.weight", of=stage.gradients)
    torch.testing.assert_close(grad[0], hidden.detach().sum(0))


def test_one_block_by_itself_is_the_block_of_the_stage():
    """What the profiler times is what the stage runs."""
    from executor.model.attention import packed_attention

    stage = single_stage(small_spec(num_layers=1))
    ids, packed = random_ids(stage.spec), pack(LENGTHS)
    hidden = block_forward(
        stage.layers[0],
        stage.embed(ids, packed.positions, stage.region(packed.num_tokens)),
        rotary_of(packed.positions, stage.spec),
        lambda q, k, v: packed_attention(q, k, v, packed),
        stage.region(packed.num_tokens),
    )
    normed = normalize(hidden, stage.final_norm, stage.spec)
    assert torch.equal(normed, stage.forward(ids, packed))


def test_weights_are_views_of_the_buffer():
    """A reallocation writes the buffer only; the stage must see it."""
    stage = single_stage(small_spec())
    ids = random_ids(stage.spec)
    before = stage.forward(ids, pack(LENGTHS))
    stage.buffer.view("layers.1.k.weight").mul_(2)
    changed = stage.forward(ids, pack(LENGTHS))
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(
        hf_twin(stage).model(ids[None, :5]).last_hidden_state[0], changed[:5], atol=1e-4, rtol=0
    )


def test_a_gradient_tensor_of_another_size_is_refused():
    stage = single_stage(small_spec())
    with pytest.raises(AssertionError):
        DecoderStage(stage.ctx, stage.buffer, gradients=stage.buffer.flat[1:])


def test_padding_of_the_buffer_stays_zero_through_backward():
    spec = small_spec()
    layout = single_stage(spec).ctx.layout
    buffer: ParameterBuffer = random_buffer(layout, multiple=1000)
    assert buffer.flat.numel() % 1000 == 0
    assert buffer.flat.numel() > buffer.num_values
    gradients = torch.zeros_like(buffer.flat)
    stage = DecoderStage(stage_place(layout, 0), buffer, gradients=gradients)
    ids = random_ids(spec)
    next_token_loss(stage, stage.forward(ids, pack(LENGTHS)), ids).backward()
    assert gradients[buffer.num_values :].abs().sum() == 0
    assert gradients[: buffer.num_values].abs().sum() > 0

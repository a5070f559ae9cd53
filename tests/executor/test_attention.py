"""Protects attention: every sequence sees its own past and nothing else, however it is packed.

Oracle: the softmax written out for one sequence and one head at a time, in float64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor.model.attention import PackedLengths, decode_attention, pack, packed_attention
from tests.executor.small_models import LENGTHS, random_ids, single_stage, small_spec

HEAD_DIM = 8


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence [length, heads, head_dim], head by head, float64."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        a, b, c = (x.double() for x in (q[:, head], k[:, head // group], v[:, head // group]))
        scores = a @ b.T / HEAD_DIM**0.5
        future = torch.ones_like(scores).triu(1).bool()
        heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ c)
    return torch.stack(heads, dim=1)


def random_qkv(num_tokens: int, heads: int, kv_heads: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, kv_heads, kv_heads)
    return [torch.randn(num_tokens, n, HEAD_DIM, generator=generator) for n in sizes]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(sum),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
)
def test_packed_attention_is_the_written_out_sum(lengths, heads):
    q, k, v = random_qkv(sum(lengths), *heads)
    out = packed_attention(q, k, v, pack(lengths))
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths))
    expected = torch.cat([written_out(*part) for part in parts]).float()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 7)).map(sorted), min_size=1, max_size=7
    ),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
)
def test_queries_may_be_the_last_tokens_of_a_sequence(lengths, heads):
    own, whole = zip(*lengths)
    q, k, v = random_qkv(sum(whole), *heads)
    mine = [torch.arange(end - n, end) for n, end in zip(own, torch.tensor(whole).cumsum(0))]
    out = packed_attention(q[torch.cat(mine)], k, v, pack(own), keys=pack(whole))
    parts = zip(own, q.split(whole), k.split(whole), v.split(whole))
    expected = torch.cat([written_out(*part)[len(part[0]) - n :] for n, *part in parts])
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(6,), (4, 4, 4), (3, 7, 3, 1, 5)])
def test_gradients_of_packed_attention(lengths):
    q, k, v = (x.double().requires_grad_() for x in random_qkv(sum(lengths), 4, 2))
    weight = torch.linspace(-1, 1, q.numel(), dtype=torch.float64).view_as(q)
    out = (packed_attention(q, k, v, pack(lengths)) * weight).sum()
    mine = torch.autograd.grad(out, (q, k, v))
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths))
    expected = (torch.cat([written_out(*part) for part in parts]) * weight).sum()
    for got, want in zip(mine, torch.autograd.grad(expected, (q, k, v))):
        torch.testing.assert_close(got, want)


def test_pack_counts_positions_from_zero_in_every_sequence():
    packed = pack((3, 0, 2))
    assert packed.positions.tolist() == [0, 1, 2, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert packed.cu_seqlens.dtype == torch.int32
    assert (packed.max_length, packed.num_tokens) == (3, 5)


def test_pack_takes_positions_of_continued_sequences():
    packed = pack((1, 1), positions=torch.tensor([4, 9]))
    assert packed.positions.tolist() == [4, 9]
    with pytest.raises(AssertionError):
        pack((1, 1), positions=torch.tensor([4]))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    bounded=st.booleans(),
)
def test_decode_attention_reads_the_valid_tokens_only(lengths, heads, bounded):
    rows = len(lengths)
    # What lies beyond a row's length is garbage; it must not be seen.
    cache = torch.full((2, rows, heads[1], 14, HEAD_DIM), 1e4)
    expected = []
    queries = []
    for row, length in enumerate(lengths):
        q, k, v = random_qkv(length, *heads, seed=row)
        cache[0, row, :, :length], cache[1, row, :, :length] = k.transpose(0, 1), v.transpose(0, 1)
        queries.append(q[-1])
        expected.append(written_out(q, k, v)[-1])
    out = decode_attention(
        torch.stack(queries),
        cache[0],
        cache[1],
        torch.tensor(lengths),
        max_length=max(lengths) if bounded else None,
    )
    torch.testing.assert_close(out, torch.stack(expected).float(), atol=1e-5, rtol=1e-5)


class DenseCache:
    """The protocol in its simplest form: [layers, rows, kv_heads, max_len, head_dim]."""

    def __init__(self, layers: int, rows: int, kv_heads: int) -> None:
        self.keys = torch.full((layers, rows, kv_heads, 16, HEAD_DIM), 1e4)
        self.values = self.keys.clone()

    def attend(
        self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, packed: PackedLengths
    ) -> Tensor:
        keys, values = self.keys[layer_index], self.values[layer_index]
        rows = torch.arange(len(packed.lengths)).repeat_interleave(torch.tensor(packed.lengths))
        keys[rows, :, packed.positions] = k
        values[rows, :, packed.positions] = v
        if packed.max_length > 1:  # the prompts
            return packed_attention(q, k, v, packed)
        return decode_attention(q, keys, values, packed.positions + 1)


def test_decoding_over_a_cache_is_the_full_forward():
    spec = small_spec()
    stage = single_stage(spec)
    prompts, steps = (4, 2, 6), 5
    whole = [n + steps for n in prompts]
    parts = random_ids(spec, whole).split(whole)
    full = [stage.forward(part, pack(part.shape)) for part in parts]

    cache = DenseCache(spec.num_layers, len(prompts), spec.num_kv_heads)
    ids = torch.cat([part[:n] for part, n in zip(parts, prompts)])
    hidden = stage.forward(ids, pack(prompts), cache)
    expected = torch.cat([rows[:n] for rows, n in zip(full, prompts)])
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)
    for step in range(steps):
        places = torch.tensor(prompts) + step
        ids = torch.stack([part[place] for part, place in zip(parts, places)])
        hidden = stage.forward(ids, pack((1,) * 3, positions=places), cache)
        expected = torch.stack([rows[place] for rows, place in zip(full, places)])
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)


def test_a_cache_keeps_no_gradient():
    stage = single_stage(small_spec(), train=True)
    cache = DenseCache(3, len(LENGTHS), 2)
    hidden = stage.forward(random_ids(stage.spec), pack(LENGTHS), cache)
    assert not hidden.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_attention_on_cuda(dtype):
    lengths = (3, 70, 3, 129)
    q, k, v = (x.to("cuda", dtype).requires_grad_() for x in random_qkv(sum(lengths), 4, 2))
    out = packed_attention(q, k, v, pack(lengths, "cuda"))
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths))
    expected = torch.cat([written_out(*part) for part in parts])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    mine = torch.autograd.grad(out.float().sum(), (q, k, v))
    for got, want in zip(mine, torch.autograd.grad(expected.sum(), (q, k, v))):
        torch.testing.assert_close(got, want, atol=5 * tolerance, rtol=5 * tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_may_be_the_last_tokens_of_a_sequence_on_cuda(dtype):
    own, whole = (3, 1, 40), (3, 70, 129)
    q, k, v = (x.to("cuda", dtype) for x in random_qkv(sum(whole), 4, 2))
    last = torch.cat([torch.arange(end - n, end) for n, end in zip(own, (3, 73, 202))])
    out = packed_attention(q[last], k, v, pack(own, "cuda"), keys=pack(whole, "cuda"))
    parts = zip(own, q.split(whole), k.split(whole), v.split(whole))
    expected = torch.cat([written_out(*part)[len(part[0]) - n :] for n, *part in parts])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)

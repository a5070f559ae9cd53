"""Protects the cache: attention through it, over any coming and going of rows, is attention over
whole sequences; rows that leave cost one copy each; memory grows with what is generated.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor.generate.kv_cache import COLUMN_STEP, KVCache, compaction
from executor.generate.prefixes import Alike

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 2


def make_cache(max_rows: int = 5, max_columns: int = 200, window: int = 0) -> KVCache:
    return KVCache(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_rows=max_rows,
        max_columns=max_columns, dtype=torch.float32, device="cpu", window=window,
    )  # fmt: skip


def whole_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Oracle: causal attention of one sequence, heads repeated; [length, heads, head_dim]."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / HEAD_DIM**0.5
    unseen = torch.ones(scores.shape[-2:]).triu(1).bool()
    if window:
        unseen |= torch.ones(scores.shape[-2:]).tril(-window).bool()
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


class Story:
    """Random q, k, v of every token of a sequence, and the outputs that its turns gave."""

    def __init__(self, prompt: int, total: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(LAYERS, total, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        self.q, self.k, self.v = (torch.randn(shape, generator=generator) for shape in shapes)
        self.tensors = self.q, self.k, self.v
        self.prompt, self.total, self.length = prompt, total, 0
        self.outputs: list[Tensor] = []  # [layers, tokens, heads, head_dim] of each turn

    def next_tokens(self) -> slice:
        start, self.length = self.length, self.length + 1 if self.length else self.prompt
        return slice(start, self.length)


def play(cache: KVCache, stories: list[Story], seed: int) -> None:
    """All stories through the cache, entering as rows come free, some turns without entries."""
    rng = random.Random(seed)
    waiting, rows = list(stories), []
    while waiting or rows:
        free = cache.max_rows - len(rows)
        count = rng.randint(0 if rows else 1, free) if free else 0
        new, waiting = waiting[:count], waiting[count:]
        turn = cache.turn([story.prompt for story in new])
        rows += new
        places = [story.next_tokens() for story in rows]
        assert turn.packed.lengths == tuple(place.stop - place.start for place in places)
        positions = torch.cat([torch.arange(place.start, place.stop) for place in places])
        assert torch.equal(turn.packed.positions, positions)
        outputs = []
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat([getattr(s, name)[layer, place] for s, place in zip(rows, places)])
                for name in "qkv"
            )
            outputs.append(turn.attend(layer, q, k, v, turn.packed))
        parts = torch.stack(outputs).split(list(turn.packed.lengths), dim=1)
        for story, part in zip(rows, parts):
            story.outputs.append(part)
        last = turn.last_tokens
        ends = torch.tensor(turn.packed.lengths).cumsum(0) - 1
        assert torch.equal(ends if last is None else last, ends)
        order = cache.compact([row for row, s in enumerate(rows) if s.length < s.total])
        rows = [rows[row] for row in order]
    assert cache.num_rows == 0


def test_slots_are_where_a_head_s_tokens_lie_side_by_side() -> None:
    cache = make_cache(max_rows=3)
    cache.turn([5, 2, 7])
    keys = cache.keys[0]
    keys.copy_(torch.arange(keys.numel()).view(keys.shape))
    rows, positions = torch.tensor([2, 0, 2, 1]), torch.tensor([6, 4, 0, 1])
    found = keys.view(-1, HEAD_DIM)[cache.slots(rows, positions)]  # [tokens, kv_heads, head_dim]
    assert torch.equal(found, keys[rows, :, positions])
    first, second = cache.slots(torch.tensor([1, 1]), torch.tensor([3, 4])).tolist()
    assert second == [slot + 1 for slot in first]


@pytest.mark.parametrize("seed", range(6))
def test_attention_through_the_cache_is_attention_over_whole_sequences(seed):
    rng = random.Random(seed)
    prompts = [rng.choice((1, 2, 3, 3, 7, 70)) for _ in range(12)]
    stories = [
        Story(prompt, prompt + rng.choice((0, 1, 5, 20, 90)), place)
        for place, prompt in enumerate(prompts)
    ]
    cache = make_cache()
    play(cache, stories, seed)
    for story in stories:
        got = torch.cat(story.outputs, dim=1)
        for layer in range(LAYERS):
            expected = whole_attention(story.q[layer], story.k[layer], story.v[layer])
            torch.testing.assert_close(got[layer], expected, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 12), st.integers(0, 6), st.integers(0, 4)),
        min_size=2, max_size=9,
    ),
    window=st.sampled_from((0, 3)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_that_begin_as_others_attend_as_if_they_had_brought_all(starts, window, seed):
    """Rows in use and rows of the same turn, also in a chain, lend their beginning."""
    rng = random.Random(seed)
    stories: list[Story] = []
    owners: list[tuple[int, int]] = []  # of each story: whose beginning it has, and how much of it
    for place, (owner, shared, own, answer) in enumerate(starts):
        owner = owner % place if place else 0
        shared = min(shared, stories[owner].prompt) if place else 0
        prompt = max(1, shared + own)
        story = Story(prompt, prompt + answer, place)
        if shared:
            for mine, theirs in zip((story.q, story.k, story.v), stories[owner].tensors):
                mine[:, :shared] = theirs[:, :shared]
        stories.append(story)
        owners.append((owner, shared))
    cache = make_cache(max_rows=len(stories), window=window)
    waiting, rows = list(range(len(stories))), list[int]()
    while waiting or any(stories[s].length < stories[s].total for s in rows):
        order = cache.compact(
            [r for r, s in enumerate(rows) if stories[s].length < stories[s].total]
        )
        rows = [rows[row] for row in order]
        new = [waiting.pop(0) for _ in range(rng.randint(0 if rows else 1, len(waiting)))
               ] if waiting else []  # fmt: skip
        rows += new
        alike = [
            Alike(row=rows.index(owners[s][0]), num_tokens=owners[s][1])
            if owners[s][0] in rows[: rows.index(s)] else Alike()
            for s in new
        ]  # fmt: skip
        turn = cache.turn([stories[s].prompt for s in new], alike)
        places = [stories[s].next_tokens() for s in rows]
        brought = [slice(p.stop - n, p.stop) for p, n in zip(places, turn.packed.lengths)]
        assert turn.packed.positions.tolist() == [
            i for p in brought for i in range(p.start, p.stop)
        ]
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat([stories[s].tensors[i][layer, place] for s, place in zip(rows, brought)])
                for i in range(3)
            )
            out = turn.attend(layer, q, k, v, turn.packed)
            ends = turn.last_tokens
            last = out if ends is None else out[ends]
            for s, place, got in zip(rows, places, last):
                whole = [x[layer, : place.stop] for x in stories[s].tensors]
                expected = whole_attention(*whole, window=window)[-1]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
            for s, place, part in zip(rows, brought, out.split(list(turn.packed.lengths))):
                whole = [x[layer, : place.stop] for x in stories[s].tensors]
                expected = whole_attention(*whole, window=window)[place.start :]
                torch.testing.assert_close(part, expected, atol=1e-5, rtol=0)


def test_oracle_is_torchs_attention():
    story = Story(6, 6, 0)
    q, k, v = (x[0].transpose(0, 1) for x in (story.q, story.k, story.v))
    expected = F.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, enable_gqa=True
    )
    got = whole_attention(story.q[0], story.k[0], story.v[0]).transpose(0, 1)
    torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=0)


def test_columns_grow_in_steps_up_to_the_longest_sequence():
    cache = make_cache(max_rows=2, max_columns=150)
    assert cache.num_bytes == 0
    sizes, story = [], Story(10, 150, 0)
    bytes_per_column = 2 * LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    while story.length < story.total:
        turn = cache.turn([] if story.length else [story.prompt])
        place = story.next_tokens()
        for layer in range(LAYERS):
            turn.attend(layer, story.q[layer, place], story.k[layer, place],
                        story.v[layer, place], turn.packed)  # fmt: skip
        assert cache.num_bytes == bytes_per_column * cache.num_columns
        sizes.append(cache.num_columns)
    assert list(dict.fromkeys(sizes)) == [COLUMN_STEP, 2 * COLUMN_STEP, 150]
    with pytest.raises(AssertionError, match=r"\(151, 150\)"):
        cache.turn()


@given(st.lists(st.booleans(), max_size=40))
def test_compaction_keeps_all_that_stay_and_moves_no_more_than_leave(stays):
    num_rows, kept = len(stays), {row for row, stay in enumerate(stays) if stay}
    order = compaction(num_rows, sorted(kept))
    assert sorted(order) == sorted(kept)
    moves = [(old, new) for new, old in enumerate(order) if old != new]
    assert len(moves) <= num_rows - len(kept)
    # Copied at once: what is read is not written.
    assert not {old for old, _ in moves} & {new for _, new in moves}

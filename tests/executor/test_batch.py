"""Protects packed batches: choosing, joining and balancing sequences loses and mixes nothing.

Oracle: a list of Python lists; for the balance, every assignment of few sequences.
"""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.batch import SequenceBatch, balanced_parts, concatenate

Sequences = list[list[int]]
some_sequences = st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=6)


def batch_of(sequences: Sequences, first_sample: int = 0) -> SequenceBatch:
    """Token ids, a second value per token and one per sequence, all told apart."""
    tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.long)
    return SequenceBatch(
        samples=tuple(range(first_sample, first_sample + len(sequences))),
        lengths=tuple(len(s) for s in sequences),
        per_token={"sequences": tokens, "values": tokens.float() / 2},
        per_sequence={"rewards": torch.tensor([float(sum(s)) for s in sequences])},
    )


def lists_of(batch: SequenceBatch) -> Sequences:
    ends = batch.offsets
    return [batch.token_ids[a:b].tolist() for a, b in pairwise(ends)]


def check(batch: SequenceBatch, sequences: Sequences, samples: list[int]) -> None:
    assert lists_of(batch) == sequences
    assert batch.samples == tuple(samples)
    assert batch.get("values").tolist() == [t / 2 for s in sequences for t in s]
    assert batch.get("rewards").tolist() == [sum(s) for s in sequences]
    assert batch.num_tokens == sum(len(s) for s in sequences)


@given(sequences=some_sequences, data=st.data())
def test_select_takes_the_sequences_asked_for_in_that_order(sequences, data):
    places = st.integers(0, len(sequences) - 1)
    indices = data.draw(st.lists(places, max_size=8))  # twice and none are allowed
    chosen = batch_of(sequences, first_sample=10).select(indices)
    check(chosen, [sequences[i] for i in indices], [10 + i for i in indices])


@given(parts=st.lists(some_sequences, min_size=1, max_size=4))
def test_concatenate_is_the_lists_joined(parts):
    whole = concatenate([batch_of(p, first_sample=100 * i) for i, p in enumerate(parts)])
    samples = [100 * i + j for i, p in enumerate(parts) for j in range(len(p))]
    check(whole, [s for p in parts for s in p], samples)


@given(sequences=some_sequences, num_parts=st.integers(1, 4))
def test_split_by_balanced_parts_and_joined_again_is_the_batch(sequences, num_parts):
    batch = batch_of(sequences)
    parts = balanced_parts(batch.lengths, num_parts)
    joined = concatenate([batch.select(part) for part in parts])
    back = sorted(range(len(sequences)), key=lambda i: joined.samples[i])
    check(joined.select(back), sequences, list(range(len(sequences))))


def test_with_values_adds_and_replaces_and_leaves_the_first_batch_alone():
    batch = batch_of([[1, 2], [3]])
    more = batch.with_values(
        per_token={"values": torch.zeros(3)}, per_sequence={"scores": torch.ones(2)}
    )
    assert more.get("values").tolist() == [0, 0, 0]
    assert more.get("scores").tolist() == [1, 1]
    assert batch.get("values").tolist() == [0.5, 1, 1.5]
    with pytest.raises(KeyError, match="scores"):
        batch.get("scores")


@pytest.mark.parametrize("kind", ["per_token", "per_sequence"])
def test_values_of_another_length_are_refused(kind):
    with pytest.raises(AssertionError, match="wrong"):
        batch_of([[1, 2], [3]]).with_values(**{kind: {"wrong": torch.zeros(5)}})


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), max_size=6), num_parts=st.integers(1, 4))
def test_the_fullest_part_is_at_most_four_thirds_of_the_best(lengths, num_parts):
    parts = balanced_parts(lengths, num_parts)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)

    def fullest(owners: tuple[int, ...]) -> int:
        return max(
            sum(n for n, o in zip(lengths, owners) if o == part) for part in range(num_parts)
        )

    best = min(fullest(owners) for owners in product(range(num_parts), repeat=len(lengths)))
    assert max(sum(lengths[i] for i in part) for part in parts) <= 4 / 3 * best


def test_equal_lengths_are_dealt_out_evenly():
    """LPT is exact here; a part must not stay empty while another has two."""
    parts = balanced_parts([7] * 10, 4)
    assert sorted(len(part) for part in parts) == [2, 2, 3, 3]
    assert [len(part) for part in balanced_parts([0, 0, 0], 3)] == [1, 1, 1]

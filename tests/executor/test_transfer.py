"""Protects the data between calls: what is packed here is what is unpacked there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.batch import SequenceBatch
from executor.transfer import SampleStore
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall

GENERATE = ModelFunctionCall(
    name="gen", kind=CallKind.GENERATE, role="a", prefix="my_", inputs=("prompts",),
    outputs=("my_sequences", "my_log_probs", "my_prompt_lengths", "finished"),
)  # fmt: skip
ONCE = ModelFunctionCall(
    name="baseline", kind=CallKind.FUNCTION, role=None, inputs=("my_sequences",),
    outputs=("baseline", "best"),
)  # fmt: skip
READ = ModelFunctionCall(
    name="read", kind=CallKind.INFER, role="a", prefix="my_",
    inputs=("my_sequences", "my_prompt_lengths", "finished", "my_log_probs", "baseline"),
)  # fmt: skip
ALONE = ModelFunctionCall(name="alone", kind=CallKind.INFER, role="a", inputs=("best",))
GRAPH = DataflowGraph(
    name="g",
    calls=(GENERATE, ONCE, READ, ALONE),
    keys=(
        DataKey(name="prompts", per="token", dtype="int64", once=True),
        DataKey(name="my_sequences", per="token", dtype="int64"),
        DataKey(name="my_log_probs", per="token"),
        DataKey(name="my_prompt_lengths", per="sequence", dtype="int64"),
        DataKey(name="finished", per="sequence"),
        DataKey(name="baseline", per="sequence", once=True),
        DataKey(name="best", per="token", once=True),
    ),
    source_keys=frozenset({"prompts"}),
)
KEYS = [GRAPH.key(name) for name in (*GENERATE.outputs, *ONCE.outputs)]


def batch_of(samples: list[int], lengths: list[int]) -> SequenceBatch:
    tokens, count = sum(lengths), len(samples)
    return SequenceBatch(
        samples=tuple(samples),
        lengths=tuple(lengths),
        per_token={
            "sequences": torch.randint(0, 1 << 40, (tokens,)),
            "log_probs": torch.randn(tokens),
            "best": torch.randn(tokens),
        },
        per_sequence={
            "prompt_lengths": torch.randint(1, 9, (count,)),
            "finished": torch.rand(count),
            "baseline": torch.rand(count),
        },
    )


def store(group_size: int) -> SampleStore:
    return SampleStore(GRAPH, torch.device("cpu"), group_size)


@given(group_size=st.integers(1, 3), num_groups=st.integers(1, 5), data=st.data())
def test_a_parcel_arrives_as_it_left(group_size: int, num_groups: int, data: st.DataObject) -> None:
    groups = data.draw(st.permutations(range(10, 10 + num_groups)))
    wanted = data.draw(st.lists(st.sampled_from(groups), min_size=1, unique=True))
    here, there = store(group_size), store(group_size)
    samples = here.sequences(groups, group_size)
    lengths = [data.draw(st.integers(1, 7)) for _ in samples]
    batch = batch_of(samples, lengths)
    here.put(batch, GENERATE)
    here.put(batch, ONCE)
    header, payload = here.pack(wanted, KEYS)
    assert header.numel() == there.header_size(wanted, KEYS)
    assert payload.numel() == sum(there.sizes(wanted, KEYS, header.tolist()))
    there.unpack(wanted, header.tolist(), payload, KEYS)
    got = there.gather(wanted, READ, group_size)
    place = {sample: i for i, sample in enumerate(samples)}
    expected = batch.select([place[s] for s in got.samples])
    assert got.samples == tuple(here.sequences(wanted, group_size))
    assert got.lengths == expected.lengths
    for name in ("sequences", "log_probs", "prompt_lengths", "finished"):
        assert torch.equal(got.get(name), expected.get(name)), name
    # What a group has once is its first sequence's, and every sequence of the group gets it.
    firsts = batch.select([place[s - s % group_size] for s in got.samples])
    assert torch.equal(got.get("baseline"), firsts.get("baseline"))
    alone = there.gather(wanted, ALONE, 1)
    first_only = batch.select([place[group * group_size] for group in wanted])
    assert alone.lengths == first_only.lengths
    assert torch.equal(alone.get("best"), first_only.get("best"))


def test_gather_of_no_samples_is_an_empty_batch() -> None:
    held = store(1)
    held.put(batch_of([3], [4]), GENERATE)
    held.put(batch_of([3], [4]), ONCE)
    assert held.gather([], READ, 1).num_tokens == 0


def test_gather_of_what_is_not_here_names_the_sample() -> None:
    held = store(1)
    held.put(batch_of([3], [4]), GENERATE)
    with pytest.raises(KeyError, match="5"):
        held.gather([5], READ, 1)

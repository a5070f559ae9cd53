"""Protects the data between calls: what is packed here is what is unpacked there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.batch import SequenceBatch
from executor.transfer import SampleStore
from experiments.ppo.config import PPOExperiment
from experiments.ppo.graph import build_graph

GRAPH = build_graph(PPOExperiment())
KEYS = ("sequences", "prompt_lengths", "finished", "log_probs")


def batch_of(samples: list[int], lengths: list[int]) -> SequenceBatch:
    tokens = sum(lengths)
    return SequenceBatch(
        samples=tuple(samples),
        lengths=tuple(lengths),
        per_token={
            "sequences": torch.randint(0, 1 << 40, (tokens,)),
            "log_probs": torch.randn(tokens),
        },
        per_sequence={
            "prompt_lengths": torch.randint(1, 9, (len(samples),)),
            "finished": torch.rand(len(samples)),
        },
    )


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6), data=st.data())
def test_a_parcel_arrives_as_it_left(lengths: list[int], data: st.DataObject) -> None:
    samples = data.draw(st.permutations(range(10, 10 + len(lengths))))
    wanted = data.draw(st.lists(st.sampled_from(samples), min_size=1, unique=True))
    here = SampleStore(GRAPH, torch.device("cpu"))
    there = SampleStore(GRAPH, torch.device("cpu"))
    here.put(batch_of(samples, lengths), KEYS)
    keys = [GRAPH.key(name) for name in KEYS]
    header, payload = here.pack(wanted, keys)
    assert payload.numel() == there.payload_bytes(header.tolist(), keys)
    there.unpack(wanted, header.tolist(), payload, keys)
    sent, got = here.gather(wanted, KEYS), there.gather(wanted, KEYS)
    assert got.lengths == sent.lengths
    for name in KEYS:
        assert torch.equal(got.get(name), sent.get(name)), name


def test_gather_of_no_samples_is_an_empty_batch() -> None:
    store = SampleStore(GRAPH, torch.device("cpu"))
    store.put(batch_of([3], [4]), KEYS)
    assert store.gather([], KEYS).num_tokens == 0


def test_gather_of_what_is_not_here_names_the_sample() -> None:
    store = SampleStore(GRAPH, torch.device("cpu"))
    store.put(batch_of([3], [4]), KEYS)
    with pytest.raises(KeyError, match="5"):
        store.gather([5], KEYS)

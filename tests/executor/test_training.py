"""Protects passes over a batch: the same mini-batches under every dp, means by what they count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.batch import SequenceBatch
from executor.context import build_contexts
from executor.training import Passes, _Means, gather_over_dp
from planner.graph import CallKind, ModelFunctionCall
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.strategy import ParallelStrategy
from planner.transfers import assign_samples
from tests.runs import SMALL
from tests.spawn import spawn


def passes(batch_size: int, num_mini_batches: int, *, step: int = 0) -> Passes:
    call = ModelFunctionCall(
        name="t", kind=CallKind.TRAIN, role="a", num_mini_batches=num_mini_batches, num_epochs=3
    )
    return Passes(
        call=call, batch_size=batch_size, group_size=1, num_micro_batches=1, seed=1, step=step
    )


@given(mini=st.integers(1, 4), per_mini=st.integers(1, 5), dp=st.integers(1, 4))
def test_dp_changes_no_mini_batch(mini: int, per_mini: int, dp: int) -> None:
    own = passes(mini * per_mini, mini)
    for epoch in range(3):
        whole = [sorted(shares[0]) for shares in own.mini_batches(epoch, 1)]
        split = [
            sorted(g for share in shares for g in share) for shares in own.mini_batches(epoch, dp)
        ]
        assert split == whole
        assert sorted(g for groups in whole for g in groups) == list(range(mini * per_mini))


@given(mini=st.integers(1, 4), per_mini=st.integers(1, 5), dp=st.integers(1, 4))
def test_the_first_pass_is_as_the_program_dealt_the_groups(
    mini: int, per_mini: int, dp: int
) -> None:
    dealt = assign_samples(mini * per_mini, dp, mini)
    for index, shares in enumerate(passes(mini * per_mini, mini).mini_batches(0, dp)):
        assert shares == [list(dealt[rank][index]) for rank in range(dp)]


def test_later_passes_are_shuffled_each_in_its_own_way() -> None:
    orders = [passes(32, 4, step=step).order(epoch) for step in (0, 1) for epoch in (1, 2)]
    assert len({tuple(order) for order in orders}) == 4
    assert passes(32, 4).order(1) == passes(32, 2).order(1)


def test_means_are_weighted_by_what_mini_batches_count() -> None:
    means = _Means()
    means.add({"loss": 1.0, "kl": 2.0}, torch.tensor([1.0, 10.0]))
    means.add({"loss": 4.0, "kl": 5.0}, torch.tensor([3.0, 20.0]))
    means.add_step({"lr": 0.1})
    means.add_step({"lr": 0.3})
    found = means.all(num_steps=4)
    assert found == pytest.approx({"loss": 13 / 4, "kl": 4.0, "lr": 0.2, "stopped": 0.5})


def gathered(rank: int, world_size: int) -> SequenceBatch:
    """Rank r holds r sequences, so that the first holds none."""
    strategy = ParallelStrategy(dp=world_size)
    layout = Layout.of(SMALL, DeviceMesh(0, world_size), strategy)
    ctx = build_contexts([layout], rank=rank, device=torch.device("cpu"))[layout]
    lengths = tuple(rank + k + 1 for k in range(rank))
    values = torch.arange(sum(lengths), dtype=torch.float64) + 100 * rank
    own = SequenceBatch(
        samples=tuple(10 * rank + k for k in range(rank)), lengths=lengths,
        per_token={"a": values}, per_sequence={"b": torch.full((rank,), rank)},
    )  # fmt: skip
    return gather_over_dp(own, ctx)


def test_gathered_sequences_stand_in_the_order_of_ranks_on_every_rank() -> None:
    for batch in spawn(3, gathered):
        assert batch.samples == (10, 20, 21)
        assert batch.lengths == (2, 3, 4)
        assert batch.get("a").tolist() == [100, 101, *range(200, 207)]
        assert batch.get("b").tolist() == [1, 2, 2]

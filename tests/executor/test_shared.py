"""Protects the sharing of common beginnings: what is computed once is what would be computed for
each sequence, values and gradients, whoever computes it and however the model is split.

Oracles: the whole batch without sharing, on one process; for who shares what, sets of prefixes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.model import shared
from executor.model.attention import pack, packed_attention
from executor.model.copies import copies_of
from executor.model.shared import Computed, whole_or_shared
from executor.parallel import pipeline
from planner.plan import ExecutionPlan
from tests.executor.small_models import FAMILY_SPECS, single_stage
from tests.executor.test_plan_independence import compare
from tests.runs import SMALL, Outcome, make_plan, run_rank
from tests.spawn import spawn

# Of two tokens, so that sequences have much in common at random; longest first tokens of others.
sequences = st.lists(st.lists(st.integers(0, 1), max_size=9), min_size=1, max_size=8)


def shared_by(rows: list[list[int]], *, least: int = 1, spared: float = 0.0) -> Computed:
    """``whole_or_shared`` of ``rows`` where even short beginnings are worth it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "LEAST_SHARED", least)
        patch.setattr(shared, "spares_enough", lambda few, all_: few > spared * all_)
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        return whole_or_shared(ids, [len(row) for row in rows])


def common(one: list[int], other: list[int]) -> int:
    unlike = (i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    return next(unlike, min(len(one), len(other)))


@settings(max_examples=60, deadline=None)
@given(rows=sequences)
def test_the_batch_is_made_of_what_is_computed(rows: list[list[int]]) -> None:
    """Every token of the batch is a computed one with the same tokens before it; none is computed
    that its neighbour has."""
    computed = shared_by(rows)
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    position = torch.cat([torch.arange(len(row)) for row in rows]) if len(ids) else ids
    assert torch.equal(computed.expand(computed.select(ids)), ids)
    assert torch.equal(computed.select(position), computed.packed.positions)
    neighbours = [0, *(common(a, b) for a, b in pairwise(rows))]
    assert computed.num_tokens == len(ids) - sum(neighbours)
    past = [tuple(row[: i + 1]) for row in rows for i in range(len(row))]
    if computed.copies is not None:
        assert computed.places is not None
        of_computed = [past[place] for place in computed.places.tolist()]
        assert [of_computed[i] for i in computed.copies.index.tolist()] == past


@settings(max_examples=60, deadline=None)
@given(
    rows=sequences.filter(lambda rows: any(rows)),
    heads=st.sampled_from([(4, 4), (4, 2)]),
    window=st.sampled_from([0, 3]),
)
def test_attention_and_its_gradients_are_those_of_whole_sequences(
    rows: list[list[int]], heads: tuple[int, int], window: int
) -> None:
    computed = shared_by(rows)
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(computed.num_tokens, n, 8, generator=generator, dtype=torch.float64)
        for n in (heads[0], heads[1], heads[1])
    ]

    def run(whole: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        if whole:
            q, k, v = (x if computed.copies is None else x[computed.copies.index] for x in leaves)
            out = packed_attention(q, k, v, pack([len(row) for row in rows]), window=window)
        else:
            out = computed.expand(packed_attention(*leaves, computed.packed, window=window))
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return out.detach(), torch.autograd.grad((out * weight).sum(), leaves)

    (found, gradients), (expected, wanted) = run(whole=False), run(whole=True)
    torch.testing.assert_close(found, expected)
    for got, want in zip(gradients, wanted):
        torch.testing.assert_close(got, want)


@settings(deadline=None)
@given(index=st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_gradients_of_copies_add_up(index: list[int]) -> None:
    rows = {row: place for place, row in enumerate(sorted(set(index)))}
    dense = np.array([rows[row] for row in index])
    x = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(index), 3, dtype=torch.float64)
    copies = copies_of(dense)
    (found,) = torch.autograd.grad((copies.expand(x) * weight).sum(), x)
    expected = torch.zeros_like(x).index_add(0, torch.from_numpy(dense), weight)
    torch.testing.assert_close(found, expected)
    for _, of_round in copies.others:  # what makes the sum the same on every run of a GPU
        assert len(of_round.unique()) == len(of_round)


def test_little_in_common_is_computed_as_ever() -> None:
    """Nothing is moved, and attention gets no keys of its own: as before there was sharing."""
    prompt = list(range(20))
    alone = [prompt + [1], [5, *prompt], [3] * 9]
    short = [prompt[:15] + [1, 2], prompt[:15] + [2, 3]]
    long = [prompt + [token] * 200 for token in (50, 51)]
    for rows in (alone, short, long):
        ids = torch.tensor([token for row in rows for token in row])
        computed = whole_or_shared(ids, [len(row) for row in rows])
        assert computed.places is computed.copies is computed.packed.shared is None
        assert computed.packed.lengths == tuple(len(row) for row in rows)
    rows = [prompt + [token] for token in (50, 51, 52)]
    computed = whole_or_shared(torch.tensor(rows).flatten(), [21] * 3)
    assert computed.num_tokens == 20 + 3


@pytest.mark.parametrize("family", FAMILY_SPECS)
def test_every_family_gives_the_hidden_states_of_whole_sequences(family: str) -> None:
    """Positions, windows, experts: a token does not see that its prompt is another sequence's."""
    spec = FAMILY_SPECS[family]
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, spec.vocab, (18,), generator=generator).tolist()
    rows = [
        prompt + torch.randint(0, spec.vocab, (n,), generator=generator).tolist()
        for n in (4, 7, 4, 1)
    ]
    rows.append(list(rows[-1]))  # the whole of it is another's
    stage, ids = single_stage(spec), torch.tensor([token for row in rows for token in row])
    lengths = [len(row) for row in rows]
    computed = whole_or_shared(ids, lengths)
    assert computed.num_tokens < 18 + 17
    found = computed.expand(stage(computed.select(ids), computed.packed))
    torch.testing.assert_close(found, stage(ids, pack(lengths)), rtol=1e-4, atol=1e-5)


# ---- whole steps of algorithms, with and without ----------------------------------------------


@dataclass
class Sharing(AbstractContextManager[Any]):
    """Counts tokens of passes; ``off``: shares nothing."""

    off: bool = False
    num_tokens: int = 0
    num_computed: int = 0
    undo: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)

    def __enter__(self) -> None:
        if self.off:
            self.undo.setattr(shared, "LEAST_SHARED", 10**9)
        self.undo.setattr(pipeline, "whole_or_shared", self.counted(whole_or_shared))

    def __exit__(self, *error: object) -> None:
        self.undo.undo()

    def counted(self, real: Callable[..., Computed]) -> Callable[..., Computed]:
        def count(ids: torch.Tensor, lengths: tuple[int, ...], *rest: object) -> Computed:
            computed = real(ids, lengths, *rest)
            self.num_tokens += sum(lengths)
            self.num_computed += computed.num_tokens
            return computed

        return count


LONG = replace(SMALL, max_positions=96)
EXPERTS = replace(
    LONG, family="qwen2_moe", qkv_bias=True, ffn=24, num_experts=6, experts_per_token=2,
    shared_ffn=40, normalize_top_k=False,
)  # fmt: skip
SIZES = ["batch_size=4", "prompt_len=48", "response_len=10", "init=random", "total_steps=2"]
ANSWERS = {
    "ppo": ["samples_per_prompt=3", "actor.lr=1e-3", "critic.lr=1e-3", "ppo.num_mini_batches=2"],
    "grpo": ["samples_per_prompt=3", "actor.lr=1e-3"],
    "reinforce": ["samples_per_prompt=3", "actor.lr=1e-3"],
    "remax": ["samples_per_prompt=3", "actor.lr=1e-3"],
    "raft": ["samples_per_prompt=3", "actor.lr=1e-3"],
    "dpo": ["actor.lr=1e-3"],
    "reward": ["reward.lr=1e-3"],
}


def plan(algorithm: str, num_devices: int, default: str, **options: Any) -> ExecutionPlan:
    """Training as ``default`` says; other calls likewise, without what they cannot have."""
    place, layout, micro, *flags = default.split(":")
    own = ":".join((place, layout, micro))
    infer = f"{own}:sp" if "sp" in flags else own
    calls = dict.fromkeys(("rew_inf", "ref_inf", "critic_inf"), infer)
    calls |= {f"{role}_train": default for role in ("actor", "critic", "reward")}
    return make_plan(
        num_devices, own, algorithm=algorithm, overrides=[*SIZES, *ANSWERS[algorithm]], **calls,
        **{"spec": LONG, **options},
    )  # fmt: skip


SPLITS = {
    "micro-batches, recomputed": (1, "0:d1p1m1:2:recompute"),
    "tp 2, selective": (2, "0:d1p1m2:1:selective"),
    "sequence parallel": (2, "0:d1p1m2:2:sp:recompute"),
    "sequence parallel, selective": (2, "0:d1p1m2:1:sp:selective"),
    "pp 2": (2, "0:d1p2m1:2"),
    "dp 2, zero": (2, "0:d2p1m1:1:zero"),
}
EXPERT_SPLITS = {
    "experts, ep 2": (2, "0:d2p1m1e2:2"),
    "experts, ep 2, recomputed": (2, "0:d2p1m1e2:1:recompute"),
    "experts, pp 2": (2, "0:d1p2m1:2"),
}


def run_all(
    rank: int, world_size: int, runs: dict[str, tuple[ExecutionPlan, bool]], folder: str
) -> dict[str, tuple[Outcome, Sharing]]:
    found = {}
    for name, (own, off) in runs.items():
        place, sharing = Path(folder) / name.replace(" ", "_"), Sharing(off=off)
        place.mkdir(parents=True, exist_ok=True)
        outcome = run_rank(rank, world_size, own, str(place), around=sharing)
        sharing.undo = pytest.MonkeyPatch()
        found[name] = (
            outcome,
            Sharing(num_tokens=sharing.num_tokens, num_computed=sharing.num_computed),
        )
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Outcome, Sharing]]]:
    """By rank and name; "NAME, whole" shares nothing."""
    one = "0:d1p1m1:1"
    alone: dict[str, tuple[ExecutionPlan, bool]] = {}
    for algorithm in ANSWERS:
        alone[algorithm] = plan(algorithm, 1, one), False
        alone[f"{algorithm}, whole"] = plan(algorithm, 1, one), True
    alone["experts"] = plan("grpo", 1, one, spec=EXPERTS), False
    alone["experts, whole"] = plan("grpo", 1, one, spec=EXPERTS), True
    split = {}
    for name, (num_devices, default) in SPLITS.items():
        split[name] = plan("ppo", num_devices, default), False
    for name, (num_devices, default) in EXPERT_SPLITS.items():
        split[name] = plan("grpo", num_devices, default, spec=EXPERTS), False
    folder = str(tmp_path_factory.mktemp("runs"))
    few = spawn(1, run_all, alone, folder, timeout_s=270.0)
    many = spawn(2, run_all, split, folder, timeout_s=270.0)
    return [{**few[0], **many[0]}, many[1]]


@pytest.mark.parametrize("name", [*ANSWERS, "experts"])
def test_steps_of_an_algorithm_are_as_without_sharing(
    name: str, outcomes: list[dict[str, tuple[Outcome, Sharing]]]
) -> None:
    """Losses, gradient norms, log-probabilities' means and weights after two steps."""
    (found, sharing), (expected, whole) = (outcomes[0][n] for n in (name, f"{name}, whole"))
    compare(name, [found], expected)
    assert whole.num_computed == whole.num_tokens == sharing.num_tokens
    assert sharing.num_computed < 0.8 * sharing.num_tokens


@pytest.mark.parametrize("name", [*SPLITS, *EXPERT_SPLITS])
def test_a_split_model_shares_with_the_same_result(
    name: str, outcomes: list[dict[str, tuple[Outcome, Sharing]]]
) -> None:
    ranks = [of_rank[name][0] for of_rank in outcomes if name in of_rank]
    compare(name, ranks, outcomes[0]["ppo, whole" if name in SPLITS else "experts, whole"][0])
    sharing = outcomes[0][name][1]
    assert sharing.num_computed < 0.8 * sharing.num_tokens

"""Protects the search for what prompts have in common: it finds the most, and the right row."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.generate.prefixes import Alike, Prefixes, prefix_key
from planner.sharing import LEAST_SHARED

# Few long runs of few tokens, so that prompts share much and part anywhere; 300 and 70,000 take
# more than a byte and more than two.
RUNS = st.lists(
    st.tuples(st.sampled_from((0, 1, 255, 300, 70_000)), st.integers(1, LEAST_SHARED)), max_size=4
)
PROMPTS = st.lists(RUNS.map(lambda runs: [t for t, n in runs for _ in range(n)] or [7]), max_size=9)


def common(one: list[int], other: list[int]) -> int:
    """By hand: tokens until the first that differs."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


@given(prompts=PROMPTS)
def test_each_prompt_finds_the_one_before_it_that_shares_most(prompts):
    prefixes = Prefixes()
    for row, prompt in enumerate(prompts):
        key = prefix_key(torch.tensor(prompt))
        found = prefixes.find(key)
        most = max((common(prompt, other) for other in prompts[:row]), default=0)
        if most < LEAST_SHARED and most < len(prompt):
            assert found == Alike()
        else:
            assert found.num_tokens == most == common(prompt, prompts[found.row])
            assert found.row < row
        prefixes.add(key, row)


@given(one=st.lists(st.integers(0, 1 << 20)), other=st.lists(st.integers(0, 1 << 20)))
def test_keys_sort_as_prompts_do(one, other):
    keys = [prefix_key(torch.tensor(ids, dtype=torch.long)) for ids in (one, other)]
    assert (keys[0] < keys[1]) == (one < other)

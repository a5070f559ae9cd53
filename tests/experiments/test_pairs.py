"""Protects the losses of pairs: the papers' formulas in float64 NumPy are the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from executor.batch import SequenceBatch
from experiments.losses import answer_lengths, answer_sums
from experiments.pairs import (
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    number_of_pairs,
)

RNG = np.random.default_rng(5)
FIRST, SECOND = RNG.normal(0, 4, 200), RNG.normal(0, 4, 200)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("margin", "center"), [(0.0, 0.0), (1.5, 0.0), (0.0, 0.01), (0.5, 0.1)])
def test_bradley_terry(margin: float, center: float) -> None:
    expected = -np.log(sigmoid(FIRST - SECOND - margin)) + center * (FIRST + SECOND) ** 2
    found = bradley_terry_loss(
        torch.tensor(FIRST, dtype=torch.float32), torch.tensor(SECOND, dtype=torch.float32),
        margin=margin, center_coef=center,
    )  # fmt: skip
    assert found.numpy() == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.1), (1.0, 0.4)])
def test_dpo_and_its_conservative_form(beta: float, smoothing: float) -> None:
    chosen, rejected = np.log(sigmoid(beta * FIRST)), np.log(sigmoid(-beta * FIRST))
    expected = -(1 - smoothing) * chosen - smoothing * rejected
    ratio = torch.tensor(FIRST, dtype=torch.float32)
    found = dpo_loss(ratio, beta=beta, label_smoothing=smoothing)
    assert found.numpy() == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_ipo_is_least_where_the_ratio_is_half_of_one_over_beta() -> None:
    expected = (FIRST - 1 / 0.4) ** 2
    found = ipo_loss(torch.tensor(FIRST, dtype=torch.float32), beta=0.2)
    assert found.numpy() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert float(ipo_loss(torch.tensor([2.5]), beta=0.2)) == 0.0


def test_a_loss_far_out_is_finite() -> None:
    """-log sigmoid by its definition overflows in float32 at about -89."""
    far = torch.tensor([-1e4], requires_grad=True)
    loss = dpo_loss(far, beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert torch.isfinite(far.grad).all()  # type: ignore[arg-type]


def test_sums_are_over_each_answer_and_no_prompt() -> None:
    lengths, prompts = (3, 5, 4, 2), (1, 2, 3, 1)
    batch = SequenceBatch(
        samples=(0, 1, 2, 3), lengths=lengths,
        per_token={"sequences": torch.arange(14)},
        per_sequence={"prompt_lengths": torch.tensor(prompts)},
    )  # fmt: skip
    values = torch.arange(1.0, 8.0)  # of 2 + 3 + 1 + 1 answer tokens
    assert answer_sums(batch, values).tolist() == [1 + 2, 3 + 4 + 5, 6, 7]
    assert answer_lengths(batch).tolist() == [2, 3, 1, 1]
    assert float(number_of_pairs(batch)) == 2.0

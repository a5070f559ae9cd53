"""Protects the losses against an implementation that is not ours: TRL's trainers on random tensors.

``scripts/compare_trl.py`` wrote their losses and gradients, with TRL's and torch's versions, into
trl_reference.json; so this runs without TRL. With TRL_PYTHON=/path/to/python of an environment
that has TRL the file itself is made again and compared.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor.batch import SequenceBatch
from experiments.dpo.config import DPOConfig
from experiments.dpo.functions import TrainOnPairs
from experiments.experience import Experience
from experiments.options import PolicyConfig
from experiments.pairs import bradley_terry_loss
from experiments.policy import TrainPolicy
from tests.experiments.test_ppo_functions import CTX, alone

FILE = Path(__file__).with_name("trl_reference.json")
REFERENCE = json.loads(FILE.read_text(encoding="utf-8"))
LENGTHS: list[int] = REFERENCE["lengths"]
GIVEN = {name: torch.tensor(value) for name, value in REFERENCE["given"].items()}
SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_trl.py"
# Our words for TRL's options.
POLICIES = {
    "grpo": PolicyConfig(
        kl_coef=0.04, kl_in="loss", kl_estimator="k3", aggregation="sequence"
    ),
    "token": PolicyConfig(kl_coef=0.0),
    "dr_grpo": PolicyConfig(kl_coef=0.0, aggregation="constant"),
    "dapo": PolicyConfig(kl_coef=0.0, clip_high=0.28),
    "two-sided": PolicyConfig(kl_coef=0.0, dual_clip=1.5),
    "entropy": PolicyConfig(kl_coef=0.0, entropy_coef=0.1),
    "ppo": PolicyConfig(kl_coef=0.0),
}  # fmt: skip


def packed(values: Tensor, order: tuple[int, ...], *, shift: int) -> Tensor:
    """[answers, longest, ...] -> [tokens, ...] of a prompt of one token and each answer, in
    ``order``; ``shift`` 0 puts them where the answers' tokens are, -1 at the states before."""
    rows = []
    for i in order:
        own = values[i, : LENGTHS[i]]
        rest = torch.zeros_like(own[:1])
        rows += [own, rest] if shift else [rest, own]
    return torch.cat(rows)


def batch_of(order: tuple[int, ...], *, per_token: bool = False) -> SequenceBatch:
    lengths = tuple(1 + LENGTHS[i] for i in order)
    advantages = GIVEN["token_advantages"]
    if not per_token:
        advantages = GIVEN["advantages"][:, None].expand(-1, max(LENGTHS))
    return SequenceBatch(
        samples=tuple(range(len(order))), lengths=lengths,
        per_token={
            "sequences": torch.zeros(sum(lengths), dtype=torch.int64),
            "advantages": packed(advantages, order, shift=0),
            "log_probs": packed(GIVEN["old"], order, shift=0),
            "ref_log_probs": packed(GIVEN["ref"], order, shift=0),
        },
        per_sequence={"prompt_lengths": torch.ones(len(order), dtype=torch.int64)},
    )  # fmt: skip


def outcome(function: Any, batch: SequenceBatch, order: tuple[int, ...]) -> tuple[float, Tensor]:
    """(loss, gradient by the logits); the head of a vocabulary of two is the identity."""
    hidden = packed(GIVEN["logits"], order, shift=-1).requires_grad_()
    loss, _ = function.loss(lambda rows: rows, hidden, batch, function.count(batch), CTX)
    loss.backward()
    assert hidden.grad is not None
    return float(loss.detach()), hidden.grad


def check(name: str, loss: float, gradient: Tensor, order: tuple[int, ...]) -> None:
    case = REFERENCE["cases"][name]
    wanted = packed(torch.tensor(case["gradient"]), order, shift=-1)
    assert loss == pytest.approx(case["loss"], abs=1e-5)
    assert (gradient - wanted).abs().max() < 1e-5
    assert wanted.abs().max() > 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_policy_losses_are_trls(name: str) -> None:
    options, order = POLICIES[name], (0, 1, 2, 3)
    function = TrainPolicy(
        Experience(lambda batch, kl_coef, total: batch, options), options=options,
        temperature=1.0, response_len=max(LENGTHS),
    )  # fmt: skip
    batch = function.prepare(batch_of(order, per_token=name == "ppo"), alone)
    check(name, *outcome(function, batch, order), order)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_dpos_losses_are_trls(name: str) -> None:
    order = (0, 2, 1, 3)  # chosen and rejected in turn
    options = DPOConfig(loss=name, beta=REFERENCE["cases"][name]["options"]["beta"])
    sums = [float(GIVEN["ref"][i, : LENGTHS[i]].sum()) for i in order]
    batch = batch_of(order).with_values(per_sequence={"ref_answer_log_probs": torch.tensor(sums)})
    check(name, *outcome(TrainOnPairs(dpo=options), batch, order), order)


def test_the_reward_models_loss_is_trls() -> None:
    scores = GIVEN["logits"][:, 0, 0].clone().requires_grad_()
    loss = bradley_terry_loss(scores[:2], scores[2:], center_coef=0.01).mean()
    loss.backward()
    case = REFERENCE["cases"]["reward"]
    assert float(loss.detach()) == pytest.approx(case["loss"], abs=1e-5)
    assert torch.allclose(
        scores.grad, torch.tensor(case["gradient"])[:, 0, 0].to(scores), atol=1e-5
    )


def test_every_case_of_the_file_is_compared() -> None:
    assert set(REFERENCE["cases"]) == {*POLICIES, "sigmoid", "ipo", "reward"}


@pytest.mark.skipif("TRL_PYTHON" not in os.environ, reason="TRL_PYTHON names no Python with TRL")
def test_the_file_is_what_trl_says(tmp_path: Path) -> None:
    new = tmp_path / "new.json"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [os.environ["TRL_PYTHON"], str(SCRIPT), "-o", str(new)], check=True, env=environment
    )
    found = json.loads(new.read_text(encoding="utf-8"))
    for name, case in REFERENCE["cases"].items():
        assert found["cases"][name]["loss"] == pytest.approx(case["loss"], abs=1e-9)

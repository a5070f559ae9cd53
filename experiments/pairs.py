"""Losses of pairs: Bradley-Terry for reward models, DPO and its relatives for policies.

All take one number of every pair and give one, so that sums over pairs do not depend on how
pairs are laid out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from executor.batch import SequenceBatch


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: float = 0.0, center_coef: float = 0.0
) -> Tensor:
    """[pairs]: -log sigmoid(c - r - margin) + center_coef (c + r)^2, c and r the two scores.

    Source: Ouyang et al. 2022 (arXiv:2203.02155), equation 1; margin: Touvron et al. 2023
    (arXiv:2307.09288), equation 2; centering: Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    return -F.logsigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected) ** 2


def dpo_loss(log_ratio: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[pairs]: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h = ``log_ratio``.

    h is log(pi / ref) of the chosen answer minus that of the rejected one; e > 0 is conservative
    DPO. Source: Rafailov et al. 2023 (arXiv:2305.18290), equation 7; Mitchell 2023, "A note on
    DPO with noisy preferences".
    """
    e = label_smoothing
    return -(1 - e) * F.logsigmoid(beta * log_ratio) - e * F.logsigmoid(-beta * log_ratio)


def ipo_loss(log_ratio: Tensor, *, beta: float) -> Tensor:
    """[pairs]: (h - 1 / (2 beta))^2, h = ``log_ratio`` of answers' *mean* log-probabilities.

    Source: Azar et al. 2023 (arXiv:2310.12036), equation 17, with tau = beta; its authors average
    over an answer's tokens, so that long answers do not weigh more.
    """
    return (log_ratio - 1 / (2 * beta)) ** 2


def number_of_pairs(batch: SequenceBatch) -> Tensor:
    """float64 []: what losses of pairs are divided by."""
    return torch.tensor(batch.num_sequences / 2, dtype=torch.float64)

"""Advantages without a critic: an answer's score against the others of its group or of the batch.

``scores`` are [num_sequences], whole groups of ``group_size`` one after another: groups are never
split over ranks, so that nothing here communicates but ``normalized``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Sum
from experiments.losses import answer_sums, gae, kl_penalty, response_mask, token_rewards

# Added to a group's standard deviation, as in TRL's GRPO trainer: scores are of order 1.
STD_EPS = 1e-4


def group_centered(scores: Tensor, group_size: int) -> Tensor:
    """[num_sequences]: score - mean of its group.

    Source: Liu et al. 2025 (arXiv:2503.20783), Dr. GRPO.
    """
    groups = scores.reshape(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).reshape(-1)


def group_normalized(scores: Tensor, group_size: int) -> Tensor:
    """[num_sequences]: (score - mean) / (std + 1e-4) of its group, std over n - 1.

    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1.2.
    """
    std = scores.reshape(-1, group_size).std(1, keepdim=True)
    centered = group_centered(scores, group_size).reshape(-1, group_size)
    return (centered / (std + STD_EPS)).reshape(-1)


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """[num_sequences]: score - mean of the *other* scores of its group.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740), equation 8.
    """
    return group_centered(scores, group_size) * (group_size / (group_size - 1))


def groups_with_signal(scores: Tensor, group_size: int) -> Tensor:
    """[num_sequences] bool: the scores of its group are not all equal."""
    groups = scores.reshape(-1, group_size)
    return (groups != groups[:, :1]).any(1).repeat_interleave(group_size)


def overlong_penalty(answer_lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """[num_sequences]: 0 up to ``longest - buffer`` tokens, then falling linearly to -1 at the end.

    Source: Yu et al. 2025 (arXiv:2503.14476), equation 13; ``buffer`` 0 gives 0.
    """
    over = (answer_lengths - (longest - buffer)).clamp(min=0)
    return -(over / max(1, buffer)).clamp(max=1.0) * (buffer > 0)


def penalized(
    batch: SequenceBatch, scores: Tensor, *, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """[num_sequences]: scores less ``kl_coef`` times the divergence of each whole answer."""
    if kl_coef == 0:
        return scores
    mask = response_mask(batch)
    log_probs, ref = batch.get("log_probs")[mask], batch.get("ref_log_probs")[mask]
    return scores - kl_coef * answer_sums(batch, kl_penalty(log_probs, ref, estimator=estimator))


def rewards_to_go(
    batch: SequenceBatch, scores: Tensor, *, kl_coef: float, gamma: float, estimator: str = "k1"
) -> Tensor:
    """[tokens]: discounted sum of the rewards from each answer token on, 0 outside the answers.

    The rewards are ``token_rewards``; ``ref_log_probs`` are read only where ``kl_coef`` > 0.
    """
    log_probs = batch.get("log_probs")
    ref = batch.get("ref_log_probs") if kl_coef > 0 else log_probs
    rewards = token_rewards(batch, scores, log_probs, ref, kl_coef=kl_coef, estimator=estimator)
    # Without a value there is nothing that could follow a truncated answer.
    return gae(batch, rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0)[0]


def to_tokens(batch: SequenceBatch, values: Tensor) -> Tensor:
    """[tokens]: each sequence's value at its answer's tokens, 0 at its prompt's."""
    lengths = torch.tensor(batch.lengths, device=values.device, dtype=torch.int64)
    return values.repeat_interleave(lengths) * response_mask(batch)


def normalized(values: Tensor, mask: Tensor, sum_over_dp: Sum) -> Tensor:
    """(x - mean) / (std + 1e-5) over the masked values of all data-parallel ranks, 0 elsewhere.

    Moments in float64 and in two passes, so that no split of the batch changes them.
    """
    wide, mask = values.double(), mask.double()
    count, total = sum_over_dp(torch.stack([mask.sum(), (wide * mask).sum()]))
    mean = total / count
    variance = sum_over_dp((((wide - mean) ** 2) * mask).sum()) / count
    return (((wide - mean) / (variance.sqrt() + 1e-5)) * mask).to(values.dtype)

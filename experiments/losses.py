"""The mathematics that algorithms share, on packed sequences; every loss is a sum.

A policy's action at position t of a sequence is its token t, taken in the state after token
t - 1. ``values[t]`` is the value of the state after token t, ``log_probs[t]`` that of token t.
For a prompt of 2 tokens and an answer of 3 (the last a stop token):

    position      0       1       2       3       4
    token         p       p       a       a       stop
    action                        yes     yes     yes
    its state             v[1]    v[2]    v[3]
    state after                   v[2]    v[3]    0 (finished) or v[4] (truncated)
"""

from __future__ import annotations

import torch
from torch import Tensor

from executor.batch import SequenceBatch


def response_mask(batch: SequenceBatch) -> Tensor:
    """[tokens] bool: the token belongs to the answer."""
    device = batch.token_ids.device
    lengths = torch.tensor(batch.lengths, device=device, dtype=torch.int64)
    starts = torch.tensor(batch.offsets[:-1], device=device, dtype=torch.int64)
    position = torch.arange(batch.num_tokens, device=device) - starts.repeat_interleave(lengths)
    return position >= batch.get("prompt_lengths").repeat_interleave(lengths)


def answer_lengths(batch: SequenceBatch) -> Tensor:
    """[num_sequences] int64: tokens of each answer."""
    lengths = torch.tensor(batch.lengths, device=batch.token_ids.device, dtype=torch.int64)
    return lengths - batch.get("prompt_lengths")


def answer_sums(batch: SequenceBatch, values: Tensor) -> Tensor:
    """[num_sequences]: sums over each answer of ``values`` [answer tokens], in their order."""
    lengths = answer_lengths(batch)
    sequence = torch.arange(batch.num_sequences, device=values.device).repeat_interleave(lengths)
    return values.new_zeros(batch.num_sequences).index_add(0, sequence, values)


def last_token_index(batch: SequenceBatch) -> Tensor:
    """[num_sequences] int64: the place of each sequence's last token among the tokens."""
    return torch.tensor(batch.offsets[1:], device=batch.token_ids.device, dtype=torch.int64) - 1


def token_rewards(
    batch: SequenceBatch, scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, *,
    kl_coef: float, estimator: str = "k1",
) -> Tensor:  # fmt: skip
    """[tokens]: -kl_coef KL(p || p_ref) on answer tokens, plus the score at the last one.

    ``scores`` [num_sequences]; KL as ``kl_penalty`` estimates it, by default log p - log p_ref.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), equation 2.
    """
    penalty = kl_penalty(log_probs, ref_log_probs, estimator=estimator)
    rewards = -kl_coef * penalty * response_mask(batch)
    return rewards.index_add(0, last_token_index(batch), scores.to(rewards.dtype))


def gae(
    batch: SequenceBatch, rewards: Tensor, values: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [tokens] each, 0 outside the answers.

    delta_t = r_t + gamma V(after t) - V(before t); A_t = delta_t + gamma lam A_(t+1);
    return_t = A_t + V(before t). ``batch`` has ``prompt_lengths`` and ``finished``: after a
    finished answer the value is 0, after a truncated one that of its last token.
    Source: Schulman et al. 2016 (arXiv:1506.02438), equations 11, 12 and 16.
    One scan over the longest answer for all sequences at once.
    """
    mask = response_mask(batch)
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    if batch.num_sequences == 0:
        return advantages, returns
    device = rewards.device
    ends = last_token_index(batch)  # [num_sequences]
    answers = ends + 1 - torch.tensor(batch.offsets[:-1], device=device)
    answers = answers - batch.get("prompt_lengths")
    after = values.clone()
    after[ends] = values[ends] * (1.0 - batch.get("finished").to(values.dtype))
    before = torch.cat((values[:1], values[:-1]))
    delta = rewards + gamma * after - before
    # Answers end in one column: [num_sequences, longest], the last token in the last column.
    back = torch.arange(int(answers.max()) - 1, -1, -1, device=device)
    index = ends[:, None] - back[None, :]
    inside = back[None, :] < answers[:, None]
    padded = torch.where(
        inside, delta[index.clamp(min=0)], torch.zeros((), device=device).to(delta)
    )
    running = torch.zeros_like(padded[:, 0])
    columns = []
    for column in range(padded.shape[1] - 1, -1, -1):
        running = padded[:, column] + gamma * lam * running
        columns.append(running)
    scanned = torch.stack(columns[::-1], dim=1)
    advantages[index[inside]] = scanned[inside]
    returns = torch.where(mask, advantages + before, returns)
    return advantages, returns


def kl_estimates(log_probs: Tensor, old_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """(k1, k3) [tokens] each: two unbiased estimates of KL(old || new) on tokens drawn from old.

    x = log p - log p_old; k1 = -x, k3 = exp(x) - 1 - x >= 0 of less variance.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    change = log_probs - old_log_probs
    return -change, change.exp() - 1 - change


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, *, estimator: str) -> Tensor:
    """[tokens]: k1, k2 or k3 estimate of KL(pi || ref) on tokens drawn from pi.

    x = log pi - log ref; k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x. As a term of a loss k1 has a
    gradient of mean zero, k2 that of the KL and k3 that of the reverse KL (on-policy).
    Source: Schulman 2020, "Approximating KL divergence".
    """
    k1, k3 = kl_estimates(ref_log_probs, log_probs)
    return {"k1": k1, "k2": 0.5 * k1**2, "k3": k3}[estimator]


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip: float,
    clip_high: float = 0.0, dual_clip: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, clipped) [tokens] each: max(-A rho, -A clip(rho, 1 - c, 1 + h)), and where it bound.

    rho = exp(log p - log p_old); h is ``clip_high``, or c where that is 0. Where A < 0 the loss is
    at most -A ``dual_clip``, if that is not 0. Source: Schulman et al. 2017 (arXiv:1707.06347),
    equation 7; h: Yu et al. 2025 (arXiv:2503.14476), equation 10; dual clip: Ye et al. 2020
    (arXiv:1912.09729), equation 5.
    """
    ratio = (log_probs - old_log_probs).exp()
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1.0 - clip, 1.0 + (clip_high or clip))
    loss, clipped = torch.maximum(free, bound), bound > free
    if dual_clip:
        most = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        loss, clipped = torch.minimum(loss, most), clipped | (loss > most)
    return loss, clipped


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """(loss, clipped) [tokens] each: 0.5 max((V - R)^2, (V_clip - R)^2), V_clip within old +- c.

    Source: the clipped value objective of OpenAI's baselines (ppo2), as PPO for RLHF uses it.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    free, bound = (values - returns) ** 2, (near - returns) ** 2
    # Where nothing is clipped the two are equal up to rounding, and only up to that.
    clipped = ((values - old_values).abs() > clip) & (bound > free)
    return 0.5 * torch.maximum(free, bound), clipped

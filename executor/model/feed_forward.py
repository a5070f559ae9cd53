"""The feed-forward half of a block: one for all tokens, or experts that a router chooses among.

Read ``dense`` and ``mixture`` first. Both take hidden states that are whole on every shard and
give the shard's part of the sum over shards (backward likewise): columns of the first matrices and
rows of the second are split over tp, of every expert alike, so that no token crosses to another
shard. Where experts are split over ep too, tokens cross to those that hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from executor.model.elementwise import activate
from executor.model.linear import linear, linear_of
from executor.parallel.experts import on_holders
from planner.strategy import Recompute
from profiles.models import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """``weight`` [out, in], ``bias`` [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """``up`` [ffn / tp, hidden], with a gate [2 ffn / tp, hidden], the gate's rows first; ``down``

    [hidden, ffn / tp], whose bias is whole on every shard.
    """

    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """``router`` [experts, hidden]; ``shared_gate`` [1, hidden]; of the experts that a rank holds

    ``up`` [experts / ep, 2 or 1, ffn / tp, hidden] with the gate first, and ``down``
    [experts / ep, hidden, ffn / tp].
    """

    router: Tensor
    up: Tensor
    down: Tensor
    shared: FeedForward | None
    shared_gate: Tensor | None


def dense(weights: FeedForward, x: Tensor, spec: ModelSpec) -> Tensor:
    """down(act(gate(x)) * up(x)), or down(act(up(x))): [tokens, hidden] -> this shard's part.

    Without ``down``'s bias, which belongs to the sum over shards.
    """
    return dense_down(weights, linear(x, weights.up.weight, weights.up.bias), spec)


def dense_down(
    weights: FeedForward, inner: Tensor, spec: ModelSpec, *, recompute: Recompute = "none"
) -> Tensor:
    """The rest of ``dense`` after its first product, [tokens, 2 or 1 ffn / tp].

    ``recompute`` selective: the activation is computed again in backward instead of kept. full:
    torch's checkpoint stops before a product whose input it has, if the product is torch's own.
    """
    activated = partial(activate, activation=spec.activation, gated=spec.gated)
    if recompute == "full":
        return F.linear(activated(inner), weights.down.weight)
    if recompute == "selective":
        return linear_of(activated, weights.down.weight, None, inner)
    return linear(activated(inner), weights.down.weight)


def mixture(
    weights: Experts, x: Tensor, spec: ModelSpec, group: dist.ProcessGroup | None = None
) -> Tensor:
    """sum over a token's experts of probability * expert(x), [tokens, hidden], this shard's part.

    The router is whole on every shard, which all make the same choice; its gradient is, as x's,
    the sum of what the shards' parts give. ``group``: ranks that hold the other experts, which all
    call this together, with any number of tokens. With a shared expert:
    + sigmoid(shared_gate(x)) * shared(x).
    Source: Jiang et al. 2024 (Mixtral), section 2.1; Qwen team 2024 (Qwen1.5-MoE).
    """
    probabilities, chosen = route(F.linear(x, weights.router), spec)
    out = _experts(weights, x, probabilities, chosen, spec, group)
    if weights.shared_gate is not None:
        assert weights.shared is not None
        gate = F.linear(x, weights.shared_gate).sigmoid()  # [tokens, 1]
        out = out + gate * dense(weights.shared, x, spec)
    return out


def route(logits: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """(weights, experts) of every token, [tokens, experts_per_token] each; logits' type and int64.

    The likeliest of softmax(logits) in fp32, largest first; where ``normalize_top_k`` the weights
    sum to 1.
    """
    weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(spec.experts_per_token, dim=-1)
    if spec.normalize_top_k:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), chosen


def _experts(
    weights: Experts, x: Tensor, probabilities: Tensor, chosen: Tensor, spec: ModelSpec,
    group: dist.ProcessGroup | None,
) -> Tensor:  # fmt: skip
    """Rows sorted by their expert, one product for each, and back in the order of the tokens.

    Sums run over a token's experts in the order of ``chosen``, whatever the other tokens do.
    """
    order = chosen.flatten().argsort(stable=True)  # [tokens * k]
    counts = torch.bincount(chosen.flatten(), minlength=spec.num_experts)
    rows = x[order // spec.experts_per_token]

    def answers(rows: Tensor, counts: Tensor) -> Tensor:
        inner = _grouped(rows, weights.up.flatten(1, 2), counts)
        inner = activate(inner, spec.activation, gated=spec.gated)
        return _grouped(inner, weights.down, counts)

    done = answers(rows, counts) if group is None else on_holders(rows, counts, group, answers)
    back = torch.empty_like(done).index_copy(0, order, done)
    return (back.unflatten(0, chosen.shape) * probabilities[..., None]).sum(1)


def _grouped(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """rows [n, in], the first counts[0] of expert 0 and so on; weights [experts, out, in]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):  # torch 2.10
        ends = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    parts = rows.split(counts.tolist())
    # One unbind and not an index for each: its gradient is made once, not per expert.
    return torch.cat([F.linear(p, w) for p, w in zip(parts, weights.unbind(0), strict=True)])

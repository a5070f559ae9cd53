"""Tensor parallelism: the few places where the shards of one model speak to each other.

A block is entered through ``copy_to_tp`` and left through ``reduce_from_tp`` (Shoeybi et al.
2019, Megatron-LM, section 3: f and g), or, where what lies between two blocks' halves is split
over its tokens, through a gather and a reduce-scatter of the same bytes (``Region``). The
vocabulary is split over the same ranks; functions of whole rows of logits exchange one number a
row instead of the rows. With tp 1 nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from executor.context import RankContext
from executor.parallel import data

# Values of one block of rows in fp32 work space: 16 MiB, so that no second copy of the logits
# is ever made while the blocks stay large enough to be fast.
BLOCK_VALUES = 4 * 2**20


def copy_to_tp(x: Tensor, ctx: RankContext) -> Tensor:
    """The same ``x`` on every shard; backward adds the shards' gradients."""
    return x if ctx.tp_group is None else _CopyToTp.apply(x, ctx.tp_group)


def reduce_from_tp(x: Tensor, ctx: RankContext) -> Tensor:
    """The sum of every shard's ``x`` on all of them; backward passes the gradient on."""
    return x if ctx.tp_group is None else _ReduceFromTp.apply(x, ctx.tp_group)


class _CopyToTp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _ReduceFromTp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """How a batch of ``num_tokens`` enters and leaves what is split over tp.

    Outside, hidden states are whole on every shard: [tokens, hidden]. With ``split_tokens``
    (sequence parallelism, Korthikanti et al. 2022, section 4.2.2) each shard has ``num_rows`` of
    them, [ceil(tokens / tp), hidden], the last ones of no meaning where tp does not divide the
    tokens: norms and sums of the residual stream are computed and kept once instead of tp times,
    and the gradients of the weights used there are each shard's part (``Adam``'s ``partial``).
    """

    ctx: RankContext
    num_tokens: int
    split_tokens: bool

    @property
    def num_rows(self) -> int:
        """Rows of a shard's hidden states outside."""
        return -(-self.num_tokens // self.ctx.layout.tp) if self.split_tokens else self.num_tokens

    def enter(self, x: Tensor) -> Tensor:
        """[num_rows, …] -> [tokens, …] on every shard; backward adds the shards' gradients."""
        if self.split_tokens:
            return _GatherTokens.apply(x, self.ctx.tp_group, self.num_tokens, True)
        return copy_to_tp(x, self.ctx)

    def leave(self, part: Tensor) -> Tensor:
        """The sum of every shard's ``part`` [tokens, …] -> [num_rows, …]."""
        if self.split_tokens:
            return _ScatterSum.apply(part, self.ctx.tp_group)
        return reduce_from_tp(part, self.ctx)

    def whole(self, x: Tensor) -> Tensor:
        """[num_rows, …] -> [tokens, …] for what every shard computes alike."""
        if self.split_tokens:
            return _GatherTokens.apply(x, self.ctx.tp_group, self.num_tokens, False)
        return x

    def own(self, values: Tensor) -> Tensor:
        """This shard's ``num_rows`` of [tokens, …]; no gradient."""
        if not self.split_tokens:
            return values
        return _padded(values, self.ctx.layout.tp).chunk(self.ctx.layout.tp)[self.ctx.tp_rank]


def _padded(x: Tensor, parts: int) -> Tensor:
    """``x`` [tokens, …] with zeros behind, a multiple of ``parts`` rows."""
    missing = -len(x) % parts
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def _summed_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This shard's rows of the sum of every shard's ``x`` [tokens, …]."""
    size = dist.get_world_size(group)
    padded = _padded(x, size)
    flat = padded.clone(memory_format=torch.contiguous_format) if padded is x else padded
    rows = data.reduce_scatter(flat.view(-1), group)
    return rows.clone().view(len(padded) // size, *x.shape[1:])


def _gathered_rows(x: Tensor, group: dist.ProcessGroup, num_tokens: int) -> Tensor:
    """All shards' rows [num_rows, …] one after the other, [tokens, …]."""
    whole = x.new_empty(len(x) * dist.get_world_size(group), *x.shape[1:])
    data.shard(whole, group).copy_(x)
    data.all_gather(whole.view(-1), group)
    return whole[:num_tokens]


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, num_tokens: int, summed: bool
    ) -> Tensor:
        ctx.group, ctx.summed = group, summed
        return _gathered_rows(x, group, num_tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.summed:
            return _summed_rows(grad, ctx.group), None, None, None
        rows = data.shard(_padded(grad, dist.get_world_size(ctx.group)), ctx.group)
        return rows.contiguous(), None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.num_tokens = group, len(part)
        return _summed_rows(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered_rows(grad, ctx.group, ctx.num_tokens), None


def vocab_parallel_embedding(ids: Tensor, weight: Tensor, region: Region) -> Tensor:
    """Rows of the whole embedding for ``ids`` [tokens] -> [num_rows, hidden] of ``region``.

    ``weight`` [vocab / tp, hidden]: a shard gives the rows it holds and zeros for the others.
    Where tp does not divide the vocabulary, shards hold one row more or less.
    """
    if region.ctx.tp_group is None:
        return _rows(ids, weight)
    local, here = _local_ids(ids, weight.shape[0], region.ctx)
    return region.leave(_rows(local, weight) * here[:, None])


def _rows(ids: Tensor, weight: Tensor) -> Tensor:
    """``F.embedding``; backward adds the rows' gradients to ``weight.grad`` where there is one.

    Autograd's way is a tensor of the whole weight's size, mostly zeros, that it adds afterwards.
    """
    if weight.grad is None or not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    return _Rows.apply(ids, weight)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        ids, weight = ctx.saved_tensors
        total = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if total.is_cuda:  # where index_add_ sums in another order every time
            total.index_put_((ids,), grad, accumulate=True)
        else:
            total.index_add_(0, ids, grad)
        return None, total if weight.grad is None else None


def _local_ids(ids: Tensor, num_rows: int, ctx: RankContext) -> tuple[Tensor, Tensor]:
    """(ids counted from this shard's first row, 0 where held elsewhere; whether held here)."""
    local = ids - ctx.layout.spec.vocab * ctx.tp_rank // ctx.layout.tp
    here = (local >= 0) & (local < num_rows)
    return torch.where(here, local, 0), here


def vocab_parallel_log_probs(logits: Tensor, targets: Tensor, ctx: RankContext) -> Tensor:
    """log softmax(logits)[target] of every row -> [rows], fp32; differentiable.

    ``logits`` [rows, vocab / tp] of this shard, ``targets`` [rows] of the whole vocabulary.
    Backward: grad * (onehot - softmax), made in one new tensor of the shard's size.
    """
    return _LogProbs.apply(logits, targets, ctx)


def vocab_parallel_entropy(logits: Tensor, ctx: RankContext) -> Tensor:
    """- sum p log p of softmax(logits) of every row, in nats -> [rows], fp32; differentiable.

    ``logits`` [rows, vocab / tp] of this shard. Backward: - grad * p * (log p + entropy).
    """
    return _Entropy.apply(logits, ctx)


def gather_vocab(logits: Tensor, ctx: RankContext) -> Tensor:
    """[rows, vocab / tp] of every shard -> [rows, vocab] on all of them; no gradient."""
    if ctx.tp_group is None:
        return logits.detach()
    vocab, tp = ctx.layout.spec.vocab, ctx.layout.tp
    sizes = [vocab * (rank + 1) // tp - vocab * rank // tp for rank in range(tp)]
    # All shards send as many columns: where tp does not divide them, some send one of no meaning.
    local = F.pad(logits.detach(), (0, max(sizes) - logits.shape[1])).contiguous()
    parts = data.gather(local, ctx.tp_group)
    return torch.cat([part[:, :size] for part, size in zip(parts, sizes)], dim=-1)


def _blocks(logits: Tensor) -> list[slice]:
    """Rows in blocks of at most BLOCK_VALUES values."""
    num_rows = logits.shape[0]
    step = max(1, BLOCK_VALUES // max(1, logits.shape[1]))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _max_and_sum(logits: Tensor, ctx: RankContext) -> tuple[Tensor, Tensor]:
    """(largest logit, sum of exp(logit - largest)) of whole rows, [rows] fp32 each.

    Kept apart: their union log sum exp would round to the largest logit's last place.
    """
    largest = logits.new_empty(logits.shape[0], dtype=torch.float32)
    total = torch.empty_like(largest)
    for rows in _blocks(logits):
        work = logits[rows].float()
        # A shard may hold ruled-out tokens only: -inf - -inf is no number.
        largest[rows] = work.amax(-1).clamp_(min=torch.finfo(torch.float32).min)
        total[rows] = torch.sub(work, largest[rows, None]).exp_().sum(-1)
    if ctx.tp_group is not None:
        local = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ctx.tp_group)
        total *= torch.exp(local - largest)
        dist.all_reduce(total, group=ctx.tp_group)
    return largest, total


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, place: RankContext) -> Tensor:
        largest, total = _max_and_sum(logits, place)
        local, here = _local_ids(targets, logits.shape[1], place)
        chosen = logits.gather(1, local[:, None])[:, 0].float()
        chosen = torch.where(here, chosen, 0.0)
        if place.tp_group is not None:
            dist.all_reduce(chosen, group=place.tp_group)
        ctx.save_for_backward(logits, largest, total, local, here)
        return (chosen - largest) - total.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, largest, total, local, here = ctx.saved_tensors
        out = torch.empty_like(logits)
        in_place = out.dtype == torch.float32
        factor = (-grad / total)[:, None]
        onehot = (grad * here)[:, None]
        for rows in _blocks(logits):
            work = out[rows] if in_place else torch.empty_like(out[rows], dtype=torch.float32)
            torch.sub(logits[rows], largest[rows, None], out=work)
            work.exp_().mul_(factor[rows]).scatter_add_(1, local[rows, None], onehot[rows])
            if not in_place:
                out[rows] = work
        return out, None, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, place: RankContext) -> Tensor:
        largest, total = _max_and_sum(logits, place)
        entropy = torch.empty_like(total)
        for rows in _blocks(logits):
            log_p = _log_p(logits[rows], largest[rows], total[rows])
            entropy[rows] = -(log_p.exp() * log_p).sum(-1)
        if place.tp_group is not None:
            dist.all_reduce(entropy, group=place.tp_group)
        ctx.save_for_backward(logits, largest, total, entropy)
        return entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, largest, total, entropy = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _blocks(logits):
            log_p = _log_p(logits[rows], largest[rows], total[rows])
            slope = log_p.exp().mul_(log_p.add_(entropy[rows, None]))
            out[rows] = slope.mul_(-grad[rows, None])
        return out, None


def _log_p(logits: Tensor, largest: Tensor, total: Tensor) -> Tensor:
    """log softmax, fp32; finite even where a logit is -inf, so that p log p is 0 there."""
    log_p = logits.float() - largest[:, None]
    return log_p.sub_(total.log()[:, None]).clamp_(min=torch.finfo(torch.float32).min)

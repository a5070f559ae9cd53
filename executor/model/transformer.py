"""``DecoderStage``: one pipeline stage and one tensor shard of a LLaMA-type decoder.

Read ``block_forward`` first: it is the whole of a block. The weights are views of the rank's
``ParameterBuffer``; with a flat gradient tensor they are autograd leaves whose ``.grad`` are
views of it, so that backward adds straight into what is reduced and optimised. Which blocks a
stage holds is ``planner.layout``'s; schedules over stages are ``executor.parallel.pipeline``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from executor.buffers import ParameterBuffer
from executor.context import RankContext
from executor.model.attention import KVCacheLike, PackedLengths, packed_attention
from executor.parallel.tensor import copy_to_tp, reduce_from_tp, vocab_parallel_embedding
from profiles.models import ModelSpec

# (q [tokens, heads / tp, head_dim], k and v [tokens, kv_heads / tp, head_dim]) -> q's shape.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """One block's shard: columns of the first matrices and rows of the second are split over tp.

    ``qkv`` [(heads + 2 kv_heads) / tp * head_dim, hidden] and ``gate_up`` [2 ffn / tp, hidden]
    are neighbours in the buffer, multiplied at once; ``o`` [hidden, heads / tp * head_dim];
    ``down`` [hidden, ffn / tp]; the norms [hidden].
    """

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Cosines and sines of the tokens' angles, [tokens, 1, head_dim / 2], fp32."""

    cos: Tensor
    sin: Tensor


def rotary_of(positions: Tensor, spec: ModelSpec) -> Rotary:
    """Angles position * theta^(-2 i / head_dim), i < head_dim / 2 (Su et al. 2021, RoFormer)."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (spec.rope_theta ** (exponents / spec.head_dim))
    angles = (positions[:, None].float() * frequencies)[:, None, :]
    return Rotary(cos=angles.cos(), sin=angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """``x`` [tokens, heads, head_dim] with coordinate i and i + head_dim / 2 turned as one pair.

    Halves and not neighbours: Hugging Face's convention, in which checkpoints are stored.
    """
    return _Rotate.apply(x, rotary.cos, rotary.sin)


class _Rotate(torch.autograd.Function):
    """Keeps the angles only; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """fp32 inside, the type of ``x`` outside."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension, statistics in fp32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def block_forward(
    weights: BlockWeights, hidden: Tensor, rotary: Rotary, attend: Attend, ctx: RankContext
) -> Tensor:
    """One block: hidden [tokens, hidden] -> [tokens, hidden].

    x += o(attention(qkv(norm(x)))); x += down(silu(gate(norm(x))) * up(norm(x))).
    """
    hidden = hidden + _attention(weights, hidden, rotary, attend, ctx)
    return hidden + _feed_forward(weights, hidden, ctx)


def _attention(
    weights: BlockWeights, hidden: Tensor, rotary: Rotary, attend: Attend, ctx: RankContext
) -> Tensor:
    spec, tp = ctx.layout.spec, ctx.layout.tp
    num_heads, num_kv_heads = spec.num_heads // tp, spec.num_kv_heads // tp
    x = copy_to_tp(rms_norm(hidden, weights.attention_norm, spec.norm_eps), ctx)
    # [tokens, heads + 2 kv_heads, head_dim], all of this shard
    qkv = F.linear(x, weights.qkv, weights.qkv_bias).unflatten(-1, (-1, spec.head_dim))
    qk, v = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    q, k = rotate(qk, rotary).split((num_heads, num_kv_heads), dim=1)
    return reduce_from_tp(F.linear(attend(q, k, v).flatten(1), weights.o), ctx)


def _feed_forward(weights: BlockWeights, hidden: Tensor, ctx: RankContext) -> Tensor:
    x = copy_to_tp(rms_norm(hidden, weights.ffn_norm, ctx.layout.spec.norm_eps), ctx)
    gate, up = F.linear(x, weights.gate_up).chunk(2, dim=-1)  # [tokens, ffn / tp] each
    return reduce_from_tp(F.linear(F.silu(gate) * up, weights.down), ctx)


class DecoderStage:
    """The blocks of ``ctx``'s stage, with the embedding on the first and the head on the last.

    ``layers``: one ``BlockWeights`` per block. ``gradients``: a flat tensor in the order and
    padding of ``buffer.flat``, of its type or wider; backward adds to it, nobody clears it.
    Without it nothing requires a gradient. ``recompute``: keep each block's input only, and
    run the block again in backward.
    """

    def __init__(
        self,
        ctx: RankContext,
        buffer: ParameterBuffer,
        *,
        gradients: Tensor | None = None,
        recompute: bool = False,
    ) -> None:
        assert gradients is None or gradients.shape == buffer.flat.shape
        self.ctx = ctx
        self.spec = ctx.layout.spec
        self.buffer = buffer
        self.gradients = gradients
        self.recompute = recompute
        self.leaves: list[Tensor] = []
        first, last, spec = ctx.is_first_stage, ctx.is_last_stage, self.spec
        tied = spec.tied_embedding
        self.embedding = self._weight("embedding.weight") if first or (last and tied) else None
        self.layers = [self._block(index) for index in ctx.layout.layers(ctx.pp_rank)]
        self.final_norm = self._weight("final_norm.weight") if last else None
        self.head_weight: Tensor | None = None
        if last:
            self.head_weight = self.embedding if tied else self._weight("head.weight")

    def _weight(self, *names: str) -> Tensor:
        """Neighbouring parameters of the buffer as one tensor, a leaf where gradients are kept."""
        weight = self.buffer.fused(names).detach()
        if self.gradients is not None:
            _accumulate_into(weight, self.buffer.fused(names, of=self.gradients))
            self.leaves.append(weight)
        return weight

    def _block(self, index: int) -> BlockWeights:
        def weight(*names: str) -> Tensor:
            return self._weight(*(f"layers.{index}.{name}" for name in names))

        return BlockWeights(
            attention_norm=weight("attention_norm.weight"),
            qkv=weight("q.weight", "k.weight", "v.weight"),
            qkv_bias=weight("q.bias", "k.bias", "v.bias") if self.spec.qkv_bias else None,
            o=weight("o.weight"),
            ffn_norm=weight("ffn_norm.weight"),
            gate_up=weight("gate.weight", "up.weight"),
            down=weight("down.weight"),
        )

    def forward(
        self, inputs: Tensor, packed: PackedLengths, cache: KVCacheLike | None = None
    ) -> Tensor:
        """Hidden states [tokens, hidden], after the final norm on the last stage.

        ``inputs``: token ids [tokens] on the first stage, hidden states [tokens, hidden] of the
        stage before on the others. With a ``cache`` no gradient is kept.
        """
        train = self.gradients is not None and cache is None and torch.is_grad_enabled()
        with torch.set_grad_enabled(train):
            rotary = rotary_of(packed.positions, self.spec)
            hidden = self.embed(inputs) if self.ctx.is_first_stage else inputs
            for index, weights in enumerate(self.layers):
                attend: Attend = (
                    partial(packed_attention, packed=packed)
                    if cache is None
                    else partial(cache.attend, index, packed=packed)
                )
                hidden = self._run(weights, hidden, rotary, attend, recompute=train)
            if self.final_norm is not None:
                hidden = rms_norm(hidden, self.final_norm, self.spec.norm_eps)
            return hidden

    __call__ = forward

    def _run(
        self, weights: BlockWeights, hidden: Tensor, rotary: Rotary, attend: Attend, *,
        recompute: bool,
    ) -> Tensor:  # fmt: skip
        if not (recompute and self.recompute):
            return block_forward(weights, hidden, rotary, attend, self.ctx)
        out: Tensor = checkpoint(
            block_forward, weights, hidden, rotary, attend, self.ctx,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        return out

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]; first stage only."""
        assert self.embedding is not None, "the embedding is on the first stage"
        return vocab_parallel_embedding(token_ids, self.embedding, self.ctx)

    def head(self, hidden: Tensor) -> Tensor:
        """Last stage only: hidden [rows, hidden] after the final norm to

        logits [rows, vocab / tp] of this shard's vocabulary (``lm``), or scores [rows] in fp32
        (``scalar``), the same on every shard.
        """
        assert self.head_weight is not None, "the head is on the last stage"
        train = self.gradients is not None and torch.is_grad_enabled()
        with torch.set_grad_enabled(train):
            if self.spec.head == "scalar":
                return F.linear(hidden.float(), self.head_weight.float())[:, 0]
            return F.linear(copy_to_tp(hidden, self.ctx), self.head_weight)


def _accumulate_into(leaf: Tensor, total: Tensor) -> None:
    """Make backward add ``leaf``'s gradient to ``total``, a view of the flat gradient tensor.

    Of one type, ``total`` is the leaf's ``.grad`` and autograd adds in place. Torch allows no
    ``.grad`` of another type: then each gradient is added to the wider ``total`` and dropped.
    """
    leaf.requires_grad_()
    if leaf.dtype == total.dtype:
        leaf.grad = total
        return

    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad)
        weight.grad = None

    leaf.register_post_accumulate_grad_hook(add)

"""``DecoderStage``: one pipeline stage and one tensor shard of a decoder of any family.

Read ``block_forward`` first: it is the whole of a block. The weights are views of the rank's
``ParameterBuffer``; with a flat gradient tensor they are autograd leaves whose ``.grad`` are
views of it, so that backward adds straight into what is reduced and optimised. Families differ
by the switches of ``ModelSpec``. Which blocks a stage holds is ``planner.layout``'s; schedules
over stages are ``executor.parallel.pipeline``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from executor.buffers import ParameterBuffer
from executor.context import RankContext
from executor.model.attention import KVCacheLike, PackedLengths, packed_attention
from executor.model.elementwise import rms_norm
from executor.model.feed_forward import Experts, FeedForward, Linear, dense_down, mixture
from executor.model.linear import linear, linear_of, overwrite_gradient
from executor.model.rotary import Rotary, rotary_of, rotate
from executor.parallel.tensor import Region, copy_to_tp, vocab_parallel_embedding
from planner.layout import repeated_kv_heads
from planner.strategy import Recompute
from profiles.models import ModelSpec

# (q [tokens, heads / tp, head_dim], k and v [tokens, kv_heads, head_dim]) -> q's shape.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


BlockDone = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """``weight`` and, of a layer norm, ``bias``, [hidden]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """One block's shard: columns of the first matrices and rows of the second are split over tp.

    ``qkv`` [(heads + 2 kv_heads) / tp * head_dim, hidden]: neighbours in the buffer, multiplied
    at once; ``qk_norm`` [2 * head_dim]: of queries, then of keys; ``o``
    [hidden, heads / tp * head_dim], whose bias is whole on every shard.
    """

    attention_norm: Norm
    qkv: Linear
    qk_norm: Tensor | None
    o: Linear
    ffn_norm: Norm
    feed_forward: FeedForward | Experts


def normalize(x: Tensor, norm: Norm, spec: ModelSpec) -> Tensor:
    """The norm of ``spec``'s kind over the last dimension, statistics in fp32.

    ``rms``: x / sqrt(mean x^2 + eps) * weight; ``rms_plus_one``: times 1 + weight, in fp32;
    ``layer``: (x - mean) / sqrt(variance + eps) * weight + bias.
    """
    if spec.norm == "layer":
        return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, spec.norm_eps)
    plus_one = spec.norm == "rms_plus_one"
    return rms_norm(x, 1.0 + norm.weight.float() if plus_one else norm.weight, spec.norm_eps)


def block_forward(
    weights: BlockWeights, hidden: Tensor, rotary: Rotary | None, attend: Attend, region: Region, *,
    recompute: Recompute = "none",
) -> Tensor:  # fmt: skip
    """One block: hidden [rows of the region, hidden] -> the same.

    x += o(attention(qkv(norm(x)))); x += feed_forward(norm(x)). ``recompute`` selective: norms
    and the feed-forward's activation are computed again in backward instead of kept; full: the
    caller runs the block again, which ends before its last product.
    """
    hidden = hidden + _attention(weights, hidden, rotary, attend, region, recompute)
    return hidden + _feed_forward(weights, hidden, region, recompute)


def _normed_linear(
    hidden: Tensor, norm: Norm, of: Linear, region: Region, recompute: Recompute
) -> Tensor:
    """linear(norm(hidden)) of all tokens: [rows, hidden] -> [tokens, out / tp]."""
    spec = region.ctx.layout.spec
    if recompute != "selective":
        return linear(region.enter(normalize(hidden, norm, spec)), of.weight, of.bias)

    def normed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return region.enter(normalize(hidden, Norm(weight=weight, bias=bias), spec))

    return linear_of(normed, of.weight, of.bias, hidden, norm.weight, norm.bias)


def _attention(
    weights: BlockWeights, hidden: Tensor, rotary: Rotary | None, attend: Attend, region: Region,
    recompute: Recompute,
) -> Tensor:  # fmt: skip
    ctx = region.ctx
    spec, tp = ctx.layout.spec, ctx.layout.tp
    # [tokens, heads + 2 kv_heads, head_dim], all of this shard
    qkv = _normed_linear(hidden, weights.attention_norm, weights.qkv, region, recompute)
    qkv = qkv.view(qkv.shape[0], qkv.shape[1] // spec.head_dim, spec.head_dim)
    num_heads = spec.num_heads // tp
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    # split_with_sizes: ``split`` goes through Python, which a decode step's small tensors feel.
    qk, v = qkv.split_with_sizes((num_heads + num_kv_heads, num_kv_heads), dim=1)
    if weights.qk_norm is not None:
        # Whole on every shard, but used on this shard's heads only: gradients are summed.
        of_q, of_k = weights.qk_norm.unflatten(0, (2, 1, -1))
        scales = torch.cat((of_q.expand(num_heads, -1), of_k.expand(num_kv_heads, -1)))
        qk = rms_norm(qk, scales, spec.norm_eps)
    q, k = rotate(qk, rotary).split_with_sizes((num_heads, num_kv_heads), dim=1)
    if (repeated := repeated_kv_heads(spec, tp, ctx.tp_rank)) is not None:
        k, v = k[:, repeated], v[:, repeated]
    return _row_parallel(linear(attend(q, k, v).flatten(1), weights.o.weight), weights.o, region)


def _feed_forward(
    weights: BlockWeights, hidden: Tensor, region: Region, recompute: Recompute
) -> Tensor:
    spec, feed_forward = region.ctx.layout.spec, weights.feed_forward
    if isinstance(feed_forward, Experts):
        x = region.enter(normalize(hidden, weights.ffn_norm, spec))
        return region.leave(mixture(feed_forward, x, spec, region.ctx.ep_group))
    inner = _normed_linear(hidden, weights.ffn_norm, feed_forward.up, region, recompute)
    part = dense_down(feed_forward, inner, spec, recompute=recompute)
    return _row_parallel(part, feed_forward.down, region)


def _row_parallel(part: Tensor, of: Linear, region: Region) -> Tensor:
    """The sum of the shards' parts, and the bias once."""
    out = region.leave(part)
    return out if of.bias is None else out + of.bias


class DecoderStage:
    """The blocks of ``ctx``'s stage, with the embedding on the first and the head on the last.

    ``layers``: one ``BlockWeights`` per block. ``gradients``: a flat tensor in the order and
    padding of ``buffer.flat``, of its type or wider; backward adds to it after ``clear_gradients``.
    Without it nothing requires a gradient. ``recompute`` in backward: ``full`` keeps each block's
    input only and runs the block again, ``selective`` makes the inputs of its products again.
    ``sequence_parallel``: hidden states between the halves of blocks are split over tp by tokens
    (``Region``), except while generating. ``partial``: parameters whose gradient is, after
    backward, this shard's part of a sum over tp.
    """

    def __init__(
        self,
        ctx: RankContext,
        buffer: ParameterBuffer,
        *,
        gradients: Tensor | None = None,
        recompute: Recompute = "none",
        sequence_parallel: bool = False,
    ) -> None:
        assert gradients is None or gradients.shape == buffer.flat.shape
        self.ctx = ctx
        self.spec = ctx.layout.spec
        self.buffer = buffer
        self.gradients = gradients
        self.recompute = recompute
        self.sequence_parallel = sequence_parallel and ctx.tp_group is not None
        self.partial: list[str] = []
        self.leaves: list[Tensor] = []
        first, last, spec = ctx.is_first_stage, ctx.is_last_stage, self.spec
        tied = spec.tied_embedding
        self.embedding = self._weight("embedding.weight") if first or (last and tied) else None
        # Rounded to the weights' type first, as the family was trained.
        self.embedding_scale = torch.tensor(spec.hidden**0.5, dtype=buffer.flat.dtype).item()
        learned = first and spec.positions == "learned"
        self.positions = self._outer("position.weight") if learned else None
        self.layers = [self._block(index) for index in ctx.layout.layers(ctx.pp_rank)]
        self.final_norm = self._norm("final_norm") if last else None
        self.head_weight: Tensor | None = None
        if last:
            self.head_weight = self.embedding if tied else self._weight("head.weight")
        self.products = self._products()

    def linear_weights(self) -> list[Tensor]:
        """What ``linear`` multiplies by: of blocks, and of a language model's head."""
        linears = [layer for block in self.layers for layer in (block.qkv, block.o)]
        for block in self.layers:
            if isinstance(block.feed_forward, FeedForward):
                linears += [block.feed_forward.up, block.feed_forward.down]
        found = [layer.weight for layer in linears]
        if self.head_weight is not None and self.spec.head == "lm":
            found.append(self.head_weight)
        return found

    def _products(self) -> list[Tensor]:
        """Leaves whose gradient comes of ``linear`` alone, in every backward pass.

        Empty where blocks run again as a whole: torch's checkpoint hands out copies of leaves.
        """
        if self.gradients is None or self.recompute == "full":
            return []
        tied = self.embedding if self.spec.tied_embedding else None
        return [w for w in self.linear_weights() if w is not tied and w.grad is not None]

    def clear_gradients(self) -> None:
        """Before the first backward pass of an optimizer step."""
        assert self.gradients is not None
        if not self.products:
            self.gradients.zero_()
            return
        written = {id(weight) for weight in self.products}
        for leaf in self.leaves:
            if id(leaf) in written:
                overwrite_gradient(leaf)
            elif leaf.grad is not None:
                leaf.grad.zero_()

    def _weight(self, *names: str) -> Tensor:
        """Neighbouring parameters of the buffer as one tensor, a leaf where gradients are kept."""
        weight = self.buffer.fused(names).detach()
        if self.gradients is not None:
            _accumulate_into(weight, self.buffer.fused(names, of=self.gradients))
            self.leaves.append(weight)
        return weight

    def _inner(self, *names: str) -> Tensor:
        """Whole on every shard, and used on what only this shard computes."""
        if self.ctx.tp_group is not None:
            self.partial += names
        return self._weight(*names)

    def _outer(self, name: str) -> Tensor:
        """Whole on every shard, and used on the hidden states between the halves of blocks."""
        return self._inner(name) if self.sequence_parallel else self._weight(name)

    def _norm(self, name: str) -> Norm:
        bias = self._outer(f"{name}.bias") if self.spec.norm == "layer" else None
        return Norm(weight=self._outer(f"{name}.weight"), bias=bias)

    def _column_linear(self, prefix: str, *names: str, bias: bool) -> Linear:
        return Linear(
            weight=self._weight(*(f"{prefix}{name}.weight" for name in names)),
            bias=self._weight(*(f"{prefix}{name}.bias" for name in names)) if bias else None,
        )

    def _row_linear(self, name: str, *, bias: bool) -> Linear:
        return Linear(
            weight=self._weight(f"{name}.weight"),
            bias=self._outer(f"{name}.bias") if bias else None,
        )

    def _block(self, index: int) -> BlockWeights:
        prefix, spec = f"layers.{index}.", self.spec
        norms = (f"{prefix}q_norm.weight", f"{prefix}k_norm.weight")
        return BlockWeights(
            attention_norm=self._norm(f"{prefix}attention_norm"),
            qkv=self._column_linear(prefix, "q", "k", "v", bias=spec.qkv_bias),
            qk_norm=self._inner(*norms) if spec.qk_norm else None,
            o=self._row_linear(f"{prefix}o", bias=spec.o_bias),
            ffn_norm=self._norm(f"{prefix}ffn_norm"),
            feed_forward=self._experts(prefix) if spec.num_experts else self._dense(prefix),
        )

    def _dense(self, prefix: str) -> FeedForward:
        first = ("gate", "up") if self.spec.gated else ("up",)
        return FeedForward(
            up=self._column_linear(prefix, *first, bias=self.spec.ffn_bias),
            down=self._row_linear(f"{prefix}down", bias=self.spec.ffn_bias),
        )

    def _experts(self, prefix: str) -> Experts:
        shared = bool(self.spec.shared_ffn)
        return Experts(
            router=self._inner(f"{prefix}router.weight"),
            up=self._weight(f"{prefix}experts.gate_up.weight"),
            down=self._weight(f"{prefix}experts.down.weight"),
            shared=self._dense(f"{prefix}shared.") if shared else None,
            shared_gate=self._inner(f"{prefix}shared_gate.weight") if shared else None,
        )

    def region(self, num_tokens: int, *, generating: bool = False) -> Region:
        """How a batch of ``num_tokens`` lies between the halves of blocks."""
        split = self.sequence_parallel and not generating
        return Region(ctx=self.ctx, num_tokens=num_tokens, split_tokens=split)

    def forward(
        self, inputs: Tensor, packed: PackedLengths, cache: KVCacheLike | None = None, *,
        block_done: BlockDone | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [tokens, hidden], after the final norm, on the last stage.

        On the others those that the next stage goes on with, [rows of ``region``, hidden].
        ``inputs``: token ids [tokens] on the first stage, on the others what the stage before
        gave. With a ``cache`` no gradient is kept. ``block_done`` is told of each block, counted
        within the stage, when backward has left it and its gradients are in ``gradients``.
        """
        train = self.gradients is not None and cache is None and torch.is_grad_enabled()
        region = self.region(packed.num_tokens, generating=cache is not None)
        with torch.set_grad_enabled(train):
            rotary = rotary_of(packed.positions, self.spec)
            hidden = inputs
            if self.ctx.is_first_stage:
                hidden = self.embed(inputs, packed.positions, region)
            for index, weights in enumerate(self.layers):
                attend: Attend = (
                    partial(packed_attention, packed=packed, window=self.spec.sliding_window)
                    if cache is None
                    else partial(cache.attend, index, packed=packed)
                )
                if block_done is not None and hidden.requires_grad:
                    # Autograd adds to leaves before it goes on to what made ``hidden``, which
                    # must so be no leaf itself: what came from the stage before is one.
                    hidden = hidden.view_as(hidden)
                    hidden.register_hook(partial(_tell, block_done, index))
                hidden = self._run(weights, hidden, rotary, attend, region, train=train)
            if self.final_norm is not None:
                hidden = region.whole(normalize(hidden, self.final_norm, self.spec))
            return hidden

    __call__ = forward

    @property
    def serves(self) -> bool:
        """Other replicas' tokens come to experts of this one: see ``serve``."""
        return self.ctx.ep_group is not None

    def serve(self) -> Tensor:
        """A pass without tokens of its own: experts compute for the others', layer by layer.

        Collective over the ranks that hold the other experts, one of which has tokens. Where
        gradients are kept, what it returns, [0, hidden], is to be run backward when theirs is.
        """
        assert self.serves
        train = self.gradients is not None and torch.is_grad_enabled()
        hidden = self.buffer.flat.new_empty(0, self.spec.hidden).requires_grad_(train)
        with torch.set_grad_enabled(train):
            for weights in self.layers:
                hidden = self._serve_block(weights, hidden, train=train)
        return hidden

    def _serve_block(self, weights: BlockWeights, hidden: Tensor, *, train: bool) -> Tensor:
        assert isinstance(weights.feed_forward, Experts)
        args = (weights.feed_forward, hidden, self.spec, self.ctx.ep_group)
        if not (train and self.recompute == "full"):
            return hidden + mixture(*args)
        # The others' blocks run again in backward, with all that they exchange.
        again: Tensor = checkpoint(mixture, *args, use_reentrant=False, preserve_rng_state=False)
        return hidden + again

    def _run(
        self, weights: BlockWeights, hidden: Tensor, rotary: Rotary | None, attend: Attend,
        region: Region, *, train: bool,
    ) -> Tensor:  # fmt: skip
        recompute = self.recompute if train else "none"
        if recompute != "full":
            return block_forward(weights, hidden, rotary, attend, region, recompute=recompute)
        out: Tensor = checkpoint(
            block_forward, weights, hidden, rotary, attend, region, recompute=recompute,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        return out

    def embed(self, token_ids: Tensor, positions: Tensor, region: Region) -> Tensor:
        """[tokens] and their places [tokens] -> [rows, hidden]; first stage only."""
        assert self.embedding is not None, "the embedding is on the first stage"
        hidden = vocab_parallel_embedding(token_ids, self.embedding, region)
        if self.spec.scaled_embedding:
            hidden = hidden * self.embedding_scale
        if self.positions is not None:
            hidden = hidden + F.embedding(region.own(positions), self.positions)
        return hidden

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
            return linear(copy_to_tp(hidden, self.ctx), self.head_weight)


def _tell(block_done: BlockDone, block: int, gradient: Tensor) -> None:
    """A hook of the tensor that a block works on."""
    block_done(block)


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

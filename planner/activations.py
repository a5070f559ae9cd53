"""Bytes that blocks keep for their backward pass, or hold while they run: values of one token.

Read ``kept_bytes``. ``BlockKernels`` says how blocks are computed; its defaults are the
executor's, the others are for systems that published their memory
(``scripts/validate_published.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from planner.strategy import ParallelStrategy, Recompute
from profiles.models import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKernels:
    """What of a block's implementation its bytes depend on.

    ``attention``: ``fused`` keeps no scores (Dao et al. 2022); ``eager`` keeps softmax's output.
    ``dropout``: a mask of one byte a value after each half of a block and on eager scores, whose
    masked copy is kept too. ``gather_again``: with sequence parallelism a product keeps its
    shard's rows of its input and gathers the others again in backward.
    """

    attention: Literal["fused", "eager"] = "fused"
    dropout: bool = False
    gather_again: bool = False


EXECUTOR = BlockKernels()


def kept_bytes(
    spec: ModelSpec, strategy: ParallelStrategy, *, value_bytes: int, length: int,
    kernels: BlockKernels = EXECUTOR, recompute: Recompute | None = None,
) -> int:  # fmt: skip
    """Bytes of one token, in a sequence of ``length``, that a block keeps on one shard.

    ``recompute``: in place of the strategy's.

    Values: what either half starts from, 2 hidden / tp with sequence parallelism, else 2 hidden;
    the inputs of their first products, 2 hidden; q, k, v as projected and attention's output,
    2 (q + kv) / tp, and q, k rotated, (q + kv) / tp; gate, up and act(gate) up, 3 ffn / tp, or up
    and its activation without a gate. With k experts to a token ffn is theirs,
    and 3 k hidden are kept: the rows that go to them, their answers, and these in order again.
    ``full`` recomputation keeps the first of these, of the block's first half. ``selective``
    drops what is large and cheap to make: eager scores; where there are none, the inputs of
    products (experts keep theirs).
    Source: Korthikanti et al. 2022, section 4, with rotary embedding, a gate, and fused attention.
    """
    tp, recompute = strategy.tp, recompute or strategy.recompute
    own = ceil(spec.hidden / tp) if strategy.sequence_parallel else spec.hidden
    if recompute == "full":
        return value_bytes * own
    eager, selective = kernels.attention == "eager", recompute == "selective"
    num_dropped = (1 if spec.num_experts else 2) if selective and not eager else 0
    values = 2 * own + (2 - num_dropped) * (own if kernels.gather_again else spec.hidden)
    values += (3 if spec.positions == "rope" else 2) * attention_values(spec, tp)
    first, activated = (2 if spec.gated else 1) * spec.active_ffn // tp, spec.active_ffn // tp
    values += first if num_dropped == 2 else first + activated
    values += 3 * spec.experts_per_token * spec.hidden + spec.num_experts
    masks = 2 * own if kernels.dropout else 0
    scores = 0
    if eager and not selective:
        each = 2 * value_bytes + 1 if kernels.dropout else value_bytes
        scores = each * (spec.num_heads // tp) * length
    return values * value_bytes + masks + scores


def attention_values(spec: ModelSpec, tp: int) -> int:
    """Values of one token in q and k, or half of those in q, k, v and the output, on one shard."""
    return (spec.num_heads // tp + spec.cached_kv_heads(tp)) * spec.head_dim


def copied_values(
    spec: ModelSpec, tp: int, *, computed: int, whole: int, kept: bool = False
) -> int:
    """What attention holds besides where sequences share beginnings (``planner.sharing``).

    Keys and values of the ``whole`` sequences, and the output of the ``computed`` tokens once
    more, in their order. ``kept`` for backward: of q, k, v as projected nothing, where they are
    rotated into a copy and not normalized.
    """
    of_keys = 2 * spec.cached_kv_heads(tp) * spec.head_dim
    of_queries = (spec.num_heads // tp) * spec.head_dim
    values = whole * of_keys + computed * of_queries
    if kept and spec.positions == "rope" and not spec.qk_norm:
        values -= computed * (of_queries + of_keys)
    return values


def working_values(spec: ModelSpec, strategy: ParallelStrategy, copied: int = 0) -> int:
    """Values of one token that a block holds at once where nothing is kept for later.

    Three hidden states: the residual, its norm gathered, and a half's result; sequence
    parallelism splits the first. ``selective`` makes the larger of a norm and an activation again.
    Experts: rows for them, answers, and these in order; split over ep also the rows as they arrived
    and in the order of the experts. ``copied``: of ``copied_values``, one token's.
    """
    tp = strategy.tp
    split = strategy.sequence_parallel
    hidden = 2 * spec.hidden + (ceil(spec.hidden / tp) if split else spec.hidden)
    rows = (5 if strategy.ep > 1 else 3) * spec.experts_per_token * spec.hidden
    width = (3 if spec.gated else 2) * spec.active_ffn // tp
    again = max(spec.hidden, spec.active_ffn // tp) if strategy.recompute == "selective" else 0
    return hidden + max(3 * attention_values(spec, tp) + copied, width + rows) + again

"""Causal attention over packed sequences, and over a KV cache.

Read ``pack`` and ``packed_attention`` first. A packed batch has no padding: the tokens of all
sequences stand in one row, and ``PackedLengths`` says where each begins. On CUDA one
variable-length kernel does the whole batch; elsewhere sequences of equal length share a call.
What sequences have in common at their beginning may be there once (``SharedKeys``, made by
``executor.model.shared``). Where keys and values are kept while generating is
``executor.generate.kv_cache``'s.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from executor.model.copies import Copies


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLengths:
    """Where the sequences of a packed batch lie; ``pack`` makes it.

    ``positions`` [tokens] int64: place of every token in its sequence, for the rotary angles.
    ``cu_seqlens`` [num_sequences + 1] int32: start of every sequence, and the end of the last.
    ``shared``: these are the sequences' last tokens; what they see is there.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    cu_seqlens: Tensor
    max_length: int
    shared: SharedKeys | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedKeys:
    """Whole sequences of which a batch has the last tokens each, as some have others' first.

    ``copies``: their tokens as rows of the batch; ``packed``: where they then lie.
    """

    packed: PackedLengths
    copies: Copies


def pack(
    lengths: Sequence[int], device: torch.device | str = "cpu", *, positions: Tensor | None = None,
    shared: SharedKeys | None = None,
) -> PackedLengths:  # fmt: skip
    """The ``PackedLengths`` of sequences of ``lengths`` tokens each.

    ``positions`` [tokens] for tokens that continue a sequence: in a decode step every length is
    1 and the position is the number of tokens before it. Without it every sequence starts at 0.
    """
    lengths = tuple(lengths)
    cu_seqlens = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=device)
    if positions is None:
        parts = [torch.arange(length) for length in lengths]
        positions = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
    assert positions.shape == (sum(lengths),), (positions.shape, lengths)
    return PackedLengths(
        lengths=lengths,
        positions=positions.to(device),
        cu_seqlens=cu_seqlens,
        max_length=max(lengths, default=0),
        shared=shared,
    )


class KVCacheLike(Protocol):
    """What a stage asks of a cache: to keep k and v of these tokens, and to attend."""

    def attend(
        self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, packed: PackedLengths
    ) -> Tensor:
        """Attention of ``q`` over what the cache holds of its sequences and ``k``, ``v``.

        ``layer_index`` counts from 0 within the stage. q [tokens, heads / tp, head_dim], k and v
        [tokens, kv_heads / tp, head_dim], all after the rotary embedding; returns q's shape.
        ``packed.positions`` are the places of the tokens in their sequences.
        """
        ...


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLengths, *, keys: PackedLengths | None = None,
    window: int = 0,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(head_dim)) v within every sequence, causal; differentiable.

    q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> [tokens, heads, head_dim].
    ``packed`` holds whole sequences, or their first parts: positions start at 0. ``keys``: k and v
    have more of each sequence, and q its last tokens, as where ``packed`` has ``shared``.
    ``window``: a token sees itself and the window - 1 before it; 0: all.
    """
    if packed.shared is not None:
        keys, copies = packed.shared.packed, packed.shared.copies
        k, v = copies.expand(k), copies.expand(v)
    keys = packed if keys is None else keys
    if q.is_cuda:
        return _cuda_attention(q, k, v, packed, keys, window)
    return _by_segments(q, k, v, packed.lengths, keys.lengths, window)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, max_length: int | None = None,
    window: int = 0, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one new token of each of n sequences over the tokens it may see.

    q [n, heads, head_dim]; caches [n, kv_heads, max_len, head_dim], the new token's key and value
    included; ``lengths`` [n] counts the valid tokens of each row, the new one included. Returns
    [n, heads, head_dim]. ``max_length``: a bound of ``lengths`` known without asking the device,
    so that the rest of the cache is not read. ``window`` as in ``packed_attention``. ``mask``:
    what ``decode_mask`` makes of all this, the same in every layer; None: it is made here.

    flash-attn, where it is installed, splits long rows among the device's processors; elsewhere
    the heads that share a kv head become rows of one small matrix. Neither copies keys or values.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if max_length is not None:
        k_cache, v_cache = k_cache[:, :, :max_length], v_cache[:, :, :max_length]
    if (flash := _flash_decode(q.device, q.dtype)) is not None:
        left = (window - 1, 0) if window else (-1, -1)  # tokens to the left that are seen
        out: Tensor = flash(
            q[:, None], k_cache.transpose(1, 2), v_cache.transpose(1, 2),
            cache_seqlens=lengths.int(), causal=True, window_size=left,
        )  # fmt: skip
        return out[:, 0]
    if mask is None:
        mask = decode_mask(lengths, k_cache.shape[2], q.dtype, window=window)
    out = F.scaled_dot_product_attention(
        q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim), k_cache, v_cache,
        attn_mask=mask,
    )  # fmt: skip
    return out.reshape(num_rows, num_heads, head_dim)


# Rows of a mask begin at multiples of so many values: what SDPA's kernels read without a copy.
_MASK_ALIGNMENT = 16


def decode_mask(
    lengths: Tensor, num_columns: int, dtype: torch.dtype, *, window: int = 0
) -> Tensor | None:
    """What is added to the scores of ``decode_attention``: [n, 1, 1, num_columns], 0 or -inf.

    None where the kernel that is used takes ``lengths`` as they are.
    """
    if _flash_decode(lengths.device, dtype) is not None:
        return None
    width = -(-num_columns // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
    places = torch.arange(width, device=lengths.device)
    unseen = places >= lengths[:, None]  # [n, width]
    if window:
        unseen |= places < lengths[:, None] - window
    zeros = torch.zeros(unseen.shape, dtype=dtype, device=lengths.device)
    return zeros.masked_fill_(unseen, -math.inf)[:, None, None, :num_columns]


# ---- CPU, and anything else without a variable-length kernel ----------------------------------


def _by_segments(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], key_lengths: tuple[int, ...],
    window: int,
) -> Tensor:  # fmt: skip
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    if len(set(zip(lengths, key_lengths))) == 1:
        return _equal_lengths(q, k, v, len(lengths), window)
    return _grouped_by_length(q, k, v, lengths, key_lengths, window)


def _equal_lengths(q: Tensor, k: Tensor, v: Tensor, num_sequences: int, window: int) -> Tensor:
    """All sequences have one length: the packed row is already a batch."""

    def batch(x: Tensor) -> Tensor:
        # [tokens, heads, head_dim] -> [n, heads, length, head_dim], without a copy
        return x.view(num_sequences, -1, *x.shape[1:]).transpose(1, 2)

    length, num_keys = q.shape[0] // num_sequences, k.shape[0] // num_sequences
    all_seen = length == num_keys and not 0 < window < length
    seen = None if all_seen else _seen(length, num_keys, window, q.device)
    out = F.scaled_dot_product_attention(
        batch(q), batch(k), batch(v), attn_mask=seen, is_causal=seen is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).reshape(q.shape)


def _seen(length: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """Which key (column) a query (row) sees, the last query all of ``window``: bool."""
    before = num_keys - length
    seen = torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(before)
    return seen.triu(before + 1 - window) if window else seen


def _grouped_by_length(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], key_lengths: tuple[int, ...],
    window: int,
) -> Tensor:  # fmt: skip
    """One call for every distinct length; split and cat move each value once, both ways.

    Equals that are neighbours are not moved.
    """
    pairs = list(zip(lengths, key_lengths, strict=True))
    runs = [(pair, len(list(run))) for pair, run in groupby(pairs)]
    if len(runs) == len(set(pairs)):
        sizes = [[pair[i] * count for pair, count in runs] for i in (0, 1, 1)]
        of_q, of_k, of_v = (x.split(n) for x, n in zip((q, k, v), sizes, strict=True))
        return torch.cat([
            _equal_lengths(of_q[i], of_k[i], of_v[i], count, window)
            for i, (pair, count) in enumerate(runs) if pair[0]
        ])  # fmt: skip
    parts = [x.split(n) for x, n in ((q, lengths), (k, key_lengths), (v, key_lengths))]
    found: dict[int, Tensor] = {}
    for pair in dict.fromkeys(pairs):
        if pair[0] == 0:
            continue
        indices = [i for i, other in enumerate(pairs) if other == pair]
        together = [
            part[indices[0]] if len(indices) == 1 else torch.cat([part[i] for i in indices])
            for part in parts
        ]
        out = _equal_lengths(together[0], together[1], together[2], len(indices), window)
        found.update(zip(indices, out.split(pair[0]), strict=True))
    return torch.cat([found[i] for i in sorted(found)])


# ---- CUDA -----------------------------------------------------------------------------------


@cache
def _flash_attention() -> Any | None:
    """flash-attn's packed kernel, or None where it is not installed (extra ``cuda``)."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _flash_decode(device: torch.device, dtype: torch.dtype) -> Any | None:
    """flash-attn's kernel for one token of each row of a cache, where it can run."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


@cache
def _torch_varlen() -> tuple[Any, bool] | None:
    """torch's own packed kernel (torch 2.10 and later) and whether it takes a window, or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, "window_size" in inspect.signature(varlen_attn).parameters


def _cuda_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLengths, keys: PackedLengths, window: int
) -> Tensor:
    """The first of flash-attn, torch's packed kernel and SDPA by segments that can run this.

    Both kernels take a sequence's queries for the last of its tokens (flash-attn since 2.1).
    """
    if q.dtype in (torch.bfloat16, torch.float16):
        ends, longest = (packed.cu_seqlens, keys.cu_seqlens), (packed.max_length, keys.max_length)
        left = window - 1 if window else -1  # tokens to the left that are seen
        if (flash := _flash_attention()) is not None:
            seen = (left, 0 if window else -1)
            return flash(q, k, v, *ends, *longest, causal=True, window_size=seen)
        varlen, windowed = _torch_varlen() or (None, False)
        if varlen is not None and (windowed or not window):
            causal: dict[str, Any] = {"window_size": (left, 0)} if windowed else {"is_causal": True}
            # Not every version shares kv heads among query heads: give each its own.
            group = q.shape[1] // k.shape[1]
            if group > 1:
                k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            return varlen(q, k, v, *ends, *longest, **causal)
    return _by_segments(q, k, v, packed.lengths, keys.lengths, window)

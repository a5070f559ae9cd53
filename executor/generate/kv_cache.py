"""Keys and values of the sequences that a stage is generating.

Read ``KVCache`` first. A row is a sequence; ``turn`` says which tokens the next forward pass
brings and gives the stage what it asks for (``KVCacheLike``). Rows 0 … ``num_rows`` - 1 are in
use, always the first ones, so that a decode step reads one block of memory. Which sequence lies
in which row is ``engine.py``'s to know; the attention itself is ``executor.model.attention``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.generate.prefixes import Alike
from executor.model.attention import (
    PackedLengths,
    decode_attention,
    decode_mask,
    pack,
    packed_attention,
)

# Columns (tokens of a row) are added in multiples of this, and at least by GROWTH of what is
# there: few copies while sequences grow, and no memory for lengths that nobody reaches.
COLUMN_STEP = 64
GROWTH = 0.5


class KVCache:
    """Of one stage's blocks: keys and values, [rows, kv_heads / tp, columns, head_dim] a block.

    What a head reads of a row lies side by side, in the order in which it reads it. Storing a
    packed batch is one indexed copy, for prompts and single tokens alike. ``max_rows`` rows are
    there from the start; columns grow as sequences do, up to ``max_columns``. With a ``window`` a
    token sees itself and the window - 1 before it, though all are kept.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_rows: int,
        max_columns: int,
        dtype: torch.dtype,
        device: torch.device | str,
        window: int = 0,
    ) -> None:
        self.window = window
        self.max_rows = max_rows
        self.max_columns = max_columns
        self.num_columns = 0
        self.lengths: list[int] = []  # tokens of the rows in use
        empty = torch.empty(max_rows, num_kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.keys = [empty] * num_layers
        self.values = [empty] * num_layers

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Of all rows and columns, used or not."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def turn(self, prompt_lengths: Sequence[int] = (), alike: Sequence[Alike] = ()) -> Turn:
        """One more token for every row in use, and then new rows with whole prompts.

        The forward pass that gets this ``Turn`` as its cache brings the tokens in that order:
        ``Turn.packed`` says the same in the model's words. ``alike``: of each new row what an
        earlier one has of its prompt, in use or new too, which is not brought again; none, if
        empty. The last token of a prompt is always among those that are brought.
        """
        num_old, device = self.num_rows, self.keys[0].device
        alike = tuple(alike) or (Alike(),) * len(prompt_lengths)
        entries = _entries(num_old, prompt_lengths, alike)
        own_lengths = [entry.num_own for entry in entries]
        packed_lengths = (*[1] * num_old, *own_lengths)
        positions = torch.cat(
            [torch.tensor(self.lengths, dtype=torch.long)]
            + [torch.arange(n - own, n) for n, own in zip(prompt_lengths, own_lengths, strict=True)]
        )
        self.lengths = [length + 1 for length in self.lengths] + list(prompt_lengths)
        assert self.num_rows <= self.max_rows, (self.num_rows, self.max_rows)
        self._hold(max(self.lengths))
        self._copy([(old, new, count) for new, entry in enumerate(entries, num_old)
                    for old, count in [entry.copied] if count])  # fmt: skip
        rows = [torch.arange(num_old)]
        places = [positions[:num_old]]
        for row, (entry, length) in enumerate(zip(entries, prompt_lengths), num_old):
            places.append(torch.arange(entry.copied[1], length))
            rows.append(torch.full_like(places[-1], row))
        shared = any(own < n for own, n in zip(own_lengths, prompt_lengths))
        stored = torch.cat([torch.arange(num_old), *(entry.tokens for entry in entries)])
        ends = torch.tensor([*range(num_old), *(int(entry.tokens[-1]) for entry in entries)])
        old_lengths = torch.tensor(self.lengths[:num_old], device=device)
        longest = max(self.lengths[:num_old], default=0)
        return Turn(
            cache=self,
            packed=pack(packed_lengths, device, positions=positions),
            slots=self.slots(torch.cat(rows), torch.cat(places)).flatten().to(device),
            stored=stored.to(device) if shared else None,
            old_lengths=old_lengths,
            max_old_length=longest,
            old_mask=self.mask(old_lengths, longest) if num_old else None,
            prompts=self._prompts(prompt_lengths, own_lengths),
            last_tokens=ends.to(device) if prompt_lengths else None,
        )

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where tokens' keys lie among all vectors of head_dim of a block: [tokens, kv_heads].

        ``rows`` and ``positions`` [tokens], on any device.
        """
        num_heads, num_columns = self.keys[0].shape[1:3]
        heads = rows[:, None] * num_heads + torch.arange(num_heads, device=rows.device)
        return heads * num_columns + positions[:, None]

    def _prompts(self, lengths: Sequence[int], own_lengths: Sequence[int]) -> _Prompts | None:
        """Of the last rows, which are new."""
        if not lengths:
            return None
        device, first = self.keys[0].device, self.num_rows - len(lengths)
        new = [index for index, own in enumerate(own_lengths) if own]
        own = pack([own_lengths[index] for index in new], device)
        if all(own_lengths[index] == lengths[index] for index in new):
            return _Prompts(own=own, whole=own, slots=None)
        whole = pack([lengths[index] for index in new], device)
        rows = torch.tensor(new).repeat_interleave(torch.tensor(whole.lengths)) + first
        return _Prompts(own=own, whole=whole, slots=self.slots(rows.to(device), whole.positions))

    def _copy(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """The first tokens of rows to other rows: (old row, new row, tokens) each."""
        if not moves:
            return
        device = self.keys[0].device
        old, new = torch.tensor([move[:2] for move in moves], device=device).T
        columns = max(count for _, _, count in moves)  # more than its own a row writes over
        for x in (*self.keys, *self.values):
            x[new, :, :columns] = x[old, :, :columns]

    def lengthen(self) -> None:
        """Every row in use has one more token, which who calls this stores."""
        self.lengths = [length + 1 for length in self.lengths]

    def mask(self, lengths: Tensor, num_columns: int) -> Tensor | None:
        """As ``decode_mask`` makes it, for rows of ``lengths`` tokens, at most ``num_columns``."""
        return decode_mask(lengths, num_columns, self.keys[0].dtype, window=self.window)

    def hold_all(self) -> None:
        """Have all columns, whose memory from now on stays where it is."""
        self._hold(self.max_columns)

    def compact(self, kept: Sequence[int]) -> list[int]:
        """Give up all rows but ``kept``; returns the old row of each new one.

        Rows from the end move into the gaps: as many are copied as leave, not as many as stay.
        """
        order = compaction(self.num_rows, kept)
        self._copy([(old, new, self.lengths[old]) for new, old in enumerate(order) if old != new])
        self.lengths = [self.lengths[row] for row in order]
        return order

    def _hold(self, num_columns: int) -> None:
        """Have at least ``num_columns`` columns, block after block: at most one is there twice."""
        if num_columns <= self.num_columns:
            return
        assert num_columns <= self.max_columns, (num_columns, self.max_columns)
        wanted = max(num_columns, int(self.num_columns * (1 + GROWTH)))
        wanted = min(-(-wanted // COLUMN_STEP) * COLUMN_STEP, self.max_columns)
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                # Zeros: what no token has written is masked, but must not be nan.
                new = old.new_zeros(*old.shape[:2], wanted, old.shape[3])
                new[:, :, : self.num_columns] = old
                tensors[index] = new
        self.num_columns = wanted


def compaction(num_rows: int, kept: Sequence[int]) -> list[int]:
    """The old row of each new row: kept rows stay below len(kept), the others fill the gaps.

    >>> compaction(6, [0, 3, 4, 5])
    [0, 4, 5, 3]
    """
    staying = set(kept)
    assert staying <= set(range(num_rows)), (num_rows, kept)
    moving = iter(sorted(row for row in staying if row >= len(staying)))
    return [row if row in staying else next(moving) for row in range(len(staying))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """Where a new row's keys and values come from.

    The first ones from a row that was in use before, ``copied`` = (that row, how many); all others
    from the packed ``tokens`` of the turn, of which the last ``num_own`` are its own.
    """

    copied: tuple[int, int]
    tokens: Tensor
    num_own: int


def _entries(num_old: int, lengths: Sequence[int], alike: Sequence[Alike]) -> list[_Entry]:
    """Of each new row, in order; packed tokens ``num_old`` and on are theirs."""
    found: list[_Entry] = []
    next_token = num_old
    for length, same in zip(lengths, alike, strict=True):
        assert same.num_tokens <= length, (length, same)
        copied, shared = (0, 0), torch.arange(0)
        if same.num_tokens and same.row < num_old:
            copied = same.row, min(same.num_tokens, length - 1)
        elif same.num_tokens:
            like = found[same.row - num_old]
            copied = like.copied[0], min(like.copied[1], same.num_tokens, length - 1)
            shared = like.tokens[: max(0, same.num_tokens - like.copied[1])]
        num_own = length - copied[1] - len(shared)
        own = torch.arange(next_token, next_token + num_own)
        next_token += num_own
        found.append(_Entry(copied=copied, tokens=torch.cat((shared, own)), num_own=num_own))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """New rows that bring tokens: ``own`` ones are the last of ``whole`` prompts, packed both.

    ``slots`` [tokens of whole prompts, kv_heads]: where in the cache their keys lie; None: all
    are brought.
    """

    own: PackedLengths
    whole: PackedLengths
    slots: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one forward pass brings into the cache; the stage's ``KVCacheLike``.

    ``packed``: one token of each old row, then what new rows bring of their prompts. ``slots``
    [stored * kv_heads]: ``KVCache.slots`` of every key that is stored, of the packed token
    ``stored`` [stored]; None: each token's once. ``old_lengths`` [old rows]: tokens of the old
    rows, the new one included, at most ``max_old_length``; ``old_mask``: what hides other columns,
    or None: nothing does, or ``decode_attention`` sees to it. ``prompts``: the new rows', or None.
    ``last_tokens`` [rows]: index of every row's last token in the packed batch; None: all of them.
    """

    cache: KVCache
    packed: PackedLengths
    slots: Tensor
    stored: Tensor | None
    old_lengths: Tensor
    max_old_length: int
    old_mask: Tensor | None
    prompts: _Prompts | None
    last_tokens: Tensor | None

    def attend(
        self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, packed: PackedLengths
    ) -> Tensor:
        """Stores k and v, and attends; shapes as ``KVCacheLike`` says."""
        keys, values = self.cache.keys[layer_index], self.cache.values[layer_index]
        for cached, new in ((keys, k), (values, v)):
            once = new if self.stored is None else new[self.stored]
            head_dim = cached.shape[3]
            cached.view(-1, head_dim).index_copy_(0, self.slots, once.reshape(-1, head_dim))
        num_old = len(self.old_lengths)
        parts = []
        if num_old:
            old = decode_attention(
                q[:num_old], keys[:num_old], values[:num_old], self.old_lengths,
                max_length=self.max_old_length, window=self.cache.window, mask=self.old_mask,
            )  # fmt: skip
            parts.append(old)
        if (prompts := self.prompts) is not None:
            k, v = k[num_old:], v[num_old:]
            if prompts.slots is not None:  # else they see themselves only: nothing is read back
                k, v = (x.view(-1, x.shape[3])[prompts.slots] for x in (keys, values))
            parts.append(
                packed_attention(
                    q[num_old:], k, v, prompts.own, keys=prompts.whole, window=self.cache.window
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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

from executor.model.attention import PackedLengths, decode_attention, pack, packed_attention

# Columns (tokens of a row) are added in multiples of this, and at least by GROWTH of what is
# there: few copies while sequences grow, and no memory for lengths that nobody reaches.
COLUMN_STEP = 64
GROWTH = 0.5


class KVCache:
    """Of one stage's blocks: keys and values, [rows, columns, kv_heads / tp, head_dim] a block.

    A row's tokens lie side by side, as they come out of the projections: storing a packed batch
    is one indexed copy, for prompts and single tokens alike. ``max_rows`` rows are there from
    the start; columns grow as sequences do, up to ``max_columns``. With a ``window`` a token sees
    itself and the window - 1 before it, though all are kept.
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
        empty = torch.empty(max_rows, 0, num_kv_heads, head_dim, dtype=dtype, device=device)
        self.keys = [empty] * num_layers
        self.values = [empty] * num_layers

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Of all rows and columns, used or not."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def turn(self, prompt_lengths: Sequence[int] = (), copies: Sequence[int] = ()) -> Turn:
        """One more token for every row in use, and then new rows with whole prompts.

        The forward pass that gets this ``Turn`` as its cache brings the tokens in that order:
        ``Turn.packed`` says the same in the model's words. ``copies``: rows that begin with each
        prompt, side by side, for which it is brought once; one each, if empty.
        """
        num_old, device = self.num_rows, self.keys[0].device
        copies = tuple(copies) or (1,) * len(prompt_lengths)
        packed_lengths = (*[1] * num_old, *prompt_lengths)
        positions = torch.cat(
            [torch.tensor(self.lengths, dtype=torch.long)]
            + [torch.arange(length) for length in prompt_lengths]
        )
        new_lengths = [n for n, times in zip(prompt_lengths, copies, strict=True)
                       for _ in range(times)]  # fmt: skip
        self.lengths = [length + 1 for length in self.lengths] + new_lengths
        assert self.num_rows <= self.max_rows, (self.num_rows, self.max_rows)
        self._hold(max(self.lengths))
        # Of every row: which of the packed sequences it gets, and where that begins.
        of_row = torch.arange(len(packed_lengths)).repeat_interleave(
            torch.tensor((*[1] * num_old, *copies), dtype=torch.long)
        )
        lengths = torch.tensor(packed_lengths, dtype=torch.long)
        ends = lengths.cumsum(0)
        stored_of_row = lengths[of_row]
        rows = torch.arange(self.num_rows).repeat_interleave(stored_of_row)
        first_stored = stored_of_row.cumsum(0) - stored_of_row
        stored = torch.arange(len(rows)) + ((ends - lengths)[of_row] - first_stored)[rows]
        shared = self.num_rows > len(packed_lengths)
        return Turn(
            cache=self,
            packed=pack(packed_lengths, device, positions=positions),
            slots=(rows * self.num_columns + positions[stored]).to(device),
            stored=stored.to(device) if shared else None,
            old_lengths=torch.tensor(self.lengths[:num_old], device=device),
            max_old_length=max(self.lengths[:num_old], default=0),
            prompts=pack(prompt_lengths, device) if prompt_lengths else None,
            last_tokens=(ends[of_row] - 1).to(device) if prompt_lengths else None,
        )

    def compact(self, kept: Sequence[int]) -> list[int]:
        """Give up all rows but ``kept``; returns the old row of each new one.

        Rows from the end move into the gaps: as many are copied as leave, not as many as stay.
        """
        order = compaction(self.num_rows, kept)
        moves = [(old, new) for new, old in enumerate(order) if old != new]
        if moves:
            device = self.keys[0].device
            old, new = torch.tensor(moves, device=device).T
            columns = max(self.lengths[row] for row, _ in moves)
            for x in (*self.keys, *self.values):
                x[new, :columns] = x[old, :columns]
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
                new = old.new_zeros(self.max_rows, wanted, *old.shape[2:])
                new[:, : self.num_columns] = old
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
class Turn:
    """What one forward pass brings into the cache; the stage's ``KVCacheLike``.

    ``packed``: one token of each old row, then the prompts of the new rows. ``slots`` [stored]:
    row * columns + position of every key that is stored, of the packed token ``stored`` [stored];
    None: each token's once. ``old_lengths`` [old rows]: tokens of the old rows, the new one
    included, at most ``max_old_length``. ``prompts``: the prompts alone, or None.
    ``last_tokens`` [rows]: index of every row's last token in the packed batch; None: all of them.
    """

    cache: KVCache
    packed: PackedLengths
    slots: Tensor
    stored: Tensor | None
    old_lengths: Tensor
    max_old_length: int
    prompts: PackedLengths | None
    last_tokens: Tensor | None

    def attend(
        self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, packed: PackedLengths
    ) -> Tensor:
        """Stores k and v, and attends; shapes as ``KVCacheLike`` says."""
        keys, values = self.cache.keys[layer_index], self.cache.values[layer_index]
        for cached, new in ((keys, k), (values, v)):
            once = new if self.stored is None else new[self.stored]
            cached.view(-1, *new.shape[1:]).index_copy_(0, self.slots, once)
        num_old = len(self.old_lengths)
        parts = []
        if num_old:
            old = decode_attention(
                q[:num_old], keys[:num_old], values[:num_old], self.old_lengths,
                max_length=self.max_old_length, window=self.cache.window,
            )  # fmt: skip
            parts.append(old)
        if self.prompts is not None:
            # A prompt sees itself only: its keys need not be read back.
            parts.append(
                packed_attention(
                    q[num_old:], k[num_old:], v[num_old:], self.prompts, window=self.cache.window
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

"""Decode turns that are always the same kernels on the same addresses: what a CUDA graph can be of.

Read ``StaticDecode.run``. Starting some twenty kernels a block costs the host more than a GPU needs
to run them, so a decode turn is captured and replayed. What changes from turn to turn lies in one
tensor of inputs, written before the turn in one copy from pinned memory; what comes out lies in one
tensor of results, read once; in between nothing asks the device for a value. A turn is for a number
of rows and of columns, to which real ones are rounded up, at most to those of the cache:

    rows        1, 2, 4, 8, then by 8 to 64, by 16 to 128, by 32 to 256, ...
    columns     by 64 to 512, by 128 to 1024, by 256 to 2048, ...

A quarter more, at most, of what a row or a column costs, while the weights, most of what a turn
reads, are read once for all; in return some ten shapes lie between a call's first decode turn and
its last. Rows without a sequence are rows of the cache that are not in use; they write and read
their own first column only.

Graphs last as long as their cache, whose addresses they hold (``caches.py``): what is another's in
another generation, its noise too, is in the inputs. Capturing costs the host about what some turns
without a graph do, so a shape is captured when it comes for the ``TURNS_BEFORE`` + 1st time: no
graph is made for shapes that hardly come, and no more is lost than twice what the best choice costs
(renting or buying skis; Karlin et al. 1988). A graph that a whole generation did not replay goes:
each holds some memory of its own, and shapes change as answers do.

Not here: turns that bring prompts, and experts, whose numbers of rows the device must be asked for
(``ModelSpec.decode_is_static``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from executor.cuda_graph import Action, Capture
from executor.generate.answers import Answer
from executor.generate.kv_cache import KVCache, Turn
from executor.generate.sampling import SamplingParams, noise_key, sample, uniform_of
from executor.model.attention import PackedLengths
from executor.model.transformer import DecoderStage
from executor.parallel.tensor import gather_vocab

# Estimated, not measured: a capture, which goes through the turn's Python once, and instantiating
# the graph take about three turns' host time; a replay saves most of one.
TURNS_BEFORE = 3
COLUMN_STEP, ROW_STEP = 64, 8


def rounded_up(count: int, step: int, most: int) -> int:
    """At least ``count``, in steps of ``step`` or of a quarter of the power of two below; capped.

    >>> [rounded_up(n, 8, 1000) for n in (7, 9, 33, 65, 129, 999)]
    [8, 16, 40, 80, 160, 1000]
    """
    assert 0 < count <= most, (count, most)
    step = max(step, (1 << (count - 1).bit_length()) // 8)
    return min(-(-count // step) * step, most)


def rounded_rows(live: int, most: int) -> int:
    """Rows of a turn with ``live`` rows; powers of two below ``ROW_STEP``.

    >>> [rounded_rows(n, 30) for n in (1, 2, 3, 5, 9, 17, 25)]
    [1, 2, 4, 8, 16, 24, 30]
    """
    if live <= ROW_STEP:
        return min(1 << (live - 1).bit_length(), most)
    return rounded_up(live, ROW_STEP, most)


class StaticDecode:
    """The decode turns of the sequences in the rows of ``cache``, on one stage; ``begin`` first.

    ``cache`` gets all of its columns. ``captured``: graphs by (rows, columns), of which
    ``replayed`` ones ran in this generation.
    """

    def __init__(self, stage: DecoderStage, cache: KVCache, params: SamplingParams) -> None:
        self.stage, self.cache, self.params = stage, cache, params
        cache.hold_all()
        device, rows = stage.ctx.device, cache.max_rows
        dtype, width = stage.buffer.flat.dtype, stage.spec.hidden
        # Of every row: its newest token, that token's position, its sample keyed, may it stop.
        self.inputs = torch.zeros(4, rows, dtype=torch.long, device=device)
        self.staging = torch.zeros(4, rows, dtype=torch.long, pin_memory=device.type == "cuda")
        row = torch.arange(rows, device=device)
        self.first_slots = cache.slots(row, torch.zeros_like(row))  # [rows, kv_heads]
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        first, last = stage.ctx.is_first_stage, stage.ctx.is_last_stage
        self.hidden = None if first else torch.zeros(rows, width, dtype=dtype, device=device)
        self.result = (
            torch.zeros(2, rows, dtype=torch.float64, device=device)
            if last
            else torch.zeros(rows, width, dtype=dtype, device=device)
        )
        self.turns: Counter[tuple[int, int]] = Counter()
        self.captured: dict[tuple[int, int], Action] = {}
        self.replayed: set[tuple[int, int]] = set()

    def begin(self, seed: int, step: int, capture: Capture) -> None:
        """Before each generation, with what its noise is keyed by."""
        self.key, self.capture = noise_key(seed, step), capture
        for key in self.captured.keys() - self.replayed:
            del self.captured[key], self.turns[key]
        self.replayed = set()

    def run(self, sequences: Sequence[Answer], hidden: Tensor | None) -> Tensor:
        """One more token of each of ``sequences``, which are those of the cache's rows.

        ``hidden`` [sequences, hidden] of the stage before, or None on the first. Returns what the
        engine's turns do: hidden states [sequences, hidden] for the next stage; on the last,
        [2, sequences] float64, tokens and log-probabilities. Written over in the next turn.
        """
        live = len(sequences)
        rows = rounded_rows(live, self.cache.max_rows)
        longest = max(sequence.length for sequence in sequences)
        columns = rounded_up(longest, COLUMN_STEP, self.cache.max_columns)
        self._write_inputs(sequences)
        if self.hidden is not None:
            assert hidden is not None
            self.hidden[:live].copy_(hidden)
        self._turn(rows, columns)
        if self.stage.ctx.is_last_stage:
            return self.result[:, :live].contiguous()
        return self.result[:live]

    def _write_inputs(self, sequences: Sequence[Answer]) -> None:
        """Rows without a sequence get zeros: their first column, which nobody reads, is written."""
        least = self.params.min_new_tokens
        rows = [
            (s.answer[-1], s.length - 1, s.sample ^ self.key, int(len(s.answer) >= least))
            for s in sequences
        ]
        self.staging.zero_()
        self.staging[:, : len(rows)] = torch.tensor(rows, dtype=torch.long).T
        self.inputs.copy_(self.staging, non_blocking=True)

    def _turn(self, rows: int, columns: int) -> None:
        key = (rows, columns)
        if key not in self.captured:
            step = partial(self.step, rows, columns)
            self.turns[key] += 1
            if self.turns[key] <= TURNS_BEFORE:
                step()
                return
            self.captured[key] = self.capture(step)
        self.replayed.add(key)
        self.captured[key]()

    def step(self, rows: int, columns: int) -> None:
        """From ``inputs`` and ``hidden`` to ``result``, for ``rows`` rows of at most ``columns``

        tokens. May be run any number of times for one turn.
        """
        tokens, positions, keyed, may_stop = self.inputs[:, :rows].unbind()
        lengths = positions + 1  # with the newest token
        turn = Turn(
            cache=self.cache,
            packed=PackedLengths(
                lengths=(1,) * rows, positions=positions, cu_seqlens=self.starts[: rows + 1],
                max_length=1,
            ),
            slots=(self.first_slots[:rows] + positions[:, None]).flatten(),
            stored=None,
            old_lengths=lengths.int(),
            max_old_length=columns,
            old_mask=self.cache.mask(lengths, columns),
            prompts=None,
            last_tokens=None,
        )  # fmt: skip
        inputs = tokens if self.hidden is None else self.hidden[:rows]
        hidden = self.stage.forward(inputs, turn.packed, turn)
        if not self.stage.ctx.is_last_stage:
            self.result[:rows].copy_(hidden)
            return
        logits = gather_vocab(self.stage.head(hidden), self.stage.ctx)  # [rows, vocab]
        u = uniform_of(keyed, lengths)
        allow_stop = may_stop.bool() if self.params.min_new_tokens else None
        chosen = sample(logits, u, self.params, allow_stop, static=True)
        for row, values in zip(self.result, chosen, strict=True):
            row[:rows].copy_(values)

"""``Caches``: the caches of a generation's groups, and what was captured of their decode turns.

They are for one generation, or stay from one to the next of a call where the plan has room for them
(``planner.plan_memory.kept_caches``): memory that is there need not be found, mapped and touched
again, nor a turn captured again. Read ``Caches.begin``. Nothing of an earlier generation is read: a
row attends to columns that it has written, and what lies in others counts 0 times.
"""

from __future__ import annotations

from collections.abc import Sequence

from executor.cuda_graph import Capture, GraphPool
from executor.generate.kv_cache import KVCache
from executor.generate.sampling import SamplingParams
from executor.generate.static_step import StaticDecode
from executor.model.transformer import DecoderStage


def shares(count: int, parts: int) -> tuple[int, ...]:
    """``count`` in ``parts`` nearly equal shares.

    >>> shares(8, 3)
    (3, 3, 2)
    """
    return tuple(count // parts + (index < count % parts) for index in range(parts))


class Caches:
    """Of groups of at most ``rows[i]`` sequences, each of at most ``longest`` tokens.

    ``pool``: of the graphs' memory. ``caches`` are there from the first generation on, and
    ``decodes``, one for each, where turns are captured.
    """

    def __init__(self, rows: Sequence[int], longest: int) -> None:
        self.rows, self.longest = tuple(rows), longest
        self.pool = GraphPool()
        self.clear()

    def clear(self) -> None:
        """Give up all memory."""
        self.caches: list[KVCache] = []
        self.decodes: list[StaticDecode] = []

    def suffice(self, rows: Sequence[int], longest: int) -> bool:
        """Is there a row for every sequence of such groups?"""
        enough = all(own <= here for own, here in zip(rows, self.rows))
        return enough and len(rows) <= len(self.rows) and longest <= self.longest

    def begin(
        self, stage: DecoderStage, params: SamplingParams, noise_key: tuple[int, int],
        capture: Capture | None,
    ) -> list[tuple[KVCache, StaticDecode | None]]:  # fmt: skip
        """For one generation by ``stage``: of every group the cache, without a row in use, and what
        runs its turns without prompts, None where these are not captured.

        ``noise_key``: (seed, step). What is captured is right as long as the weights lie where they
        did, which is as long as ``stage`` is the same.
        """
        self.caches = self.caches or [self._cache(stage, rows) for rows in self.rows]
        for cache in self.caches:
            cache.lengths = []
        if capture is None or not stage.spec.decode_is_static:
            return [(cache, None) for cache in self.caches]
        if any(one.stage is not stage or one.params != params for one in self.decodes):
            self.decodes = []
        self.decodes = self.decodes or [StaticDecode(stage, cache, params) for cache in self.caches]
        for one in self.decodes:
            one.begin(*noise_key, capture)
        return list(zip(self.caches, self.decodes))

    def _cache(self, stage: DecoderStage, rows: int) -> KVCache:
        spec = stage.spec
        return KVCache(
            num_layers=len(stage.layers),
            num_kv_heads=spec.cached_kv_heads(stage.ctx.layout.tp),
            head_dim=spec.head_dim,
            max_rows=rows,
            max_columns=self.longest,
            dtype=stage.buffer.flat.dtype,
            device=stage.ctx.device,
            window=spec.sliding_window,
        )

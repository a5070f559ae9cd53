"""What is timed: this executor's own layers, called as a run calls them.

Read ``LayerBench`` first. A block is a stage in the middle of a pipeline of three, the embedding
is on its first stage, final norm and head on its last: nothing of the model is written here
again. A tensor-parallel shard is measured alone: its context has tp > 1 and no groups, so that
``parallel.tensor`` sends nothing; collectives are measured apart (``profile_device.py``).
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.context import RankContext
from executor.generate.kv_cache import KVCache, Turn
from executor.generate.sampling import SamplingParams, sample, uniform
from executor.model.attention import pack
from executor.model.linear import pack_weight, packable
from executor.model.transformer import DecoderStage, normalize
from executor.parallel.optimizer import Adam, AdamConfig
from executor.parallel.tensor import vocab_parallel_log_probs
from executor.profile_graph import TryCapture
from executor.profile_measure import Action, Probe
from planner.layout import Layout
from planner.mesh import DeviceMesh
from profiles.models import ModelSpec
from profiles.units import MIB

Place = Literal["first", "middle", "last"]
STAGES: tuple[Place, ...] = ("first", "middle", "last")

# A run walks through all of a model's layers before it comes back to the first, so few weights
# stay in a cache between two uses. Small batches are measured over as many layers as it takes to
# leave the caches too: measured here with one matrix, 1 row takes 0.5 ms from the cache and
# 1.4 ms from memory; from 256 rows on there is no difference. Server CPUs have up to some hundred
# MiB of last-level cache (260 where this was found), shared by all workers.
CACHE_BYTES = 512 * MIB
STREAMING_TOKENS = 128
# Tokens, times layers, that one action on a CPU runs at most beyond one layer.
LAYER_TOKENS = 512


def stage_of(spec: ModelSpec, place: Place, *, tp: int, num_layers: int) -> Layout:
    """The layout whose stage ``place`` holds ``num_layers`` blocks."""
    return Layout(
        spec=replace(spec, num_layers=3 * num_layers), mesh=DeviceMesh(0, 3 * tp), pp=3, tp=tp
    )


class LayerBench:
    """One tensor-parallel shard of ``spec``'s layers on ``device``, and probes of its costs.

    Weights are random: time does not depend on them. With ``capture`` decode steps of blocks and
    the head are measured as graphs as well; once it fails, no more.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        tp: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        capture: TryCapture | None = None,
    ) -> None:
        self.capture = capture
        self.spec = spec
        self.tp = tp
        self.device = device
        self.dtype = dtype
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self._stages: dict[tuple[Place, int, bool], DecoderStage] = {}

    # ---- probes ---------------------------------------------------------------------------

    def block_train(self, tokens: int, length: int) -> Probe:
        """Forward without gradients, and forward plus backward minus that."""
        depth = self.depth(tokens)
        stage = self._stage("middle", num_layers=depth)
        packed = pack([length] * (tokens // length), self.device)
        hidden = self._hidden(tokens).requires_grad_()
        slope = self._hidden(tokens)

        def forward() -> None:
            with torch.no_grad():
                stage.forward(hidden, packed)

        def train() -> None:
            hidden.grad = None
            stage.forward(hidden, packed).backward(slope)

        return _forward_backward(forward, train, count=depth)

    def block_decode(self, num_sequences: int, context: int) -> Probe:
        """One new token each of ``num_sequences`` sequences that hold ``context`` tokens."""
        depth = self.depth(num_sequences, context=context)
        stage = self._stage("middle", num_layers=depth, generates=True)
        hidden = self._hidden(num_sequences)
        turn = self._turn(num_sequences, context, depth)

        @torch.no_grad()
        def step() -> Tensor:
            return stage.forward(hidden, turn.packed, turn)

        return self._decode(step, count=depth)

    def _decode(self, step: Action, *, count: int = 1) -> Probe:
        """``step``, and as a graph where it can be one."""
        replay = self.capture(step) if self.capture is not None else None
        if replay is None:
            self.capture = None
            return Probe(actions=(step,), readings={"decode": (1,)}, count=count)
        return Probe(
            actions=(step, replay),
            readings={"decode": (1, 0), "decode_graph": (0, 1)},
            count=count,
        )

    def embedding_train(self, tokens: int, length: int) -> Probe:
        """As ``block_train``; ``length`` changes nothing. Backward's gradient is dense."""
        stage = self._stage("first", num_layers=1)
        ids, slope = self._ids(tokens), self._hidden(tokens)
        places, region = torch.zeros_like(ids), stage.region(tokens)

        def forward() -> None:
            with torch.no_grad():
                stage.embed(ids, places, region)

        return _forward_backward(forward, lambda: stage.embed(ids, places, region).backward(slope))

    def embedding_decode(self, num_sequences: int, context: int) -> Probe:
        """The embedding, and what every decode step does once: the cache's next turn."""
        stage = self._stage("first", num_layers=1)
        ids = self._ids(num_sequences)
        places, region = torch.zeros_like(ids), stage.region(num_sequences)
        cache = self._cache(num_sequences, self.spec.max_positions, num_layers=1)
        cache.turn([1] * num_sequences)

        @torch.no_grad()
        def step() -> None:
            cache.lengths = [1] * num_sequences
            cache.turn()
            stage.embed(ids, places, region)

        return Probe(actions=(step,), readings={"decode": (1,)})

    def head_train(self, tokens: int, length: int) -> Probe:
        """Final norm, head, and log-probabilities of the next tokens (``lm``) or scores."""
        stage = self._stage("last", num_layers=1)
        targets = self._ids(tokens)
        hidden = self._hidden(tokens).requires_grad_()
        slope = torch.ones(tokens, device=self.device)

        def values() -> Tensor:
            out = stage.head(_final_norm(stage, hidden))
            if self.spec.head == "scalar":
                return out
            return vocab_parallel_log_probs(out, targets, stage.ctx)

        def forward() -> None:
            with torch.no_grad():
                values()

        def train() -> None:
            hidden.grad = None
            values().backward(slope)

        return _forward_backward(forward, train)

    def head_decode(self, num_sequences: int, context: int) -> Probe:
        """Final norm, the logits of ``num_sequences`` rows, and a token of each drawn from them.

        Where tp cuts the vocabulary, the shard's logits stand in for the others'.
        """
        stage = self._stage("last", num_layers=1, generates=True)
        hidden = self._hidden(num_sequences)
        places = torch.arange(num_sequences, device=self.device)
        params = SamplingParams(max_new_tokens=1)

        @torch.no_grad()
        def step() -> None:
            logits = stage.head(_final_norm(stage, hidden)).repeat(1, self.tp)
            sample(logits, uniform(0, 0, places, places), params)

        return self._decode(step)

    def optimizer_step(self, num_blocks: int, length: int = 0) -> Probe:
        """Norm, clipping and Adam's update over ``num_blocks`` blocks, and cleared gradients."""
        stage = self._stage("middle", num_layers=num_blocks)
        gradients = self._noise(stage.buffer.flat.numel())
        # Another tensor is cleared: gradients of zero would not be clipped, and clipping costs.
        cleared = torch.empty_like(gradients)
        adam = Adam(stage.ctx, stage.buffer, gradients, AdamConfig(lr=1e-6), zero=0)

        def step() -> None:
            adam.step()
            cleared.zero_()

        return Probe(actions=(step,), readings={"step": (1,)})

    # ---- what the probes run on -------------------------------------------------------------

    def depth(self, tokens: int, *, context: int = 0) -> int:
        """How many blocks one action runs: see ``CACHE_BYTES``.

        ``context``: of a decode step, whose blocks read keys and values besides weights.
        """
        if self.device.type == "cpu" and tokens > STREAMING_TOKENS:
            return min(self.spec.num_layers, max(1, LAYER_TOKENS // tokens))
        kv_values = 2 * tokens * context * self.spec.num_kv_heads * self.spec.head_dim
        block_values = (self.spec.block_parameters + kv_values) // self.tp
        depth = ceil(CACHE_BYTES / (block_values * self.dtype.itemsize))
        return min(self.spec.num_layers, max(1, depth))

    def _stage(self, place: Place, *, num_layers: int, generates: bool = False) -> DecoderStage:
        """A stage of ``num_layers`` blocks; kept, because points of one depth come again."""
        key = (place, num_layers, generates)
        if key not in self._stages:
            self._stages[key] = self._new_stage(*key)
        return self._stages[key]

    def _new_stage(self, place: Place, num_layers: int, generates: bool) -> DecoderStage:
        layout = stage_of(self.spec, place, tp=self.tp, num_layers=num_layers)
        rank = layout.device(STAGES.index(place), 0, 0)
        buffer = ParameterBuffer.for_rank(layout, rank, dtype=self.dtype, device=self.device)
        buffer.flat.copy_(self._noise(buffer.flat.numel())).mul_(0.02)
        ctx = RankContext(layout=layout, rank=rank, device=self.device)
        if generates:  # with weights as ``generate`` has them
            stage = DecoderStage(ctx, buffer)
            for weight in filter(packable, stage.linear_weights()):
                pack_weight(weight)
            return stage
        # Gradients are summed in fp32 on every device, as the worker does.
        gradients = torch.zeros_like(buffer.flat, dtype=torch.float32)
        return DecoderStage(ctx, buffer, gradients=gradients)

    def _noise(self, num_values: int) -> Tensor:
        """[num_values] fp32, of unit variance: a million numbers over and over, to save time."""
        noise = torch.randn(2**20, device=self.device, generator=self.generator)
        return noise.repeat(-(-num_values // len(noise)))[:num_values]

    def _cache(self, num_rows: int, max_columns: int, *, num_layers: int) -> KVCache:
        return KVCache(
            num_layers=num_layers,
            num_kv_heads=self.spec.cached_kv_heads(self.tp),
            head_dim=self.spec.head_dim,
            max_rows=num_rows,
            max_columns=max_columns,
            dtype=self.dtype,
            device=self.device,
            window=self.spec.sliding_window,
        )

    def _turn(self, num_sequences: int, context: int, num_layers: int) -> Turn:
        """A decode step's cache after which each sequence holds ``context`` tokens."""
        cache = self._cache(num_sequences, context, num_layers=num_layers)
        cache.turn([context - 1] * num_sequences)
        turn = cache.turn()
        for x in (*cache.keys, *cache.values):
            x.fill_(0.5)  # memory that nobody has written reads faster than any other
        return turn

    def _hidden(self, rows: int) -> Tensor:
        """Random hidden states [rows, hidden]."""
        shape = (rows, self.spec.hidden)
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=self.generator)

    def _ids(self, rows: int) -> Tensor:
        """Random ids [rows] of this shard's part of the vocabulary, which begins at 0."""
        high = self.spec.vocab // self.tp
        return torch.randint(high, (rows,), device=self.device, generator=self.generator)


def _forward_backward(forward: Action, train: Action, *, count: int = 1) -> Probe:
    """What training adds to a forward pass is called backward, whatever of it is."""
    return Probe(
        actions=(forward, train), readings={"forward": (1, 0), "backward": (-1, 1)}, count=count
    )


def _final_norm(stage: DecoderStage, hidden: Tensor) -> Tensor:
    assert stage.final_norm is not None, "the final norm is on the last stage"
    return normalize(hidden, stage.final_norm, stage.spec)

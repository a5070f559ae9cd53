"""AdamW over a rank's flat buffer: one clipped, fused update for all parameters of a rank.

Read ``Adam.step`` first. Weights that are not fp32 have fp32 masters here. ZeRO 0 keeps the
state of every parameter of the rank, ZeRO 1 that of the rank's shard of the flat buffer over dp.
Experts that are split over ep are a section of their own: dp / ep ranks hold the same ones.
Sums over replicas are ``data.py``'s; what fills the gradients is ``pipeline.py``'s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, repeat
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.context import RankContext
from executor.parallel import data
from executor.parallel.overlap import EarlySums, make_buckets
from profiles.errors import ConfigError

EMBEDDING = "embedding.weight"
# Gradients of another type than fp32 are converted this many values at a time (64 MiB).
CONVERTED_VALUES = 1 << 24
# Of one tensor in a norm: on CUDA torch has counted them in 32 bits (pytorch issue 169930).
NORM_VALUES = 1 << 30

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamConfig:
    """AdamW's numbers. ``total_steps`` counts optimizer steps, warm-up included.

    ``max_grad_norm`` bounds the 2-norm of the whole model's gradient; 0: no bound.
    Source: Loshchilov and Hutter 2019 (decoupled weight decay).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(
                f"'{self.schedule}' is not a schedule", where="schedule",
                remedy="use constant, linear or cosine",
            )  # fmt: skip
        if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ConfigError(
                f"{self.total_steps} optimizer steps leave none after {self.warmup_steps} of "
                "warm-up", where="warmup_steps", remedy="lower it",
            )  # fmt: skip
        for name, value in (("beta1", self.betas[0]), ("beta2", self.betas[1])):
            if not 0 <= value < 1:
                raise ConfigError(f"{value} is not in [0, 1)", where=name)
        for name in ("lr", "eps", "weight_decay", "warmup_steps", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{getattr(self, name)} is not at least 0", where=name)


def learning_rate(config: AdamConfig, step: int) -> float:
    """The rate of optimizer step ``step``, counted from 0.

    lr (step + 1) / warmup_steps while warming up, so that no step is lost; then with p the done
    share of the remaining steps: lr, lr (1 - p), or lr (1 + cos(pi p)) / 2.

    >>> [learning_rate(AdamConfig(lr=1.0, warmup_steps=2, total_steps=6, schedule="linear"), s)
    ...  for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / (config.total_steps - config.warmup_steps))
    if config.schedule == "linear":
        return config.lr * (1.0 - done)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))


class Section:
    """A run of the flat buffer that the ranks of ``group`` hold alike; they sum its gradients.

    ``own``: the range that this rank keeps state for, with ``zero`` 1 its shard, else all. Views.
    ``state``: as ``state()`` says, used as it is; None: masters are the weights, moments zero.
    """

    def __init__(
        self, flat: Tensor, within: Range, group: dist.ProcessGroup | None, *, zero: int,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.within, self.group = within, group
        self.shard_group = group if zero == 1 else None
        whole = flat[within[0] : within[1]]
        self.weights = data.shard(whole, self.shard_group)
        num_shards = 1 if self.shard_group is None else dist.get_world_size(self.shard_group)
        assert whole.numel() == self.weights.numel() * num_shards, (
            "ZeRO 1 needs ParameterBuffer(multiple=dp)"
        )
        rank = 0 if group is None else dist.get_rank(group)
        start = within[0] + (self.weights.numel() * rank if self.shard_group else 0)
        self.own: Range = (start, start + self.weights.numel())
        # Another rank has the same state.
        self.is_replica = self.shard_group is None and rank > 0
        if flat.dtype == torch.float32:
            self.masters = self.weights
        else:
            self.masters = self.weights.float() if state is None else state["weight"]
        if state is None:
            self.moments = torch.zeros_like(self.masters), torch.zeros_like(self.masters)
        else:
            self.moments = state["exp_avg"], state["exp_avg_sq"]

    def reduce(self, gradients: Tensor) -> None:
        """``gradients`` of the whole flat buffer become their sums where this rank needs them."""
        part = gradients[self.within[0] : self.within[1]]
        if self.shard_group is not None:
            data.reduce_scatter(part, self.shard_group)
        else:
            data.all_reduce(part, self.group)

    def gather(self, flat: Tensor) -> None:
        """Every shard of the section of ``flat`` from its owner."""
        data.all_gather(flat[self.within[0] : self.within[1]], self.shard_group)

    def take_weights(self) -> None:
        if self.masters is not self.weights:
            self.masters.copy_(self.weights)

    def give_weights(self) -> None:
        if self.masters is not self.weights:
            self.weights.copy_(self.masters)

    def state(self) -> dict[str, Tensor]:
        """What the rank keeps, fp32 [own values] each, shared and not copied.

        ``weight`` (the masters), ``exp_avg`` and ``exp_avg_sq``. With ``Adam``'s ``steps`` and
        ``count``, which are the same on all ranks, this is all that the next step depends on.
        """
        return {"weight": self.masters, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}


class Adam:
    """The optimizer of one rank. ``gradients``: flat, in ``buffer.flat``'s order and padding.

    ``partial``: parameters that all tensor shards hold, whose gradient is the sum of theirs.

    Collective: all ranks of the layout make one and call the same methods. Masters are taken
    from the buffer when it is made; after a later change of the weights call ``take_weights``.
    ``states``: of each section, where they are here already (``Section``); then call ``go_on``.
    ``early``: gradients of blocks are summed over replicas as ``block_done`` is told of them; not
    of a model with experts, whose gradients lie elsewhere.
    Bytes: 8 a value of the own range (all of it, or with ZeRO 1 a dp-th), and 4 more for masters.
    """

    def __init__(
        self, ctx: RankContext, buffer: ParameterBuffer, gradients: Tensor, config: AdamConfig, *,
        zero: int, partial: Sequence[str] = (), early: bool = False,
        states: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        assert gradients.shape == buffer.flat.shape, (gradients.shape, buffer.flat.shape)
        assert zero in (0, 1), zero
        self.ctx, self.buffer, self.gradients, self.config = ctx, buffer, gradients, config
        self.partial = tuple(partial)
        ends = (0, buffer.experts_start, buffer.flat.numel())
        parts = [
            (within, group)
            for within, group in zip(pairwise(ends), (ctx.dp_group, ctx.expert_group))
            if within[0] < within[1]
        ]
        self.sections = [
            Section(buffer.flat, within, group, zero=zero, state=state)
            for (within, group), state in zip(parts, states or repeat(None))
        ]
        self.early: EarlySums | None = None
        if early and ctx.dp_group is not None and not ctx.layout.spec.num_experts:
            buckets = make_buckets(
                buffer, ctx.layout.layers(ctx.pp_rank), bucket_bytes=data.BUCKET_BYTES,
                value_bytes=gradients.element_size(),
            )  # fmt: skip
            self.early = EarlySums(gradients, buckets, ctx.dp_group, zero=zero)
        self.count = torch.zeros((), dtype=torch.float32, device=buffer.flat.device)
        self.steps = 0
        self.decayed = [len(piece.length) > 1 for piece in buffer.slices]
        self.is_counted = self._find_counted()
        self.counted = [
            part
            for section in self.sections
            if not section.is_replica
            for part in _ranges(buffer, self.is_counted, section.own)[True]
        ]

    @property
    def own_state(self) -> tuple[Tensor, ...]:
        """What nothing but ``step`` reads: moments, and masters where they are not the weights."""
        found: list[Tensor] = []
        for section in self.sections:
            masters = () if section.masters is section.weights else (section.masters,)
            found += [*section.moments, *masters]
        return tuple(found)

    def _find_counted(self) -> list[bool]:
        """Per slice: is its gradient this rank's to count in the norm, once over tp and pp."""
        ctx, layout = self.ctx, self.ctx.layout
        shapes = {shape.name: shape for shape in layout.stage_parameters(ctx.pp_rank)}
        second_copy = layout.spec.tied_embedding and not ctx.is_first_stage
        return [
            ctx.tp_rank % (layout.tp // shapes[piece.name].num_parts(layout.tp)) == 0
            and not (piece.name == EMBEDDING and second_copy)
            for piece in self.buffer.slices
        ]

    def step(self) -> Mapping[str, float]:
        """One update from the gradients as the backward passes left them, summed here over dp.

        Returns ``grad_norm`` (before clipping), ``lr`` and ``skipped``: 1.0 where the norm was
        not finite, and then the weights did not change. The gradients are undefined afterwards:
        set them to zero before the next backward pass.
        """
        lr = learning_rate(self.config, self.steps)
        with torch.no_grad():
            self._reduce_gradients()
            norm = self._gradient_norm()
            finite = math.isfinite(norm)
            if finite:
                bound = self.config.max_grad_norm
                # The + 1e-6 is torch.nn.utils.clip_grad_norm_'s.
                self._update(lr, divisor=(norm + 1e-6) / bound if bound > 0 else 0.0)
                for section in self.sections:
                    section.gather(self.buffer.flat)
        self.steps += 1
        return {"grad_norm": norm, "lr": lr, "skipped": 0.0 if finite else 1.0}

    def block_done(self, block: int) -> None:
        """Backward of the step's last micro-batch has left a block, counted within the stage."""
        if self.early is not None:
            for bucket in self.early.ready(block):
                self._sum_over_shards(bucket.names)
                self.early.start(bucket.within)

    def all_done(self) -> None:
        """Backward is over: all ranks begin what those without tokens at its end have not begun.

        Before anything else is sent to the other replicas, and before ``step`` or ``forget``.
        """
        self.block_done(0)

    def forget(self) -> None:
        """The step is not taken after all."""
        if self.early is not None:
            self.early.wait()

    def _reduce_gradients(self) -> None:
        if self.early is None:
            self._sum_over_shards(self.buffer.by_name)
            for section in self.sections:
                section.reduce(self.gradients)
            return
        self.all_done()
        in_buckets = frozenset[str]().union(*(bucket.names for bucket in self.early.buckets))
        self._sum_over_shards(self.buffer.by_name.keys() - in_buckets)
        for within in self.early.rest():
            if within[0] < within[1]:
                self.early.start(within)
        self.early.wait()

    def _sum_over_shards(self, names: Collection[str]) -> None:
        """Gradients of those of ``names`` that several shards or both end stages share."""
        shapes = self.ctx.layout.stage_parameters(self.ctx.pp_rank)
        # Kv heads that several shards hold, each for its own heads' queries.
        shared = [shape.name for shape in shapes if shape.max_parts and shape.name in names]
        self._sum(shared, self.ctx.kv_group)
        self._sum([name for name in self.partial if name in names], self.ctx.tp_group)
        if self.ctx.embedding_group is not None and EMBEDDING in names:
            embedding = self.buffer.view(EMBEDDING, of=self.gradients)
            data.all_reduce(embedding.flatten(), self.ctx.embedding_group)

    def _sum(self, names: Sequence[str], group: dist.ProcessGroup | None) -> None:
        """Gradients of some parameters become their sums over ``group``, in one message."""
        if group is None or not names:
            return
        views = [self.buffer.view(name, of=self.gradients) for name in names]
        together = torch.cat([view.flatten() for view in views])
        data.all_reduce(together, group)
        for view, total in zip(views, together.split([view.numel() for view in views])):
            view.copy_(total.view_as(view))

    def _gradient_norm(self) -> float:
        """2-norm of the whole model's gradient: squares of every value once, over the mesh."""
        ranges = [self.gradients[a:b] for a, b in self.counted]
        parts = [part for values in ranges for part in values.split(NORM_VALUES)]
        square = torch.zeros((), dtype=torch.float64, device=self.gradients.device)
        if parts:
            norms = torch._foreach_norm(parts, 2, dtype=torch.float32)
            square = torch.stack(norms).double().square().sum()
        if self.ctx.mesh_group is not None:
            dist.all_reduce(square, group=self.ctx.mesh_group)
        return math.sqrt(square.item()) if square.isfinite() else float(square.item())

    def _update(self, lr: float, *, divisor: float) -> None:
        """Gradients / max(1, ``divisor``) into moments, masters and weights."""
        self.count += 1
        scale = None
        if divisor > 1.0:
            scale = torch.full_like(self.count, divisor)
        for section in self.sections:
            self._update_section(section, lr, scale)

    def _update_section(self, section: Section, lr: float, scale: Tensor | None) -> None:
        first, last = section.own
        whole = self.gradients.dtype == torch.float32
        stride = max(1, last - first) if whole else CONVERTED_VALUES
        for start in range(first, last, stride):
            chunk = (start, min(last, start + stride))
            gradient = self.gradients[chunk[0] : chunk[1]].float()  # a view where it is fp32
            for decayed, ranges in _ranges(self.buffer, self.decayed, chunk).items():
                mine = [(a - first, b - first) for a, b in ranges]
                if not mine:
                    continue
                beta1, beta2 = self.config.betas
                torch._fused_adamw_(
                    [section.masters[a:b] for a, b in mine],
                    [gradient[a - start : b - start] for a, b in ranges],
                    [section.moments[0][a:b] for a, b in mine],
                    [section.moments[1][a:b] for a, b in mine],
                    [],
                    [self.count] * len(mine),
                    amsgrad=False,
                    maximize=False,
                    lr=lr,
                    beta1=beta1,
                    beta2=beta2,
                    eps=self.config.eps,
                    weight_decay=self.config.weight_decay if decayed else 0.0,
                    grad_scale=scale,
                )
        section.give_weights()

    def take_weights(self) -> None:
        """Masters from the buffer's weights, after these were filled from elsewhere."""
        for section in self.sections:
            section.take_weights()

    def go_on(self, *, steps: int, updates: int) -> None:
        """After ``state`` of the sections was filled from elsewhere: the weights follow.

        All ranks together. ``steps`` were taken, of which ``updates`` were not skipped.
        """
        self.steps = steps
        self.count.fill_(updates)
        with torch.no_grad():
            for section in self.sections:
                section.give_weights()
                section.gather(self.buffer.flat)


def _ranges(buffer: ParameterBuffer, flags: list[bool], within: Range) -> dict[bool, list[Range]]:
    """Runs of slices with equal flags, as ranges of the flat buffer cut to ``within``.

    The padding belongs to none. A tied embedding is a run by itself on both of its stages, so that
    both copies are updated by the same arithmetic.
    """
    found: dict[bool, list[Range]] = {True: [], False: []}
    runs = groupby(zip(flags, buffer.slices), key=lambda pair: (pair[0], pair[1].name == EMBEDDING))
    for (flag, _), group in runs:
        pieces = [piece for _, piece in group]
        start = buffer.starts[pieces[0].name]
        stop = buffer.starts[pieces[-1].name] + pieces[-1].num_values
        lo, hi = max(start, within[0]), min(stop, within[1])
        if lo < hi:
            found[flag].append((lo, hi))
    return found

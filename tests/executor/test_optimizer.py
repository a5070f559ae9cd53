"""Protects: the optimizer takes torch's AdamW's path, however weights and state are laid out.

Oracle: ``torch.optim.AdamW`` with ``clip_grad_norm_`` over whole parameters on one process. The
gradients are made up, cut by the layout and divided unevenly over replicas, so that no model's
error can hide one here.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.context import RankContext, build_contexts, single_process
from executor.parallel.optimizer import Adam, AdamConfig, learning_rate
from planner.layout import Layout, ParameterSlice, parameters
from planner.mesh import DeviceMesh
from profiles.errors import ConfigError
from profiles.models import ModelSpec
from tests.spawn import spawn

SPEC = ModelSpec(name="t", num_layers=3, hidden=6, num_heads=4, num_kv_heads=2, head_dim=2,
                 ffn=8, vocab=10, tied_embedding=True, qkv_bias=True)  # fmt: skip
MIXTURE = replace(SPEC, num_experts=4, experts_per_token=1)
CONFIG = AdamConfig(lr=0.01, weight_decay=0.1, warmup_steps=2, total_steps=8, schedule="cosine",
                    max_grad_norm=20.0)  # fmt: skip
STEPS = 5


def random(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Norms of both sides of CONFIG's bound: clipped in even steps only."""
    return random(f"{name} {step}", shape) * (2.0 if step % 2 == 0 else 0.1)


def box(piece: ParameterSlice) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))


def expected(config: AdamConfig, spec: ModelSpec = SPEC) -> tuple[dict[str, Tensor], list[float]]:
    """(weights, gradient norms) of the oracle after STEPS."""
    weights = {p.name: random(p.name, p.shape).requires_grad_() for p in parameters(spec)}
    decayed = [w for w in weights.values() if w.dim() > 1]
    others = [w for w in weights.values() if w.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
    )  # fmt: skip
    norms = []
    for step in range(STEPS):
        for name, weight in weights.items():
            weight.grad = gradient(name, tuple(weight.shape), step)
        bound = config.max_grad_norm or math.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), bound)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}, norms


def made(
    ctx: RankContext, config: AdamConfig, zero: int, dtype: torch.dtype = torch.float32
) -> tuple[ParameterBuffer, Adam]:
    buffer = ParameterBuffer.for_rank(
        ctx.layout, ctx.rank, dtype=dtype, device="cpu", multiple=ctx.layout.dp
    )
    for shape in ctx.layout.stage_parameters(ctx.pp_rank):
        piece = buffer.by_name[shape.name]
        buffer.view(shape.name).copy_(random(shape.name, shape.shape)[box(piece)])
    gradients = torch.zeros(buffer.flat.shape, dtype=torch.float32)
    return buffer, Adam(ctx, buffer, gradients, config, zero=zero)


def set_gradients(ctx: RankContext, adam: Adam, step: int) -> None:
    """This rank's part of a sum over dp, or of experts over those that hold them, and over both

    ends of a tied embedding.
    """
    ep, dp = ctx.layout.ep, ctx.layout.dp
    share = (ctx.dp_rank + 1) / sum(range(1, dp + 1))
    of_experts = (ctx.dp_rank // ep + 1) / sum(range(1, dp // ep + 1))
    for shape in ctx.layout.stage_parameters(ctx.pp_rank):
        part = of_experts if shape.is_expert else share
        if shape.name == "embedding.weight" and ctx.layout.pp > 1:
            part *= 0.25 if ctx.is_first_stage else 0.75
        piece = adam.buffer.by_name[shape.name]
        value = gradient(shape.name, shape.shape, step)[box(piece)] * part
        adam.buffer.view(shape.name, of=adam.gradients).copy_(value)


def follow(rank: int, world_size: int, cases: list[tuple[Layout, int, AdamConfig]]) -> int:
    contexts = build_contexts(
        dict.fromkeys(layout for layout, _, _ in cases), rank=rank, device=torch.device("cpu")
    )
    for layout, zero, config in cases:
        if rank not in layout.mesh:
            continue
        ctx, label = contexts[layout], f"{layout.key} zero {zero} {config}"
        weights, norms = expected(config, layout.spec)
        buffer, adam = made(ctx, config, zero)
        for step in range(STEPS):
            set_gradients(ctx, adam, step)
            if step == 3:  # resume in the middle
                old = adam
                adam = Adam(ctx, buffer, old.gradients, config, zero=zero)
                for section, before in zip(adam.sections, old.sections, strict=True):
                    for name, values in section.state().items():
                        values.copy_(before.state()[name])
                adam.go_on(steps=old.steps, updates=int(old.count))
            told = adam.step()
            assert told["grad_norm"] == pytest.approx(norms[step], rel=1e-5), label
            assert told["lr"] == learning_rate(config, step)
            assert told["skipped"] == 0.0
            adam.gradients.zero_()
        for piece in buffer.slices:
            torch.testing.assert_close(
                buffer.view(piece.name), weights[piece.name][box(piece)], rtol=1e-5, atol=1e-6,
                msg=f"{label} {piece}",
            )  # fmt: skip
        sizes = [buffer.experts_start // (layout.dp if zero else 1)]
        if layout.ep > 1:
            rest = buffer.flat.numel() - buffer.experts_start
            sizes.append(rest // (layout.dp // layout.ep if zero else 1))
        kept = [section.state()["exp_avg"].numel() for section in adam.sections]
        assert kept == sizes, "ZeRO 1 keeps a dp-th, of experts a (dp / ep)-th"
        padding = torch.ones_like(buffer.flat)
        for piece in buffer.slices:
            buffer.view(piece.name, of=padding).zero_()
        assert not (buffer.flat * padding).any(), "padding stays zero"
    return 1


def test_every_layout_follows_adamw_with_clipping() -> None:
    def layout(pp: int, tp: int, dp: int) -> Layout:
        return Layout(spec=SPEC, mesh=DeviceMesh(0, pp * tp * dp), pp=pp, tp=tp, dp=dp)

    layouts = [layout(*s) for s in ((1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (3, 1, 1),
                                    (2, 1, 2), (2, 2, 1), (1, 2, 2), (1, 1, 3))]  # fmt: skip
    layouts += [
        Layout(spec=MIXTURE, mesh=DeviceMesh(0, pp * tp * dp), pp=pp, tp=tp, dp=dp, ep=ep)
        for pp, tp, dp, ep in ((1, 1, 2, 2), (1, 1, 4, 2), (1, 2, 2, 2), (2, 1, 2, 2), (1, 1, 4, 4))
    ]
    plain = AdamConfig(lr=0.01, max_grad_norm=0.0)
    cases = [(shape, zero, CONFIG) for shape in layouts for zero in (0, 1)]
    cases += [(layouts[5], 1, plain), (layouts[5], 0, plain)]
    assert all(spawn(4, follow, cases))


def alone() -> RankContext:
    return single_process(Layout(spec=SPEC, mesh=DeviceMesh(0, 1)))


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_weights_follow_their_fp32_masters(gradient_dtype: torch.dtype) -> None:
    """bf16 weights are the fp32 path rounded, not a path of rounded steps."""
    ctx = alone()
    buffer, adam = made(ctx, CONFIG, 0, torch.bfloat16)
    adam.sections[0].masters.copy_(made(ctx, CONFIG, 0)[0].flat)
    adam.gradients = adam.gradients.to(gradient_dtype)
    for step in range(STEPS):
        set_gradients(ctx, adam, step)
        adam.step()
    weights, _ = expected(CONFIG)
    tolerance = 1e-6 if gradient_dtype == torch.float32 else 2e-3
    for piece in buffer.slices:
        master = buffer.view(piece.name, of=adam.sections[0].masters)
        torch.testing.assert_close(master, weights[piece.name], rtol=1e-5, atol=tolerance)
        assert torch.equal(buffer.view(piece.name), master.bfloat16())


def test_conversion_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for values in (1 << 24, 37):
        monkeypatch.setattr("executor.parallel.optimizer.CONVERTED_VALUES", values)
        _, adam = made(alone(), CONFIG, 0, torch.bfloat16)
        adam.gradients = adam.gradients.bfloat16()
        for step in range(2):
            set_gradients(alone(), adam, step)
            adam.step()
        found.append(adam.sections[0].masters.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_a_norm_of_many_values_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.parallel.optimizer.NORM_VALUES", 7)
    _, adam = made(alone(), CONFIG, 0)
    set_gradients(alone(), adam, 0)
    assert adam.step()["grad_norm"] == pytest.approx(expected(CONFIG)[1][0], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_no_weight(bad: float) -> None:
    buffer, adam = made(alone(), CONFIG, 0)
    before = buffer.flat.clone()
    adam.gradients[5] = bad
    assert adam.step()["skipped"] == 1.0
    assert torch.equal(buffer.flat, before)
    adam.gradients.zero_()
    set_gradients(alone(), adam, 0)
    assert adam.step()["skipped"] == 0.0
    assert buffer.flat.isfinite().all()
    assert not torch.equal(buffer.flat, before)


def test_schedules_begin_at_the_first_step_and_end_near_zero() -> None:
    def rates(schedule: str) -> list[float]:
        config = AdamConfig(lr=2.0, warmup_steps=4, total_steps=12, schedule=schedule)  # type: ignore[arg-type]
        return [learning_rate(config, step) for step in range(13)]

    for schedule in ("constant", "linear", "cosine"):
        assert rates(schedule)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates("constant")[12] == 2.0
    assert rates("linear")[8] == rates("linear")[4] / 2 == 1.0
    assert rates("cosine")[8] == pytest.approx(1.0)
    assert rates("cosine")[6] == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert rates("linear")[12] == rates("cosine")[12] == 0.0


def test_wrong_numbers_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"schedule: 'step' is not a schedule; use constant"):
        AdamConfig(lr=1.0, schedule="step")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"beta2: 1.0 is not in \[0, 1\)"):
        AdamConfig(lr=1.0, betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="lr: nan is not at least 0"):
        AdamConfig(lr=math.nan)
    with pytest.raises(ConfigError, match="3 optimizer steps leave none after 3 of warm-up"):
        AdamConfig(lr=1.0, schedule="linear", warmup_steps=3, total_steps=3)

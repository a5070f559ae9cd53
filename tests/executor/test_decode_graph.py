"""Protects decode turns as graphs: a turn that is replayed from recorded operators on fixed
addresses chooses what eager turns choose, for every family, way of sampling and layout; and nothing
in it waits for a device.

The oracle is the engine without graphs. ``graphs.Graphs`` stands in for CUDA: what Python decided
in a capture is frozen in all replays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from executor.batch import SequenceBatch
from executor.buffers import ParameterBuffer
from executor.context import build_contexts, single_process
from executor.cuda_graph import Capture, GraphCapture
from executor.generate.answers import begun
from executor.generate.kv_cache import KVCache
from executor.generate.sampling import SamplingParams, sample
from executor.generate.static_step import (
    ROW_STEP,
    TURNS_BEFORE,
    StaticDecode,
    rounded_rows,
    rounded_up,
)
from executor.model.transformer import DecoderStage
from planner.layout import Layout
from planner.mesh import DeviceMesh
from profiles.models import ModelSpec
from tests.executor.graphs import Graphs, tensors_of
from tests.executor.small_models import (
    FAMILY_SPECS,
    random_buffer,
    single_layout,
    single_stage,
    small_spec,
)
from tests.executor.test_engine import params, random_prompts, run, sequences_of
from tests.spawn import spawn

DENSE = {name: spec for name, spec in FAMILY_SPECS.items() if not spec.num_experts}
SETTINGS = {
    "plain": params(),
    "greedy": params(greedy=True),
    "truncated": params(temperature=0.7, top_k=9, top_p=0.8),
    "top-p": params(top_p=0.9),
    "min new tokens": params(min_new_tokens=7),
}
OPTIONS: list[dict[str, Any]] = [{}, {"max_rows": 3}, {"num_groups": 2}, {"max_prompt_tokens": 9}]


def assert_same(got: SequenceBatch, expected: SequenceBatch) -> None:
    assert sequences_of(got) == sequences_of(expected)
    assert torch.equal(got.get("finished"), expected.get("finished"))
    torch.testing.assert_close(got.get("log_probs"), expected.get("log_probs"), atol=5e-5, rtol=0)


# ---- what is replayed is what would have run ---------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_replayed_turns_choose_what_eager_turns_choose(name: str) -> None:
    """Answers of unlike lengths, rows that are compacted, prompts that enter as rows come free."""
    stage, graphs = single_stage(DENSE[name]), Graphs()
    for place, setting in enumerate(SETTINGS.values()):
        options = OPTIONS[place % len(OPTIONS)]
        got = run(stage, setting, capture=graphs, **options)
        assert_same(got, run(stage, setting, **options))
    assert len(graphs.replays) > 2 * graphs.captures > 0, "hardly anything was replayed"


@pytest.mark.parametrize("options", OPTIONS)
def test_sequences_of_one_prompt(options: dict[str, Any]) -> None:
    """Several answers to each prompt, which share its pass before they are decoded."""
    stage = single_stage(small_spec())
    prompts = [prompt for prompt in random_prompts(stage.spec)[:3] for _ in range(4)]
    more = {"prompts": prompts, "samples": range(40, 52), **options}
    graphs = Graphs()
    assert_same(run(stage, params(), capture=graphs, **more), run(stage, params(), **more))
    assert graphs.replays


def test_long_answers_go_through_several_column_counts() -> None:
    stage = single_stage(small_spec(max_positions=400, sliding_window=90))
    setting = params(stop_token_ids=(), max_new_tokens=200)
    graphs = Graphs()
    some = {"prompts": random_prompts(stage.spec, [3, 30, 60]), "samples": (1, 2, 3)}
    assert_same(run(stage, setting, capture=graphs, **some), run(stage, setting, **some))
    assert graphs.captures == 4  # 64, 128, 192, 256 columns; the cache has 260


def test_experts_stay_eager() -> None:
    """Their rows are numbers that the device must be asked for: no capture may be tried."""
    graphs = Graphs()
    run(single_stage(FAMILY_SPECS["mixtral"]), params(), capture=graphs)
    assert graphs.captures == 0


def test_each_shape_is_captured_once_and_not_before_it_has_come_often() -> None:
    stage = single_stage(small_spec())
    setting = params(stop_token_ids=(), max_new_tokens=TURNS_BEFORE + 2)
    prompts = {"prompts": random_prompts(stage.spec, [4] * 3), "samples": (1, 2, 3)}
    graphs = Graphs()
    run(stage, setting, capture=graphs, **prompts)  # the first token comes with the prompts
    assert (graphs.captures, graphs.replays) == (1, [0])
    few = params(stop_token_ids=(), max_new_tokens=TURNS_BEFORE + 1)
    graphs = Graphs()
    run(stage, few, capture=graphs, **prompts)
    assert graphs.captures == 0


def test_what_a_generation_captured_is_gone_with_it() -> None:
    """At once, without the garbage collector: its memory is counted as free between calls."""
    graphs, held = Graphs(), list[weakref.ref[Any]]()

    def capture(action: Callable[[], object]) -> Callable[[], object]:
        replay = graphs(action)
        held.append(weakref.ref(replay))
        return replay

    run(single_stage(small_spec()), params(), capture=capture)
    assert held
    assert not any(reference() is not None for reference in held)


# ---- shapes ------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(0, 5000), st.sampled_from((1, 8, 64)))
def test_rounding_wastes_at_most_a_quarter_and_keeps_few_counts(
    count: int, beyond: int, step: int
) -> None:
    found = rounded_up(count, step, count + beyond)
    assert count <= found <= count + beyond
    assert found - count < max(step, count / 4)
    assert found <= rounded_up(min(count + 1, count + beyond), step, count + beyond)
    rows = rounded_rows(count, count + beyond)
    assert count <= rows <= count + beyond
    assert rows < 2 * count if count <= ROW_STEP else rows - count < max(ROW_STEP, count / 4)


def test_there_are_few_counts() -> None:
    assert len({rounded_rows(n, 1024) for n in range(1, 1025)}) == 4 + 7 + 4 * 4


# ---- one step -----------------------------------------------------------------------------------


def static_decode(
    stage: DecoderStage, setting: SamplingParams, *, max_rows: int, columns: int = 70
) -> StaticDecode:
    spec = stage.spec
    cache = KVCache(
        num_layers=len(stage.layers), num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        max_rows=max_rows, max_columns=columns, dtype=stage.buffer.flat.dtype,
        device=stage.ctx.device, window=spec.sliding_window,
    )  # fmt: skip
    decode = StaticDecode(stage, cache, setting)
    decode.begin(1, 2, Graphs())
    return decode


def three_rows(stage: DecoderStage, garbage: float) -> tuple[Tensor, list[Tensor], StaticDecode]:
    """(result, keys and values before) of a turn of 3 rows in 4, in a cache of 8."""
    decode = static_decode(stage, params(), max_rows=8)
    cache, generator = decode.cache, torch.Generator().manual_seed(0)
    for x in (*cache.keys, *cache.values):
        x[:3] = torch.randn(x[:3].shape, generator=generator)
        x[3:] = garbage
    before = [x.clone() for x in (*cache.keys, *cache.values)]
    answers = begun(stage.spec, random_prompts(stage.spec, [5, 9, 2]), (4, 8, 9), params())
    for answer in answers:
        answer.append(7, 0.0)
    cache.lengths = [answer.length for answer in answers]
    with torch.no_grad():
        return decode.run(answers, None).clone(), before, decode


def test_rows_without_a_sequence_write_their_own_first_column_only() -> None:
    """Nor does what lies in rows out of use, were it no number, reach a live row."""
    stage = single_stage(small_spec())
    result, before, decode = three_rows(stage, 0.25)
    for old, new in zip(before, (*decode.cache.keys, *decode.cache.values), strict=True):
        changed = (old != new).any(-1).any(1).nonzero().tolist()
        assert changed == [[0, 5], [1, 9], [2, 2], [3, 0]]
    assert torch.equal(three_rows(stage, torch.nan)[0], result)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", DENSE)
def test_a_step_neither_asks_the_device_nor_sends_to_it(name: str, setting: str) -> None:
    """On a device whose tensors have no values to ask for; nothing lies on another one."""
    device, layout = torch.device("meta"), single_layout(DENSE[name])
    buffer = ParameterBuffer.for_rank(layout, 0, dtype=torch.bfloat16, device=device)
    stage = DecoderStage(single_process(layout, device), buffer)
    decode, graphs = static_decode(stage, SETTINGS[setting], max_rows=8), Graphs()
    with torch.no_grad():
        graphs(lambda: decode.step(4, 64))
    (recorder,) = graphs.recorders
    assert len(recorder.operations) > 20 * len(stage.layers)
    for func, *values in recorder.operations:
        assert {x.device.type for x in tensors_of(values)} <= {"meta"}, func


def test_such_a_device_notices_a_question() -> None:
    """The test before would fail: top-p's search for few candidates asks."""
    logits, u = torch.zeros(2, 5000, device="meta"), torch.zeros(2, device="meta").double()
    with pytest.raises(RuntimeError, match="item"):
        sample(logits, u, params(top_p=0.9))
    sample(logits, u, params(top_p=0.9), static=True)


# ---- layouts, in real processes -----------------------------------------------------------------


LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "pp2 tp2": {"pp": 2, "tp": 2}}


def batches(rank: int, world_size: int, layout: Layout) -> list[tuple[SequenceBatch, int]]:
    """Every setting on one rank, with its number of replays."""
    context = build_contexts([layout], rank=rank, device=torch.device("cpu"))[layout]
    stage = DecoderStage(context, random_buffer(layout, rank))
    found = []
    for place, setting in enumerate(SETTINGS.values()):
        graphs = Graphs()
        found.append(
            (
                run(stage, setting, capture=graphs, **OPTIONS[place % len(OPTIONS)]),
                len(graphs.replays),
            )
        )
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "pp2 tp2")) for n in LAYOUTS]
)
def test_replays_with_collectives_and_between_stages(name: str) -> None:
    """Shards' sums are in the recorded turn, what stages send each other is not."""
    spec = small_spec(tied_embedding="pp" in name)
    size = 4 if name == "pp2 tp2" else 2
    layout = Layout(spec=spec, mesh=DeviceMesh(0, size), **LAYOUTS[name])
    by_rank = spawn(size, batches, layout)
    reference = single_stage(spec)
    assert all(sum(replays for _, replays in results) > 20 for results in by_rank)
    for case, setting in enumerate(SETTINGS.values()):
        expected = run(reference, setting)
        for results in by_rank:
            got, _ = results[case]
            assert sequences_of(got) == sequences_of(expected), (name, case)
            torch.testing.assert_close(
                got.get("log_probs"), expected.get("log_probs"), atol=1e-4, rtol=0
            )


# ---- on a GPU -----------------------------------------------------------------------------------


def cuda_stage(spec: ModelSpec, dtype: torch.dtype) -> DecoderStage:
    device = torch.device("cuda", 0)
    layout = single_layout(spec)
    buffer = ParameterBuffer.for_rank(layout, 0, dtype=dtype, device=device)
    buffer.flat.copy_(random_buffer(layout).flat)
    return DecoderStage(single_process(layout, device), buffer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", DENSE)
def test_graphs_on_cuda_choose_what_eager_turns_choose(name: str, dtype: torch.dtype) -> None:
    """Token by token. In bf16, where the number of rows decides roundings and so tokens, the oracle
    is the same step without graphs; in fp32 it is the engine without any.
    """
    stage, stream = cuda_stage(DENSE[name], dtype), torch.cuda.Stream()
    prompts = [prompt.cuda() for prompt in random_prompts(stage.spec)]
    oracle: Capture | None = (lambda action: action) if dtype == torch.bfloat16 else None
    for setting in SETTINGS.values():
        graphed, eager = (
            run(stage, setting, prompts=prompts, capture=capture)
            for capture in (GraphCapture(stage.ctx.device, stream), oracle)
        )
        assert_same(graphed, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_graphs_is_free_after_a_generation() -> None:
    stage, stream = cuda_stage(small_spec(), torch.bfloat16), torch.cuda.Stream()
    prompts = [prompt.cuda() for prompt in random_prompts(stage.spec)]
    held = []
    for _ in range(4):
        run(stage, params(), prompts=prompts, capture=GraphCapture(stage.ctx.device, stream))
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3]  # the first sets up workspaces

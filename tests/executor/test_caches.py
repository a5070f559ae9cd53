"""Protects what stays of a generation: with kept caches and graphs a run computes what it computes
without, bit for bit, whatever weights, prompts and lengths come next; and graphs are captured anew
where the weights may lie elsewhere.

Oracle: caches that are made for one generation.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from executor.batch import SequenceBatch
from executor.cuda_graph import GraphCapture
from executor.dataset import MockData
from executor.generate import engine
from executor.generate.caches import Caches
from executor.model.transformer import DecoderStage
from executor.worker import Worker
from planner.memory import cache_memory
from planner.plan import ExecutionPlan
from planner.plan_memory import kept_caches, kept_layouts
from planner.program import Generate
from tests.executor.graphs import Graphs
from tests.executor.small_models import random_buffer, single_layout, single_stage, small_spec
from tests.executor.test_decode_graph import assert_same, cuda_stage
from tests.executor.test_engine import params, run
from tests.executor.test_staleness import ahead
from tests.runs import OVERRIDES, Outcome, make_plan, run_rank
from tests.spawn import spawn

LONGEST = 40  # tokens of a row that is kept
LENGTHS = [(5, 9, 1, 5, 14, 2, 7), (14, 3), (8, 8, 8, 2, 16, 1, 11), (1, 16, 6, 6, 5)]
SETTING = params(top_k=20)


def prompts_of(generation: int) -> dict[str, Any]:
    """Of one of several generations, with the arguments that differ; some prompts are alike."""
    lengths = LENGTHS[generation % len(LENGTHS)]
    generator = torch.Generator().manual_seed(generation)
    prompts = [torch.randint(0, 64, (length,), generator=generator) for length in lengths]
    prompts[-1] = prompts[0][: len(prompts[-1])].clone()
    return {"prompts": prompts, "samples": range(len(prompts)), "step": generation}


def change_weights(stage: DecoderStage, generation: int) -> None:
    stage.buffer.flat.copy_(random_buffer(single_layout(stage.spec), seed=generation).flat)


def spoil(caches: Caches) -> None:
    """What lies in rows that nobody uses: far from what any token wrote."""
    for cache in caches.caches:
        for x in (*cache.keys, *cache.values):
            x.fill_(1e6)


def assert_equal(got: SequenceBatch, expected: SequenceBatch) -> None:
    assert got.lengths == expected.lengths
    for name, values in expected.per_token.items():
        assert torch.equal(got.get(name), values), name


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products read weights where they lie, as a GPU's do: a graph knows no packed copy's place."""
    monkeypatch.setattr(engine, "packed_weights", lambda weights: nullcontext())


# ---- one process --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options"),
    [((7,), {}), ((3,), {"max_rows": 3}), ((4, 3), {"num_groups": 2}),
     ((2, 2), {"max_rows": 4, "num_groups": 2})],
)  # fmt: skip
@pytest.mark.parametrize("window", [0, 6])
def test_generations_in_one_memory_are_those_in_memory_of_their_own(
    rows: tuple[int, ...], options: dict[str, int], window: int
) -> None:
    stage = single_stage(small_spec(sliding_window=window))
    caches, places = Caches(rows, LONGEST), list[list[int]]()
    for generation in range(5):
        change_weights(stage, generation)
        more = {**prompts_of(generation), **options}
        got = run(stage, SETTING, caches=caches, **more)
        assert_equal(got, run(stage, SETTING, **more))
        places.append([x.data_ptr() for cache in caches.caches for x in cache.keys])
        spoil(caches)
    assert places[2] == places[3] == places[4], "the longest was there from then on"


def test_a_generation_that_needs_more_has_memory_of_its_own_and_nothing_else_is_there() -> None:
    stage = single_stage(small_spec())
    caches = Caches((7,), 20)
    short = params(max_new_tokens=4)
    run(stage, short, caches=caches, **prompts_of(0))
    assert caches.caches
    got = run(stage, SETTING, caches=caches, **prompts_of(0))  # 38 tokens
    assert not caches.caches
    assert_equal(got, run(stage, SETTING, **prompts_of(0)))
    got = run(stage, short, caches=caches, **prompts_of(0))
    assert caches.caches
    assert_equal(got, run(stage, short, **prompts_of(0)))
    assert not Caches((3,), 40).suffice((4,), 40)
    assert not Caches((3,), 40).suffice((2, 2), 40)
    assert Caches((3, 3), 40).suffice((2,), 8)


# ---- graphs, of recorded operators ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_groups": 2}])
def test_what_was_captured_is_replayed_with_new_weights_prompts_and_noise(
    unpacked: None, options: dict[str, int]
) -> None:
    """Oracle: graphs of each generation's own in caches of the same size, and none at all."""
    stage = single_stage(small_spec())
    rows = (4, 3) if options else (7,)
    caches, graphs, captures = Caches(rows, LONGEST), Graphs(), [0]
    longer = replace(SETTING, stop_token_ids=(3, 17))
    for generation in range(4):
        change_weights(stage, generation)
        more = {**prompts_of(2), "step": generation, **options}
        more["prompts"] = [(x + generation) % 64 for x in more["prompts"]]
        before = len(graphs.replays)
        got = run(stage, longer, caches=caches, capture=graphs, **more)
        captures.append(graphs.captures)
        own = run(stage, longer, caches=Caches(rows, LONGEST), capture=Graphs(), **more)
        assert_equal(got, own)
        assert_same(got, run(stage, longer, **more))
        spoil(caches)
        old = [number for number in graphs.replays[before:] if number < captures[-2]]
        assert len(old) > len(graphs.replays[before:]) / 2 or generation == 0
    assert graphs.replays
    assert captures[-1] < 2 * captures[1]


def test_a_shape_that_a_generation_does_without_is_captured_again(unpacked: None) -> None:
    """Else graphs of all shapes that ever came would stay, each with some memory of its own."""
    stage, graphs, caches = single_stage(small_spec()), Graphs(), Caches((4,), LONGEST)
    endless = params(stop_token_ids=(), max_new_tokens=12)
    captures = []
    for rows in (3, 3, 1, 3):
        more = {"prompts": prompts_of(0)["prompts"][:rows], "samples": range(rows)}
        run(stage, endless, caches=caches, capture=graphs, **more)
        captures.append(graphs.captures)
        (decode,) = caches.decodes
        assert [rows for rows, _ in decode.replayed] == [4 if rows == 3 else 1]
    assert captures == [1, 1, 2, 3]
    run(stage, endless, caches=caches, capture=graphs, **more)
    assert list(decode.captured) == [(4, LONGEST)]


def test_graphs_are_captured_anew_for_another_stage_and_other_sampling(unpacked: None) -> None:
    """A stage is another where the weights may be: here they are."""
    stage, caches = single_stage(small_spec()), Caches((7,), LONGEST)
    other = DecoderStage(stage.ctx, random_buffer(single_layout(stage.spec), seed=8))
    greedy = params(greedy=True)
    cases = [(stage, SETTING), (other, SETTING), (other, greedy), (other, greedy)]
    captured = []
    for own, setting in cases:
        graphs = Graphs()
        got = run(own, setting, caches=caches, capture=graphs, **prompts_of(0))
        assert_same(got, run(own, setting, **prompts_of(0)))
        assert graphs.replays
        captured.append(caches.decodes[0])
    assert len(set(captured[:3])) == 3
    assert captured[2] is captured[3]


class Replay:
    """A graph, to be seen as it goes."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def __call__(self) -> None:
        self.run()


def test_graphs_go_with_their_caches_at_once(unpacked: None) -> None:
    """Nobody who ends a communicator that they know need wait for the garbage collector."""
    stage, graphs, caches = single_stage(small_spec()), Graphs(), Caches((7,), LONGEST)
    made: list[weakref.ref[Replay]] = []

    def capture(action: Callable[[], object]) -> Replay:
        replay = Replay(graphs(action))
        made.append(weakref.ref(replay))
        return replay

    run(stage, SETTING, caches=caches, capture=capture, **prompts_of(0))
    gc.disable()
    try:
        assert any(replay() is not None for replay in made)
        del caches
        assert [replay() for replay in made] == [None] * len(made)
    finally:
        gc.enable()


def capture_in(caches: Caches, stage: DecoderStage, stream: torch.cuda.Stream) -> GraphCapture:
    return GraphCapture(stage.ctx.device, stream, caches.pool)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_that_stay_on_cuda_choose_what_new_ones_choose() -> None:
    """With new weights, prompts and noise; also after what was there was given up."""
    stage, stream, rows = cuda_stage(small_spec(), torch.bfloat16), torch.cuda.Stream(), (7,)
    caches = Caches(rows, LONGEST)
    for generation in range(4):
        change_weights(stage, generation)
        more = prompts_of(generation)
        more["prompts"] = [prompt.cuda() for prompt in more["prompts"]]
        if generation == 3:
            caches.clear()
        kept, own = (
            run(stage, SETTING, caches=held, capture=capture_in(held, stage, stream), **more)
            for held in (caches, Caches(rows, LONGEST))
        )
        assert_equal(kept, own)


# ---- real workers over steps ---------------------------------------------------------------------


class Watched(Worker):
    """Evaluates before every step; ``captures``: by step, of graphs; ``made``: all workers.

    ``keeps`` False: nothing is kept. Where turns are graphs the caches are still as large, for a
    turn's columns, and so the order of its sums, are rounded up to the cache's at most.
    """

    keeps: ClassVar[bool] = True
    graphed: ClassVar[bool] = False
    made: ClassVar[list[Watched]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.graphs = Graphs()
        self.captures: list[int] = []
        if self.graphed:
            self.generation.capture = lambda stage, pool: self.graphs  # type: ignore[method-assign]
        self.made.append(self)

    def _generate(self, instruction: Generate, counts: dict[str, int]) -> None:
        whole = self.keeps or self.graphed
        super()._generate(replace(instruction, keeps=instruction.keeps and whole), counts)
        if not self.keeps:
            self.generation.kept.clear()

    def run_step(self, step: int, *, last: bool = False) -> None:
        config = self.run.config
        other = MockData(
            vocab=96, seed=9, prompt_len=config.prompt_len, response_len=config.response_len
        )
        self.evaluate(step, other, index=step)
        self.samples.values.clear()
        super().run_step(step, last=last)
        self.captures.append(self.graphs.captures)


STEPS = 3
WORDS = [*OVERRIDES, f"total_steps={STEPS}", "actor.lr=1e-2"]
PLANS = {
    "tp": make_plan(2, "0:d1p1m2:1", overrides=WORDS),
    "pp, waves": make_plan(
        2, "0:d1p2m1:2", overrides=WORDS, actor_gen="0:d1p2m1:2:rows=5"
    ),
    "dp, unlike shares": make_plan(2, "0:d2p1m1:1", overrides=[*WORDS, "batch_size=5"]),
    # The weights come in every step, to memory that is kept.
    "moves": make_plan(2, "0:d1p1m2:1", overrides=WORDS, actor_gen="0:d2p1m1:1"),
    "ahead": ahead(make_plan(2, "0:d1p2m1:2", overrides=WORDS, actor_gen="0:d1p1m2:1")),
}  # fmt: skip
GENERATION = ["init=random", "total_steps=3", "batch_size=4", "prompt_len=8", "response_len=24"]
OFFLOADED = {
    f"{name}{offload}": make_plan(
        2,
        "0:d2p1m1:1",
        overrides=GENERATION,
        algorithm="generation",
        actor_gen=f"0:{layout}:1{offload}",
    )
    for name, layout in (("dp", "d2p1m1"), ("tp", "d1p1m2"))
    for offload in ("", ":offload")
}

Found = tuple[Outcome, list[int], int]


def variants(
    rank: int, world_size: int, plans: dict[str, ExecutionPlan], folder: str, graphed: bool
) -> dict[tuple[str, bool], Found]:
    """By plan and whether anything is kept: (outcome, captures by step, bytes that are kept)."""
    engine.packed_weights = (  # type: ignore[assignment]
        (lambda weights: nullcontext()) if graphed else engine.packed_weights
    )
    Watched.graphed = graphed
    found = {}
    for name, plan in plans.items():
        for keeps in (True, False):
            Watched.keeps = keeps
            own = Path(folder) / f"{name} {keeps}".replace(":", "_")
            own.mkdir(exist_ok=True)
            outcome = run_rank(rank, world_size, plan, str(own), worker_class=Watched)
            worker = Watched.made[-1]
            held = [c for caches in worker.generation.kept.values() for c in caches.caches]
            found[name, keeps] = outcome, worker.captures, sum(c.num_bytes for c in held)
    return found


def assert_alike(kept: Outcome, without: Outcome) -> None:
    """Tokens, numbers and trained weights, bit for bit."""
    assert kept.tokens == without.tokens
    assert kept.metrics == without.metrics
    for role, slices in without.slices.items():
        for key, value in slices.items():
            assert torch.equal(kept.slices[role][key], value), (role, key)


def test_a_run_with_kept_caches_is_the_run_without(tmp_path: Path) -> None:
    """Evaluated before every step; what is kept is what the planner counts."""
    by_rank = spawn(2, variants, PLANS, str(tmp_path), False, timeout_s=200.0)
    for name, plan in PLANS.items():
        assert kept_caches(plan, kept_layouts(plan)) == {"actor_gen"}, name
        call, allocation = plan.problem.graph.call("actor_gen"), plan.allocations["actor_gen"]
        spec = plan.problem.spec_of("actor_gen")
        assert spec is not None
        for rank, found in enumerate(by_rank):
            kept, without = found[name, True], found[name, False]
            assert_alike(kept[0], without[0])
            stage = allocation.strategy.coordinates(rank)[0]
            planned = cache_memory(plan.problem, call, allocation, spec, stage).kv_cache
            assert (kept[2], without[2]) == (planned, 0), name


def test_graphs_stay_where_the_weights_do(tmp_path: Path) -> None:
    """Of an offloaded role they are captured anew in every step: its weights may come back to
    another place."""
    plans = {"ppo": PLANS["moves"], **OFFLOADED}
    by_rank = spawn(2, variants, plans, str(tmp_path), True, timeout_s=200.0)
    for name in plans:
        for found in by_rank:
            kept, without = found[name, True], found[name, False]
            assert_alike(kept[0], without[0])
            first, *later = kept[1]
            assert first > 0, name
            if name.endswith(":offload"):
                assert kept[2] == 0
            else:
                assert later[-1] - first < (without[1][-1] - without[1][0]) / 2, name

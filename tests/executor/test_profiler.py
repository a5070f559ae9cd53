"""Protects ``realexec profile``: that it runs the executor's own layers, that its table holds all
that a planner asks for, that interpolation errors add points, and that no finished part is lost.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from executor import profile_graph, profiler
from executor.cross_memory import CrossMemory
from executor.profile_device import driver_version
from executor.profile_grid import Allowance, Found, Grid, Point, Target, explore
from executor.profile_layers import LayerBench
from executor.profile_measure import SMALLEST_PART, Lockstep, Measurement, Probe
from executor.profile_rows import layer_rows, predict_seconds
from executor.profile_worker import PROBES, Limits, WorkerJob
from executor.profiler import ProfileRequest, load_partial, partial_path, profile
from profiles.catalogue import MODELS
from profiles.errors import ConfigError
from profiles.table import CostTable, check_rows
from tests.spawn import spawn

TINY = MODELS["tiny"]
LIMITS = Limits(tokens=1024, head_tokens=64, length=1024, sequences=16, budget_s=1.0)


def request(folder: Path, **changes: object) -> ProfileRequest:
    plain = ProfileRequest(spec=TINY, output=folder / "profile.json", limits=LIMITS, workers=2)
    return replace(plain, **changes)  # type: ignore[arg-type]


class Interrupted:
    """A progress that interrupts once ``num_tasks`` tasks are done; remembers what it heard."""

    def __init__(self, num_tasks: int) -> None:
        self.shares: set[float] = set()
        self.num_tasks = num_tasks

    def __call__(self, text: str, share: float) -> None:
        self.shares.add(share)
        if len(self.shares) > self.num_tasks:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str], Path]:
    """A profile that was interrupted and taken up again: (what the interruption left, what was

    measured afterwards, the table's file).
    """
    what = request(tmp_path_factory.mktemp("profile"), tps=(1, 2))
    with pytest.raises(KeyboardInterrupt):
        profile(what, Interrupted(3))
    left = json.loads(partial_path(what.output).read_text())
    heard: list[str] = []
    profile(what, lambda text, share: heard.append(text))
    return left, heard, what.output


def reads_all(rank: int, world_size: int) -> bool:
    return CrossMemory.between_workers().all_readable


def test_every_question_of_a_planner_has_rows(resumed: tuple[dict, list[str], Path]) -> None:
    table = CostTable.load(resumed[2])  # validates every row
    found = {(row.component, row.operation, row.tp) for row in table.rows}
    layers = {
        (component, operation, tp)
        for component in ("block", "embedding", "head")
        for operation in ("forward", "backward", "decode")
        for tp in (1, 2)
    }
    names = {"all_reduce", "all_gather", "reduce_scatter", "p2p"}
    if all(spawn(2, reads_all)):
        names.add("read")
    collectives = {("collective", name, 1) for name in names}
    alone = {(component, "decode_alone", 1) for component in ("block", "head")}
    assert found == layers | collectives | alone | {("optimizer", "step", 1)}
    heads = {row.shape.rsplit("-")[-1] for row in table.rows if row.component == "head"}
    assert heads == {"lm", "scalar"}, "an actor and a critic are planned with one profile"
    assert {row.workers for row in table.rows if row.component == "collective"} == {2}
    assert table.device.kind == "cpu"
    assert "2 workers" in table.device.name
    assert table.versions["torch"] == torch.__version__


# A 70B's heads, kv heads and proportions, an eighth as wide a head.
NARROW_70B = replace(
    MODELS["llama-70b"], num_layers=2, hidden=512, head_dim=8, ffn=1792, vocab=1024
)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_one_device_measures_every_shard_of_a_wide_layer(tp: int) -> None:
    """A shard needs itself only: the heads, columns and kv heads of one of ``tp`` devices."""
    device = torch.device("cpu")
    bench = LayerBench(NARROW_70B, tp=tp, device=device, dtype=torch.float32)
    probe = bench.block_train(16, 8)
    found = Lockstep(device, world_size=1).measure(probe, cap_s=0.05)
    check_rows(layer_rows(NARROW_70B, "block", tp, {(16, 8): found}))
    layer = bench._stages["middle", probe.count, False].layers[0]
    assert layer.feed_forward.down.weight.shape == (512, 1792 // tp)
    for more in (bench.block_decode(2, 8), bench.head_train(16, 8), bench.embedding_train(16, 8)):
        more.actions[0]()


def test_the_drivers_version_is_read(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    assert driver_version(file) == "550.54.15"
    assert driver_version(tmp_path / "none") == "unknown"


@pytest.mark.parametrize("context", [32, 1024])
def test_a_decode_step_looks_at_all_of_its_context(context: int) -> None:
    """How long that takes is not tested: clocks depend on who else is on the machine."""
    bench = LayerBench(TINY, tp=1, device=torch.device("cpu"), dtype=torch.float32)
    turn = bench._turn(16, context, 1)
    assert turn.old_lengths.tolist() == [context] * 16
    assert turn.packed.num_tokens == 16


def test_an_interrupted_profile_goes_on_where_it_stopped(
    resumed: tuple[dict, list[str], Path],
) -> None:
    left, heard, output = resumed
    assert len(left["done"]) >= 3
    for name in left["done"]:
        assert not any(text == name or text.startswith(f"{name}:") for text in heard), name
    assert not partial_path(output).exists()
    rows = [[row[name] for name in sorted(row)] for row in left["rows"]]
    data = json.loads(output.read_text())
    order = sorted(range(len(data["columns"])), key=lambda i: data["columns"][i])
    kept = [[row[i] for i in order] for row in data["rows"]]
    assert rows == kept[: len(rows)], "what was measured before the interruption is in the table"


def test_a_partial_file_of_other_conditions_or_cut_off_is_not_continued(tmp_path: Path) -> None:
    what = request(tmp_path)
    partial = load_partial(what)
    partial.done.append("device")
    path = partial_path(what.output)
    path.write_text(json.dumps({**profiler.asdict(partial)}))
    assert load_partial(what).done == ["device"]
    assert load_partial(replace(what, workers=1)).done == []
    assert load_partial(replace(what, spec=TINY.with_head("scalar"))).done == []
    path.write_text(path.read_text()[:-20])
    assert load_partial(what).done == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which CUDA fails")
def test_a_failing_worker_is_reported_with_its_traceback() -> None:
    job = WorkerJob(
        spec=TINY, tps=(1,), kind="cuda", workers=1, num_threads=1, limits=LIMITS, done=frozenset()
    )
    with pytest.raises(RuntimeError, match=r"(?s)worker 0:.*Traceback.*set_device"):
        list(profiler._reports(job))


# ---- what is measured ---------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "kind,phase,head",
    [
        (kind, phase, head)
        for kind, phase in PROBES
        for head in ("lm", "scalar")
        if (phase, head) != ("decode", "scalar")  # only a language model decodes
    ],
)
def test_a_shard_runs_alone(kind: str, phase: str, head: str, tp: int) -> None:
    """Groups are None: a collective would fail, no process group exists here."""
    spec = TINY.with_head("scalar" if head == "scalar" else "lm")
    bench = LayerBench(spec, tp=tp, device=torch.device("cpu"), dtype=torch.float32)
    size, length = (2, 0) if phase == "step" else (64, 32)
    probe = PROBES[kind, phase](bench, size, length)
    for action in probe.actions:
        action()
    (stage,) = bench._stages.values()
    if phase == "train":
        assert stage.gradients is not None
        assert stage.gradients.abs().max() > 0, "backward adds to the flat gradients"
    if kind == "block":
        assert probe.count == len(stage.layers) == TINY.num_layers
        assert stage.layers[0].feed_forward.down.weight.shape == (TINY.hidden, TINY.ffn // tp)
        assert stage.embedding is None
        assert stage.final_norm is None


def test_decode_steps_are_measured_as_graphs_where_they_can_be_captured() -> None:
    """CUDA's part is ``test_a_captured_step_computes_the_same``'s; here captures are scripted."""
    captured: list[object] = []

    def capture(action: object) -> object:
        captured.append(action)
        return action if len(captured) < 3 else None

    bench = LayerBench(TINY, tp=1, device=torch.device("cpu"), dtype=torch.float32, capture=capture)  # type: ignore[arg-type]
    lockstep = Lockstep(torch.device("cpu"), world_size=1)
    for context in (8, 32):
        probe = bench.block_decode(2, context)
        found = lockstep.measure(probe, cap_s=0.05)
        assert set(found) == {"decode", "decode_graph"}
        rows = layer_rows(TINY, "block", 1, {(2, context): found})
        check_rows(rows)
        graph, plain = found["decode_graph"].seconds, found["decode"].seconds
        assert profiler.graph_share(rows) == pytest.approx(graph / plain)
        assert profiler.graph_share([r for r in rows if r.operation == "decode"]) is None
    for _ in range(2):
        assert set(bench.block_decode(2, 64).readings) == {"decode"}
    assert len(captured) == 3, "what could not be captured once is not tried again"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_computes_the_same() -> None:
    bench = LayerBench(
        TINY, tp=1, device=torch.device("cuda"), dtype=torch.bfloat16, capture=profile_graph.capture
    )
    probe = bench.block_decode(4, 32)
    assert set(probe.readings) == {"decode", "decode_graph"}
    kept = torch.zeros(4, 8, device="cuda")
    replay = profile_graph.capture(lambda: kept.add_(1.0))
    assert replay is not None
    before = kept.clone()
    replay()
    assert torch.equal(kept, before + 1.0)
    assert profile_graph.capture(lambda: kept.sum().item()) is None


class Scripted(Lockstep):
    """A clock that believes what an action returns."""

    def elapsed_s(self, action: object, repeats: int) -> float:
        return action()  # type: ignore[operator]


def _measure_scripted(rank: int, world_size: int) -> dict[str, Measurement]:
    lockstep = Scripted(torch.device("cpu"), world_size=world_size)
    forward_s, train_s = (1.0, 4.0) if rank == 0 else (3.0, 12.0)
    probe = Probe(
        actions=(lambda: forward_s, lambda: train_s),
        readings={"forward": (1, 0), "backward": (-1, 1)},
        count=2,
    )
    return lockstep.measure(probe, cap_s=0.01)


def test_readings_are_differences_per_layer_and_the_median_over_workers() -> None:
    results = spawn(2, _measure_scripted)
    assert results[0] == results[1], "all workers decide alike"
    # Of layers: forward 1 / 2 and 3 / 2 seconds, backward 3 / 2 and 9 / 2.
    assert results[0]["forward"].seconds == pytest.approx(1.0)
    assert results[0]["backward"].seconds == pytest.approx(3.0)
    assert results[0]["forward"].spread == 0


def test_a_difference_below_zero_counts_as_a_little_of_the_whole() -> None:
    """Noise made forward and backward shorter than forward alone: not a time of nothing."""
    lockstep = Scripted(torch.device("cpu"), world_size=1)
    probe = Probe(
        actions=(lambda: 3.0, lambda: 2.0), readings={"forward": (1, 0), "backward": (-1, 1)}
    )
    found = lockstep.measure(probe, cap_s=0.01)
    assert found["forward"].seconds == 3.0
    assert found["backward"].seconds == pytest.approx(SMALLEST_PART * 5.0)


# ---- where it is measured -----------------------------------------------------------------


def explore_formula(
    grid: Grid, seconds: object, *, budget_s: float = 1e6
) -> tuple[Found, list[float]]:
    """What ``explore`` finds of ``seconds(size, length)``, and its held-out errors."""

    def measure(point: Point, cap_s: float) -> dict[str, Measurement]:
        value = seconds(*point)  # type: ignore[operator]
        return {"forward": Measurement(seconds=value, spread=0.0, samples=3)}

    target = Target(measure=measure, predict=predict_seconds, depth=lambda point: 1)
    allowance = Allowance(budget_s, lambda value: value)
    found, held_out = explore(grid, target, allowance, tick=lambda point: None)
    return found, [abs(h.error) for h in held_out]


GRID = Grid(sizes=(64, 256, 1024), lengths=(32, 256), whole=True)


def test_where_interpolation_is_right_no_line_is_added() -> None:
    found, errors = explore_formula(GRID, lambda size, length: 1e-6 * size)
    assert max(errors) < 1e-9
    assert {size for size, _ in found} == {64, 256, 1024}


def test_where_interpolation_misses_lines_are_added() -> None:
    """A step in the cost between 256 and 1024 tokens, as a cache has it."""

    def seconds(size: int, length: int) -> float:
        return 1e-6 * size * (3.0 if size >= 512 else 1.0)

    found, errors = explore_formula(GRID, seconds)
    assert max(errors) > 0.05
    assert {(512, 32), (512, 256)} <= set(found), "the whole line, not the tested point alone"
    assert all(size >= length for size, length in found)


def test_points_that_take_too_long_are_left_out_largest_first() -> None:
    found, _ = explore_formula(GRID, lambda size, length: 2e-3 * size, budget_s=2.0)
    sizes = {size for size, _ in found}
    assert 64 in sizes
    assert 1024 not in sizes


# ---- command line -------------------------------------------------------------------------


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    profiler.add_arguments(parser)
    return parser.parse_args(argv)


def test_the_flags_are_these() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    profiler.add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert flags == {"--model", "--tp", "--device", "--workers", "-o", "--output"}
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("model,tps", [("tiny", (1, 2)), ("smollm2-135m", (1,))])
def test_tp_defaults_to_what_divides_the_model(model: str, tps: tuple[int, ...]) -> None:
    """SmolLM2 has 9 heads and 3 kv heads."""
    assert profiler.request_from_args(parse("--model", model, "--workers", "2")).tps == tps


@pytest.mark.parametrize(
    "argv,sentence",
    [
        (("--tp", "1,x"), r"--tp: '1,x' is not a list of degrees"),
        (("--tp", "0"), r"--tp: tp is 0"),
        (("--tp", "3"), r"--tp: tp 3 does not divide the 4 heads of tiny"),
        (("--workers", "0"), r"--workers: 0 is not at least 1"),
        (("--device", "cuda", "--workers", "99"), r"--workers: 99 workers, but torch sees \d"),
    ],
)
def test_a_wrong_flag_is_named(argv: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        profiler.request_from_args(parse("--model", "tiny", *argv))


def test_an_interrupt_says_where_the_partial_result_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(what: ProfileRequest, *args: object) -> CostTable:
        partial_path(what.output).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(profiler, "profile", interrupted)
    output = tmp_path / "p.json"
    assert profiler.run_from_args(parse("--model", "tiny", "-o", str(output))) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert partial_path(output).name == "p.json.partial.json"
    assert partial_path(output).exists()

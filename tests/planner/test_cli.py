"""Protects ``realplan``: search, show and estimate work from the command line, the flags are
those that were decided, and a user's mistake is one sentence and exit code 2.
"""

from __future__ import annotations

import json
import logging
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.cli import _Once, build_parser, main
from planner.plan_schema import load_plan
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.roofline import RooflineCosts
from profiles.shapes import shape_key
from profiles.table import CostRow, CostTable

FAST = ["--model", "tiny", "--gpus", "2", "--time-limit", "5"]
SMALL = ["batch_size=8", "prompt_len=16", "response_len=16", "ppo.num_mini_batches=2"]


@pytest.fixture(scope="module")
def a_plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a plan for two GPUs."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["search", *FAST, *SMALL, "-o", str(file)]) == 0
    return file.read_text()


@pytest.fixture
def plan_file(a_plan: str, tmp_path: Path) -> Path:
    file = tmp_path / "plan.json"
    file.write_text(a_plan)
    return file


def test_search_writes_a_plan_and_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    flags = ["--batch-size", "8", "--prompt-len", "16", "--response-len", "12", "--seed", "3"]
    assert main(["search", *FAST, *flags, "ppo.kl_coef=0.05", "-o", str(file)]) == 0
    captured = capsys.readouterr()
    plan = load_plan(file)
    assert plan.seed == 3
    assert plan.problem.workload.response_tokens == 12
    assert plan.problem.config["ppo"]["kl_coef"] == 0.05
    assert plan.estimate is not None
    assert plan.estimate.lower_bound_s <= plan.estimate.step_s
    assert "symmetric" in plan.baselines
    for text in ("actor_train", "per step", "lower bound", "one steady step", str(file)):
        assert text in captured.out
    assert "costs are from the shipped a100 tables" in captured.err


def test_json_is_the_plan_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main(["search", *FAST, *SMALL, "--json", "-o", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())


def test_show_and_estimate_an_edited_plan(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``show`` prints today's numbers; ``estimate -o`` writes those of the edited plan."""
    assert main(["show", str(plan_file)]) == 0
    assert "critic_train" in capsys.readouterr().out
    assert main(["show", str(plan_file), "--rank", "1"]) == 0
    shown = capsys.readouterr().out
    assert "rank 1" in shown
    assert "on device 1 over a step" in shown
    assert "between calls" in shown
    assert main(["show", str(plan_file), "--provenance", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert any(row["source"].startswith("gemm: aiconfigurator a100") for row in rows)
    assert main(["show", str(plan_file), "--provenance"]) == 0
    assert "peak rates of a100" in capsys.readouterr().out
    data = json.loads(plan_file.read_text())
    one = {"dp": 1, "pp": 1, "tp": 1, "zero": 0, "recompute": "none", "sequence_parallel": False}
    for allocation in data["allocations"].values():
        allocation.update(mesh=[0, 1], strategy=one, num_micro_batches=1)
    plan_file.write_text(json.dumps(data))
    assert main(["estimate", str(plan_file), "-o", str(plan_file), "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["step_s"] == pytest.approx(sum(estimate["per_call_s"].values()))
    saved = load_plan(plan_file).estimate
    assert saved is not None
    assert saved.step_s == estimate["step_s"]


@pytest.mark.parametrize("verb", ["models", "devices"])
def test_the_catalogue_is_listed(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert {"models": "llama-70b", "devices": "h100"}[verb] in names
    assert main([verb]) == 0


@pytest.mark.parametrize("columns, times", [("80", 2), ("400", 1)])
@pytest.mark.parametrize("verb", ["models", "devices"])
def test_a_row_of_the_catalogue_is_a_line(
    verb: str, columns: str, times: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Sources would fold every row; in 80 columns they are in a table of their own."""
    monkeypatch.setenv("COLUMNS", columns)
    assert main([verb, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert main([verb]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        (first, *rest) = (line for line in lines if line[:1] == [row["name"]])
        words = " ".join(str(value) for key, value in row.items() if key != "source").split()
        assert first[: len(words)] == words
        assert len(rest) == times - 1


def _hf_folder(path: Path) -> Path:
    spec = MODELS["tiny"]
    path.mkdir()
    config = {
        "model_type": "llama", "hidden_size": spec.hidden, "num_hidden_layers": 2,
        "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.ffn, "vocab_size": spec.vocab, "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_folders_become_the_roles_paths(tmp_path: Path) -> None:
    """A critic may start from the actor's weights; a reward model needs its own."""
    folder, out = _hf_folder(tmp_path / "sft"), tmp_path / "plan.json"
    words = ["--gpus", "1", *SMALL, "-o", str(out)]
    assert main(["search", "--model", str(folder), *words]) == 0
    name = str(folder)
    assert load_plan(out).problem.paths == {"actor": name, "ref": name, "critic": name}
    other = str(_hf_folder(tmp_path / "rm"))
    assert main(["search", "--model", name, "--critic", other, *words]) == 0
    paths = {"actor": name, "ref": name, "critic": other, "reward": other}
    assert load_plan(out).problem.paths == paths
    assert main(["search", "--model", str(folder / "config.json"), *words]) == 0
    assert load_plan(out).problem.paths == {}


def test_large_llamas_have_a_critic_of_7b(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    flags = ["--gpus", "16", "--batch-size", "32", "--time-limit", "1"]
    assert main(["search", "--model", "llama-13b", *flags, "-o", str(out)]) == 0
    names = {role: spec.name for role, spec in load_plan(out).problem.models.items()}
    large, small = "llama-13b", "llama-7b"
    assert names == {"actor": large, "ref": large, "critic": small, "reward": small}


def _profile(path: Path, *, device: str = "cpu") -> Path:
    """A table in which every layer takes ten times what the roofline says."""
    spec, cluster = MODELS["tiny"], make_cluster(device, 1)
    roofline = RooflineCosts(cluster.device)
    rows = []
    for operation in ("forward", "backward", "decode"):
        for size in (1, 64, 4096):
            for length in (16, 64):
                cost = roofline.layer(spec, "block", operation, tp=1, size=size, length=length)
                rows.append(
                    CostRow(
                        component="block", operation=operation, shape=shape_key(spec), size=size,
                        length=length, seconds=10 * cost.seconds,
                    )
                )  # fmt: skip
    table = CostTable(
        device=cluster.device, rows=tuple(rows), dtype="fp32", date="2025-01-01", source="test"
    )
    table.save(path)
    return path


def test_a_profile_is_used_and_remembered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured costs reach the estimate, and ``show`` takes them from where the plan says."""
    profile, out = _profile(tmp_path / "profile.json"), tmp_path / "plan.json"
    local = ["search", "--model", "tiny", "--cluster", "local", *SMALL, "-o", str(out)]
    assert main([*local, "--profile", str(profile)]) == 0
    plan = load_plan(out)
    assert plan.num_devices == 2
    assert plan.estimate is not None
    assert plan.estimate.provenance.get("roofline", 0.0) < 0.9
    assert plan.provenance["profile"] == str(profile)
    assert "peak rates" not in capsys.readouterr().err
    assert main(["estimate", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["step_s"] == plan.estimate.step_s
    profile.unlink()
    assert main(["show", str(out)]) == 0
    assert "is not here: costs are as without one" in capsys.readouterr().err


def test_the_flags_of_search() -> None:
    """A new flag is a decision: options of the algorithm are key=value words."""
    actions = build_parser()._subparsers._group_actions[0].choices["search"]._actions  # type: ignore[union-attr, index]
    flags = sorted(flag for action in actions for flag in action.option_strings)
    assert flags == sorted(
        [
            "-h", "--help", "--model", "--critic", "--gpus", "--device", "--cluster", "--profile",
            "--algorithm", "--experiment", "--prompt-len", "--response-len", "--batch-size",
            "--engine", "--time-limit", "--seed", "-o", "--output", "--json",
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        *([verb, "--help"] for verb in ("search", "show", "baselines", "compare", "explain")),
    ],
)
def test_help_has_examples(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["search"], "search: the following arguments are required: --model"),
        (["search", "--model", "lama-70b"], "--model: unknown model 'lama-70b'; did you mean"),
        (["search", "--model", "tiny", "--critic", "x"], "--critic: unknown model 'x'"),
        (["search", "--model", "none/x"], "none/x/config.json|none/x: no such file"),
        (["search", "--model", "tiny", "--gpus", "0"], "--gpus: 0 is below 1"),
        (["search", "--model", "tiny", "--gpus", "3.5"], "--gpus: '3.5' is not a whole number"),
        (["search", "--model", "tiny", "--gpus", "12"], "--gpus: 12 devices .*use 8 or 16"),
        (["search", "--model", "tiny", "--device", "z9"], "unknown device or cluster 'z9'"),
        (["search", "--model", "tiny", "--device", "a100", "--cluster", "local"], "two devices"),
        (["search", "--model", "tiny", "--batch-size", "0"], "--batch-size: 0 is below 1"),
        (["search", "--model", "tiny", "--time-limit", "-1"], "--time-limit: '-1' is not a number"),
        (["search", "--model", "tiny", "--algorithm", "dpoo"], "unknown algorithm 'dpoo'"),
        (["search", "--model", "tiny", "--engine", "x"], "invalid choice: 'x'"),
        (["search", "--model", "tiny", "--what"], "unrecognized arguments: --what"),
        (["search", "--model", "tiny", "batchsize=3"], "override 'batchsize=3': .*batch_size"),
        (["search", "--model", "tiny", "batch_size"], "override 'batch_size'.*write key=value"),
        (["search", "--model", "tiny", "ppo.gamma=x"], "override 'ppo.gamma=x'"),
        (["search", "--model", "tiny", "ppo.gamma=2"], "ppo.gamma: 2.0 is not in"),
        (["search", "--model", "tiny", "--profile", "no.json"], "no.json: no such file"),
        (["search", "--model", "tiny", "-o", "no/plan.json"], "-o: no folder for no/plan.json"),
        (["search", "--model", "llama-70b", "--gpus", "8"], "role actor does not fit.*too little"),
        (["search", "--model", "tiny", "gap=2"], "gap: 2 is not from 0 to below 1"),
        (["search", "--model", "tiny", "memory_limit=90GiB"], "memory_limit: 90.00 GiB is above"),
        (
            ["search", "--model", "tiny", "max_staleness=2"],
            "max_staleness: 2 steps are not planned",
        ),
        (["search", "--model", "tiny", "memory_limit=big"], "memory_limit: 'big' is not a number"),
        (["search", "--model", "tiny", "cluster.x=1"], "cluster.x: unknown field 'x'"),
        (["search", "--model", "tiny", "lock.gen=plan.json"], "lock.gen: plan.json has no call"),
        (["search", "--model", "tiny", "lock.a.mesh=[0]"], r"lock.a.mesh: \[0\] is no mesh"),
        (["search", "--model", "tiny", "lock.a.strategy=x"], "lock.a.strategy: 'x' is not a lay"),
        (["search", "--model", "tiny", "lock.zz.mesh=[0,1]"], "lock.zz: unknown call 'zz'"),
        (["search", "--model", "tiny", "--cluster", "c.yaml"], "c.yaml: cannot be read"),
        (["baselines", "--model", "tiny", "-o", "none"], "-o: none is no folder"),
        (
            ["compare", "plan.json", "long.json"],
            r"workload.response_tokens \(16 and 32\)",
        ),
        (["explain", "plan.json", "--against", "no.json"], "no.json: cannot be read"),
        (["show", "no.json"], "no.json: cannot be read"),
        (["show", "plan.json", "--rank", "2"], "--rank: 2 is not a rank of this plan; use 0 to 1"),
        (["show", "plan.json", "--rank", "x"], "--rank: 'x' is not a whole number"),
        (["show", "cut.json"], "cut.json: is cut off at line"),
        (["show", "tp.json"], "tp.json: allocations.ref_inf: tp 8 does not divide the 4 heads"),
        (["estimate", "plan.json", "--profile", "gpu.json"], "--profile: was measured on a100"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    argv: list[str],
    message: str,
    plan_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plan_file.parent)
    text = plan_file.read_text()
    Path("cut.json").write_text(text[: len(text) // 2])
    data = json.loads(text)
    data["workload"]["response_tokens"] = 32
    Path("long.json").write_text(json.dumps(data))
    data["cluster"].update(devices_per_node=8)
    data["allocations"]["ref_inf"].update(mesh=[0, 8])
    data["allocations"]["ref_inf"]["strategy"].update(dp=1, pp=1, tp=8)
    Path("tp.json").write_text(json.dumps(data))
    _profile(Path("gpu.json"), device="a100")
    if argv[:1] == ["estimate"]:
        cpu = main(["search", "--model", "tiny", "--cluster", "local", *SMALL])
        assert cpu == 0
        capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("realplan: ")
    assert "Traceback" not in captured.err
    assert re.search(message, last), last


def test_a_limit_and_a_cluster_field_reach_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = ["memory_limit=30GiB", "cluster.intra_link.bytes_per_s=5GB", "gap=0.5"]
    assert main(["search", *FAST, *SMALL, *words, "-o", str(out)]) == 0
    cluster = load_plan(out).problem.cluster
    assert cluster.device.memory_bytes == 30 * 2**30
    assert cluster.intra_link.bytes_per_s == 5e9


def test_baselines_are_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each written plan is one that ``search`` says no worse than."""
    assert main(["baselines", *FAST[:4], *SMALL, "-o", str(tmp_path)]) == 0
    assert "symmetric" in capsys.readouterr().out
    best = tmp_path / "best.json"
    assert main(["search", *FAST, *SMALL, "-o", str(best)]) == 0
    found = load_plan(best)
    for name in ("symmetric", "greedy"):
        baseline = load_plan(tmp_path / f"{name}.json")
        assert baseline.estimate is not None
        assert found.estimate is not None
        assert found.estimate.step_s <= baseline.estimate.step_s * (1 + 1e-9)
    shape = {
        a.strategy.short for n, a in load_plan(tmp_path / "symmetric.json").allocations.items()
    }
    assert len(shape) == 1


def test_explain_and_compare_read_plans(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = plan_file.with_name("other.json")
    data = json.loads(plan_file.read_text())
    one = {"dp": 1, "pp": 1, "tp": 1, "zero": 0, "recompute": "none", "sequence_parallel": False}
    data["allocations"]["actor_gen"].update(mesh=[0, 1], strategy=one, num_micro_batches=1)
    other.write_text(json.dumps(data))
    assert main(["explain", str(plan_file), "--against", str(other)]) == 0
    out = capsys.readouterr().out
    for text in (
        "sets the pace",
        "who waits",
        "memory: device",
        "were one thing faster",
        "why not",
    ):
        assert text in out
    assert main(["compare", str(plan_file), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["faster"] in (str(plan_file), str(other))
    assert {swap["call"] for swap in found["swaps"]} <= {"actor_gen"}
    assert main(["explain", str(plan_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cycle"]["num_steps"] >= 1


def test_ctrl_c_leaves_the_best_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first improvement is followed by SIGINT: the plan is written, the exit code is 0."""
    from planner.cli_search import _Progress

    tell = _Progress.tell

    def interrupt(self: _Progress, *args: float) -> None:
        tell(self, *args)  # type: ignore[arg-type]
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_Progress, "tell", interrupt)
    out = tmp_path / "plan.json"
    words = ["--model", "llama-7b", "--gpus", "8", "batch_size=64", "-o", str(out)]
    assert main(["search", *words]) == 0
    assert "interrupted: the plan is the best so far" in capsys.readouterr().err
    assert load_plan(out).estimate is not None


def test_doctor_finds_this_installation_whole(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    states = {f["what"]: f["state"] for f in found["findings"]}
    assert states["self-test"] == "ok"
    assert code == int("wrong" in states.values())
    assert found["ok"] == (code == 0)


def _mutated(value: Any, rng: random.Random) -> Any:
    """``value`` with one leaf somewhere replaced by something odd."""
    odd = [None, True, -1, 0, 10**30, 1.5, "x", "", [], {}, [1, 2, 3], float("1e300")]
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return {**value, key: _mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], _mutated(value[i], rng), *value[i + 1 :]]
    return rng.choice(odd)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), verb=st.sampled_from(["show", "explain", "estimate", "compare"]))
def test_a_broken_plan_never_ends_in_a_traceback(seed: int, verb: str, plan_file: Path) -> None:
    """Any mutation of a plan file either works or is one sentence with exit code 2."""
    rng = random.Random(seed)
    data = json.loads(plan_file.read_text())
    for _ in range(rng.choice([1, 1, 2])):
        data = _mutated(data, rng)
    broken = plan_file.with_name("broken.json")
    broken.write_text(json.dumps(data))
    more = [str(plan_file)] if verb == "compare" else []
    assert main([verb, str(broken), *more]) in (0, 2)


@pytest.mark.parametrize(
    "path,sentence",
    [
        (("cluster", "num_nodes"), "cluster: .* devices; at most 131072"),
        (("workload", "batch_size"), "sequences per step; at most 1048576"),
        (("models", "actor", "num_layers"), "layers; at most 10000"),
    ],
)
def test_an_absurd_number_is_refused_at_once(
    path: tuple[str, ...], sentence: str, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(plan_file.read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 10**30
    broken = plan_file.with_name("absurd.json")
    broken.write_text(json.dumps(data))
    assert main(["show", str(broken)]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_json_errors_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--model", "x", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["where"] == "--model"


def test_a_report_without_plotly_is_static_and_says_so(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("planner.cli_plans.find_spec", lambda name: None)
    page = tmp_path / "report.html"
    assert main(["report", str(plan_file), "-o", str(page)]) == 0
    assert "<script" not in page.read_text()
    assert "pip install 'realplan[notebook]'" in capsys.readouterr().err
    assert main(["report", str(plan_file), "-o", str(page), "--what-if"]) == 2
    assert "--what-if: this figure needs plotly" in capsys.readouterr().err


def test_a_report_searches_other_clusters_where_it_is_asked_to(
    plan_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("plotly", reason="figures need the extra notebook")
    page = tmp_path / "report.html"
    assert main(["report", str(plan_file), "-o", str(page), "--what-if"]) == 0
    text = page.read_text()
    for heading in ("The search: ", "Seconds of a step against dollars", "What matters most"):
        assert f"<h2>{heading}" in text


def test_a_warning_is_told_once() -> None:
    """``explain`` prices a plan under many costs of one table, each of which warns of it."""
    once, text = _Once(), "%s is outside what was measured"
    records = [
        logging.LogRecord("profiles", logging.WARNING, "", 0, text, (kernel,), None)
        for kernel in ("gemm", "attention", "gemm")
    ]
    assert [once.filter(record) for record in records] == [True, True, False]

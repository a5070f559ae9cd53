"""Protects that every algorithm can be planned, ours by name and a user's by its file."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from planner.algorithm import (
    ENTRY_POINT_GROUP,
    config_to_dict,
    find_algorithm,
    import_functions,
    make_config,
    role_paths,
)
from planner.cli import main
from planner.graph import CallKind
from planner.plan_schema import load_plan
from planner.program import compile_plan
from planner.program_check import check_program
from profiles.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
SMALL = ["batch_size=8", "prompt_len=16", "response_len=16"]
# Calls in the order of the graph, by algorithm and overrides.
CALLS = {
    "sft": "actor_train",
    "reward": "reward_train",
    "dpo": "ref_inf actor_train",
    "ppo": "actor_gen rew_inf ref_inf critic_inf actor_train critic_train",
    "ppo ppo.ref_average=0.01": ("actor_gen rew_inf ref_inf critic_inf actor_train critic_train"),
    "ppo ppo.kl_coef=0 reward.source=model+vader": (
        "actor_gen rew_inf rew_fn critic_inf actor_train critic_train"
    ),
    "grpo": "actor_gen rew_inf ref_inf actor_train",
    "grpo grpo.kl_coef=0 reward.source=vader": "actor_gen rew_inf actor_train",
    "remax": "actor_gen greedy_gen rew_inf greedy_rew_inf ref_inf actor_train",
    "remax samples_per_prompt=3 remax.kl_coef=0": (
        "actor_gen greedy_gen rew_inf greedy_rew_inf actor_train"
    ),
    "reinforce": "actor_gen rew_inf ref_inf actor_train",
    "reinforce reinforce.baseline=leave_one_out": "actor_gen rew_inf ref_inf actor_train",
    "raft": "actor_gen rew_inf select actor_train",
    "generation": "actor_gen write",
}

USERS = '''
"""A user's own algorithm: best-of-n answers, scored by a function of mine."""
from dataclasses import dataclass, field

from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall
from planner.plan import Workload
from planner.run_config import ModelConfig, RunConfig

@dataclass
class Mine(RunConfig):
    actor: ModelConfig = field(default_factory=ModelConfig)

KEYS = tuple(DataKey(name=n, per="token", dtype="int64", once=n == "prompts")
             for n in ("prompts", "sequences"))
GEN = ModelFunctionCall(name="gen", kind=CallKind.GENERATE, role="actor", inputs=("prompts",),
                        outputs=("sequences",))
TRAIN = ModelFunctionCall(name="train", kind=CallKind.TRAIN, role="actor", inputs=("sequences",))
GRAPH = DataflowGraph(name="mine", calls=(GEN, TRAIN), keys=KEYS,
                      source_keys=frozenset({"prompts"}))
ALGORITHM = Algorithm(
    name="mine", config_class=Mine, graph=lambda config: GRAPH,
    workload=lambda c: Workload(batch_size=c.batch_size, prompt_tokens=c.prompt_len,
                                response_tokens=c.response_len, group_size=4),
    roles=lambda config: {"actor": RoleSpec(source="model", head="lm")}, functions="torch_half.py")
'''


def ours(name: str) -> str:
    """The graph of one of our algorithms, whatever version of the package is installed."""
    return str(REPOSITORY / "experiments" / name / "graph.py")


def test_every_algorithm_of_the_package_has_its_entry_point_and_is_tested_here() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition(f'entry-points."{ENTRY_POINT_GROUP}"]')[2].partition("\n[")[0]
    declared = dict(re.findall(r'^(\w+) = "(.*)"$', section, flags=re.M))
    folders = {file.parent.name for file in (REPOSITORY / "experiments").glob("*/graph.py")}
    assert declared == {name: f"experiments.{name}.graph:ALGORITHM" for name in folders}
    assert {words.split()[0] for words in CALLS} == folders
    for name, point in declared.items():
        assert EntryPoint(name, point, ENTRY_POINT_GROUP).load().name == name


@pytest.mark.parametrize("words", CALLS)
def test_a_plan_is_found_for_every_algorithm(words: str, tmp_path: Path) -> None:
    name, *overrides = words.split()
    out = tmp_path / "plan.json"
    flags = ["--model", "tiny", "--gpus", "4", "--time-limit", "1", "--algorithm", ours(name)]
    if name == "ppo":
        overrides.append("ppo.num_mini_batches=2")
    assert main(["search", *flags, *SMALL, *overrides, "-o", str(out)]) == 0
    plan = load_plan(out)
    assert [call.name for call in plan.problem.graph.calls] == CALLS[words].split()
    assert plan.estimate is not None
    assert 0 < plan.estimate.lower_bound_s <= plan.estimate.step_s
    check_program(plan, compile_plan(plan))


def test_what_a_group_has_once_is_worked_on_once() -> None:
    for name, once in (("raft", {"actor_train"}), ("remax", {"greedy_gen", "greedy_rew_inf"})):
        algorithm = find_algorithm(ours(name))
        config = make_config(algorithm.config_class, ["samples_per_prompt=4"])
        graph = algorithm.graph(config)
        size = algorithm.workload(config).group_size
        assert {c.name for c in graph.calls if graph.sequences_per_group(c, size) == 1} == once


def test_a_users_file_is_an_algorithm(tmp_path: Path) -> None:
    file, out = tmp_path / "mine.py", tmp_path / "plan.json"
    file.write_text(USERS)
    (tmp_path / "torch_half.py").write_text("def make_functions(config):\n    return {'gen': 1}\n")
    words = ["--model", "tiny", "--gpus", "2", "--time-limit", "1", *SMALL, "-o", str(out)]
    assert main(["search", "--algorithm", str(file), *words]) == 0
    plan = load_plan(out)
    assert plan.problem.algorithm == str(file)
    assert plan.problem.workload.group_size == 4
    found = find_algorithm(plan.problem.algorithm)
    assert import_functions(found).make_functions(None) == {"gen": 1}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"own\.py: no such file; name an existing \.py file"),
        ("x = 1\n", r"own\.py: defines no ALGORITHM; write ALGORITHM = "),
        ("ALGORITHM = 3\n", r"own\.py: its ALGORITHM is 3"),
        ("x = (\n", r"own\.py:1: cannot be imported"),
        ("import nothing_like_this\n", r"own\.py: cannot be imported \(No module named"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, sentence: str) -> None:
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        find_algorithm(str(file))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown algorithm 'pop'; installed: .*ppo.*or name"):
        find_algorithm("pop")


@pytest.mark.parametrize(
    ("overrides", "base", "where"),
    [
        (["data.prompt_mean=1" + "0" * 400], None, "override 'data.prompt_mean=1000"),
        ([], {"data": {"prompt_mean": 10**400}}, "config: "),
    ],
)
def test_a_number_that_no_float_holds_is_a_mistake_of_the_user(
    overrides: list[str], base: dict[str, object] | None, where: str
) -> None:
    config_class = find_algorithm(ours("ppo")).config_class
    with pytest.raises(ConfigError, match="int too large to convert to float") as caught:
        make_config(config_class, overrides, base=base)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "base", "sentence"),
    [
        (
            ["data.response_lengths=[[1]]"],
            None,
            r"override 'data\.response_lengths=\[\[1\]\]': Val",
        ),
        (
            [],
            {"data": {"response_lengths": [[1]]}},
            r"config: response_lengths\[0\]: Value '\[1\]'",
        ),
    ],
)
def test_a_list_in_a_list_is_refused_at_once(
    overrides: list[str], base: dict[str, object] | None, sentence: str
) -> None:
    config_class = find_algorithm(ours("ppo")).config_class
    with pytest.raises(ConfigError, match=sentence) as caught:
        make_config(config_class, overrides, base=base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["actor.lr=inf", "actor.warmup_steps=0 critic.eps=inf",
                                      "actor.weight_decay=nan", "ppo.kl_coef=-inf"])  # fmt: skip
def test_a_number_that_no_plan_can_hold_is_named(override: str) -> None:
    config = make_config(find_algorithm(ours("ppo")).config_class, override.split())
    name, _, value = override.split()[-1].partition("=")
    with pytest.raises(ConfigError, match=rf"{name}: {value} is not a finite number"):
        config_to_dict(config)


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("grpo", "samples_per_prompt=1", "samples_per_prompt: 1 is not at least 2"),
        ("grpo", "grpo.aggregation=mean", r"grpo\.aggregation: 'mean' is unknown; use one of"),
        ("dpo", "dpo.label_smoothing=0.5", r"dpo\.label_smoothing: 0\.5 is not in \[0, 0\.5\)"),
        ("dpo", "dpo.beta=0", r"dpo\.beta: 0\.0 is not above 0"),
        ("reinforce", "reinforce.baseline=mean", r"reinforce\.baseline: 'mean' is unknown"),
        ("raft", "raft.num_mini_batches=9", r"9 mini-batches of a batch of 8"),
    ],
)
def test_an_option_out_of_range_is_named(name: str, override: str, sentence: str) -> None:
    algorithm = find_algorithm(ours(name))
    config = make_config(algorithm.config_class, ["batch_size=8", override])
    with pytest.raises(ConfigError, match=sentence):
        algorithm.graph(config)


def test_a_reward_model_never_starts_from_the_actors_weights(tmp_path: Path) -> None:
    folder, other = str(tmp_path), str(tmp_path / "critic")
    Path(other).mkdir()
    for name in ("ppo", "grpo"):
        algorithm = find_algorithm(ours(name))
        config = algorithm.config_class()
        alone = role_paths(algorithm, config, model=folder, critic=None)
        assert "reward" not in alone
        assert alone.get("critic", folder) == folder
        both = role_paths(algorithm, config, model=folder, critic=other)
        assert both["reward"] == other
    trained = find_algorithm(ours("reward"))
    paths = role_paths(trained, trained.config_class(), model=folder, critic=None)
    assert paths == {"reward": folder}


def test_calls_with_a_model_have_the_kind_of_their_source() -> None:
    algorithm = find_algorithm(ours("remax"))
    for source, kind in (("model", CallKind.INFER), ("vader", CallKind.FUNCTION)):
        config = make_config(algorithm.config_class, [f"reward.source={source}"])
        graph = algorithm.graph(config)
        assert graph.call("rew_inf").kind is graph.call("greedy_rew_inf").kind is kind

"""Protects exports: options that the other systems have, sizes that multiply to the devices,
batches that add up to the plan's, and a sentence for everything that is not said.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path

import pytest

from experiments.grpo.graph import ALGORITHM as GRPO
from planner.algorithm import make_config, make_problem
from planner.cli import main
from planner.export import EXPORTERS
from planner.export.draft import Exported
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan, Problem, validate_plan
from planner.plan_schema import save_plan
from planner.strategy import ParallelStrategy
from profiles.errors import ConfigError
from tests.planner.plans import SPEC, make_test_cluster, ppo, random_plan

OPTIONS = json.loads((Path(__file__).parent / "export_options.json").read_text())


def known(system: str) -> set[str]:
    """The system's options, braces expanded."""
    found = set()
    for text in OPTIONS[system]["options"]:
        parts = [part.split(",") for part in re.split(r"[{}]", text)]
        found |= {"".join(words) for words in product(*parts)}
    return found


def plan_of(problem: Problem, **texts: str) -> ExecutionPlan:
    """``call="first count dXpYmZ micro"``; calls that are not named are as ``rest``."""
    allocations = {}
    for call in problem.graph.calls:
        words = texts.get(call.name, texts["rest"]).split()
        dp, pp, tp = map(int, re.findall(r"\d+", words[2]))
        if call.role is None:
            dp, pp, tp = 1, 1, 1
            words[1] = "1"
        allocations[call.name] = Allocation(
            mesh=DeviceMesh(int(words[0]), int(words[1])), num_micro_batches=int(words[3]),
            strategy=ParallelStrategy(dp=dp, pp=pp, tp=tp),
        )  # fmt: skip
    plan = ExecutionPlan(problem=problem, allocations=allocations)
    validate_plan(plan)
    return plan


@pytest.fixture
def problem() -> Problem:
    return ppo(make_test_cluster(2, 8), ["batch_size=32", "ppo.num_mini_batches=2"])


@pytest.mark.parametrize("system", sorted(EXPORTERS))
@pytest.mark.parametrize("seed", range(25))
def test_every_option_exists_and_the_command_is_a_shell_word_list(system: str, seed: int) -> None:
    plan = random_plan(random.Random(seed))
    found = EXPORTERS[system](plan)
    assert set(found.settings) <= known(system)
    line = " ".join(
        part for part in found.text.replace("\\\n", " ").splitlines() if not part.startswith("#")
    )
    words = shlex.split(line)
    assert words[: len(shlex.split(found.command))] == shlex.split(found.command)
    assert len(words) >= len(found.settings)
    subprocess.run(["bash", "-n"], input=found.text, text=True, check=True)
    assert all(sentence and "\n" not in sentence for sentence in found.lost)


def test_a_plan_on_all_devices_is_verls_to_the_last_size(problem: Problem) -> None:
    """Oracle: dp * tp * pp is 16, and micro-batches of all ranks make a mini-batch of 16."""
    rest = "0 16 d2p2m4 4"
    found = EXPORTERS["verl"](plan_of(problem, rest=rest))
    put = found.settings
    for path in ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic", "reward_model"):
        tp = put[f"{path}.megatron.tensor_model_parallel_size"]
        pp = put[f"{path}.megatron.pipeline_model_parallel_size"]
        assert (tp, pp) == (4, 2)
    world = int(put["trainer.nnodes"]) * int(put["trainer.n_gpus_per_node"])
    assert world == 16
    micro = int(put["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"])
    assert micro * 4 * (world // 8) == put["actor_rollout_ref.actor.ppo_mini_batch_size"] == 16
    assert put["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"] == 32 // 2 // 4
    assert len(found.lost) == 1  # the log-probabilities that verl computes again
    assert "log-probabilities" in found.lost[0]


def test_what_verl_does_elsewhere_is_said(problem: Problem) -> None:
    plan = plan_of(
        problem, rest="0 16 d2p2m4 4", critic_train="8 8 d8p1m1 1", ref_inf="0 4 d4p1m1 1"
    )
    text = EXPORTERS["verl"](plan).text
    assert "critic_train runs on [8-15] in the plan, and in verl on all devices with dp 16" in text
    assert "ref_inf runs on [0-3] in the plan, and in verl on all devices with dp 16" in text
    assert "verl runs critic_inf in the layout of critic_train" in text


def test_a_size_that_does_not_divide_is_left_out() -> None:
    problem = ppo(make_test_cluster(4, 2), ["batch_size=32"], replace(SPEC, num_layers=6))
    plan = plan_of(problem, rest="0 8 d8p1m1 1", actor_train="0 6 d1p3m2 1")
    found = EXPORTERS["verl"](plan)
    assert "which tp 2 x pp 3 does not divide" in found.text
    assert "actor_rollout_ref.actor.megatron.tensor_model_parallel_size" not in found.settings


def test_openrlhf_puts_roles_where_the_plan_has_them(problem: Problem) -> None:
    """Oracle: engines times their tp are generation's devices; a role's nodes are its mesh's."""
    texts = {
        "rest": "8 8 d8p1m1 1", "actor_gen": "0 8 d4p1m2 1", "actor_train": "8 8 d8p1m1 2",
        "ref_inf": "8 8 d8p1m1 1", "critic_train": "0 8 d8p1m1 2", "critic_inf": "0 8 d8p1m1 1",
        "rew_inf": "0 8 d8p1m1 1",
    }  # fmt: skip
    found = EXPORTERS["openrlhf"](plan_of(problem, **texts))
    put = found.settings
    assert (put["vllm_num_engines"], put["vllm_tensor_parallel_size"]) == (4, 2)
    for role in ("actor", "ref", "critic", "reward"):
        assert (put[f"{role}_num_nodes"], put[f"{role}_num_gpus_per_node"]) == (1, 8)
    assert put["colocate_actor_ref"] is put["colocate_critic_reward"] is True
    assert "colocate_all_models" not in put
    assert put["train_batch_size"] == 16
    assert put["micro_train_batch_size"] == ceil(16 / 8 / 2)
    (sentence,) = found.lost
    assert sentence.startswith("critic and generation; reward and generation share devices")


def test_openrlhf_has_no_pipeline_and_says_so(problem: Problem) -> None:
    found = EXPORTERS["openrlhf"](plan_of(problem, rest="0 16 d2p2m4 4"))
    assert found.settings["zero_stage"] == 3
    assert found.settings["colocate_all_models"] is True
    assert found.settings["vllm_num_engines"] == 4
    assert sum("has no pipeline" in sentence for sentence in found.lost) == 4
    assert "--colocate_all_models \\\n" in found.text


def grpo_plan(**texts: str) -> ExecutionPlan:
    words = ["batch_size=16", "samples_per_prompt=4", "prompt_len=16", "response_len=16",
             "reward.source=vader", "grpo.num_mini_batches=2"]  # fmt: skip
    problem = make_problem(
        GRPO, make_config(GRPO.config_class, words), model=SPEC, critic=SPEC,
        cluster=make_test_cluster(2, 8),
    )  # fmt: skip
    return plan_of(problem, **texts)


def test_nemo_generates_beside_training_where_the_plan_does() -> None:
    found = EXPORTERS["nemo-rl"](
        grpo_plan(rest="0 8 d2p2m2 2", actor_gen="8 8 d4p1m2 1", ref_inf="0 8 d2p2m2 2")
    )
    put = found.settings
    assert put["policy.generation.colocated.enabled"] is False
    assert put["policy.generation.colocated.resources.num_nodes"] == 1
    assert put["policy.train_global_batch_size"] == 32  # 8 prompts of 4 answers
    assert put["policy.train_micro_batch_size"] == 32 // 2 // 2
    assert not found.lost


def test_nemo_shares_all_devices_where_the_plan_does() -> None:
    found = EXPORTERS["nemo-rl"](grpo_plan(rest="0 16 d4p1m4 1", ref_inf="0 8 d2p1m4 1"))
    assert found.settings["policy.generation.colocated.enabled"] is True
    assert [s for s in found.lost if "ref_inf in the layout of actor_train" in s]


def test_a_system_that_does_not_know_the_algorithm_says_which_it_knows(problem: Problem) -> None:
    plan = plan_of(problem, rest="0 16 d2p2m4 4")
    plan = replace(plan, problem=replace(problem, algorithm="raft"))
    with pytest.raises(ConfigError, match="verl is not told of raft; export a plan of ppo, grpo"):
        EXPORTERS["verl"](plan)


def test_export_from_the_command_line(
    problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, script = tmp_path / "plan.json", tmp_path / "run.sh"
    save_plan(plan_of(problem, rest="0 16 d2p2m4 4"), file)
    assert main(["export", str(file), "--to", "openrlhf", "-o", str(script)]) == 0
    captured = capsys.readouterr()
    found: Exported = EXPORTERS["openrlhf"](plan_of(problem, rest="0 16 d2p2m4 4"))
    assert script.read_text() == found.text
    assert captured.err.count("OpenRLHF cannot: ") == len(found.lost)
    assert main(["export", str(file), "--to", "verl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["trainer.nnodes"] == 2
    assert main(["export", str(file), "--to", "slime"]) == 2

"""Protects the executor's master property: results do not depend on the plan.

One and the same PPO step of a small model runs under plans that differ in everything that a plan
may choose; tokens must be identical, losses and parameters after the step equal to 1e-4. Every
layout is an oracle for every other, and the one-process plan for all.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.runs import OVERRIDES, SMALL, Outcome, Runs, make_plan, run_plans

PLANS = {
    "one process": make_plan(1, "0:d1p1m1:1"),
    "micro-batches": make_plan(1, "0:d1p1m1:3", actor_train="0:d1p1m1:4:recompute"),
    "dp 2": make_plan(2, "0:d2p1m1:1"),
    "tp 2": make_plan(2, "0:d1p1m2:2"),
    "waves of generation": make_plan(1, "0:d1p1m1:1", actor_gen="0:d1p1m1:1:rows=3"),
    "waves of two groups": make_plan(2, "0:d1p2m1:2", actor_gen="0:d1p2m1:2:rows=3"),
    "pp 2": make_plan(2, "0:d1p2m1:2"),
    "dp 2 trained, tp 2 generating": make_plan(
        2, "0:d2p1m1:2", actor_gen="0:d1p1m2:1", critic_inf="0:d1p2m1:2"
    ),
    "disjoint meshes": make_plan(
        2, "0:d1p1m1:1", critic_inf="1:d1p1m1:1", critic_train="1:d1p1m1:2", ref_inf="1:d1p1m1:1"
    ),
    "everything differs": make_plan(
        4,
        "0:d4p1m1:1",
        actor_gen="0:d2p1m2:1",
        rew_inf="2:d1p2m1:2",
        ref_inf="0:d1p1m2:2",
        critic_inf="2:d1p1m2:1",
        actor_train="0:d1p2m2:2:recompute",
        critic_train="0:d2p2m1:2:zero",
    ),
    "zero 1": make_plan(
        4, "0:d2p1m2:1", actor_train="0:d2p1m2:2:zero", critic_train="2:d2p1m1:1:zero"
    ),
    "sequence parallel": make_plan(
        4,
        "0:d2p1m2:1",
        ref_inf="0:d1p2m2:2:sp",
        critic_inf="0:d2p1m2:1:sp",
        actor_train="0:d1p2m2:2:sp:selective",
        critic_train="0:d1p1m4:2:sp:recompute:zero",
    ),
    "offloaded": make_plan(
        2,
        "0:d1p1m2:1",
        ref_inf="0:d1p1m2:1:offload",
        rew_inf="0:d2p1m1:1:offload",
        actor_train="0:d2p1m1:1:zero:offload",
        critic_train="0:d1p1m2:2:offload",
    ),
    "trained beside, generated on all": make_plan(
        4,
        "0:d4p1m1:1",
        actor_gen="0:d2p2m1:3",
        actor_train="0:d1p2m1:4",
        critic_train="2:d1p1m2:1",
    ),
}


GROUPS = [*OVERRIDES, "batch_size=5", "samples_per_prompt=3"]
GROUP_PLANS = {
    "one process": make_plan(1, "0:d1p1m1:1", overrides=GROUPS),
    "dp 2, micro-batches": make_plan(2, "0:d2p1m1:1", overrides=GROUPS, actor_gen="0:d2p1m1:2"),
    "moving": make_plan(
        2, "0:d1p2m1:2", overrides=GROUPS, actor_gen="0:d2p1m1:1", critic_train="1:d1p1m1:2",
        ref_inf="0:d2p1m1:2",
    ),
}  # fmt: skip


# Prompts that are long enough to be shared by their answers.
LONG = replace(SMALL, max_positions=96)
SHARED = [*GROUPS, "prompt_len=48"]
SHARED_PLANS = {
    "one process": make_plan(1, "0:d1p1m1:1", overrides=SHARED, spec=LONG),
    "dp 2, micro-batches": make_plan(
        2, "0:d2p1m1:1", overrides=SHARED, spec=LONG, ref_inf="0:d2p1m1:2",
        actor_train="0:d1p1m1:2:selective", critic_train="1:d1p1m1:1:recompute",
    ),
    "moving": make_plan(
        2, "0:d1p2m1:2", overrides=SHARED, spec=LONG, actor_gen="0:d2p1m1:1",
        actor_train="0:d1p1m2:2:sp", critic_inf="0:d1p1m2:2:sp", ref_inf="0:d2p1m1:2",
    ),
}  # fmt: skip


# What other families add: experts and their router, and shapes that tp does not divide.
FAMILIES = {
    "experts": replace(
        SMALL, family="qwen2_moe", qkv_bias=True, ffn=24, num_experts=6, experts_per_token=2,
        shared_ffn=40, normalize_top_k=False,
    ),
    "gpt2, odd vocabulary": replace(
        SMALL, family="gpt2", norm="layer", positions="learned", gated=False, num_kv_heads=4,
        activation="gelu_tanh", qkv_bias=True, o_bias=True, ffn_bias=True, vocab=97,
    ),
    "one kv head, window": replace(SMALL, family="mistral", num_kv_heads=1, sliding_window=6),
}  # fmt: skip


FAMILY_PLAN = {
    "actor_gen": "0:d2p1m2:2:rows=2", "rew_inf": "2:d1p2m1:2", "ref_inf": "0:d1p1m2:2:offload",
    "critic_inf": "2:d1p1m2:1", "actor_train": "0:d1p2m2:2:recompute",
    "critic_train": "0:d2p1m2:2:zero:offload:sp",
}  # fmt: skip


# Experts over data-parallel ranks: in all calls, beside tp and pp, with what keeps or moves state.
EXPERT_PLANS = {
    "ep 2": (2, "0:d2p1m1e2:1", {}),
    "ep 2 trained, tp 2 generating": (
        2, "0:d2p1m1e2:2", {"actor_gen": "0:d1p1m2:1", "critic_train": "0:d2p1m1e2:2:zero"},
    ),
    "ep 2, few rows, recomputed": (
        2, "0:d2p1m1e2:1",
        {"actor_gen": "0:d2p1m1e2:1:rows=2", "actor_train": "0:d2p1m1e2:2:recompute:zero",
         "critic_train": "0:d1p2m1:2"},
    ),
    "ep 2 beside tp and pp": (
        4, "0:d4p1m1e2:1",
        {"actor_gen": "0:d2p2m1e2:2", "rew_inf": "2:d2p1m1e2:1", "ref_inf": "0:d2p1m2e2:1",
         "critic_inf": "0:d2p2m1e2:2", "actor_train": "0:d4p1m1e2:1:zero:selective",
         "critic_train": "0:d2p1m2e2:2:zero:sp"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """What all plans of this file come to, by name."""
    plans = {**PLANS, **{f"groups, {name}": plan for name, plan in GROUP_PLANS.items()}}
    plans |= {f"shared, {name}": plan for name, plan in SHARED_PLANS.items()}
    for name, spec in FAMILIES.items():
        plans[f"{name}, whole"] = make_plan(1, "0:d1p1m1:1", spec=spec)
        plans[f"{name}, split"] = make_plan(4, "0:d4p1m1:1", spec=spec, **FAMILY_PLAN)
    for name, (num_devices, default, calls) in EXPERT_PLANS.items():
        plans[name] = make_plan(num_devices, default, spec=FAMILIES["experts"], **calls)
    found: dict[str, list[Outcome]] = {}
    for few in (True, False):
        runs: Runs = {
            name: (plan, None) for name, plan in plans.items() if (plan.num_devices <= 2) is few
        }
        found |= run_plans(runs, tmp_path_factory.mktemp("runs"))
    return found


@pytest.fixture(scope="module")
def reference(outcomes: dict[str, list[Outcome]]) -> Outcome:
    return outcomes["one process"][0]


@pytest.mark.parametrize("name", [name for name in PLANS if name != "one process"])
def test_every_plan_gives_the_tokens_losses_and_weights_of_one_process(
    name: str, outcomes: dict[str, list[Outcome]], reference: Outcome
) -> None:
    compare(name, outcomes[name], reference)


def test_groups_of_samples_give_the_same_under_every_plan(
    outcomes: dict[str, list[Outcome]],
) -> None:
    """Three answers to each of five prompts: answers to one prompt differ from each other.

    After long prompts training and inference compute these once for all three.
    """
    for kind, plans in (("groups", GROUP_PLANS), ("shared", SHARED_PLANS)):
        whole = outcomes[f"{kind}, one process"][0]
        assert len(whole.tokens) == 2 * 5 * 3
        assert len({tuple(ids) for ids in whole.tokens.values()}) > 2 * 5 * 2
        for name in list(plans)[1:]:
            compare(f"{kind}, {name}", outcomes[f"{kind}, {name}"], whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_the_same_under_every_plan(
    name: str, outcomes: dict[str, list[Outcome]]
) -> None:
    compare(name, outcomes[f"{name}, split"], outcomes[f"{name}, whole"][0])


@pytest.mark.parametrize("name", EXPERT_PLANS)
def test_experts_over_data_parallel_ranks_change_nothing(
    name: str, outcomes: dict[str, list[Outcome]]
) -> None:
    compare(name, outcomes[name], outcomes["experts, whole"][0])


def compare(name: str, outcomes: list[Outcome], reference: Outcome) -> None:
    """Tokens identical, metrics and weights equal to 1e-4, all of them seen."""
    seen: set[tuple[int, int]] = set()
    for outcome in outcomes:
        for key, ids in outcome.tokens.items():
            assert ids == reference.tokens[key], (name, key)
            seen.add(key)
        for call, values in reference.metrics.items():
            for metric, value in values.items():
                assert outcome.metrics[call][metric] == pytest.approx(value, abs=1e-4, rel=1e-4), (
                    name, call, metric,
                )  # fmt: skip
    assert seen == set(reference.tokens)
    for role, whole in reference.slices.items():
        parameters = {parameter: tensor for (parameter, _), tensor in whole.items()}
        covered = dict.fromkeys(parameters, 0)
        for outcome in outcomes:
            for (parameter, offset), tensor in outcome.slices.get(role, {}).items():
                index = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
                expected = parameters[parameter][index]
                assert (tensor - expected).abs().max() <= 1e-4, (name, role, parameter)
                covered[parameter] += tensor.numel()
        for parameter, tensor in parameters.items():
            assert covered[parameter] >= tensor.numel(), (name, role, parameter)


def test_the_steps_changed_the_weights(reference: Outcome) -> None:
    """Guards the comparison above against comparing what never moved."""
    assert len(reference.tokens) == 8 * 2
    assert len({tuple(ids) for ids in reference.tokens.values()}) > 8
    norms = [values["grad_norm"] for call, values in reference.metrics.items() if "train" in call]
    assert norms
    assert all(norm > 0 for norm in norms)

"""``to_openrlhf``."""

from __future__ import annotations

from collections.abc import Mapping

from planner.export.draft import Draft, Exported, lose_averages, lose_experts, nodes_of, unknown
from planner.graph import CallKind
from planner.plan import Allocation, ExecutionPlan

_OPENRLHF_ESTIMATORS = {"ppo": "gae", "grpo": "group_norm"}
_OPENRLHF_BASELINES = {"batch": "reinforce", "group": "reinforce_baseline",
                       "leave_one_out": "rloo"}  # fmt: skip


def to_openrlhf(plan: ExecutionPlan) -> Exported:
    """Flags of ``openrlhf.cli.train_ppo_ray``: each role on nodes of its own or all on the same.

    Training is DeepSpeed's: ZeRO and one tensor-parallel size for all roles, no pipeline.
    Generation is vLLM's, engines of tp devices. Source: OpenRLHF/OpenRLHF,
    ``openrlhf/cli/train_ppo_ray.py`` at commit 021d1b0 (end of 2025).
    """
    draft = Draft(plan=plan)
    estimator = _OPENRLHF_ESTIMATORS.get(plan.problem.algorithm)
    if plan.problem.algorithm == "reinforce":
        estimator = _OPENRLHF_BASELINES[plan.problem.config["reinforce"]["baseline"]]
    if estimator is None:
        raise unknown(plan, "OpenRLHF", [*_OPENRLHF_ESTIMATORS, "reinforce"])
    put, workload = draft.settings, plan.problem.workload
    train, actor = draft.need(CallKind.TRAIN, "actor")
    homes = _openrlhf_homes(draft)
    for role, allocation in homes.items():
        nodes, per_node = nodes_of(plan, allocation)
        put[f"{role}_num_nodes"], put[f"{role}_num_gpus_per_node"] = nodes, per_node
    _openrlhf_sharing(draft, homes)
    _openrlhf_engines(draft)
    _openrlhf_training(draft, actor, homes)
    tp = actor.strategy.tp
    dp = max(1, actor.mesh.num_devices // tp)
    put["advantage_estimator"] = estimator
    put["n_samples_per_prompt"] = draft.samples
    put["rollout_batch_size"] = workload.batch_size
    put["train_batch_size"] = draft.mini_batch(train) * draft.samples
    put["micro_train_batch_size"] = draft.micro_batch(train, actor, dp)
    inference = draft.find(CallKind.INFER, "ref")
    if inference is not None:
        call, allocation = inference
        replicas = max(1, allocation.mesh.num_devices // tp)
        put["micro_rollout_batch_size"] = draft.micro_batch(call, allocation, replicas)
    put["max_epochs"] = train.num_epochs
    put["prompt_max_len"] = workload.prompt_tokens
    put["generate_max_len"] = workload.response_tokens
    draft.compare_twins("OpenRLHF", "critic_inf", "critic_train")
    lose_experts(draft, "OpenRLHF")
    lose_averages(draft, "OpenRLHF")
    if len(plan.problem.cluster.groups) > 1:
        draft.lost.append(
            "OpenRLHF takes nodes of its Ray cluster as they come: it is not told which role is to "
            "be on which kind of device"
        )
    if plan.problem.graph.max_staleness:
        put["async_train"] = True
    return Exported(
        system="OpenRLHF", version="OpenRLHF/OpenRLHF 021d1b0", settings=put, flags=True,
        lost=tuple(draft.lost), command="python3 -m openrlhf.cli.train_ppo_ray",
    )  # fmt: skip


def _openrlhf_homes(draft: Draft) -> dict[str, Allocation]:
    """The allocation that stands for each of OpenRLHF's DeepSpeed roles."""
    wanted = (
        ("actor", CallKind.TRAIN), ("ref", CallKind.INFER), ("critic", CallKind.TRAIN),
        ("reward", CallKind.INFER),
    )  # fmt: skip
    found = {role: draft.find(kind, role) for role, kind in wanted}
    return {role: pair[1] for role, pair in found.items() if pair is not None}


def _openrlhf_sharing(draft: Draft, homes: Mapping[str, Allocation]) -> None:
    """Which roles are on the same devices; roles that overlap otherwise cannot be said."""
    gen = draft.need(CallKind.GENERATE, "actor")[1]
    meshes = {role: allocation.mesh for role, allocation in homes.items()}
    if len({*meshes.values(), gen.mesh}) == 1:
        draft.settings["colocate_all_models"] = True
        draft.settings["vllm_enable_sleep"] = True
        draft.settings["deepspeed_enable_sleep"] = True
        return
    together = []
    for a, b in (("actor", "ref"), ("critic", "reward")):
        if a in meshes and meshes[a] == meshes.get(b):
            draft.settings[f"colocate_{a}_{b}"] = True
            together.append({a, b})
    meshes["generation"] = gen.mesh
    names = list(meshes)
    shared = [
        f"{a} and {b}"
        for i, a in enumerate(names) for b in names[i + 1 :]
        if meshes[a].overlaps(meshes[b]) and {a, b} not in together
    ]  # fmt: skip
    if shared:
        draft.lost.append(
            f"{'; '.join(shared)} share devices in the plan; OpenRLHF gives each of them devices "
            "of its own, so that it needs more"
        )


def _openrlhf_engines(draft: Draft) -> None:
    call, gen = draft.need(CallKind.GENERATE, "actor")
    s = gen.strategy
    draft.settings["vllm_num_engines"] = gen.mesh.num_devices // s.tp
    draft.settings["vllm_tensor_parallel_size"] = s.tp
    if s.pp > 1:
        draft.lost.append(
            f"{call.name} has pp {s.pp}; OpenRLHF's engines have no pipeline: there are {s.pp} "
            f"times as many of tp {s.tp}, each with all the weights"
        )
    if gen.generation_batch:
        draft.lost.append(
            f"{call.name} decodes {gen.generation_batch} sequences at once; vLLM decides by "
            "vllm_gpu_memory_utilization"
        )


def _openrlhf_training(draft: Draft, actor: Allocation, homes: Mapping[str, Allocation]) -> None:
    put = draft.settings
    put["ds_tensor_parallel_size"] = actor.strategy.tp
    for role, allocation in homes.items():
        if allocation.strategy.tp != actor.strategy.tp:
            draft.lost.append(
                f"{role} has tp {allocation.strategy.tp}; OpenRLHF has one tp for all its "
                f"DeepSpeed roles, {actor.strategy.tp} as the actor's"
            )
        if allocation.strategy.pp > 1:
            draft.lost.append(
                f"{role} has pp {allocation.strategy.pp}; DeepSpeed in OpenRLHF has no pipeline: "
                "weights are split by ZeRO stage 3 instead"
            )
    trained = [homes[role] for role in ("actor", "critic") if role in homes]
    if any(allocation.strategy.pp > 1 for allocation in homes.values()):
        put["zero_stage"] = 3
    else:
        put["zero_stage"] = max(allocation.strategy.zero for allocation in trained)
    if any(allocation.strategy.recompute != "none" for allocation in trained):
        put["gradient_checkpointing"] = True
    kinds = {allocation.strategy.recompute for allocation in trained}
    if kinds - {"none", "full"} or len(kinds) > 1:
        draft.lost.append(
            f"recomputation is {' and '.join(sorted(kinds))} in the plan; gradient_checkpointing "
            "is of whole blocks, and of both trained roles or none"
        )
    if any(allocation.offload for allocation in trained):
        put["adam_offload"] = True
    frozen = [homes[role] for role in ("ref", "reward") if role in homes]
    if any(allocation.offload for allocation in frozen):
        put["ref_reward_offload"] = True

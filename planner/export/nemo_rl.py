"""``to_nemo_rl``."""

from __future__ import annotations

from planner.export.draft import (
    Draft,
    Exported,
    equal_nodes,
    lose_averages,
    lose_experts,
    nodes_of,
    unknown,
)
from planner.graph import CallKind
from planner.plan import ExecutionPlan


def to_nemo_rl(plan: ExecutionPlan) -> Exported:
    """Overrides of NeMo-RL's GRPO: one Megatron policy, and vLLM beside or between its steps.

    The reference is a copy in the policy's layout; there is no critic and no reward model (rewards
    come from an environment). Source: NVIDIA-NeMo/RL, ``examples/configs/grpo_math_1B.yaml`` at
    commit 00294d9 (end of 2025).
    """
    draft = Draft(plan=plan)
    if (
        draft.find(CallKind.GENERATE, "actor") is None
        or draft.find(CallKind.TRAIN, "actor") is None
    ):
        raise unknown(plan, "NeMo-RL", ["grpo"])
    put, cluster, workload = draft.settings, equal_nodes(plan, "NeMo-RL"), plan.problem.workload
    train, actor = draft.need(CallKind.TRAIN, "actor")
    generate, gen = draft.need(CallKind.GENERATE, "actor")
    apart = not gen.mesh.overlaps(actor.mesh)
    shared = draft.devices - gen.mesh.num_devices if apart else draft.devices
    put["cluster.num_nodes"] = cluster.num_nodes
    put["cluster.gpus_per_node"] = cluster.devices_per_node
    put["grpo.num_prompts_per_step"] = workload.batch_size
    put["grpo.num_generations_per_prompt"] = draft.samples
    put["policy.max_total_sequence_length"] = workload.max_tokens
    put["policy.train_global_batch_size"] = draft.mini_batch(train) * draft.samples
    s, megatron = actor.strategy, "policy.megatron_cfg"
    put["policy.dtensor_cfg.enabled"] = False
    put[f"{megatron}.enabled"] = True
    put[f"{megatron}.tensor_model_parallel_size"] = s.tp
    put[f"{megatron}.pipeline_model_parallel_size"] = s.pp
    put[f"{megatron}.sequence_parallel"] = s.sequence_parallel
    put[f"{megatron}.activation_checkpointing"] = s.recompute != "none"
    put[f"{megatron}.optimizer.use_distributed_optimizer"] = bool(s.zero)
    put["policy.make_sequence_length_divisible_by"] = s.tp
    dp = max(1, shared // (s.tp * s.pp))
    put["policy.train_micro_batch_size"] = draft.micro_batch(train, actor, dp)
    inference = draft.find(CallKind.INFER, "ref")
    call, allocation = inference or (train, actor)
    put["policy.logprob_batch_size"] = draft.micro_batch(call, allocation, dp)
    put["policy.generation.vllm_cfg.tensor_parallel_size"] = gen.strategy.tp
    put["policy.generation.vllm_cfg.pipeline_parallel_size"] = gen.strategy.pp
    put["policy.generation.max_new_tokens"] = workload.response_tokens
    put["policy.generation.colocated.enabled"] = not apart
    if apart:
        nodes, per_node = nodes_of(plan, gen)
        put["policy.generation.colocated.resources.num_nodes"] = nodes
        put["policy.generation.colocated.resources.gpus_per_node"] = per_node
    if plan.problem.graph.max_staleness:
        put["grpo.async_grpo.enabled"] = True
        put["grpo.async_grpo.max_trajectory_age_steps"] = plan.problem.graph.max_staleness
    _nemo_losses(draft, train.name, generate.name, apart=apart, shared=shared)
    return Exported(
        system="NeMo-RL", version="NVIDIA-NeMo/RL 00294d9", settings=put, lost=tuple(draft.lost),
        command="uv run examples/run_grpo_math.py --config examples/configs/grpo_math_1B.yaml",
    )  # fmt: skip


def _nemo_losses(
    draft: Draft, train: str, generate: str, *, apart: bool, shared: int
) -> None:  # fmt: skip
    plan = draft.plan
    for call in plan.problem.graph.calls:
        if call.role in ("critic", "reward"):
            draft.lost.append(f"{call.name}: GRPO in NeMo-RL has no {call.role} model")
    if plan.problem.algorithm != "grpo":
        draft.lost.append(f"the algorithm is {plan.problem.algorithm}; these options are GRPO's")
    actor, gen = plan.allocations[train], plan.allocations[generate]
    if actor.mesh.num_devices != shared:
        draft.lost.append(
            f"{train} runs on {actor.mesh} in the plan, and in NeMo-RL on all {shared} devices "
            "that generation does not have for itself"
        )
    if not apart and gen.mesh.num_devices != shared:
        draft.lost.append(
            f"{generate} runs on {gen.mesh} in the plan, and in NeMo-RL on the policy's devices"
        )
    if actor.strategy.recompute == "selective":
        draft.lost.append(f"{train}: activation_checkpointing is of whole blocks, not selective")
    if gen.generation_batch:
        draft.lost.append(
            f"{generate} decodes {gen.generation_batch} sequences at once; vLLM decides by "
            "gpu_memory_utilization"
        )
    if any(allocation.offload for allocation in plan.allocations.values()):
        draft.lost.append("offloading single calls; NeMo-RL moves the policy out by itself")
    draft.compare_twins("NeMo-RL", "ref_inf", train)
    lose_experts(draft, "NeMo-RL")
    lose_averages(draft, "NeMo-RL")

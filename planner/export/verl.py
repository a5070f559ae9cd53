"""``to_verl``."""

from __future__ import annotations

from math import ceil

from planner.export.draft import (
    Draft,
    Exported,
    equal_nodes,
    lose_averages,
    lose_experts,
    unknown,
)
from planner.graph import CallKind
from planner.plan import Allocation, ExecutionPlan

_VERL_ESTIMATORS = {"ppo": "gae", "grpo": "grpo", "remax": "remax"}
_RLOO = {"batch": "reinforce_plus_plus", "group": "reinforce_plus_plus_baseline",
         "leave_one_out": "rloo"}  # fmt: skip


def to_verl(plan: ExecutionPlan) -> Exported:
    """Overrides of verl's ``ppo_megatron_trainer``: all models share all devices.

    Every role has its tp and pp; dp is what is left of all devices. Source: volcengine/verl,
    ``verl/trainer/config/_generated_ppo_megatron_trainer.yaml`` at commit 00bbce4 (end of 2025).
    """
    draft = Draft(plan=plan)
    estimator = _VERL_ESTIMATORS.get(plan.problem.algorithm)
    if plan.problem.algorithm == "reinforce":
        estimator = _RLOO[plan.problem.config["reinforce"]["baseline"]]
    if estimator is None:
        raise unknown(plan, "verl", [*_VERL_ESTIMATORS, "reinforce"])
    put, cluster, workload = draft.settings, equal_nodes(plan, "verl"), plan.problem.workload
    generate, gen = draft.need(CallKind.GENERATE, "actor")
    put["trainer.nnodes"] = cluster.num_nodes
    put["trainer.n_gpus_per_node"] = cluster.devices_per_node
    put["algorithm.adv_estimator"] = estimator
    put["data.train_batch_size"] = workload.batch_size
    put["data.max_prompt_length"] = workload.prompt_tokens
    put["data.max_response_length"] = workload.response_tokens
    rollout = "actor_rollout_ref.rollout"
    put[f"{rollout}.n"] = draft.samples
    put[f"{rollout}.tensor_model_parallel_size"] = gen.strategy.tp
    put[f"{rollout}.pipeline_model_parallel_size"] = gen.strategy.pp
    _verl_shares_all(draft, generate.name, gen)
    dp = max(1, draft.devices // (gen.strategy.tp * gen.strategy.pp))
    rows = gen.generation_batch or ceil(workload.num_sequences / dp)
    put[f"{rollout}.max_num_seqs"] = rows
    _verl_trained(draft, "actor", "actor_rollout_ref.actor")
    _verl_frozen(draft, "ref", "actor_rollout_ref.ref", "log_prob_micro_batch_size_per_gpu")
    _verl_trained(draft, "critic", "critic")
    if draft.find(CallKind.INFER, "reward") is not None:
        put["reward_model.enable"] = True
        _verl_frozen(draft, "reward", "reward_model", "micro_batch_size_per_gpu")
    draft.compare_twins("verl", "critic_inf", "critic_train")
    draft.lost.append(
        "verl computes the actor's log-probabilities once more in its training layout before it "
        "trains; the plan takes them from generation"
    )
    draft.staleness("max_staleness 1 is verl's recipe one_step_off_policy, not an option here")
    lose_experts(draft, "verl", megatron=True)
    lose_averages(draft, "verl")
    return Exported(
        system="verl", version="volcengine/verl 00bbce4", settings=put, lost=tuple(draft.lost),
        command="python3 -m verl.trainer.main_ppo --config-name=ppo_megatron_trainer.yaml",
    )  # fmt: skip


def _verl_shares_all(draft: Draft, name: str, allocation: Allocation) -> bool:
    """Does the call's layout divide all devices? Told where it is not on all of them."""
    s = allocation.strategy
    if draft.devices % (s.tp * s.pp):
        draft.lost.append(
            f"{name}: verl puts every model on all {draft.devices} devices, which tp {s.tp} x pp "
            f"{s.pp} does not divide: its options are left as they are"
        )
        return False
    if allocation.mesh.num_devices != draft.devices:
        draft.lost.append(
            f"{name} runs on {allocation.mesh} in the plan, and in verl on all devices with dp "
            f"{draft.devices // (s.tp * s.pp)}"
        )
    return True


def _verl_trained(draft: Draft, role: str, path: str) -> None:
    found = draft.find(CallKind.TRAIN, role)
    if found is None:
        return
    call, allocation = found
    s, put = allocation.strategy, draft.settings
    put[f"{path}.ppo_mini_batch_size"] = draft.mini_batch(call)
    put[f"{path}.ppo_epochs"] = call.num_epochs
    if not _verl_shares_all(draft, call.name, allocation):
        return
    dp = draft.devices // (s.tp * s.pp)
    put[f"{path}.ppo_micro_batch_size_per_gpu"] = draft.micro_batch(call, allocation, dp)
    put[f"{path}.megatron.tensor_model_parallel_size"] = s.tp
    put[f"{path}.megatron.pipeline_model_parallel_size"] = s.pp
    if s.ep > 1:
        put[f"{path}.megatron.expert_model_parallel_size"] = s.ep
    put[f"{path}.megatron.sequence_parallel"] = s.sequence_parallel
    put[f"{path}.megatron.use_distributed_optimizer"] = bool(s.zero)
    for what in ("optimizer", "grad"):
        put[f"{path}.megatron.{what}_offload"] = allocation.offload
    options = f"{path}.megatron.override_transformer_config"
    if s.recompute == "full":
        put[f"{options}.recompute_granularity"] = "full"
        put[f"{options}.recompute_method"] = "uniform"
        put[f"{options}.recompute_num_layers"] = 1
    elif s.recompute == "selective":
        put[f"{options}.recompute_granularity"] = "selective"
        draft.lost.append(
            f"{call.name}: selective recomputation is Megatron's of attention's core, not ours of "
            "all that is cheap: activations take more memory than in the plan"
        )
    if role == "actor":
        # verl asks for it wherever it computes the actor's log-probabilities again.
        put["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"] = draft.micro_batch(
            call, allocation, dp
        )


def _verl_frozen(draft: Draft, role: str, path: str, micro: str) -> None:
    found = draft.find(CallKind.INFER, role)
    if found is None:
        return
    call, allocation = found
    s = allocation.strategy
    if not _verl_shares_all(draft, call.name, allocation):
        return
    put, dp = draft.settings, draft.devices // (s.tp * s.pp)
    put[f"{path}.{micro}"] = draft.micro_batch(call, allocation, dp)
    put[f"{path}.megatron.tensor_model_parallel_size"] = s.tp
    put[f"{path}.megatron.pipeline_model_parallel_size"] = s.pp
    if s.ep > 1:
        put[f"{path}.megatron.expert_model_parallel_size"] = s.ep
    put[f"{path}.megatron.sequence_parallel"] = s.sequence_parallel
    put[f"{path}.megatron.param_offload"] = allocation.offload

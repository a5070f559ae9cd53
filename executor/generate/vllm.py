"""Generation by vLLM, with the interface of ``engine.generate``: an engine inside each worker.

Read ``VLLM.generate`` first. Weights go from the parameter buffer into vLLM's model in memory, by
their names in a checkpoint, before every generation; no file is read. Meanwhile a device holds
them twice, and a planner's seconds and bytes stay those of our own engine. The engines of a
tensor-parallel group schedule alike, as under vLLM's external launcher, and talk over vLLM's
groups, which ``join`` makes.

Which token is drawn is vLLM's: seeded by (seed, step, sample), but by no rule that a layout cannot
change. Only greedy answers are those of ``engine.py``, and equal under every plan, up to rounding.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from executor.batch import SequenceBatch
from executor.generate.answers import Answer, batch_of, begun
from executor.generate.sampling import SamplingParams, uniform
from executor.model.hf_save import checkpoint_config, checkpoint_tensors
from executor.model.transformer import DecoderStage
from executor.optional import optional_package
from planner.cost.stage import MAX_PROMPT_TOKENS
from planner.graph import CallKind
from planner.layout import Layout
from planner.plan import ExecutionPlan
from profiles.errors import ConfigError, PlanError

WHERE = "generation_backend"
REMEDY = "pip install 'realplan[vllm]', or generation_backend=own"

# Tokens of a block of vLLM's cache: what all of its devices allow, and the least of its CPUs.
BLOCK_TOKENS = 32

# Before vllm is imported; what a user has set stays.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it has the weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all workers of a machine bind to the same cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

# Without Triton, vLLM 0.32 looks for its kernels in all that all modules hold, and fails at what
# numba brings: an object that has every attribute.
HIDDEN = ("llvmlite.binding.ffi",)


def one_tp(plan: ExecutionPlan) -> int:
    """The tensor parallelism of all calls that generate; 1 where none does.

    Raises:
        PlanError: a call generates a model or under a layout that vLLM cannot have here; names it.
    """
    sizes: dict[int, str] = {}
    for call in plan.problem.graph.calls:
        if call.kind is not CallKind.GENERATE:
            continue
        mesh, strategy = plan.allocations[call.name].mesh, plan.allocations[call.name].strategy
        where = f"allocations.{call.name}"
        if strategy.pp > 1:
            raise PlanError(
                f"vLLM generates under tp and dp here, not with pp {strategy.pp}", where=where,
                remedy="give this call pp 1, or generation_backend=own",
            )  # fmt: skip
        spec = plan.problem.spec_of(call.name)
        if spec is not None and spec.num_experts:
            raise PlanError(
                f"vLLM goes on with the experts that it began with: {spec.name} has "
                f"{spec.num_experts}",
                where=where, remedy="use generation_backend=own",
            )  # fmt: skip
        sizes.setdefault(strategy.tp, call.name)
        if len(sizes) > 1:
            raise PlanError(
                f"vLLM has one tp in a process, but this call has {strategy.tp} and "
                f"{sizes[next(iter(sizes))]} has {next(iter(sizes))}",
                where=where, remedy="give them one tp, or generation_backend=own",
            )  # fmt: skip
        if mesh.first % strategy.tp or plan.num_devices % strategy.tp:
            raise PlanError(
                f"vLLM cuts the plan's {plan.num_devices} devices into groups of tp {strategy.tp}, "
                f"of which none begins at device {mesh.first}",
                where=where, remedy="move the call, or generation_backend=own",
            )  # fmt: skip
    return next(iter(sizes), 1)


class VLLM:
    """One rank's engines, one for each layout that it generates in.

    Made on every rank of the world at once, also on those that never generate: the process groups
    are made here, of ``tp`` ranks each. ``longest_tokens``: of a prompt and its answer.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, *, tp: int, longest_tokens: int, device: torch.device) -> None:
        os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
        self.vllm = optional_package("vllm", where=WHERE, remedy=REMEDY)
        self.longest_tokens = longest_tokens
        self.sleeps = device.type == "cuda"  # vLLM ignores it on CPUs
        self.engines: dict[Layout, Any] = {}
        self.scales: dict[Layout, list[tuple[Any, float]]] = {}  # of logits, as the model has them
        _join(tp, device)

    def generate(
        self,
        stage: DecoderStage,
        prompts: Sequence[Tensor],
        *,
        samples: Sequence[int],
        params: SamplingParams,
        seed: int,
        step: int,
        num_groups: int = 1,
        max_rows: int | None = None,
    ) -> SequenceBatch:
        """As ``engine.generate``, but for which tokens are drawn; vLLM makes its own groups.

        ``log_probs`` are those of log_softmax(logits / temperature), as there: the temperature
        divides the logits in vLLM's model, which tells them before anything is left out.
        """
        answers = begun(stage.spec, prompts, samples, params)
        llm = self.hand_over(stage, max_rows or len(answers))
        for module, scale in self.scales[stage.ctx.layout]:
            module.scale = scale / params.temperature
        outputs = llm.generate(
            [{"prompt_token_ids": answer.prompt.tolist()} for answer in answers],
            self._sampling(answers, params, seed, step),
            use_tqdm=False,
        )
        if self.sleeps:
            llm.sleep(level=2)  # weights and cache go: the next generation brings its own
        for answer, output in zip(answers, outputs, strict=True):
            (found,) = output.outputs
            for token, log_probs in zip(found.token_ids, found.logprobs, strict=True):
                answer.append(token, log_probs[token].logprob)
            answer.finished = answer.answer[-1] in params.stop_token_ids
        return batch_of(answers, stage.ctx.device)

    def hand_over(self, stage: DecoderStage, rows: int) -> Any:
        """The layout's engine, awake, with the weights of ``stage``; made for ``rows`` sequences
        under way at once if there is none yet."""
        layout = stage.ctx.layout
        if layout not in self.engines:
            self.engines[layout] = self._engine(stage, rows)
            self.scales[layout] = _scales(self.engines[layout])
        llm = self.engines[layout]
        if self.sleeps:
            llm.wake_up(tags=["weights"])
        weights = checkpoint_tensors(stage.ctx, stage.buffer, stage.spec)
        with torch.no_grad():
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if stage.spec.tied_embedding:
                llm.apply_model(_repack_head)
        if self.sleeps:
            llm.wake_up(tags=["kv_cache"])
        llm.reset_prefix_cache()  # it holds keys and values of other weights
        return llm

    def _sampling(
        self, answers: Sequence[Answer], params: SamplingParams, seed: int, step: int
    ) -> list[Any]:
        """vLLM's parameters of each answer. The temperature is in the logits already."""
        samples = torch.tensor([answer.sample for answer in answers])
        seeds = uniform(seed, step, samples, torch.zeros_like(samples)) * 2.0**53
        return [
            self.vllm.SamplingParams(
                temperature=0.0 if params.greedy else 1.0,
                top_k=params.top_k,
                top_p=params.top_p,
                seed=int(own_seed),
                max_tokens=answer.limit - len(answer.prompt),
                min_tokens=min(params.min_new_tokens, answer.limit - len(answer.prompt)),
                stop_token_ids=list(params.stop_token_ids),
                ignore_eos=True,  # the stop tokens say all
                logprobs=0,  # of the chosen token
                detokenize=False,
            )
            for answer, own_seed in zip(answers, seeds.tolist(), strict=True)
        ]

    def _engine(self, stage: DecoderStage, rows: int) -> Any:
        """An engine of this shape, with weights that mean nothing yet."""
        spec, dtype, tp = stage.spec, stage.buffer.flat.dtype, stage.ctx.layout.tp
        longest = min(self.longest_tokens, spec.max_positions)
        # A block more than the rows fill: vLLM keeps one for nobody.
        num_blocks = rows * -(-longest // BLOCK_TOKENS) + 1
        token_bytes = (
            2 * spec.num_layers * spec.cached_kv_heads(tp) * spec.head_dim * dtype.itemsize
        )
        num_threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
        with tempfile.TemporaryDirectory() as folder:
            config = json.dumps(checkpoint_config(spec, dtype))
            (Path(folder) / "config.json").write_text(config, encoding="utf-8")
            hidden = {name: sys.modules.pop(name) for name in HIDDEN if name in sys.modules}
            try:
                llm = self.vllm.LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    dtype=str(dtype).removeprefix("torch."),
                    tensor_parallel_size=tp,
                    distributed_executor_backend=_executor_class(stage),
                    max_model_len=longest,
                    max_num_seqs=rows,
                    max_num_batched_tokens=max(MAX_PROMPT_TOKENS, rows, longest),
                    block_size=BLOCK_TOKENS,
                    kv_cache_memory_bytes=num_blocks * BLOCK_TOKENS * token_bytes,
                    # A GPU must have this share of its memory free when the engine is made, also
                    # where the cache's size is given; by default more than training leaves.
                    gpu_memory_utilization=0.01,
                    logprobs_mode="raw_logprobs",
                    enable_sleep_mode=self.sleeps,
                    enforce_eager=not self.sleeps,  # CUDA graphs, but no compiler on CPUs
                )
            except (NotImplementedError, ValueError) as error:
                raise ConfigError(
                    f"vLLM cannot have {spec.name}: {error}", where=WHERE,
                    remedy="use generation_backend=own",
                ) from error  # fmt: skip
            finally:
                sys.modules.update(hidden)
                # vLLM takes threads from the whole process for good; they are training's too.
                torch.set_num_threads = set_num_threads
                set_num_threads(num_threads)
        # At the engine's end it would destroy the process groups of the run.
        llm.llm_engine.engine_core._finalizer.detach()
        return llm


def _join(tp: int, device: torch.device) -> None:
    """vLLM's process groups over the whole world, in consecutive groups of ``tp``."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    # The name of the shared memory of a tensor-parallel group.
    name = torch.tensor(list(uuid.uuid4().bytes), dtype=torch.uint8, device=device)
    dist.broadcast(name, src=0)
    os.environ["VLLM_DIST_IDENT"] = bytes(name.tolist()).hex()
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            world_size=dist.get_world_size(), rank=dist.get_rank(),
            local_rank=int(os.environ.get("LOCAL_RANK", dist.get_rank())),
            backend=current_platform.dist_backend,
        )  # fmt: skip
        parallel_state.ensure_model_parallel_initialized(tp, 1)


def _executor_class(stage: DecoderStage) -> type:
    """vLLM's external launcher for some of the processes instead of for all of them."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor

    rank = stage.ctx.tp_rank
    local_rank = stage.ctx.device.index or 0

    class Engine(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            return "env://", rank, local_rank  # the groups are there: nothing is read

        def determine_available_memory(self) -> list[int]:
            # The cache's size is given, so that nobody needs to ask all processes.
            found: list[int] = UniProcExecutor.determine_available_memory(self)
            return found

    return Engine


def _repack_head(model: Any) -> None:
    """On CPUs a head keeps a copy of its weights, which nobody makes anew if it shares them."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)


def _scales(llm: Any) -> list[tuple[Any, float]]:
    """The modules that scale logits, and by what the model's family asks."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def find(model: Any) -> list[tuple[Any, float]]:
        return [(m, m.scale) for m in model.modules() if isinstance(m, LogitsProcessor)]

    (found,) = llm.apply_model(find)
    assert found, "no logits in vLLM's model"
    return list(found)

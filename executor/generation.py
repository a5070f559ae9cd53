"""``Generation``: with what a rank generates, and what of it stays from step to step.

Read ``engine``. Whether something stays is the program's (``planner.program.Generate``), what that
is ``generate/caches.py``'s; vLLM keeps what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from executor.batch import SequenceBatch
from executor.cuda_graph import Capture, GraphCapture, GraphPool
from executor.generate.caches import Caches, shares
from executor.generate.engine import generate
from executor.generate.vllm import VLLM, one_tp
from executor.model.transformer import DecoderStage
from executor.run import Run
from planner.memory import generation_rows
from planner.program import Generate


class Generation:
    """``kept``: caches by call, each made in the call's first generation."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.plan = run.plan
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.kept: dict[str, Caches] = {}
        self.vllm: VLLM | None = None
        if run.config.generation_backend == "vllm":
            longest = run.config.prompt_len + run.config.response_len
            self.vllm = VLLM(tp=one_tp(run.plan), longest_tokens=longest, device=device)

    def engine(self, instruction: Generate, stage: DecoderStage) -> Callable[..., SequenceBatch]:
        """What generates with ``stage`` for this instruction, called as ``engine.generate`` is."""
        if self.vllm is not None:
            return partial(self.vllm.generate, stage)
        caches = self._caches(instruction.call) if instruction.keeps else None
        capture = self.capture(stage, GraphPool() if caches is None else caches.pool)
        return partial(generate, stage, capture=capture, caches=caches)

    def capture(self, stage: DecoderStage, pool: GraphPool) -> Capture | None:
        """For one generation by ``stage``; its graphs' memory is that of ``pool``."""
        return None if self.stream is None else GraphCapture(self.device, self.stream, pool)

    def _caches(self, name: str) -> Caches:
        """As large as the plan has a call's."""
        if name not in self.kept:
            problem, allocation = self.plan.problem, self.plan.allocations[name]
            rows, _ = generation_rows(problem, problem.graph.call(name), allocation)
            groups = min(allocation.num_micro_batches, rows)
            self.kept[name] = Caches(shares(rows, groups), problem.workload_of(name).max_tokens)
        return self.kept[name]

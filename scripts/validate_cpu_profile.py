"""Does a profile predict whole stages? Predicted against measured seconds of whole calls.

    realexec profile --model smollm2-135m --workers 2 -o profile.json
    python scripts/validate_cpu_profile.py profile.json [--model smollm2-135m] [--workers 2]

Every worker builds the whole model (random weights) and, at the same time as the others, runs
inference, training with its optimizer step, and generation, on batches and lengths that no
profile has as points. The predictions are ``planner.cost``'s for one device. Prints one row for
each case, and the median error of each kind and of all. Exits with 1 where the median error of
all is above 10%. The profile takes a minute or two, this a few.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from executor.allocator import keep_freed_memory
from executor.batch import SequenceBatch
from executor.buffers import ParameterBuffer
from executor.context import single_process
from executor.generate.engine import generate
from executor.generate.sampling import SamplingParams
from executor.model.attention import pack
from executor.model.transformer import DecoderStage
from executor.parallel.optimizer import Adam, AdamConfig
from executor.parallel.pipeline import train_1f1b
from executor.parallel.tensor import vocab_parallel_log_probs
from executor.profile_measure import Action, Lockstep, Probe
from planner.cost import CallCost, CostModel, call_cost
from planner.graph import CallKind, DataflowGraph, ModelFunctionCall
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Problem, Workload
from planner.strategy import ParallelStrategy
from profiles.catalogue import resolve_model
from profiles.clusters import local_cluster
from profiles.collectives import Collectives
from profiles.errors import UserError
from profiles.models import ModelSpec
from profiles.roofline import RooflineCosts
from profiles.table import CostTable
from profiles.table_costs import TableCosts

LIMIT = 0.10

Kind = Literal["infer", "train", "generate"]
Shapes = tuple[tuple[int, int, int], ...]  # sequences, prompt, response


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``sequences`` of ``prompt`` + ``response`` tokens, in one micro-batch."""

    kind: Kind
    sequences: int
    prompt: int
    response: int

    @property
    def length(self) -> int:
        return self.prompt + self.response


# Off every grid: no power of two among the numbers of sequences or the lengths.
SHAPES: Mapping[Kind, Shapes] = {
    "infer": ((3, 60, 36), (7, 61, 24), (5, 50, 110), (1, 500, 180), (11, 12, 9)),
    "train": ((3, 60, 36), (5, 61, 24), (2, 150, 60), (1, 500, 100), (9, 12, 9)),
    "generate": ((3, 40, 20), (7, 90, 15), (23, 20, 15), (12, 300, 8), (5, 12, 40)),
}
CASES = tuple(
    Case(kind=kind, sequences=n, prompt=prompt, response=response)
    for kind, shapes in SHAPES.items()
    for n, prompt, response in shapes
)


# ---- predicted ------------------------------------------------------------------------------


def predict(table: CostTable, spec: ModelSpec, case: Case, workers: int) -> CallCost:
    """One call on one worker, its costs from the table."""
    kind = {"infer": CallKind.INFER, "train": CallKind.TRAIN, "generate": CallKind.GENERATE}
    cluster = replace(local_cluster(workers), device=table.device)
    call = ModelFunctionCall(name="call", kind=kind[case.kind], role="model")
    problem = Problem(
        algorithm="none",
        config={},
        graph=DataflowGraph(name="one call", calls=(call,), keys=()),
        models={"model": spec},
        workload=Workload(
            batch_size=case.sequences, prompt_tokens=case.prompt, response_tokens=case.response
        ),
        cluster=cluster,
    )
    costs = TableCosts(table, RooflineCosts(table.device))
    model = CostModel(cluster, costs, Collectives(cluster, table))
    allocation = Allocation(mesh=DeviceMesh(0, 1), strategy=ParallelStrategy())
    return call_cost(problem, "call", allocation, model)


# ---- measured -------------------------------------------------------------------------------


class WholeModel:
    """All layers of ``spec`` with gradients and optimizer, in this process."""

    def __init__(self, spec: ModelSpec) -> None:
        ctx = single_process(Layout(spec=spec, mesh=DeviceMesh(0, 1)))
        buffer = ParameterBuffer.for_rank(ctx.layout, 0, dtype=torch.float32, device="cpu")
        buffer.flat.copy_(
            torch.randn(2**20).repeat(len(buffer.flat) // 2**20 + 1)[: len(buffer.flat)]
        )
        buffer.flat.mul_(0.02)
        gradients = torch.zeros_like(buffer.flat)
        self.stage = DecoderStage(ctx, buffer, gradients=gradients)
        self.adam = Adam(ctx, buffer, gradients, AdamConfig(lr=1e-6), zero=0)

    def action(self, case: Case) -> Action:
        n, spec = case.sequences, self.stage.spec
        if case.kind == "generate":
            prompts = list(torch.randint(spec.vocab, (n, case.prompt)))
            params = SamplingParams(max_new_tokens=case.response)
            samples = range(n)
            return lambda: generate(
                self.stage, prompts, samples=samples, params=params, seed=1, step=0
            )
        ids = torch.randint(spec.vocab, (n * case.length,))
        if case.kind == "infer":
            packed = pack([case.length] * n)
            return torch.no_grad()(lambda: self._log_probs(self.stage.forward(ids, packed), ids))
        batch = SequenceBatch(
            samples=tuple(range(n)), lengths=(case.length,) * n, per_token={"sequences": ids}
        )

        def loss(hidden: Tensor, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
            return -self._log_probs(hidden, batch.token_ids).mean(), {}

        def train() -> None:
            self.stage.clear_gradients()
            train_1f1b(self.stage, [batch], loss=loss)
            self.adam.step()

        return train

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [tokens, hidden] -> [tokens]."""
        return vocab_parallel_log_probs(self.stage.head(hidden), targets, self.stage.ctx)


def measure_worker(
    rank: int, workers: int, num_threads: int, spec: ModelSpec, folder: str, results: Any
) -> None:
    """Entry of a worker; rank 0 puts (seconds, spread) of every case into ``results``."""
    torch.set_num_threads(num_threads)
    keep_freed_memory()  # as a run's workers
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=workers)
    lockstep = Lockstep(torch.device("cpu"), world_size=workers)
    model = WholeModel(spec)
    for case in CASES:
        probe = Probe(actions=(model.action(case),), readings={"call": (1,)})
        measured = lockstep.measure(probe, cap_s=2.0)["call"]
        if rank == 0:
            results.put((measured.seconds, measured.spread))
    dist.barrier()
    dist.destroy_process_group()


def measure(spec: ModelSpec, workers: int) -> Iterator[tuple[float, float]]:
    """(seconds, spread) of every case, each as soon as it is known."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        threads = max(1, torch.get_num_threads() // workers)
        arguments = (workers, threads, spec, folder, results)
        group = mp.start_processes(
            measure_worker, args=arguments, nprocs=workers, join=False, start_method="spawn"
        )
        ended = False
        while not ended or not results.empty():
            ended = ended or group.join(timeout=0.5)  # raises a worker's exception
            while not results.empty():
                yield results.get()


# ---- the table --------------------------------------------------------------------------------

ROW = "{:<9} {:>9} {:>11} {:>11} {:>10} {:>7} {:>7}"


def report(table: CostTable, spec: ModelSpec, workers: int) -> bool:
    """One line for each case as it is measured, then the errors; whether they are small enough."""
    print(ROW.format("call", "sequences", "tokens", "predicted s", "measured s", "spread", "error"))
    errors: dict[str, list[float]] = {}
    for case, (measured_s, spread) in zip(CASES, measure(spec, workers)):
        predicted_s = predict(table, spec, case, workers).seconds
        error = predicted_s / measured_s - 1
        errors.setdefault(case.kind, []).append(abs(error))
        tokens = f"{case.prompt} + {case.response}"
        numbers = (f"{predicted_s:.3f}", f"{measured_s:.3f}", f"{spread:.0%}", f"{error:+.1%}")
        print(ROW.format(case.kind, case.sequences, tokens, *numbers), flush=True)
    for kind, values in errors.items():
        print(f"{kind}: median error {median(values):.1%}, largest {max(values):.1%}")
    total = median(error for values in errors.values() for error in values)
    print(f"all: median error {total:.1%} (limit {LIMIT:.0%})")
    return total <= LIMIT


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("profile", help="a table of realexec profile --device cpu")
    parser.add_argument("--model", default="smollm2-135m", help="default smollm2-135m")
    parser.add_argument("--workers", type=int, default=2, help="as profiled (default 2)")
    args = parser.parse_args(argv)
    # As realexec's workers have it, in a profile and in a run: see ``executor.cli.main``.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        good = report(CostTable.load(args.profile), resolve_model(args.model), args.workers)
    except UserError as error:
        print(f"validate_cpu_profile: {error}", file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

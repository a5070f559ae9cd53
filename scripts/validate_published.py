"""Estimates against published runs: iteration times and memory of Megatron-LM on A100s.

    python scripts/validate_published.py

Prints each row of ``scripts/data/published-*.csv`` beside the estimate. Exits with 1 where the
times are off by more than 10% on average or 20% in any row, or memory by more than 10% in any row.

Costs are the shipped A100 tables with their defaults; no constant is fitted to these rows. What
those runs did that our executor does not is said to the model, alike for all rows: attention that
writes its scores, dropout, recomputation of blocks to their end, an interleaved pipeline, hidden
states that cross nodes in parts, and inputs of products that sequence parallelism gathers again.
Not modelled: Megatron-LM overlaps a part of the backward collectives with products. No row has
data-parallel replicas, so none says anything of how their gradients are summed.
Source: Korthikanti et al. 2022, arXiv:2205.05198; Narayanan et al. 2021, arXiv:2104.04473.
"""

from __future__ import annotations

import csv
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from planner.activations import BlockKernels, kept_bytes
from planner.cost import CostModel
from planner.cost.pipeline import Schedule
from planner.cost.stage import stage_shapes
from planner.cost.train import train_parts
from planner.memory import held_memory
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Workload
from planner.strategy import ParallelStrategy, Recompute
from profiles.clusters import make_cluster
from profiles.collectives import Collectives
from profiles.devices import DEVICES
from profiles.kernel_costs import KernelCosts
from profiles.kernels import KernelSurfaces
from profiles.models import ModelSpec
from profiles.roofline import RooflineCosts
from profiles.units import GIB

MEAN_LIMIT, ROW_LIMIT, MEMORY_LIMIT = 0.10, 0.20, 0.10
DATA_FOLDER = Path(__file__).parent / "data"
DEVICE = "a100"
KERNELS = BlockKernels(attention="eager", dropout=True, gather_again=True)
Row = Mapping[str, str]


def published(name: str) -> list[Row]:
    with (DATA_FOLDER / f"published-{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gpt(row: Row) -> ModelSpec:
    """GPT-3's architecture in the row's size."""
    hidden, heads = int(row["hidden"]), int(row["heads"])
    return ModelSpec(
        name=row["model"], family="gpt2", num_layers=int(row["layers"]), hidden=hidden,
        num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, ffn=4 * hidden,
        vocab=int(row["vocab"]), max_positions=int(row["seq_len"]), norm="layer",
        positions="learned", activation="gelu", gated=False, tied_embedding=True, qkv_bias=True,
        o_bias=True, ffn_bias=True,
    )  # fmt: skip


def strategy(row: Row, recompute: Recompute, sequence_parallel: bool) -> ParallelStrategy:
    return ParallelStrategy(
        pp=int(row["pp"]), tp=int(row["tp"]), dp=int(row["dp"]), recompute=recompute,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip


def micro_batches(row: Row) -> int:
    return int(row["global_batch"]) // (int(row["micro_batch"]) * int(row["dp"]))


def cost_model(num_devices: int) -> CostModel:
    cluster = make_cluster(DEVICE, num_devices)
    kernels = RooflineCosts(cluster.device, attention="eager", dropout=True)
    surfaces = KernelSurfaces.shipped(cluster.device, DEVICES[DEVICE])
    return CostModel(
        cluster, KernelCosts(surfaces, kernels), Collectives(cluster, shipped=DEVICE),
        kernels=kernels, stops_early=False,
    )  # fmt: skip


def iteration_parts(row: Row) -> dict[str, float]:
    """Seconds of one iteration by part."""
    num_devices = int(row["n_gpus"])
    # All tokens are trained on: the head reads every position but the first.
    workload = Workload(
        batch_size=int(row["global_batch"]), prompt_tokens=1,
        response_tokens=int(row["seq_len"]) - 1,
    )  # fmt: skip
    recompute: Recompute = "full" if row["recompute"] == "full" else "selective"
    allocation = Allocation(
        mesh=DeviceMesh(0, num_devices),
        strategy=strategy(row, recompute, row["sequence_parallel"] == "yes"),
        num_micro_batches=micro_batches(row),
    )
    parts = train_parts(
        gpt(row), workload, allocation, cost_model(num_devices), num_mini_batches=1,
        schedule=Schedule(
            virtual_stages=int(row["interleave"]), scatter_hops=True, early_sums=False
        ),
    )  # fmt: skip
    return {name: part.seconds for name, part in parts.items()}


def micro_batches_under_way(row: Row) -> float:
    """That the first stage has run forward and not backward, in units of the whole stage.

    1F1B: pp. With v parts of the model on a device pp v + pp - 1 of v-ths.
    Source: Korthikanti et al. 2022, section 4.2.3: L (1 + (pp - 1) / (pp v)) layers.
    """
    pp, virtual = int(row["pp"]), int(row["interleave"])
    under_way = pp if virtual == 1 else pp + (pp - 1) / virtual
    return min(float(micro_batches(row)), under_way)


def memory_gib(
    row: Row, recompute: Recompute, sequence_parallel: bool
) -> tuple[float, float, float]:
    """(parameters and optimizer state, activations, and all that the fullest device holds).

    The paper spreads blocks over all devices and leaves out the embedding: its state is that of a
    stage between the ends. Activations are the first stage's, and so is the last figure.
    """
    spec, s = gpt(row), strategy(row, recompute, sequence_parallel)
    between, first = (
        held_memory(spec, s, stage, "cuda", trained=True).total for stage in (min(1, s.pp - 1), 0)
    )
    length = int(row["seq_len"])
    block = kept_bytes(spec, s, value_bytes=2, length=length, kernels=KERNELS)
    tokens = int(row["micro_batch"]) * length
    layers = micro_batches_under_way(row) * stage_shapes(spec, s.pp)[0].num_layers
    activations = layers * tokens * block
    return between / GIB, activations / GIB, (first + activations) / GIB


def check_times() -> bool:
    errors = []
    print(f"{'iteration':28s} {'published':>10s} {'estimate':>9s} {'error':>7s}  largest parts")
    for row in published("training"):
        parts = iteration_parts(row)
        seconds, expected = sum(parts.values()), float(row["iteration_s"])
        errors.append(seconds / expected - 1)
        largest = sorted(parts, key=lambda name: -parts[name])[:3]
        shares = ", ".join(f"{name} {parts[name] / seconds:.0%}" for name in largest)
        name = f"GPT {row['model']} {row['recompute']} x{row['n_gpus']}"
        print(f"{name:28s} {expected:8.2f} s {seconds:7.2f} s {errors[-1]:+7.1%}  {shares}")
    mean, worst = statistics.mean(map(abs, errors)), max(map(abs, errors))
    print(f"mean error {mean:.1%} (limit {MEAN_LIMIT:.0%}), worst {worst:.1%} ({ROW_LIMIT:.0%})")
    return mean <= MEAN_LIMIT and worst <= ROW_LIMIT


def check_memory() -> bool:
    shapes = {row["model"]: row for row in published("training")}
    worst = 0.0
    print(f"\n{'memory, GiB':28s} {'state':>23s} {'activations':>24s} {'first stage':>24s}")
    for row in published("memory"):
        less = row["mode"] != "no recompute and no sequence parallel"
        found = memory_gib(shapes[row["model"]], "selective" if less else "none", less)
        state, activations = (
            float(row[name]) for name in ("parameters_and_optimizer_gib", "activations_gib")
        )
        texts = []
        for ours, theirs in zip(found, (state, activations, state + activations), strict=True):
            worst = max(worst, abs(ours / theirs - 1))
            texts.append(f"{ours:7.2f} of {theirs:6.2f} {ours / theirs - 1:+6.1%}")
        name = f"GPT {row['model']} {'selective, sp' if less else 'none'}"
        print(f"{name:28s} {' '.join(texts)}")
    print(f"worst {worst:.1%} (limit {MEMORY_LIMIT:.0%})")
    return worst <= MEMORY_LIMIT


def main(argv: Sequence[str] | None = None) -> int:
    if list(sys.argv[1:] if argv is None else argv):
        print("usage: python scripts/validate_published.py", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)
    try:
        passed = [check_times(), check_memory()]
    finally:
        logging.disable(logging.NOTSET)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Answers that were made ahead, in checkpoints: a run that goes on trains on the very same.

They are of older weights than the checkpoint has, so that they cannot be made again. Every
sequence is written once, by the first rank that holds it; who reads it is the plan's that goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from executor.metrics import post, posted
from executor.results import reporting_rank
from executor.run_checkpoint import Checkpoint, write_tensors
from executor.worker import Worker
from planner.graph import ModelFunctionCall
from planner.transfers import producing_ranks, samples_of

# Of files; no role has such a name.
_PREFIX = "made-ahead"


def _made(worker: Worker, step: int) -> tuple[ModelFunctionCall, ...]:
    """Calls that have worked for ``step``, which has not begun."""
    return worker.problem.graph.ahead if worker.step_data.works_for == step else ()


def write_coming(worker: Worker, folder: Path, step: int) -> None:
    """This rank's part of what was made for ``step``.

    Raises:
        OSError: no room, or no right to write.
    """
    for call in _made(worker, step):
        allocation = worker.plan.allocations[call.name]
        holders = producing_ranks(call, allocation.strategy, allocation.mesh.first)
        firsts = {ranks[0] for ranks in holders}
        if worker.rank in firsts:
            held = worker.step_data.coming.values
            tensors = {f"{key}@{n}": v for key in call.outputs for n, v in held[key].items()}
            name = f"{_PREFIX}.{call.name}.rank{worker.rank:05}.safetensors"
            write_tensors(folder / name, tensors)


def coming_header(worker: Worker, step: int) -> dict[str, Any]:
    """By call what its reporting rank has told; all ranks' parts are written."""
    group_size = worker.problem.workload.group_size
    return {
        call.name: {
            "group_size": group_size,
            "values": posted(worker.store, str(step), call.name)[1],
        }
        for call in _made(worker, step)
    }


def restore_coming(worker: Worker, checkpoint: Checkpoint) -> None:
    """What was made for the step that comes; nothing where this plan or its data need others.

    Raises:
        CheckpointError: an answer is missing.
    """
    calls, header = worker.problem.graph.ahead, checkpoint.header["ahead"]
    group_size = worker.problem.workload.group_size
    if not calls or any(header.get(c.name, {}).get("group_size") != group_size for c in calls):
        return
    for call in calls:
        allocation = worker.plan.allocations[call.name]
        if worker.rank in allocation.mesh:
            wanted = made_by(worker, call)
            found = checkpoint.tensors(f"{_PREFIX}.{call.name}.", wanted)
            for name, (key, sequence) in wanted.items():
                values = worker.step_data.coming.values.setdefault(key, {})
                values[sequence] = found[name].to(worker.device)
        if worker.rank == reporting_rank(allocation, call):
            post(worker.store, str(checkpoint.step), call.name, header[call.name]["values"])
    worker.step_data.works_for = checkpoint.step


def made_by(worker: Worker, call: ModelFunctionCall) -> dict[str, tuple[str, int]]:
    """All values that this rank's ``call`` makes: the name in a file; the key and sequence."""
    allocation = worker.plan.allocations[call.name]
    _, dp_rank, _ = allocation.strategy.coordinates(worker.rank - allocation.mesh.first)
    groups = samples_of(worker.problem, call, allocation.strategy.dp)[dp_rank]
    found = {}
    for key in call.outputs:
        once = worker.problem.graph.key(key).once
        per_group = 1 if once else worker.step_data.group_size(call)
        for sequence in worker.samples.sequences(groups, per_group):
            found[f"{key}@{sequence}"] = key, sequence
    return found

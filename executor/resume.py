"""Checkpoints of a run: what belongs to its state, and how it goes on from one.

The state is: the step (data order and noise follow from it and the seed), weights and moments of
the trained roles, their optimizers' counts, what an algorithm's functions keep, and answers that
were made ahead (``coming.py``). Files and boxes are ``run_checkpoint.py``'s. Read ``save_run`` and
``restore``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from executor import run_checkpoint
from executor.agreement import written_by_all
from executor.coming import coming_header, restore_coming, write_coming
from executor.parallel.optimizer import Adam
from executor.results import reporting_rank
from executor.run import Run
from executor.run_checkpoint import Checkpoint, Piece, pieces_of
from executor.worker import Worker
from planner.plan_schema import plan_to_dict
from planner.program import home_layouts
from profiles.errors import CheckpointError, ConfigError

# A run may go on with other values of all options but these: they decide what a step computes on.
FIXED_OPTIONS = ("seed", "batch_size", "prompt_len", "response_len")


def checkpoint_root(run: Run) -> Path:
    return run.output / "checkpoints"


def optimizer_pieces(adam: Adam, *, once: bool) -> list[Piece]:
    """This rank's fp32 weights and moments; ``once``: without what another rank writes."""
    slices = [
        piece
        for piece, counted in zip(adam.buffer.slices, adam.is_counted, strict=True)
        if counted or not once
    ]
    found: list[Piece] = []
    for section in adam.sections:
        if not (once and section.is_replica):
            found += pieces_of(slices, adam.buffer.starts, section.state(), section.own)
    return found


def average_pieces(worker: Worker, *, once: bool) -> dict[str, list[Piece]]:
    """This rank's fp32 averages of frozen roles; ``once``: without what another rank writes."""
    found: dict[str, list[Piece]] = {}
    for (role, layout), average in worker.weights.averages.items():
        buffer = worker.weights.buffers[role, layout]
        slices = buffer.slices
        if once:
            lower = range(layout.mesh.first, worker.rank)
            held = {(s.name, s.offset) for rank in lower for s in layout.slices(rank)}
            first = home_layouts(worker.plan)[role][0]  # every layout of the role is the same
            slices = tuple(s for s in slices if layout == first and (s.name, s.offset) not in held)
        pieces = pieces_of(slices, buffer.starts, {"average": average}, (0, average.numel()))
        if pieces:
            found.setdefault(role, []).extend(pieces)
    return found


# ---- saving -----------------------------------------------------------------------------------


def save_run(worker: Worker, step: int, *, keep: int) -> None:
    """Write the checkpoint after ``step`` steps; all ranks of the run together.

    Of older ones the newest ``keep`` - 1 stay.

    Raises:
        CheckpointError: a rank could not write; on every rank, and the older ones stay.
    """
    root, leads = checkpoint_root(worker.run), worker.rank == 0
    group = dist.group.WORLD

    def together(problem: OSError | None) -> None:
        try:
            written_by_all(problem, group=group, device=worker.device, where=root)
        except CheckpointError:
            if leads:  # of a full disk this frees the room to say so
                run_checkpoint.discard(root, step)
            dist.barrier()
            raise

    together(_attempt(lambda: run_checkpoint.make_partial(root, step)) if leads else None)
    together(_attempt(lambda: _write(worker, root, step)))
    problem = None
    if leads:
        header = _header(worker, step)
        problem = _attempt(lambda: run_checkpoint.finish(root, step, header))
        if problem is None:
            run_checkpoint.remove_old(root, keep=keep)
    together(problem)


def _attempt(action: Any) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


def _write(worker: Worker, root: Path, step: int) -> None:
    with worker.weights.all_here():
        _write_state(worker, run_checkpoint.partial_folder(root, step), step)


def _write_state(worker: Worker, folder: Path, step: int) -> None:
    for role, trainer in worker.weights.trainers.items():
        pieces = optimizer_pieces(trainer.optimizer, once=True)
        if pieces:
            run_checkpoint.write_pieces(folder, role, worker.rank, pieces)
        call = worker.problem.graph.train_call(role)
        assert call is not None, role
        if worker.rank == reporting_rank(worker.plan.allocations[call.name], call):
            counts = {"steps": trainer.optimizer.steps, "updates": int(trainer.optimizer.count)}
            worker.store.set(_key(step, role), json.dumps(counts))
    for role, pieces in average_pieces(worker, once=True).items():
        run_checkpoint.write_pieces(folder, role, worker.rank, pieces)
    write_coming(worker, folder, step)
    for call in worker.problem.graph.calls:
        function = worker.functions[call.name]
        if hasattr(function, "state") and worker.rank == reporting_rank(
            worker.plan.allocations[call.name], call
        ):
            worker.store.set(_key(step, call.name), json.dumps(function.state()))


def _key(step: int, name: str) -> str:
    return f"checkpoint/{step}/{name}"


def _header(worker: Worker, step: int) -> dict[str, Any]:
    """Everything but tensors; what other ranks know of it they have left in the store."""
    run, graph = worker.run, worker.problem.graph
    trained = [role for role in graph.roles if graph.train_call(role) is not None]
    stateful = [c.name for c in graph.calls if hasattr(worker.functions[c.name], "state")]
    return {
        "algorithm": run.algorithm.name,
        "fixed": {name: getattr(run.config, name) for name in FIXED_OPTIONS},
        "models": {role: asdict(worker.problem.models[role]) for role in trained},
        "optimizers": {role: json.loads(worker.store.get(_key(step, role))) for role in trained},
        "functions": {name: json.loads(worker.store.get(_key(step, name))) for name in stateful},
        "ahead": coming_header(worker, step),
        "versions": {"torch": torch.__version__},
        "plan": plan_to_dict(run.plan),
    }


# ---- going on ---------------------------------------------------------------------------------


def find_checkpoint(run: Run) -> Path | None:
    """The checkpoint that ``resume`` names: a folder, or ``auto`` for the newest of the output.

    None: begin at the beginning, because nothing is asked for or ``auto`` finds nothing.

    Raises:
        CheckpointError: no complete checkpoint, one of another run, or the output holds some and
            nothing says whether to go on from them.
        ConfigError: it already has all the steps.
    """
    wanted = run.config.resume
    newest = run_checkpoint.latest(checkpoint_root(run))
    if not wanted:
        if newest is not None:
            raise CheckpointError(
                f"holds checkpoints of an earlier run, the newest {newest.name}",
                where=str(run.output), remedy="add --resume to go on, or -o for another folder",
            )  # fmt: skip
        return None
    folder = newest if wanted == "auto" else Path(wanted)
    if folder is None:
        return None
    checkpoint = Checkpoint(folder)
    _check_same_run(run, checkpoint)
    if checkpoint.step >= run.config.total_steps:
        raise ConfigError(
            f"{folder} has all of total_steps={run.config.total_steps} done", where="resume",
            remedy="raise total_steps to go on",
        )  # fmt: skip
    return folder


def _check_same_run(run: Run, checkpoint: Checkpoint) -> None:
    header, where = checkpoint.header, str(checkpoint.folder)
    if header.get("algorithm") != run.algorithm.name:
        raise CheckpointError(
            f"is of a {header.get('algorithm')} run, not {run.algorithm.name}", where=where
        )
    for name, value in header["fixed"].items():
        if getattr(run.config, name) != value:
            raise CheckpointError(
                f"was written with {name}={value}, not {getattr(run.config, name)}", where=where,
                remedy=f"resume with {name}={value}",
            )  # fmt: skip
    for role, spec in header["models"].items():
        planned = asdict(run.plan.problem.models[role]) if role in run.plan.problem.models else {}
        name = unlike_shape(spec, planned)
        if name:
            raise CheckpointError(
                f"its {role} has {name} {spec[name]}, the plan's {planned.get(name)}", where=where,
                remedy="resume with a plan for this model",
            )  # fmt: skip


def unlike_shape(spec: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first number in which a model of ``spec`` has another shape, None: there is none."""
    # Where a shape came from and what it is called says nothing of the shape.
    named = ("name", "source")
    return next((k for k in spec if k not in named and other.get(k) != spec[k]), None)


def restore(worker: Worker, folder: Path) -> int:
    """After ``worker.setup``: the state of a checkpoint; returns how many steps it had done.

    All ranks of the run together. The plan may be another than the one that wrote it.
    """
    checkpoint = Checkpoint(folder)
    with worker.weights.all_here():
        for role, trainer in worker.weights.trainers.items():
            checkpoint.fill(role, optimizer_pieces(trainer.optimizer, once=False))
            counts = checkpoint.header["optimizers"][role]
            trainer.optimizer.go_on(steps=counts["steps"], updates=counts["updates"])
    for role, pieces in average_pieces(worker, once=False).items():
        checkpoint.fill(role, pieces)
    for key, average in worker.weights.averages.items():
        worker.weights.buffers[key].flat.copy_(average)
    for name, state in checkpoint.header["functions"].items():
        worker.functions[name].restore(state)
    restore_coming(worker, checkpoint)
    worker.versions.first = checkpoint.step
    return checkpoint.step

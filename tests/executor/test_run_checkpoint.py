"""Protects a run's state on disk: nothing lost, nothing half, readable under every layout."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from executor import run_checkpoint
from executor.run_checkpoint import Checkpoint, Piece, pieces_of
from planner.layout import Layout, ParameterSlice
from planner.mesh import DeviceMesh
from profiles.errors import CheckpointError
from tests.runs import SMALL


def whole_model(state: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that depend on where they are and nothing else."""
    seed = sum(map(ord, f"{state}/{name}"))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STATES = ("weight", "exp_avg")
# (pp, tp, dp, ZeRO): uneven stages, tied embedding on both ends, parts of rows.
LAYOUTS = [(1, 1, 1, 0), (2, 1, 1, 0), (3, 1, 1, 0), (1, 2, 2, 0), (1, 1, 3, 1), (2, 2, 2, 1)]


def local_pieces(layout: Layout, rank: int, zero: int, *, filled: bool) -> list[Piece]:
    """What a rank of a layout holds; with ZeRO its dp-th of the flat buffer."""
    slices = layout.slices(rank)
    starts, end = {}, 0
    for piece in slices:
        starts[piece.name] = end
        end += piece.num_values
    share = -(-end // layout.dp) if zero else end
    dp_rank = layout.coordinates(rank)[1] if zero else 0
    own = (dp_rank * share, min(end, (dp_rank + 1) * share))
    states = {}
    for state in STATES:
        flat = torch.full((end,), torch.nan)
        if filled:
            for piece in slices:
                shape = next(
                    p.shape
                    for p in layout.stage_parameters(layout.coordinates(rank)[0])
                    if p.name == piece.name
                )
                index = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))
                part = whole_model(state, piece.name, shape)[index].flatten()
                flat[starts[piece.name] : starts[piece.name] + piece.num_values] = part
        states[state] = flat[own[0] : own[1]]
    return pieces_of(slices, starts, states, own)


def is_first_holder(layout: Layout, rank: int, zero: int, piece: Piece) -> bool:
    """Every value is written by one rank."""
    pp_rank, dp_rank, tp_rank = layout.coordinates(rank)
    name = piece.box.name.partition("/")[2]
    shape = next(p for p in layout.stage_parameters(pp_rank) if p.name == name)
    return (
        (zero == 1 or dp_rank == 0)
        and (shape.shard_dim is not None or tp_rank == 0)
        and (name != "embedding.weight" or pp_rank == 0)
    )


def layout_of(axes: tuple[int, int, int, int]) -> Layout:
    pp, tp, dp, _ = axes
    return Layout(spec=SMALL, mesh=DeviceMesh(0, pp * tp * dp), pp=pp, tp=tp, dp=dp)


def written(root: Path, axes: tuple[int, int, int, int], step: int = 7) -> Path:
    run_checkpoint.make_partial(root, step)
    layout = layout_of(axes)
    for rank in layout.mesh.devices:
        pieces = [
            piece
            for piece in local_pieces(layout, rank, axes[3], filled=True)
            if is_first_holder(layout, rank, axes[3], piece)
        ]
        folder = run_checkpoint.partial_folder(root, step)
        run_checkpoint.write_pieces(folder, "actor", rank, pieces)
    return run_checkpoint.finish(root, step, {"seed": 1})


@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_reads_what_every_other_wrote(
    source: tuple[int, int, int, int], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(written(tmp_path, source))
    assert checkpoint.step == 7
    for target in LAYOUTS:
        layout = layout_of(target)
        for rank in layout.mesh.devices:
            pieces = local_pieces(layout, rank, target[3], filled=False)
            checkpoint.fill("actor", pieces)
            expected = local_pieces(layout, rank, target[3], filled=True)
            for piece, reference in zip(pieces, expected, strict=True):
                assert torch.equal(piece.values, reference.values), (target, rank, piece.box)


def test_a_missing_value_is_told(tmp_path: Path) -> None:
    folder = written(tmp_path, (1, 1, 1, 0))
    far = ParameterSlice(name="weight/layers.0.q.weight", offset=(30, 0), length=(4, 32))
    with pytest.raises(CheckpointError, match=r"64 values of actor's weight/layers\.0\.q"):
        Checkpoint(folder).fill("actor", [Piece(box=far, values=torch.zeros(4, 32))])
    whole = ParameterSlice(name="weight/final_norm.weight", offset=(0,), length=(32,))
    with pytest.raises(CheckpointError, match="32 values of critic's weight/final_norm"):
        Checkpoint(folder).fill("critic", [Piece(box=whole, values=torch.zeros(32))])


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert run_checkpoint.latest(tmp_path) is None
    written(tmp_path, (1, 1, 1, 0), step=4)
    written(tmp_path, (1, 1, 1, 0), step=12)
    run_checkpoint.make_partial(tmp_path, 20)  # killed while it was written
    newest = run_checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step00000012"
    written(tmp_path, (1, 1, 1, 0), step=16)
    run_checkpoint.remove_old(tmp_path, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step00000012", "step00000016"]


def _cut(folder: Path) -> None:
    file = next(iter(folder.glob("*.safetensors")))
    file.write_bytes(file.read_bytes()[:-9])


def _garbage(folder: Path) -> None:
    file = next(iter(folder.glob("actor.weight*")))
    file.write_bytes(b"\xff" * file.stat().st_size)


def _header(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        file = folder / "checkpoint.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    "harm,message",
    [
        (_cut, "is cut off"),
        (lambda f: next(iter(f.glob("*.safetensors"))).unlink(), "is missing"),
        (_garbage, "is damaged"),
        (lambda f: (f / "checkpoint.json").unlink(), "is not a complete checkpoint"),
        (lambda f: (f / "checkpoint.json").write_text("{"), "not JSON"),
        (lambda f: (f / "checkpoint.json").write_text("[]"), "is not a checkpoint of realexec"),
        (_header(schema="x"), "is not a checkpoint of realexec"),
        (_header(version=9), "version is 9; this realexec reads version 1"),
        (_header(step="x"), "step or files is damaged"),
        (_header(files=[]), "step or files is damaged"),
    ],
)
def test_damage_is_told_in_one_sentence(harm: Any, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path, (1, 1, 1, 0))
    harm(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder).fill("actor", local_pieces(layout_of((1, 1, 1, 0)), 0, 0, filled=False))


# ---- a kill while it is written ---------------------------------------------------------------

SHAPE = (64, 257)


def piece_of_step(name: str, step: int) -> Piece:
    box = ParameterSlice(name=f"weight/{name}", offset=(0, 0), length=SHAPE)
    return Piece(box=box, values=torch.full(SHAPE, float(step)))


def write_forever(root: Path, first: int) -> None:
    """One checkpoint after another, until killed."""
    step = first
    while True:
        run_checkpoint.make_partial(root, step)
        folder = run_checkpoint.partial_folder(root, step)
        for rank, name in enumerate(("a", "b")):
            run_checkpoint.write_pieces(folder, "actor", rank, [piece_of_step(name, step)])
        run_checkpoint.finish(root, step, {"functions": {}})
        run_checkpoint.remove_old(root, keep=2)
        step += 1


def test_fifty_kills_while_it_is_written_leave_no_half_checkpoint(tmp_path: Path) -> None:
    """The oracle: every value of what is found is of the step that its name says."""
    rng, done, while_writing = random.Random(3), 0, 0
    context = multiprocessing.get_context("fork")
    for _ in range(50):
        child = context.Process(target=write_forever, args=(tmp_path, done + 1))
        child.start()
        time.sleep(rng.uniform(0.01, 0.06))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        while_writing += any(tmp_path.glob(".step*.partial"))
        newest = run_checkpoint.latest(tmp_path)
        if newest is None:
            continue
        for folder in run_checkpoint.steps(tmp_path):
            checkpoint = Checkpoint(folder)
            for name in ("a", "b"):
                box = piece_of_step(name, 0).box
                piece = Piece(box=box, values=torch.full(SHAPE, torch.nan))
                checkpoint.fill("actor", [piece])
                assert piece.values.unique().tolist() == [checkpoint.step]
        assert Checkpoint(newest).step >= done  # no kill takes a checkpoint away
        done = Checkpoint(newest).step
    assert done > 0
    assert while_writing > 10

"""A model from layout to layout, beside raw messages and beside torch.distributed.checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DeviceMesh as TorchDeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from executor.buffers import ParameterBuffer
from executor.context import RankContext, build_contexts
from executor.cross_memory import CrossMemory
from executor.reallocate import carry_out
from executor.reallocation_rounds import make_schedule
from executor_benches.turns import WORLD, Row, take_turns
from planner.layout import Layout
from planner.memory import STAGING_BYTES
from planner.mesh import DeviceMesh
from planner.reallocation import reallocate
from profiles.catalogue import resolve_model

REALLOCATIONS = (("tp2", "dp2"), ("dp2", "pp2"), ("pp2", "tp2"))


def reallocation(rank: int, path: Path, repeats: int) -> list[Row]:
    """Every pair of layouts; bytes are held against what each rank lacks."""
    spec = replace(
        resolve_model("llama-7b"), num_layers=8, hidden=1024, num_heads=16, num_kv_heads=16,
        head_dim=64, ffn=2816,
    )  # fmt: skip
    mesh = DeviceMesh(0, WORLD)
    layouts = {
        "tp2": Layout(spec=spec, mesh=mesh, tp=2),
        "dp2": Layout(spec=spec, mesh=mesh, dp=2),
        "pp2": Layout(spec=spec, mesh=mesh, pp=2),
    }
    contexts = build_contexts(layouts.values(), rank=rank, device=torch.device("cpu"))
    found = []
    for source, destination in REALLOCATIONS:
        name = f"{source} to {destination}"
        found += move(rank, layouts[source], layouts[destination], contexts, name, repeats)
    return found


def move(
    rank: int, src: Layout, dst: Layout, contexts: dict[Layout, RankContext], name: str,
    repeats: int,
) -> list[Row]:  # fmt: skip
    plan = reallocate(src, dst)
    source = ParameterBuffer.for_rank(src, rank, dtype=torch.float32, device="cpu")
    source.flat.normal_()
    sent = sum(4 * m.slice.num_values for m in plan.messages if m.src == rank)
    wanted = sum(4 * m.slice.num_values for m in plan.messages if m.dst == rank)
    outgoing, incoming = torch.ones(sent // 4), torch.ones(wanted // 4)

    kept = ParameterBuffer.for_rank(dst, rank, dtype=torch.float32, device="cpu", lender=source)
    schedule = make_schedule(plan, rank, STAGING_BYTES["cpu"] // kept.flat.element_size())

    memory = CrossMemory.between_workers()

    def ours() -> int:
        return carry_out(schedule, source, kept, memory=memory)

    def by_messages() -> int:
        return carry_out(schedule, source, kept)

    def raw() -> None:
        operations = []
        if sent:
            operations.append(dist.P2POp(dist.isend, outgoing, 1 - rank))
        if wanted:
            operations.append(dist.P2POp(dist.irecv, incoming, 1 - rank))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

    folder = shared_folder(rank)

    def checkpoint() -> None:
        writer = dcp.FileSystemWriter(folder, overwrite=True)
        dcp.save(distributed(source, contexts[src]), storage_writer=writer)
        target = ParameterBuffer.for_rank(dst, rank, dtype=torch.float32, device="cpu")
        dcp.load(distributed(target, contexts[dst]), checkpoint_id=folder)

    lacking = lacking_bytes(src, dst, rank)
    assert ours() == by_messages() == lacking == wanted, (rank, wanted, lacking)
    ours_s, sent_s, raw_s, dcp_s = take_turns((ours, by_messages, raw, checkpoint), repeats)
    if rank == 0:
        shutil.rmtree(folder)
    note = f"rank 0 receives {wanted / 1e6:.0f} MB, what it lacks is {lacking / 1e6:.0f} MB"
    if not memory.readable:
        note += "; this machine lets no process read another"
    row = partial(Row, note=note)
    rows = []
    if wanted or sent:
        raw_name = "raw send and receive"
        rows = [
            row(subject=name, peer=raw_name, ours_s=ours_s, peer_s=raw_s),
            row(subject=f"{name}, sent", peer=raw_name, ours_s=sent_s, peer_s=raw_s),
        ]
    dcp_name = "torch.distributed.checkpoint"
    return [*rows, row(subject=name, peer=dcp_name, ours_s=ours_s, peer_s=dcp_s)]


def lacking_bytes(src: Layout, dst: Layout, rank: int) -> int:
    """Counted value by value: what ``rank`` needs under ``dst`` and does not hold under ``src``."""
    held = {piece.name: piece for piece in src.slices(rank)}
    total = 0
    for piece in dst.slices(rank):
        need = torch.ones(piece.length, dtype=torch.bool)
        if (have := held.get(piece.name)) is not None:
            inside = tuple(
                slice(max(0, h - n), max(0, h + hl - n))
                for n, h, hl in zip(piece.offset, have.offset, have.length, strict=True)
            )
            need[inside] = False
        total += 4 * int(need.sum())
    return total


def shared_folder(rank: int) -> str:
    """One new folder for both processes."""
    name = [tempfile.mkdtemp(prefix="bench-executor-") if rank == 0 else ""]
    dist.broadcast_object_list(name)
    return str(name[0])


def distributed(buffer: ParameterBuffer, ctx: RankContext) -> dict[str, Any]:
    """A buffer's parameters as torch.distributed.checkpoint knows them: sharded or whole."""
    layout, state = ctx.layout, dict[str, Any]()
    mesh = TorchDeviceMesh("cpu", list(layout.mesh.devices)) if layout.pp == 1 else None
    shapes = {shape.name: shape for shape in layout.stage_parameters(ctx.pp_rank)}
    for piece in buffer.slices:
        local = buffer.view(piece.name)
        if mesh is None:  # a stage's parameters are its own
            state[piece.name] = local
            continue
        whole = shapes[piece.name].shape
        cut = [i for i, (n, w) in enumerate(zip(piece.length, whole, strict=True)) if n != w]
        placement: Placement = Shard(cut[0]) if cut else Replicate()
        state[piece.name] = DTensor.from_local(local, mesh, [placement], run_check=False)
    return state

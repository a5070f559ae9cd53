"""Weights to Hugging Face folders: one bounded file at a time, so that no rank holds the model.

Read ``save`` first. The names are ``families``'s tables; which slice a rank holds is
``planner.layout``'s. Reading is ``hf_load``'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from executor.agreement import written_by_all
from executor.buffers import ParameterBuffer
from executor.context import RankContext
from executor.model.families import FAMILIES, Stored, head_config, stored
from executor.model.hf_load import INDEX_FILE, SINGLE_FILE, read_config
from executor.parallel import data
from planner.layout import Layout, ParameterShape, shard
from profiles import hf_config
from profiles.errors import CheckpointError
from profiles.models import ModelSpec
from profiles.units import GIB

# Copied from the source folder where they are: everything but config and weights.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file of a checkpoint: whole parameters of one pipeline stage."""

    name: str
    pp_rank: int
    parameters: tuple[ParameterShape, ...]

    @property
    def num_values(self) -> int:
        return sum(prod(parameter.shape) for parameter in self.parameters)


def weight_files(
    layout: Layout, *, bytes_per_value: int, max_bytes: int = 4 * GIB
) -> tuple[WeightFile, ...]:
    """Which file holds which parameter: stage by stage, each at most ``max_bytes`` or one tensor.

    (Of an expert layer: all experts' first or second matrices.)
    A tied embedding that the last stage copies is written once, by the first.
    """
    parts: list[tuple[int, list[ParameterShape]]] = []
    for pp_rank in range(layout.pp):
        num_bytes = max_bytes  # a stage begins a new file
        for together in _joined(layout, pp_rank):
            size_bytes = sum(prod(parameter.shape) for parameter in together) * bytes_per_value
            if num_bytes + size_bytes > max_bytes or parts[-1][0] != pp_rank:
                parts.append((pp_rank, []))
                num_bytes = 0
            parts[-1][1].extend(together)
            num_bytes += size_bytes
    if len(parts) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    return tuple(
        WeightFile(name=name, pp_rank=pp_rank, parameters=tuple(found))
        for name, (pp_rank, found) in zip(names, parts, strict=True)
    )


def _joined(layout: Layout, pp_rank: int) -> list[list[ParameterShape]]:
    """The parameters that a stage writes; those that share a tensor of the checkpoint together."""
    found: list[list[ParameterShape]] = []
    last: set[str] = set()
    for parameter in layout.stage_parameters(pp_rank):
        if parameter.name == "embedding.weight" and pp_rank > 0:
            continue
        names = {place.name for place in stored(layout.spec)[parameter.name]}
        if names & last:
            found[-1].append(parameter)
        else:
            found.append([parameter])
        last = names
    return found


def save(
    ctx: RankContext,
    buffer: ParameterBuffer,
    folder: str | Path,
    spec: ModelSpec,
    *,
    source_folder: str | Path | None = None,
    max_file_bytes: int = 4 * GIB,
) -> None:
    """Write the model as a Hugging Face folder that transformers opens; called by all its ranks.

    The first shard of every stage of dp rank 0 gathers its stage's parameters one at a time and
    writes them in files of at most ``max_file_bytes``, which is all it holds at once. The folder
    must be on a file system that these ranks share; it is written under another name, the index
    last, and renamed when every rank is done, so it is complete or absent. An older folder of
    that name is replaced. ``source_folder``: config and tokenizer are taken from there.

    A scalar head is written as a sequence classifier with one label, whose score transformers
    reads at the last token that is not ``pad_token_id``.

    Raises:
        CheckpointError: a family that transformers' tables lack, or a rank could not write; on
            every rank.
    """
    folder = Path(folder)
    if spec.family not in FAMILIES:
        raise CheckpointError(
            f"family {spec.family} cannot be written", where=str(folder),
            remedy=f"supported: {', '.join(FAMILIES)}",
        )  # fmt: skip
    work = folder.parent / f".{folder.name}.partial"
    files = weight_files(
        ctx.layout, bytes_per_value=buffer.flat.element_size(), max_bytes=max_file_bytes
    )
    leads = ctx.rank == ctx.layout.mesh.first
    _together(ctx, folder, _make_empty(work) if leads else None)
    _together(ctx, folder, _write_stage(ctx, buffer, work, spec, files))
    problem = None
    if leads:
        source = None if source_folder is None else Path(source_folder)
        problem = _finish(work, folder, spec, files, buffer.flat.dtype, source)
    _together(ctx, folder, problem)


def _together(ctx: RankContext, folder: Path, problem: OSError | None) -> None:
    """Wait for every rank of the mesh; raise on all of them where one has a problem."""
    written_by_all(problem, group=ctx.mesh_group, device=ctx.device, where=folder)


def _make_empty(folder: Path) -> OSError | None:
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        return error
    return None


def _write_stage(
    ctx: RankContext, buffer: ParameterBuffer, work: Path, spec: ModelSpec,
    files: tuple[WeightFile, ...],
) -> OSError | None:  # fmt: skip
    """The files of this rank's stage. A rank that cannot write still takes part in gathering."""
    problem: OSError | None = None
    if ctx.dp_rank >= ctx.layout.ep:  # another replica has the same
        return None
    for file in files:
        if file.pp_rank != ctx.pp_rank:
            continue
        tensors: dict[str, Tensor] = {}
        for parameter in file.parameters:
            if ctx.dp_rank > 0 and not parameter.is_expert:
                continue
            whole = _gathered(ctx, buffer.view(parameter.name), parameter)
            if whole is not None:
                _add(tensors, stored(spec)[parameter.name], whole.cpu())
        if ctx.tp_rank == ctx.dp_rank == 0 and problem is None:
            try:
                save_file(tensors, str(work / file.name), metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                problem = OSError(str(error))
    return problem


def checkpoint_tensors(
    ctx: RankContext, buffer: ParameterBuffer, spec: ModelSpec
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by name, whole, on every rank: in memory what ``save`` writes.

    For layouts without pp and ep; called by all ranks of a tensor-parallel group. Without
    tensor parallelism a tensor is a view of the buffer where the checkpoint has it as we do.
    """
    assert ctx.layout.pp == ctx.layout.ep == 1, ctx.layout
    for together in _joined(ctx.layout, 0):
        tensors: dict[str, Tensor] = {}
        for parameter in together:
            whole = _whole(ctx, buffer.view(parameter.name).detach(), parameter)
            _add(tensors, stored(spec)[parameter.name], whole)
        yield from tensors.items()


def _whole(ctx: RankContext, local: Tensor, parameter: ParameterShape) -> Tensor:
    """The whole parameter on every rank of the tensor-parallel group."""
    tp = ctx.layout.tp
    num_parts = parameter.num_parts(tp)
    if num_parts == 1:
        return local
    whole = local.new_empty(parameter.shape)
    for tp_rank in range(0, tp, tp // num_parts):
        piece = shard(parameter, tp, tp_rank)
        mine = tp_rank == ctx.tp_rank
        part = local.contiguous() if mine else local.new_empty(piece.length)
        dist.broadcast(
            part, src=ctx.layout.device(ctx.pp_rank, ctx.dp_rank, tp_rank), group=ctx.tp_group
        )
        whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))].copy_(part)
    return whole


def _add(tensors: dict[str, Tensor], places: tuple[Stored, ...], whole: Tensor) -> None:
    """One of our parameters into the tensors of a file; rows below those that are there."""
    for place in places:
        part = whole[place.index]
        if place.transposed:
            part = part.T
        if place.first_row > 0:
            part = torch.cat((tensors[place.name], part), dim=-1 if place.transposed else 0)
        tensors[place.name] = part.contiguous()


def _gathered(ctx: RankContext, local: Tensor, parameter: ParameterShape) -> Tensor | None:
    """The whole parameter on the first shard's rank of the first replica, None on the others."""
    whole = _gathered_over_tp(ctx, local, parameter)
    if whole is None or ctx.ep_group is None or not parameter.is_expert:
        return whole
    if ctx.dp_rank > 0:
        data.send(whole, ctx.layout.device(ctx.pp_rank, 0, 0), ctx.ep_group)
        return None
    parts = [whole]
    for dp_rank in range(1, ctx.layout.ep):
        part = torch.empty_like(whole)
        data.receive(part, ctx.layout.device(ctx.pp_rank, dp_rank, 0), ctx.ep_group)
        parts.append(part)
    return torch.cat(parts)


def _gathered_over_tp(
    ctx: RankContext, local: Tensor, parameter: ParameterShape
) -> Tensor | None:  # fmt: skip
    """The whole parameter, or of experts those of this replica, on the first shard's rank."""
    tp, local = ctx.layout.tp, local.detach().contiguous()
    num_parts = parameter.num_parts(tp)
    holds_first = ctx.tp_rank % (tp // num_parts) == 0
    if num_parts == 1:
        return local if ctx.tp_rank == 0 else None
    if ctx.tp_rank > 0:
        if holds_first:
            first = ctx.layout.device(ctx.pp_rank, ctx.dp_rank, 0)
            data.send(local, first, ctx.tp_group)
        return None
    own = shard(parameter, 1, 0, ctx.layout.ep, ctx.dp_rank)
    whole = local.new_empty(own.length)
    for tp_rank in range(0, tp, tp // num_parts):
        piece = shard(parameter, tp, tp_rank, ctx.layout.ep, ctx.dp_rank)
        part = local
        if tp_rank > 0:
            part = local.new_empty(piece.length)
            device = ctx.layout.device(ctx.pp_rank, ctx.dp_rank, tp_rank)
            data.receive(part, device, ctx.tp_group)
        whole[piece.relative_to(own)].copy_(part)
    return whole


def _finish(
    work: Path, folder: Path, spec: ModelSpec, files: tuple[WeightFile, ...],
    dtype: torch.dtype, source: Path | None,
) -> OSError | None:  # fmt: skip
    """Config, tokenizer, index, and the rename."""
    try:
        config = checkpoint_config(spec, dtype, {} if source is None else read_config(source))
        _write_json(work / "config.json", config)
        if source is not None:
            _copy_files(source, work, spec)
        if len(files) > 1:
            places = {
                place.name: file.name
                for file in files
                for parameter in file.parameters
                for place in stored(spec)[parameter.name]
            }
            total_bytes = sum(file.num_values for file in files) * dtype.itemsize
            _write_json(
                work / INDEX_FILE,
                {"metadata": {"total_size": total_bytes}, "weight_map": places},
            )
        _replace(work, folder)
    except OSError as error:
        return error
    return None


def _copy_files(source: Path, work: Path, spec: ModelSpec) -> None:
    for name in COPIED_FILES:
        # How to sample says nothing about a model that gives scores.
        wanted = spec.head == "lm" or name != "generation_config.json"
        if wanted and (source / name).is_file():
            shutil.copyfile(source / name, work / name)


def checkpoint_config(
    spec: ModelSpec, dtype: torch.dtype, source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json. The source's fields win over the shape's, and the head's over both."""
    config = {**hf_config.hf_config(spec), **(source or {}), **head_config(spec)}
    config.pop("torch_dtype", None)  # the older name of dtype
    config["dtype"] = str(dtype).removeprefix("torch.")
    if spec.head == "lm":
        for name in ("num_labels", "id2label", "label2id"):
            config.pop(name, None)
    elif config.get("pad_token_id") is None:
        end = config.get("eos_token_id")
        end = end[0] if isinstance(end, list) and end else end
        config["pad_token_id"] = end if isinstance(end, int) else 0
    return config


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(work: Path, folder: Path) -> None:
    """Rename ``work`` to ``folder``; what stood there goes last."""
    old = folder.parent / f".{folder.name}.old"
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    if old.exists():
        shutil.rmtree(old)

"""A run's state on disk: complete or absent, and readable under any plan.

A checkpoint is a folder ``step00000012`` with safetensors files of the trained roles' fp32 weights
and Adam moments, and ``checkpoint.json``, which is written last. A tensor in a file is a box of a
parameter: its key is ``exp_avg/layers.0.q.weight@0,128`` with the box's offset. Every value is
written once, by one of its holders; a rank reads what its own layout needs out of whatever boxes
there are, so a run may go on under another plan. No pickle is written or read, which is why this
is not torch.distributed.checkpoint: the metadata of that is a pickle.

Read ``save``, ``latest`` and ``Checkpoint.fill``. When a checkpoint is due and what else belongs
to a run's state is ``session.py``'s.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from executor.trace import write_json
from planner.boxes import intersection, interval_boxes
from planner.layout import ParameterSlice
from profiles.errors import CheckpointError

SCHEMA = "realexec-checkpoint"
VERSION = 1
HEADER_FILE = "checkpoint.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of the tensor that ``box.name`` names, and its values in the box's shape."""

    box: ParameterSlice
    values: Tensor


def pieces_of(
    slices: Sequence[ParameterSlice],
    starts: Mapping[str, int],
    states: Mapping[str, Tensor],
    own: tuple[int, int],
) -> list[Piece]:
    """The own range of flat tensors as boxes of the whole model's parameters, views.

    ``slices`` lie in a flat buffer from ``starts[name]`` on; ``states`` hold values [own range]
    each, under names such as ``exp_avg``.
    """
    found = []
    for piece in slices:
        start = starts[piece.name]
        lo, hi = max(own[0], start), min(own[1], start + piece.num_values)
        for offset, length in interval_boxes(piece.length, lo - start, hi - start):
            first = start - own[0] + _flat_index(piece.length, offset)
            where = tuple(o + p for o, p in zip(piece.offset, offset, strict=True))
            for state, values in states.items():
                box = ParameterSlice(name=f"{state}/{piece.name}", offset=where, length=length)
                found.append(
                    Piece(box=box, values=values[first : first + prod(length)].view(length))
                )
    return found


def _flat_index(shape: Sequence[int], offset: Sequence[int]) -> int:
    index = 0
    for size, place in zip(shape, offset, strict=True):
        index = index * size + place
    return index


# ---- writing --------------------------------------------------------------------------------


def folder_name(step: int) -> str:
    """Of the checkpoint after ``step`` steps.

    >>> folder_name(12)
    'step00000012'
    """
    return f"step{step:08}"


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is while it is written."""
    return root / f".{folder_name(step)}.partial"


def make_partial(root: Path, step: int) -> None:
    """An empty folder for the ranks to write into; on one rank, before all others write."""
    folder = partial_folder(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def discard(root: Path, step: int) -> None:
    """Leave nothing of a checkpoint that could not be written."""
    shutil.rmtree(partial_folder(root, step), ignore_errors=True)


def write_pieces(folder: Path, role: str, rank: int, pieces: Sequence[Piece]) -> None:
    """One file a state, so that no more than one state is copied to the host at once.

    Raises:
        OSError: no room, or no right to write.
    """
    by_state: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for piece in pieces:
        key = f"{piece.box.name}@{','.join(map(str, piece.box.offset))}"
        by_state[piece.box.name.partition("/")[0]][key] = piece.values
    for state, tensors in by_state.items():
        write_tensors(folder / f"{role}.{state}.rank{rank:05}.safetensors", tensors)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file of a checkpoint.

    Raises:
        OSError: no room, or no right to write.
    """
    try:
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, file)
        _to_disk(file)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def finish(root: Path, step: int, header: Mapping[str, Any]) -> Path:
    """Write the header and rename; on one rank, after all others have written."""
    work, folder = partial_folder(root, step), root / folder_name(step)
    sizes = {file.name: file.stat().st_size for file in sorted(work.glob("*.safetensors"))}
    head = {"schema": SCHEMA, "version": VERSION, "step": step, **header, "files": sizes}
    write_json(work / HEADER_FILE, head)
    _to_disk(work / HEADER_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    _to_disk(root)
    return folder


def _to_disk(path: Path) -> None:
    """What was written survives a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_old(root: Path, *, keep: int) -> None:
    """All but the newest ``keep`` complete checkpoints, and what a killed run left half-written."""
    for folder in steps(root)[: -keep if keep else None]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob(".step*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


# ---- reading --------------------------------------------------------------------------------


def steps(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [folder for folder in root.glob("step*") if (folder / HEADER_FILE).is_file()]
    return sorted(folder for folder in found if re.fullmatch(r"step\d{8,}", folder.name))


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = steps(root)
    return found[-1] if found else None


class Checkpoint:
    """A complete checkpoint, opened for reading.

    Raises:
        CheckpointError: no such folder, a damaged or foreign header, or a file that is missing
            or was cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = _read_header(folder)
        for name, size in self.header["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise CheckpointError(
                    f"{name} is {'cut off' if file.is_file() else 'missing'}",
                    where=str(folder), remedy="resume from an older checkpoint",
                )  # fmt: skip
        self._boxes: dict[str, dict[str, list[tuple[Path, str, ParameterSlice]]]] = {}

    @property
    def step(self) -> int:
        """Steps that were done when it was written."""
        return int(self.header["step"])

    def fill(self, role: str, pieces: Iterable[Piece]) -> None:
        """Write a role's saved values into ``pieces``, whatever boxes they were saved in.

        Raises:
            CheckpointError: values that a piece needs are not there.
        """
        boxes = self._boxes_of(role)
        with ExitStack() as stack, torch.no_grad():
            opened: dict[Path, Any] = {}
            for piece in pieces:
                missing = piece.box.num_values
                for file, key, box in boxes.get(piece.box.name, ()):
                    common = intersection(piece.box, box)
                    if common is None:
                        continue
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(str(file), "pt"))
                    part = opened[file].get_slice(key)[common.relative_to(box)]
                    piece.values[common.relative_to(piece.box)] = part.to(piece.values.device)
                    missing -= common.num_values
                if missing != 0:  # below 0: a value is there twice
                    raise CheckpointError(
                        f"{missing} values of {role}'s {piece.box.name} are missing",
                        where=str(self.folder), remedy="was it written by a run of this model?",
                    )  # fmt: skip

    def tensors(self, prefix: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, out of the files whose names begin with ``prefix``.

        Raises:
            CheckpointError: one of ``names`` is not there.
        """
        missing, found = set(names), dict[str, Tensor]()
        for file in (name for name in self.header["files"] if name.startswith(prefix)):
            with safe_open(str(self.folder / file), "pt") as tensors:
                for name in missing.intersection(tensors.keys()):
                    found[name] = tensors.get_tensor(name)
            missing -= found.keys()
        if missing:
            raise CheckpointError(
                f"{min(missing)} is missing of {prefix}", where=str(self.folder),
                remedy="was it written by a run of this algorithm?",
            )  # fmt: skip
        return found

    def _boxes_of(self, role: str) -> dict[str, list[tuple[Path, str, ParameterSlice]]]:
        """By tensor: the file, key and box of every part that was saved."""
        if role not in self._boxes:
            found: dict[str, list[tuple[Path, str, ParameterSlice]]] = defaultdict(list)
            for name in self.header["files"]:
                if not name.startswith(f"{role}."):
                    continue
                file = self.folder / name
                try:
                    with safe_open(str(file), "pt") as tensors:
                        for key in tensors.keys():  # noqa: SIM118 - not a mapping
                            length = tuple(tensors.get_slice(key).get_shape())
                            box = _box(key, length)
                            found[box.name].append((file, key, box))
                except (SafetensorError, ValueError) as error:
                    raise CheckpointError(
                        f"{name} is damaged ({error})", where=str(self.folder),
                        remedy="resume from an older checkpoint",
                    ) from None  # fmt: skip
            self._boxes[role] = dict(found)
        return self._boxes[role]


def _read_header(folder: Path) -> dict[str, Any]:
    file = folder / HEADER_FILE
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(
            "is not a complete checkpoint", where=str(folder),
            remedy=f"name a folder that holds {HEADER_FILE}",
        ) from None  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"not JSON ({error})", where=str(file)) from None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise CheckpointError("is not a checkpoint of realexec", where=str(file))
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"version is {header.get('version')!r}", where=str(file),
            remedy=f"this realexec reads version {VERSION}",
        )  # fmt: skip
    step, files = header.get("step"), header.get("files")
    if not isinstance(step, int) or not isinstance(files, dict):
        raise CheckpointError("step or files is damaged", where=str(file))
    for name in ("fixed", "models", "optimizers", "functions", "ahead"):
        section = header.get(name, {})
        nested = (
            section.values()
            if name in ("models", "optimizers", "ahead") and isinstance(section, dict)
            else ()
        )
        if not isinstance(section, dict) or not all(isinstance(v, dict) for v in nested):
            raise CheckpointError(f"{name} is damaged", where=str(file))
        header[name] = section
    return header


def _box(key: str, length: tuple[int, ...]) -> ParameterSlice:
    name, _, offset = key.rpartition("@")
    place = tuple(int(part) for part in offset.split(","))
    if len(place) != len(length):
        raise ValueError(f"key {key} of a tensor {list(length)}")
    return ParameterSlice(name=name, offset=place, length=length)

"""Weights from Hugging Face folders: every rank reads its own slices only.

Read ``load`` first. The names are ``families``'s tables; which slice a rank holds is
``planner.layout``'s. Safetensors files are mapped, not read whole. Writing is ``hf_save``'s, random
weights are ``random_weights``'s.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from executor.buffers import ParameterBuffer
from executor.model.families import FAMILIES, Stored, stored, stored_shapes
from executor.model.random_weights import init_scalar_head
from planner.layout import ParameterSlice
from profiles import hf_config
from profiles.errors import CheckpointError
from profiles.models import ModelSpec

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors calls them


def load(buffer: ParameterBuffer, folder: str | Path, spec: ModelSpec, *, seed: int = 0) -> None:
    """Fill ``buffer`` from the safetensors of a Hugging Face folder, reading its slices only.

    A scalar head that the checkpoint lacks (an LM's) is drawn from N(0, 1 / (hidden + 1)) by
    ``seed``, the same on every rank and under every layout. A tied checkpoint may lack the head.

    Raises:
        CheckpointError: no such folder or file, no safetensors, a tensor missing, unknown or of
            another shape.
    """
    folder = Path(folder)
    files = tensor_files(folder)
    _refuse_unknown(files, spec, folder)
    wanted: dict[Path, list[tuple[str, Stored, ParameterSlice]]] = defaultdict(list)
    for piece in buffer.slices:
        for place in stored(spec)[piece.name]:
            name = _stored_name(place.name, files, folder, spec)
            if name is None and piece.name == "head.weight" and spec.head == "scalar":
                init_scalar_head(buffer, spec, seed)
            elif name is None:
                raise CheckpointError(
                    f"no tensor {place.name}",
                    where=str(folder),
                    remedy=f"the checkpoint is not of {spec.name} or is incomplete",
                )
            else:
                wanted[files[name]].append((name, place, piece))
    for file, pieces in wanted.items():
        with _opened(file) as tensors:
            for name, place, piece in pieces:
                shape = stored_shapes(spec)[place.name]
                _read(_part(tensors, name, shape, file), place, piece, buffer)


def _part(tensors: Any, name: str, expected: tuple[int, ...], file: Path) -> Any:
    """A tensor of the mapped file, of which slices can be read; of floating-point numbers."""
    try:
        part = tensors.get_slice(name)
    except SafetensorError:
        raise CheckpointError(
            f"no tensor {name}, which the index says is here", where=str(file)
        ) from None
    shape = tuple(part.get_shape())
    if shape != expected:
        raise CheckpointError(
            f"{name} is {list(shape)}, but the model needs {list(expected)}",
            where=str(file),
            remedy="use the config.json of this checkpoint",
        )
    if part.get_dtype() not in FLOATS:
        raise CheckpointError(
            f"{name} has values of type {part.get_dtype()}: quantised weights are not read",
            where=str(file),
            remedy=f"give weights of type {', '.join(FLOATS)}",
        )
    return part


def _read(part: Any, place: Stored, piece: ParameterSlice, buffer: ParameterBuffer) -> None:
    """What ``piece`` has of one tensor of the checkpoint, from there into the buffer."""
    lead = len(place.index)
    inside = tuple(i - o for i, o in zip(place.index, piece.offset[:lead], strict=True))
    if any(not 0 <= i < n for i, n in zip(inside, piece.length[:lead], strict=True)):
        return
    box = [slice(o, o + n) for o, n in zip(piece.offset[lead:], piece.length[lead:], strict=True)]
    box[0] = slice(box[0].start + place.first_row, box[0].stop + place.first_row)
    values = part[tuple(reversed(box))].T if place.transposed else part[tuple(box)]
    buffer.view(piece.name)[inside].copy_(values)


def _opened(file: Path) -> Any:
    """A context manager over the mapped file."""
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(
            "no such file, but the index names it", where=str(file), remedy="download it again"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"not a whole safetensors file ({error})", where=str(file), remedy="download it again"
        ) from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint, by Hugging Face's name."""
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder", where=str(folder), remedy="give a Hugging Face folder"
        )
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"not an index of safetensors ({error!r})", where=str(index)
            ) from None
    if (folder / SINGLE_FILE).is_file():
        with _opened(folder / SINGLE_FILE) as tensors:
            return dict.fromkeys(tensors.keys(), folder / SINGLE_FILE)
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            "holds weights as .bin only",
            where=str(folder),
            remedy="convert them: open with transformers and save_pretrained, "
            "which writes safetensors",
        )
    raise CheckpointError(
        f"holds neither {SINGLE_FILE} nor {INDEX_FILE}",
        where=str(folder),
        remedy="give a folder with safetensors",
    )


def _stored_name(name: str, files: Mapping[str, Path], folder: Path, spec: ModelSpec) -> str | None:
    """What the checkpoint calls ``name``: bare decoders lack a prefix, tied ones the head."""
    family = FAMILIES[spec.family]
    for found in (name, name.removeprefix(f"{family.prefix}.")):
        if found in files:
            return found
    tied = hf_config.FAMILIES[spec.family].defaults.get("tie_word_embeddings", False)
    if name == "lm_head.weight" and read_config(folder).get("tie_word_embeddings", tied):
        embedding = f"{family.prefix}.{family.outer['embedding.weight']}"
        return _stored_name(embedding, files, folder, spec)
    return None


def _refuse_unknown(files: Mapping[str, Path], spec: ModelSpec, folder: Path) -> None:
    """Raise where the checkpoint has more than our model: it would compute otherwise.

    Of a head that is not ours anything may be there.
    """
    family, ours = FAMILIES[spec.family], stored_shapes(spec)
    prefix = f"{family.prefix}."
    own, other = ("lm_head.", "score.") if spec.head == "lm" else ("score.", "lm_head.")
    known = {*ours, f"{own}weight"}  # also where it is tied
    for found, file in files.items():
        name = found if found.startswith((prefix, own)) else prefix + found
        if found.startswith(other) or name in known or name.endswith(family.ignored):
            continue
        if found == f"{own}bias" and _is_zero(found, file):
            continue
        raise CheckpointError(
            f"tensor {found} has no place in {spec.name} ({spec.family}, {spec.num_layers} layers)",
            where=str(folder),
            remedy="the checkpoint is of another model, or quantised",
        )


def _is_zero(name: str, file: Path) -> bool:
    """As token classification's bias is where nothing has trained it."""
    with _opened(file) as tensors:
        return not bool(tensors.get_tensor(name).any())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, empty where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"not JSON ({error})", where=str(file)) from None
    return config if isinstance(config, dict) else {}

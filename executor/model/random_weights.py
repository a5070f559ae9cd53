"""Random weights whose values do not depend on the layout.

Every block of rows of a parameter has its own seed, so a rank draws the blocks it needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from executor.buffers import ParameterBuffer
from planner.layout import ParameterShape, ParameterSlice, parameters
from profiles.models import ModelSpec

# Values are drawn in blocks of whole rows of about this many.
BLOCK_VALUES = 2**20


def init_random(buffer: ParameterBuffer, spec: ModelSpec, seed: int, std: float = 0.02) -> None:
    """Fill ``buffer`` with N(0, std^2); norms scale by 1 and biases are 0, as transformers does.

    A value depends on ``seed``, the parameter's name and its place in the whole parameter, and
    not on the layout. Running time: of all row blocks that the slices touch, whole rows.
    """
    wholes = {parameter.name: parameter for parameter in parameters(spec)}
    for piece in buffer.slices:
        view = buffer.view(piece.name)
        if piece.name.endswith("norm.weight"):
            view.fill_(0.0 if spec.norm == "rms_plus_one" else 1.0)
        elif piece.name.endswith(".bias"):
            view.zero_()
        else:
            for rows, values in _normal_blocks(wholes[piece.name], piece, seed):
                view[rows].copy_(values * std)


def _normal_blocks(
    whole: ParameterShape, piece: ParameterSlice, seed: int
) -> Iterator[tuple[slice, Tensor]]:
    """(rows of ``piece``, N(0, 1) values there), block by block of the whole parameter."""
    num_rows, row_shape = whole.shape[0], whole.shape[1:]
    step = max(1, BLOCK_VALUES // max(1, prod(row_shape)))
    first, last = piece.offset[0], piece.offset[0] + piece.length[0]
    inner = tuple(slice(o, o + n) for o, n in zip(piece.offset[1:], piece.length[1:], strict=True))
    for block in range(first // step, -(-last // step)):
        start, end = block * step, min((block + 1) * step, num_rows)
        digest = hashlib.sha256(f"{seed}/{whole.name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        values = torch.randn(end - start, *row_shape, generator=generator)
        a, b = max(start, first), min(end, last)
        yield slice(a - first, b - first), values[(slice(a - start, b - start), *inner)]


def init_scalar_head(buffer: ParameterBuffer, spec: ModelSpec, seed: int) -> None:
    """The head of a critic or reward model: N(0, 1 / (hidden + 1)), the same on every rank."""
    wholes = {parameter.name: parameter for parameter in parameters(spec)}
    piece, std = buffer.by_name["head.weight"], (spec.hidden + 1) ** -0.5
    for rows, values in _normal_blocks(wholes[piece.name], piece, seed):
        buffer.view(piece.name)[rows].copy_(values * std)

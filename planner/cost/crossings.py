"""What of a reallocation does not depend on the meshes, nor on dp: ``crossings``, for ``lanes.py``.

For each group of layers that go from the same stages to the same stages, and for each cut, how many
parts there are at both ends, and what parameters weigh along the dimension that the cut divides.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from math import lcm, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.layout import Layout, layer_parameters
from planner.lending import may_be_part
from planner.mesh import DeviceMesh
from planner.routes import Cut, cut_dim, cuts, groups_of_layers, num_parts
from profiles.models import ModelSpec

Ints = npt.NDArray[np.int64]


class Crossings(NamedTuple):
    """A row for each group of layers and each cut, in the order of ``planner.routes.routes``.

    ``rows`` [rows, 13], see the fields below; ``stages`` of all rows; and of parameters of which
    dimensions of equal size are cut ``sizes`` [rows, unlike sizes] and ``weights`` [rows, block or
    ends, which, unlike sizes], values for each one along that dimension.
    Which: all, those that only a device that holds them alike may lend, those cut inside rows.
    """

    rows: Ints
    stages: Ints
    sizes: Ints
    weights: Ints


# Fields of a row: is it the first of its group, parts of experts and of shards at both ends, units
# of which both ends' parts are multiples, blocks, where in ``stages`` the ends' are, unlike sizes.
(
    NEW_GROUP, SRC_EP, SRC_TP, DST_EP, DST_TP, EP_UNITS, UNITS, BLOCKS, FIRST_SRC, LAST_SRC,
    FIRST_DST, LAST_DST, NUM_SIZES,
) = range(13)  # fmt: skip
ALL, UNLENDABLE, INNER = range(3)


@lru_cache(maxsize=4096)
def crossings(
    spec: ModelSpec, source: tuple[int, int, int], target: tuple[int, int, int]
) -> Crossings:
    """``source`` and ``target``: pp, tp and ep."""
    src, dst = _unplaced(spec, *source), _unplaced(spec, *target)
    heads = list[tuple[Cut, tuple[int, ...]]]()
    for cut in cuts(src, dst):
        parts = num_parts(src, cut), num_parts(dst, cut)
        units = (lcm(a, b) for a, b in zip(*parts))
        heads.append((cut, (*parts[0], *parts[1], *units)))
    rows, stages = list[tuple[int, ...]](), list[int]()
    # Groups of the same layers but for the number of blocks weigh alike: there are few unlike ones.
    unlike: dict[tuple[tuple[int, ...], tuple[int, ...], Cut], int] = {}
    which = list[int]()
    for src_stages, dst_stages, blocks, ends in _groups(spec, src.pp, dst.pp):
        first = len(stages)
        middle, last = first + len(src_stages), first + len(src_stages) + len(dst_stages)
        stages += [*src_stages, *dst_stages]
        for index, (cut, head) in enumerate(heads):
            weighed = (0,) if blocks else (), ends, cut
            which.append(unlike.setdefault(weighed, len(unlike)))
            rows.append((int(index == 0), *head, blocks, first, middle, middle, last, 0))
    found = [_sizes_and_weights(spec, *weighed) for weighed in unlike]
    counts = np.array([len(sizes) for sizes, _ in found], dtype=np.int64)
    sizes = np.zeros((len(found), counts.max()), dtype=np.int64)
    weights = np.zeros((len(found), 2, 3, counts.max()), dtype=np.int64)
    for i, (own_sizes, own_weights) in enumerate(found):
        sizes[i, : counts[i]], weights[i, ..., : counts[i]] = own_sizes, own_weights
    table = np.array(rows, dtype=np.int64)
    table[:, NUM_SIZES] = counts[which]
    return Crossings(
        rows=table, stages=np.array(stages, dtype=np.int64), sizes=sizes[which],
        weights=weights[which],
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _sizes_and_weights(
    spec: ModelSpec, blocks: tuple[int, ...], ends: tuple[int, ...], cut: Cut
) -> tuple[Ints, Ints]:
    """Unlike sizes [sizes], and what parameters of blocks and of ends weigh [2, which, sizes]."""
    alike = _weights(spec, blocks, cut), _weights(spec, ends, cut)
    sizes = sorted(alike[0].keys() | alike[1].keys())
    weights = np.zeros((2, 3, len(sizes)), dtype=np.int64)
    for k, of_size in enumerate(alike):
        for j, size in enumerate(sizes):
            weights[k, :, j] = of_size.get(size, 0)
    return np.array(sizes, dtype=np.int64), weights


@lru_cache(maxsize=1024)
def _groups(
    spec: ModelSpec, src_pp: int, dst_pp: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]]:
    """(source stages, destination stages, number of blocks, other layers)."""
    found = []
    ends = _unplaced(spec, src_pp, 1, 1), _unplaced(spec, dst_pp, 1, 1)
    for src_stages, dst_stages, layers in groups_of_layers(*ends):
        others = tuple(layer for layer in layers if not 0 <= layer < spec.num_layers)
        found.append((src_stages, dst_stages, len(layers) - len(others), others))
    return found


def _unplaced(spec: ModelSpec, pp: int, tp: int, ep: int) -> Layout:
    return Layout(spec=spec, mesh=DeviceMesh(0, pp * tp * ep), pp=pp, tp=tp, dp=ep, ep=ep)


@lru_cache(maxsize=4096)
def _weights(spec: ModelSpec, layers: tuple[int, ...], cut: Cut) -> dict[int, Ints]:
    """Of what a cut names of some layers: by size of the dimension that it cuts, [which]."""
    found: dict[int, Ints] = defaultdict(lambda: np.zeros(3, dtype=np.int64))
    for layer in layers:
        for parameter in layer_parameters(spec, layer):
            dim = cut_dim(parameter, cut)
            if dim is not None:
                size = parameter.shape[dim]
                # Who holds a replicated parameter holds it alike.
                is_cut = parameter.shard_dim is not None
                which = 1, is_cut and not may_be_part(parameter), is_cut and dim > 0
                found[size] += np.array(which, dtype=np.int64) * (prod(parameter.shape) // size)
    return dict(found)

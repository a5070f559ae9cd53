"""The arrays that the kernels read and write: ``Tables``, ``Prices``, ``Scratch``.

``tables.py`` makes the first from an ``OptionSpace``, ``prices.py`` fills the second.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Passed from kernel to kernel, an array is counted; so there are few, and leaves take single ones.
Records = npt.NDArray[np.void]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
NO_KEY = -1  # of an empty place in the table of reallocations


MESH = np.dtype(
    [
        ("first", "i8"),
        ("end", "i8"),
        ("kind", "i8"),  # index of its kind: group and size
        ("group", "i8"),  # of like devices
        ("node", "i8"),  # first device of its first node
        ("last_node", "i8"),  # first device of its last node
        ("memory_bytes", "f8"),  # of each device
        ("free_bytes", "f8"),  # of these what the framework leaves
    ],
    align=True,
)
CALL = np.dtype(
    [
        ("home", "i8"),  # the call in whose layout the role lives, -1: frozen or no role
        ("ahead", "i8"),  # 1: works for the next step, with the weights of this one's beginning
        ("average", "i8"),  # which average over steps the role is, -1: none
        ("role", "i8"),  # -1: none
        ("spec", "i8"),  # equal for equal models, -1: none
        ("last_stage_only", "i8"),  # 1: outputs are on the last stage only
        ("mesh_start", "i8"),  # into call_meshes
        ("mesh_stop", "i8"),
        ("pair_start", "i8"),  # into pairs, by producer
        ("pair_stop", "i8"),
    ],
    align=True,
)
ROW = np.dtype(
    [
        ("seconds", "f8"),  # of the call and of what leaves the device after it
        ("reload_s", "f8"),  # of what comes from the host before it; above 0: it is offloaded
        ("average_s", "f8"),  # of the average in its layout, where its role is one
        ("axes", "i8"),  # index of (group, pp, tp, dp, ep)
        ("stages", "i8"),  # pp
        ("samples", "i8"),  # equal where on one mesh every rank has the same samples
        ("copies", "i8"),  # index of pp * tp: of every sample so many ranks need one
        ("segment_start", "i8"),  # into segment_end: runs of stages with equal bytes
        ("segment_stop", "i8"),
    ],
    align=True,
)
PAIR = np.dtype([("producer", "i8"), ("reader_start", "i8"), ("reader_stop", "i8")], align=True)
RANGE = np.dtype([("start", "i8"), ("count", "i8")], align=True)
EVENT = np.dtype(
    [
        ("call", "i8"),
        ("home", "i8"),  # of a reallocation the call of the source, else -1
        ("parent", "i8"),
        ("busy_s", "f8"),
        ("potential_s", "f8"),
    ],
    align=True,
)
USE = np.dtype(
    [
        ("event", "i8"),  # of the call
        ("first", "i8"),  # from which call on they are there
        ("last", "i8"),  # last reader of the borrowed weights that the call brings, else -1
        ("stays", "i8"),  # 1: the weights of its layout are resident and counted here
    ],
    align=True,
)


class Tables(NamedTuple):
    """What a problem's options are, as arrays; ``tables.py`` makes it.

    ``C`` calls, ``M`` meshes, ``K`` kinds of meshes, ``R`` choices of all calls ("rows"), ``A``
    axes (group, pp, tp, dp, ep), ``P`` pairs of a producer and a consumer, ``G`` groups of like
    devices.
    """

    num_devices: int
    reserve_bytes: float
    meshes: Records  # [M] of MESH
    kinds: Records  # [K] of RANGE into kind_meshes
    kind_meshes: Ints  # meshes by kind, by position
    allowed: npt.NDArray[np.bool_]  # [C, M] by the call's lock, and the kind has choices
    calls: Records  # [C] of CALL
    call_meshes: Ints  # allowed meshes
    average_of: Ints  # of each average the call that trains the weights that it follows
    rows: Records  # [R] of ROW
    row_ranges: Records  # [C, K] of RANGE: rows of a call on meshes of a kind, fastest first
    like: Records  # [C, A] of RANGE into like_rows
    like_rows: Ints  # rows of a call with certain axes, fastest first
    segment_end: Ints  # stages before the end of a run
    segment_bytes: Floats  # [3, segments]: held, borrowed, running
    most_bytes: Floats  # [3, R]
    pairs: Records  # [P] of PAIR
    readers: Ints  # earlier calls that read all keys of a pair
    # [P, copies, K (the smaller mesh), inside a node or not]; then between groups of the end that
    # is of this kind, by the other end's group: [..., 2 + G].
    transfer_s: Floats


class Prices(NamedTuple):
    """Seconds of reallocations by ``kernels.reallocation_key``, in an open-addressing table."""

    keys: Ints  # a power of two of places, ``NO_KEY`` where empty
    seconds: Floats


class Scratch(NamedTuple):
    """Room for one evaluation; ``E = 4 C`` events at most."""

    events: Records  # [E] of EVENT
    uses: Records  # [C] of USE
    after_s: Floats  # [P] from the end of the producer to the end of the consumer
    weight_s: Floats  # [E, E] e_v - e_u at least, below 0: no edge
    missing: Ints  # [1] key of a reallocation that has no price yet, else NO_KEY

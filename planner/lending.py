"""``lent``: what of a layout needs no memory of its own where the device holds another one.

Such slices are views of what is there; ``executor.buffers`` makes them, ``plan_memory`` counts the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from planner.layout import Layout, ParameterShape, ParameterSlice
from planner.mesh import DeviceMesh

# Parameters that the executor multiplies at once: neighbours in the buffer that holds them.
_TOGETHER = {
    "q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up", "q_norm": "qk_norm",
    "k_norm": "qk_norm",
}  # fmt: skip


def _group(name: str) -> str:
    """``layers.3.qkv.weight`` of ``layers.3.q.weight``; what is used alone is a group by itself."""
    prefix, _, kind = name.rpartition(".")
    before, _, last = prefix.rpartition(".")
    return f"{before}.{_TOGETHER[last]}.{kind}" if last in _TOGETHER else name


def may_be_part(parameter: ParameterShape) -> bool:
    """May a device that holds more of it lend a part? Else only what it holds alike (``lent``)."""
    return len(parameter.shape) <= 2 and _group(parameter.name) == parameter.name


def lent(wanted: Sequence[ParameterSlice], held: Sequence[ParameterSlice]) -> frozenset[str]:
    """Names of wanted slices that need no memory: views of held ones of the same device.

    A matrix or a vector is one where the held slice covers it, strided if need be: a product takes
    rows at any distance. What is multiplied at once only if all of it is held alike, and so is
    a stack of matrices.
    """
    by_name = {piece.name: piece for piece in held}
    unlike = {_group(piece.name) for piece in wanted if by_name.get(piece.name) != piece}
    found = []
    for piece in wanted:
        group = _group(piece.name)
        covered = group == piece.name and len(piece.length) <= 2 and piece.name in by_name
        if group not in unlike or (covered and _covers(by_name[piece.name], piece)):
            found.append(piece.name)
    return frozenset(found)


def _covers(outer: ParameterSlice, inner: ParameterSlice) -> bool:
    return all(
        a <= o and o + n <= a + have
        for a, have, o, n in zip(
            outer.offset, outer.length, inner.offset, inner.length, strict=True
        )
    )


def stored_values(src: Layout, dst: Layout, device: int) -> int:
    """Values of ``dst`` that ``device`` needs memory for beside those of ``src`` (``lent``)."""
    near, far = (
        replace(layout, mesh=DeviceMesh(0, layout.mesh.num_devices)) for layout in (src, dst)
    )
    held_at = None if device not in src.mesh else _alike_to(src, device)
    return _stored_values(near, far, held_at, _alike_to(dst, device))


def _alike_to(layout: Layout, device: int) -> int:
    """The first device that holds what ``device`` does, were the mesh to begin at 0."""
    pp_rank, _, tp_rank = layout.coordinates(device)
    return layout.device(pp_rank, layout.ep_rank(device), tp_rank) - layout.mesh.first


@lru_cache(maxsize=4096)
def _stored_values(src: Layout, dst: Layout, held_at: int | None, wanted_at: int) -> int:
    wanted = dst.slices(wanted_at)
    names = lent(wanted, () if held_at is None else src.slices(held_at))
    return sum(piece.num_values for piece in wanted if piece.name not in names)

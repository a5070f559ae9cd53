"""Two layouts of a role -> the minimal messages that turn one into the other.

Who gives what to whom is ``routes.py``'s; ``reallocate`` expands each of its routes into one
``Message`` per parameter, which the executor carries out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from planner.layout import Layout, ParameterSlice, layer_parameters
from planner.routes import LEAST_SHARE, Route, part_of, routes
from profiles.models import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """``slice`` goes from device ``src`` to device ``dst``; a copy where they are one.

    In ``phase`` 0 out of what ``src`` holds, in phase 1 out of what it was sent in phase 0.
    """

    src: int
    dst: int
    slice: ParameterSlice
    phase: Literal[0, 1] = 0

    @property
    def num_values(self) -> int:
        return self.slice.num_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Reallocation:
    """``messages`` between devices, ``copies`` within one."""

    src: Layout
    dst: Layout
    messages: tuple[Message, ...]
    copies: tuple[Message, ...]


_Slices = dict[tuple[object, ...], list[ParameterSlice]]


def _expand(spec: ModelSpec, route: Route, known: _Slices) -> Iterator[Message]:
    """``known``: slices by layer and part; many routes move the same between other devices."""
    for layer in route.layers:
        key = (layer, route.lo, route.hi, route.units, route.cut, route.experts)
        if key not in known:
            boxes = [part_of(parameter, route) for parameter in layer_parameters(spec, layer)]
            known[key] = [box for box in boxes if box is not None]
        for box in known[key]:
            yield Message(src=route.src, dst=route.dst, slice=box, phase=route.phase)


@lru_cache(maxsize=32)
def reallocate(
    src: Layout, dst: Layout, *, devices_per_node: int = 1 << 30, first_device: int = 0,
    least_share: int = LEAST_SHARE,
) -> Reallocation:  # fmt: skip
    """The messages and local copies that fill ``dst`` from ``src``; options as of ``routes``.

    >>> from planner.mesh import DeviceMesh
    >>> from profiles.models import ModelSpec
    >>> spec = ModelSpec(name="x", num_layers=2, hidden=4, num_heads=2, num_kv_heads=2,
    ...                  head_dim=2, ffn=8, vocab=10)
    >>> two = DeviceMesh(0, 2)
    >>> plan = reallocate(Layout(spec=spec, mesh=two, tp=2), Layout(spec=spec, mesh=two, dp=2))
    >>> whole = Layout(spec=spec, mesh=two, dp=2).num_values(0)
    >>> sum(m.num_values for m in plan.messages if m.dst == 0) < whole / 2
    True
    """
    messages: list[Message] = []
    copies: list[Message] = []
    known: _Slices = {}
    for route in routes(
        src, dst, devices_per_node=devices_per_node, first_device=first_device,
        least_share=least_share,
    ):  # fmt: skip
        (copies if route.src == route.dst else messages).extend(_expand(src.spec, route, known))
    return Reallocation(src=src, dst=dst, messages=tuple(messages), copies=tuple(copies))

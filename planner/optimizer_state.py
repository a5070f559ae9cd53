"""Optimizer state under two layouts -> the minimal messages that turn one into the other.

The state of a trained role is flat in the order of its buffer: masters and moments, a value each
for every value of the weights. With ZeRO 1 a rank keeps its dp-th of that, which begins and ends
anywhere in a parameter; of experts that are split, its (dp / ep)-th of theirs. So unlike weights
(``reallocation.py``) no two parameters are cut alike, and what goes where is found box by box.

Of a rank that holds q [4, 3] and k [2, 3], ZeRO 1 over dp 2:

    dp rank 0  q rows 0 … 3                dp rank 1  q row 3, k rows 0 and 1

Read ``StateLayout``, then ``reallocate_state``. A rank is sent exactly what it lacks, from its own
node where somebody there holds it, and among equals from the one that has been given least to send.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from planner.boxes import intersection, interval_boxes, without
from planner.layout import Layout, ParameterSlice
from planner.reallocation import Message

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSection:
    """A run of a rank's flat buffer that it keeps state for: values ``own`` of it.

    ``boxes`` are what these are, each with where it begins in ``own``; the rest is padding.
    """

    own: Range
    boxes: tuple[tuple[int, ParameterSlice], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayout:
    """Where the optimizer state of a role lies: its weights' layout, and ``zero`` 0 or 1.

    What ``executor.parallel.optimizer`` keeps: with ZeRO 1 buffers are padded to a multiple of
    dp, and before and after experts that are split to one of their own.
    """

    layout: Layout
    zero: int

    @property
    def key(self) -> str:
        """A short name: ``[0-7] d4p2m1 ZeRO 1``."""
        return f"{self.layout.key} ZeRO {self.zero}"

    def sections(self, device: int) -> tuple[StateSection, ...]:
        """What ``device`` keeps state for, experts that are split apart; () outside the mesh."""
        layout, slices = self.layout, self.layout.slices(device)
        split = layout.ep > 1
        experts = [piece for piece in slices if split and piece.is_expert]
        rest = list(slices[: len(slices) - len(experts)])
        _, dp_rank, _ = layout.coordinates(device) if slices else (0, 0, 0)
        found, start = [], 0
        for pieces, shards, rank in (
            (rest, layout.dp, dp_rank),
            (experts, max(1, layout.dp // layout.ep), dp_rank // layout.ep),
        ):
            share = -(-sum(piece.num_values for piece in pieces) // shards)
            own = (rank * share, (rank + 1) * share) if self.zero == 1 else (0, shards * share)
            if pieces:
                boxes = tuple(_boxes(pieces, own))
                found.append(StateSection(own=(start + own[0], start + own[1]), boxes=boxes))
            start += shards * share
        return tuple(found)

    def boxes(self, device: int) -> list[ParameterSlice]:
        """What ``device`` keeps state for, in the order of its buffer."""
        return [box for section in self.sections(device) for _, box in section.boxes]


def _boxes(pieces: Sequence[ParameterSlice], own: Range) -> Iterator[tuple[int, ParameterSlice]]:
    """Values ``own`` of ``pieces``, which lie end to end, each box with its place in ``own``."""
    start = 0
    for piece in pieces:
        lo, hi = max(own[0], start), min(own[1], start + piece.num_values)
        place = lo - own[0]
        for offset, length in interval_boxes(piece.length, lo - start, hi - start):
            where = tuple(o + p for o, p in zip(piece.offset, offset, strict=True))
            box = ParameterSlice(name=piece.name, offset=where, length=length)
            yield place, box
            place += box.num_values
        start += piece.num_values


@dataclass(frozen=True, slots=True, kw_only=True)
class StateReallocation:
    """As ``reallocation.Reallocation``, of one state: the same for masters and both moments."""

    src: StateLayout
    dst: StateLayout
    messages: tuple[Message, ...]
    copies: tuple[Message, ...]


# A box that some devices hold alike, and these.
_Held = tuple[ParameterSlice, tuple[int, ...]]


def reallocate_state(
    src: StateLayout, dst: StateLayout, *, devices_per_node: int = 1 << 30, first_device: int = 0
) -> StateReallocation:
    """The messages and local copies that fill ``dst`` from ``src``, in the order of the ranks.

    Every value of ``dst`` is in one message or copy of its rank. Cost: O(boxes of all devices of
    dst x boxes of one parameter under src).

    >>> from planner.mesh import DeviceMesh
    >>> from profiles.models import ModelSpec
    >>> spec = ModelSpec(name="x", num_layers=2, hidden=4, num_heads=2, num_kv_heads=2,
    ...                  head_dim=2, ffn=8, vocab=10)
    >>> two = Layout(spec=spec, mesh=DeviceMesh(0, 2), dp=2)
    >>> plan = reallocate_state(StateLayout(layout=two, zero=0), StateLayout(layout=two, zero=1))
    >>> len(plan.messages), sum(c.num_values for c in plan.copies) == two.num_values(0)
    (0, True)
    """
    assert src.layout.spec == dst.layout.spec, (src.layout.spec.name, dst.layout.spec.name)
    held = _holders(src)
    near: dict[tuple[str, int], Sequence[_Held]] = {}  # by parameter and node
    sent: dict[int, int] = defaultdict(int)  # values that each device has been given to send
    messages: list[Message] = []
    copies: list[Message] = []

    def node_of(device: int) -> int:
        return (device - first_device) // devices_per_node

    for device in dst.layout.mesh.devices:
        own: dict[str, list[ParameterSlice]] = defaultdict(list)
        for box in src.boxes(device):
            own[box.name].append(box)
        for wanted in dst.boxes(device):
            lacking, found = _taken([wanted], own[wanted.name])
            copies += [Message(src=device, dst=device, slice=box) for box in found]
            place = (wanted.name, node_of(device))
            if place not in near:
                on_node = (
                    (box, tuple(d for d in devices if node_of(d) == place[1]))
                    for box, devices in held[wanted.name]
                )
                near[place] = [(box, devices) for box, devices in on_node if devices]
            for holders in (near[place], held[wanted.name]):
                lacking, given = _given(lacking, holders, sent)
                messages += [Message(src=giver, dst=device, slice=box) for giver, box in given]
            assert not lacking, (src.key, dst.key, lacking)
    return StateReallocation(src=src, dst=dst, messages=tuple(messages), copies=tuple(copies))


def _holders(layout: StateLayout) -> Mapping[str, Sequence[_Held]]:
    """By parameter the different boxes that devices hold; boxes may have common parts."""
    found: dict[str, dict[ParameterSlice, list[int]]] = defaultdict(lambda: defaultdict(list))
    for device in layout.layout.mesh.devices:
        for box in layout.boxes(device):
            found[box.name][box].append(device)
    return {
        name: [(box, tuple(devices)) for box, devices in boxes.items()]
        for name, boxes in found.items()
    }


def _given(
    lacking: list[ParameterSlice], holders: Sequence[_Held], sent: dict[int, int]
) -> tuple[list[ParameterSlice], list[tuple[int, ParameterSlice]]]:
    """What no holder has, and who gives what of the rest; adds to what each has to send.

    The least burdened is asked first, and of equals the first.
    """
    found: list[tuple[int, ParameterSlice]] = []
    for box, devices in sorted(holders, key=lambda h: min(map(sent.__getitem__, h[1]))):
        if not lacking:
            break
        lacking, parts = _taken(lacking, [box])
        if parts:
            giver = min(devices, key=sent.__getitem__)
            found += [(giver, part) for part in parts]
            sent[giver] += sum(part.num_values for part in parts)
    return lacking, found


def _taken(
    wanted: Sequence[ParameterSlice], given: Sequence[ParameterSlice]
) -> tuple[list[ParameterSlice], list[ParameterSlice]]:
    """What of ``wanted`` boxes is left when ``given`` ones are taken out, and what these were."""
    left, found = list(wanted), []
    for box in given:
        rest: list[ParameterSlice] = []
        for piece in left:
            common = intersection(piece, box)
            if common is None:
                rest.append(piece)
            else:
                found.append(common)
                rest += without(piece, common)
        left = rest
    return left, found

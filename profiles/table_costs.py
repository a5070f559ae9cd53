"""``TableCosts``: what a ``CostTable`` answers to a planner; what lies between its rows is

``interpolate.py``'s, what it lacks is the fallback's.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict

from profiles.costs import Component, Cost, LayerCosts, Operation, Provenance
from profiles.interpolate import Point, Surface
from profiles.models import ModelSpec
from profiles.shapes import component_shape, spec_of_shape
from profiles.table import CostTable

logger = logging.getLogger(__name__)

_Key = tuple[str, str, tuple[int | str, ...], int]  # component, operation, dimensions, tp


class TableCosts:
    """``LayerCosts`` from a table's rows, and from ``fallback`` where there are none.

    A decode step is one as a CUDA graph where these were measured and the engine runs it so.
    A missing tp or model width takes the fallback's seconds, times measured / fallback at the
    nearest width and tp that were measured (its form, this machine's level).
    """

    def __init__(self, table: CostTable, fallback: LayerCosts) -> None:
        self.table = table
        self.fallback = fallback
        self.surfaces: dict[_Key, Surface] = {}
        self._specs: dict[_Key, ModelSpec] = {}
        self._answers: dict[tuple[object, ...], Cost] = {}
        self._warned: set[str] = set()
        points: dict[_Key, dict[Point, float]] = defaultdict(dict)
        optimizer: dict[Point, float] = {}
        for row in table.rows:
            if row.component == "optimizer":
                optimizer[(row.size, 0)] = row.seconds
            elif row.component in ("block", "embedding", "head"):
                component: Component = row.component  # type: ignore[assignment]
                spec = spec_of_shape(row.shape)
                key = (component, row.operation, component_shape(spec, component), row.tp)
                points[key][(row.size, row.length)] = row.seconds
                self._specs[key] = spec
        self.surfaces.update({key: Surface(found) for key, found in points.items()})
        self.optimizer = Surface(optimizer) if optimizer else None

    def layer(
        self, spec: ModelSpec, component: Component, operation: Operation, *, tp: int, size: int,
        length: int,
    ) -> Cost:  # fmt: skip
        """See ``costs.LayerCosts``."""
        question = (spec, component, operation, tp, size, length)
        answer = self._answers.get(question)
        if answer is None:
            answer = self._layer(spec, component, operation, tp, size, length)
            self._answers[question] = answer
        return answer

    def _layer(
        self, spec: ModelSpec, component: Component, operation: Operation, tp: int, size: int,
        length: int,
    ) -> Cost:  # fmt: skip
        measured = self._as_run(spec, component, operation)
        key = (component, measured, component_shape(spec, component), tp)
        if operation == "decode_alone" and key not in self.surfaces:
            return self.layer(spec, component, "decode", tp=tp, size=size, length=length)
        surface = self.surfaces.get(key)
        if surface is None:
            return self._scaled_fallback(spec, component, operation, tp, size, length)
        cost = surface.at(size, length)
        if cost.provenance is Provenance.EXTRAPOLATED and component not in self._warned:
            self._warned.add(component)
            logger.warning(
                "%s %s of %s at tp %d: size %d, length %d is outside what was measured (%s); said "
                "once of a %s",
                component, operation, spec.name, tp, size, length, surface.range_text, component,
            )  # fmt: skip
        return self._from_table(cost)

    def _as_run(self, spec: ModelSpec, component: Component, operation: Operation) -> str:
        """The operation of the rows that hold for what runs."""
        graph = f"{operation}_graph"
        if spec.decode_is_static and any(key[:2] == (component, graph) for key in self.surfaces):
            return graph
        return operation

    def _from_table(self, cost: Cost) -> Cost:
        return Cost(cost.seconds, cost.provenance, source=self.table.label)

    def _scaled_fallback(
        self, spec: ModelSpec, component: Component, operation: Operation, tp: int, size: int,
        length: int,
    ) -> Cost:  # fmt: skip
        guess = self.fallback.layer(spec, component, operation, tp=tp, size=size, length=length)
        key = self._nearest(spec, component, self._as_run(spec, component, operation), tp)
        if key is None:
            return guess
        near, near_tp = self._specs[key], key[3]
        there = self.fallback.layer(
            near, component, operation, tp=near_tp, size=size, length=length
        )
        measured_s = self.surfaces[key].at(size, length).seconds
        return Cost(
            guess.seconds * measured_s / there.seconds, Provenance.ROOFLINE,
            source=f"{self.table.label}, scaled to another width or tp",
        )  # fmt: skip

    def _nearest(
        self, spec: ModelSpec, component: Component, operation: str, tp: int
    ) -> _Key | None:
        """The measured surface of these rows' operation at the most alike width and tp."""

        def distance(key: _Key) -> tuple[float, int]:
            near = self._specs[key]
            unlike = component == "head" and near.head != spec.head
            return (
                abs(math.log(near.hidden / spec.hidden))
                + abs(math.log(near.vocab / spec.vocab)) * (component == "head")
                + abs(math.log(key[3] / tp)) / 10
                + 100.0 * unlike,
                key[3],
            )

        same = (k for k in self.surfaces if k[:2] == (component, operation))
        return min(same, key=distance, default=None)

    def optimizer_step(self, num_parameters: int) -> Cost:
        """See ``costs.LayerCosts``."""
        if self.optimizer is None:
            return self.fallback.optimizer_step(num_parameters)
        return self._from_table(self.optimizer.at(num_parameters, 0))

"""Between what was measured and the rows of a ``CostTable``."""

from __future__ import annotations

from executor.profile_grid import Found, Point
from executor.profile_measure import Measurement
from profiles.interpolate import Surface
from profiles.models import ModelSpec
from profiles.shapes import shape_key
from profiles.table import CostRow


def _row(
    component: str, operation: str, point: Point, measured: Measurement, *, shape: str = "",
    tp: int = 1, workers: int = 1,
) -> CostRow:  # fmt: skip
    return CostRow(
        component=component, operation=operation, shape=shape, tp=tp, workers=workers,
        size=point[0], length=point[1], seconds=measured.seconds, spread=measured.spread,
        samples=measured.samples,
    )  # fmt: skip


def layer_rows(spec: ModelSpec, component: str, tp: int, found: Found) -> list[CostRow]:
    """One row for every point and operation, operation by operation."""
    rows = [
        _row(component, operation, point, measured, shape=shape_key(spec), tp=tp)
        for point, operations in sorted(found.items())
        for operation, measured in operations.items()
    ]
    return sorted(rows, key=lambda row: row.operation)


def optimizer_rows(spec: ModelSpec, found: Found) -> list[CostRow]:
    """Points count blocks; rows count parameters."""
    return [
        _row("optimizer", "step", (blocks * spec.block_parameters, 0), operations["step"])
        for (blocks, _), operations in sorted(found.items())
    ]


def collective_row(operation: str, workers: int, num_bytes: int, measured: Measurement) -> CostRow:
    return _row("collective", operation, (num_bytes, 0), measured, workers=workers)


def predict_seconds(found: Found, operation: str, point: Point) -> float:
    """What the finished table will say of ``point``, from the points found so far."""
    known = {
        where: operations[operation].seconds
        for where, operations in found.items()
        if operation in operations
    }
    return Surface(known).at(*point).seconds

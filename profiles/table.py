"""``CostTable``: measured seconds of layers, optimizer and collectives on one device kind.

The file is JSON: ``header`` (schema, version, device, library versions, date, source, dtype),
``columns`` (names of ``CostRow``'s fields) and ``rows`` (one list each). ``load`` accepts nothing
that it cannot explain: an error names the file, the row and the column. A planner's questions
are answered from a table by ``table_costs.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from profiles.calibration import Calibration
from profiles.errors import ConfigError, ProfileError
from profiles.hardware import DeviceSpec
from profiles.roofline import RooflineCosts
from profiles.shapes import spec_of_shape

SCHEMA = "realplan-profile"
VERSION = 1

_LAYER_OPERATIONS = frozenset({"forward", "backward", "decode"})
OPERATIONS: Mapping[str, frozenset[str]] = {
    # A decode step also as a CUDA graph, where it was measured so.
    "block": _LAYER_OPERATIONS | {"decode_graph", "decode_alone"},
    "embedding": _LAYER_OPERATIONS,
    "head": _LAYER_OPERATIONS | {"decode_graph", "decode_alone"},
    "optimizer": frozenset({"step"}),
    # A read of another worker's memory only where the machine allows it.
    "collective": frozenset({"all_reduce", "all_gather", "reduce_scatter", "p2p", "read"}),
}

UNIT = "s"
HEADER = (
    "schema", "version", "unit", "device", "dtype", "date", "source", "versions", "calibration",
)  # fmt: skip
DTYPES = ("bf16", "fp32")

# No layer, optimizer step or collective takes hours: such a number is milliseconds or
# microseconds written as seconds.
LARGEST_SECONDS = 1e4
LARGEST_WHOLE = 10**18
# Nor does any take a hundredth of what the device's own rates in the header suggest, or hundreds
# of times that and half a second, which a busy machine may add. Blocks in the median take 1 to 5
# times as long.
LEAST_OF_RATES, MOST_OF_RATES, START_S = 0.01, 300.0, 0.5
LEAST_MEDIAN, MOST_MEDIAN = 0.05, 100.0
# Of a collective between workers of one machine: gloo reaches ten times this.
SLOWEST_LINK_BYTES_PER_S = 1e8


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """One measured point.

    ``size``: packed tokens (forward, backward), sequences (decode), parameters (optimizer) or
    bytes of the whole tensor (collective). ``length``: tokens of each sequence, live context
    (decode), or 0 where it does not matter. ``workers``: devices of a collective, else 1.
    ``seconds``: median of ``samples``; ``spread``: inter-quartile range over the median.
    ``shape``: ``shape_key`` of the model, empty for optimizer and collective.
    """

    component: str
    operation: str
    shape: str = ""
    tp: int = 1
    workers: int = 1
    size: int
    length: int = 0
    seconds: float
    spread: float = 0.0
    samples: int = 1


COLUMNS = tuple(f.name for f in fields(CostRow))
_LEAST = {"tp": 1, "workers": 1, "size": 1, "length": 0, "samples": 1}


def _row_problem(row: CostRow) -> tuple[str, str] | None:
    """(column, what is wrong) of a row, or None."""
    for column in ("component", "operation", "shape"):
        if not isinstance(getattr(row, column), str):
            return column, f"{getattr(row, column)!r} is not text"
    if row.component not in OPERATIONS:
        return "component", f"'{row.component}' is unknown; known: {', '.join(OPERATIONS)}"
    if row.operation not in OPERATIONS[row.component]:
        known = ", ".join(sorted(OPERATIONS[row.component]))
        return "operation", f"'{row.operation}' is not one of {row.component}'s: {known}"
    for column, least in _LEAST.items():
        value = getattr(row, column)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return column, f"{value!r} is not a whole number of at least {least}"
        if value > LARGEST_WHOLE:
            return column, f"{value!r} is more than there can be"
    for column in ("seconds", "spread"):
        value = getattr(row, column)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return column, f"{value!r} is not a number"
        if not abs(value) < 1e300:
            return column, f"{value!r} is not finite"
    if row.seconds <= 0:
        return "seconds", f"{row.seconds!r} is not above zero"
    if row.seconds > LARGEST_SECONDS:
        return "seconds", f"{row.seconds!r} is hours for one operation: is it in another unit?"
    if row.spread < 0:
        return "spread", f"{row.spread!r} is below zero"
    if (row.component == "collective") != (row.workers > 1):
        return "workers", f"{row.workers} for a {row.component}: only collectives have several"
    if row.component in ("block", "embedding", "head"):
        try:
            heads = spec_of_shape(row.shape).num_heads
        except ProfileError as error:
            return "shape", error.problem
        if heads % row.tp:
            return "tp", f"{row.tp} does not divide the {heads} heads of {row.shape}"
    elif row.shape:
        return "shape", f"{row.shape!r} for a {row.component}: leave it empty"
    return None


def check_rows(rows: Sequence[CostRow]) -> None:
    """Raise ``ProfileError`` that names the first bad row and its column."""
    seen: dict[tuple[Any, ...], tuple[int, float]] = {}
    for index, row in enumerate(rows):
        problem = _row_problem(row)
        if problem is not None:
            raise ProfileError(
                problem[1], where=f"rows[{index}].{problem[0]}", remedy="measure it again"
            )
        point = (
            row.component, row.operation, row.shape, row.tp, row.workers, row.size, row.length
        )  # fmt: skip
        first, seconds = seen.setdefault(point, (index, row.seconds))
        if seconds != row.seconds:
            raise ProfileError(
                f"{row.seconds!r}, but rows[{first}] has {seconds!r} for the same point",
                where=f"rows[{index}].seconds",
                remedy="keep one of them",
            )


def check_units(rows: Sequence[CostRow], device: DeviceSpec) -> None:
    """Raise ``ProfileError`` for the first row whose seconds look like another unit's.

    A file's rows are held against formulas on the rates that its own header gives: each by
    itself, and the blocks' in the median, which tells milliseconds even of tiny models.
    """
    roofline = RooflineCosts(device)
    ratios = {
        index: row.seconds / _rates_allow(row, roofline)[1]
        for index, row in enumerate(rows) if row.component == "block"
    }  # fmt: skip
    if ratios and not LEAST_MEDIAN <= median(ratios.values()) <= MOST_MEDIAN:
        raise ProfileError(
            f"blocks take {median(ratios.values()):.2g} times what this device's rates suggest, in "
            "the median",
            where=f"rows[{min(ratios)}].seconds", remedy="is it in another unit than seconds?",
        )  # fmt: skip
    for index, row in enumerate(rows):
        least_s, most_s = _rates_allow(row, roofline)
        if LEAST_OF_RATES * least_s <= row.seconds <= MOST_OF_RATES * most_s + START_S:
            continue
        raise ProfileError(
            f"{row.seconds!r} s, where this device's rates suggest {most_s:.2g} s",
            where=f"rows[{index}].seconds", remedy="is it in another unit than seconds?",
        )  # fmt: skip


def _rates_allow(row: CostRow, roofline: RooflineCosts) -> tuple[float, float]:
    """(seconds at the least, seconds at slow rates) of a row."""
    if row.component == "collective":
        memory_s = row.size / roofline.memory_bytes_per_s
        return memory_s, row.workers * row.size / SLOWEST_LINK_BYTES_PER_S
    if row.component == "optimizer":
        seconds = roofline.optimizer_step(row.size).seconds
        return seconds, seconds
    seconds = roofline.layer(
        spec_of_shape(row.shape), row.component,  # type: ignore[arg-type]
        row.operation.removesuffix("_graph"),  # type: ignore[arg-type]
        tp=row.tp, size=row.size, length=max(1, row.length),
    ).seconds  # fmt: skip
    return seconds, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Rows and what they were measured on.

    ``versions``: of the libraries, by name. ``date``: ISO 8601. ``dtype``: bf16 or fp32.
    ``calibration``: what runs have taught of the rows, which stay as they were measured.

    Raises:
        ProfileError: a row is impossible (see ``check_rows``).
    """

    device: DeviceSpec
    rows: tuple[CostRow, ...]
    dtype: str
    date: str
    source: str
    versions: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        check_rows(self.rows)

    @property
    def uncorrected(self) -> CostTable:
        """The rows without what runs have taught of them."""
        return replace(self, calibration=None)

    @property
    def label(self) -> str:
        """Whose numbers these are, with version and device, in a few words."""
        torch = f", torch {self.versions['torch']}" if "torch" in self.versions else ""
        return f"profile of {self.date[:10]}{torch} ({self.device.name})"

    # ---- files --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        header = {
            "schema": SCHEMA, "version": VERSION, "unit": UNIT, "device": asdict(self.device),
            "dtype": self.dtype, "date": self.date, "source": self.source,
            "versions": dict(self.versions),
        }  # fmt: skip
        if self.calibration is not None:
            header["calibration"] = self.calibration.to_dict()
        return {
            "header": header,
            "columns": list(COLUMNS),
            "rows": [list(astuple(row)) for row in self.rows],
        }

    def save(self, path: str | Path) -> None:
        """Write the file under a temporary name beside ``path``, then rename: whole or absent."""
        path = Path(path)
        data = self.to_dict()
        rows = ",\n".join(json.dumps(row, allow_nan=False) for row in data["rows"])
        head = json.dumps(data["header"], indent=1, allow_nan=False)
        text = f'{{"header": {head},\n"columns": {json.dumps(data["columns"])},\n'
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(f'{text}"rows": [\n{rows}\n]}}\n')
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def from_dict(cls, data: Any) -> CostTable:
        """The inverse of ``to_dict``; raises ``ProfileError`` with the JSON path."""
        header = _object(data, "header")
        if header.get("schema") != SCHEMA or header.get("version") != VERSION:
            raise ProfileError(
                f"schema {header.get('schema')!r} version {header.get('version')!r}",
                where="header", remedy=f"this program reads {SCHEMA!r} version {VERSION}",
            )  # fmt: skip
        for name in header:
            if name not in HEADER:
                raise ProfileError("no such field", where=f"header.{name}")
        if header.get("unit", UNIT) != UNIT:
            raise ProfileError(
                f"{header['unit']!r}", where="header.unit",
                remedy=f"this program reads seconds, {UNIT!r}",
            )  # fmt: skip
        try:
            device = DeviceSpec(**_object(header, "device", where="header."))
        except (TypeError, ConfigError) as error:
            raise ProfileError(str(error), where="header.device") from None
        for name in ("dtype", "date", "source"):
            if not isinstance(header.get(name), str):
                raise ProfileError("missing or not text", where=f"header.{name}")
        if header["dtype"] not in DTYPES:
            raise ProfileError(
                f"{header['dtype']!r}", where="header.dtype", remedy=f"known: {', '.join(DTYPES)}"
            )
        rows = _read_rows(data.get("columns"), data.get("rows"))
        check_rows(rows)
        check_units(rows, device)
        return cls(
            device=device,
            rows=rows,
            dtype=header["dtype"],
            date=header["date"],
            source=header["source"],
            versions=_object(header, "versions", where="header."),
            calibration=(
                Calibration.from_dict(header["calibration"]) if "calibration" in header else None
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """The table of a file.

        Raises:
            ProfileError: no such file, truncated or no JSON, another schema or version, or an
                impossible row; names the file, row and column.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ProfileError(
                "no such file", where=str(path), remedy="make one with realexec profile"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"cannot be read ({error})", where=str(path)) from None
        except json.JSONDecodeError as error:
            raise ProfileError(
                f"not JSON, or cut off ({error})", where=str(path),
                remedy="make it again with realexec profile",
            ) from None  # fmt: skip
        try:
            return cls.from_dict(data)
        except ProfileError as error:
            raise ProfileError(
                error.problem, where=f"{path}: {error.where}", remedy=error.remedy
            ) from None


def _object(data: Any, key: str, *, where: str = "") -> dict[str, Any]:
    value = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(value, Mapping):
        raise ProfileError("missing or not an object", where=f"{where}{key}")
    return dict(value)


def _read_rows(columns: Any, rows: Any) -> tuple[CostRow, ...]:
    if not isinstance(columns, list) or not isinstance(rows, list):
        raise ProfileError("missing or not lists", where="columns, rows")
    for name in COLUMNS:
        if name not in columns:
            raise ProfileError(f"column '{name}' is missing", where="columns")
    for name in columns:
        if name not in COLUMNS:
            raise ProfileError(f"unknown column {name!r}", where="columns")
    if len(set(columns)) != len(columns):
        raise ProfileError("a column is named twice", where="columns")
    found = []
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(columns):
            raise ProfileError(f"not a list of {len(columns)} values", where=f"rows[{index}]")
        found.append(CostRow(**dict(zip(columns, row, strict=True))))
    return tuple(found)

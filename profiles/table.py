"""``CostTable``: measured seconds of layers, optimizer and collectives on one device kind.

The file is JSON: ``header`` (schema, version, device, library versions, date, source, dtype),
``columns`` (names of ``CostRow``'s fields) and ``rows`` (one list each). ``load`` accepts nothing
that it cannot explain: an error names the file, the row and the column. ``TableCosts`` answers
the planner's questions from a table; what lies between the rows is ``interpolate.py``'s.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from profiles.calibration import Calibration
from profiles.costs import Component, Cost, LayerCosts, Operation, Provenance
from profiles.errors import ConfigError, ProfileError
from profiles.hardware import DeviceSpec
from profiles.interpolate import Point, Surface
from profiles.models import ModelSpec

logger = logging.getLogger(__name__)

SCHEMA = "realplan-profile"
VERSION = 1

_LAYER_OPERATIONS = frozenset({"forward", "backward", "decode"})
OPERATIONS: Mapping[str, frozenset[str]] = {
    "block": _LAYER_OPERATIONS,
    "embedding": _LAYER_OPERATIONS,
    "head": _LAYER_OPERATIONS,
    "optimizer": frozenset({"step"}),
    "collective": frozenset({"all_reduce", "all_gather", "reduce_scatter", "p2p"}),
}

# No layer, optimizer step or collective takes hours: such a number is milliseconds or
# microseconds written as seconds.
LARGEST_SECONDS = 1e4


def shape_key(spec: ModelSpec) -> str:
    """The per-layer dimensions of a model: models of one width share their rows.

    >>> from profiles.catalogue import MODELS
    >>> shape_key(MODELS["llama-7b"])
    'h4096-q32-k32-d128-f11008-v32000-b0-lm'
    >>> shape_key(MODELS["qwen1.5-moe-a2.7b"])  # of 60 experts 4, and a shared one
    'h2048-q16-k16-d128-f1408-v151936-b1-e60.4.5632-lm'
    """
    letters = "".join(letter for letter, field, value in _SWITCHES if getattr(spec, field) == value)
    switches = f"-{letters}" if letters else ""
    if spec.num_experts:
        switches += f"-e{spec.num_experts}.{spec.experts_per_token}.{spec.shared_ffn}"
    biases = spec.qkv_bias + 2 * spec.o_bias + 4 * spec.ffn_bias
    return (
        f"h{spec.hidden}-q{spec.num_heads}-k{spec.num_kv_heads}-d{spec.head_dim}-f{spec.ffn}"
        f"-v{spec.vocab}-b{biases}{switches}-{spec.head}"
    )


# Letters of a shape for what differs from a LLaMA's block.
_SWITCHES: tuple[tuple[str, str, object], ...] = (
    ("u", "gated", False),
    ("n", "qk_norm", True),
    ("l", "norm", "layer"),
    ("p", "norm", "rms_plus_one"),
    ("a", "positions", "learned"),
)
_SHAPE = re.compile(
    r"h(\d+)-q(\d+)-k(\d+)-d(\d+)-f(\d+)-v(\d+)-b([0-7])"
    r"(?:-([unlpa]+))?(?:-e(\d+)\.(\d+)\.(\d+))?-(lm|scalar)"
)


def spec_of_shape(shape: str) -> ModelSpec:
    """A one-layer model of a ``shape_key``; raises ``ProfileError`` for other text."""
    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise ProfileError(
            f"{shape!r} is not a shape", where="shape", remedy="write it as table.shape_key does"
        )
    hidden, heads, kv_heads, head_dim, ffn, vocab, biases = (int(match[i]) for i in range(1, 8))
    experts, per_token, shared_ffn = (int(match[i] or 0) for i in range(9, 12))
    switches: dict[str, Any] = {
        field: value for letter, field, value in _SWITCHES if letter in (match[8] or "")
    }
    try:
        return ModelSpec(
            name=shape, num_layers=1, hidden=hidden, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, ffn=ffn, vocab=vocab, qkv_bias=bool(biases & 1),
            o_bias=bool(biases & 2), ffn_bias=bool(biases & 4), num_experts=experts,
            experts_per_token=per_token, shared_ffn=shared_ffn,
            head="lm" if match[12] == "lm" else "scalar", **switches,
        )  # fmt: skip
    except ConfigError as error:
        raise ProfileError(f"{shape!r}: {error}", where="shape") from None


def component_shape(spec: ModelSpec, component: Component) -> tuple[int | str, ...]:
    """The dimensions that a component's cost depends on: a critic's blocks are an actor's."""
    if component == "block":
        return (
            spec.hidden, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.ffn, spec.qkv_bias,
            spec.o_bias, spec.ffn_bias, spec.gated, spec.qk_norm, spec.norm, spec.positions,
            spec.num_experts, spec.experts_per_token, spec.shared_ffn,
        )  # fmt: skip
    if component == "embedding":
        return (spec.hidden, spec.vocab)
    return (spec.hidden, spec.vocab, "lm") if spec.head == "lm" else (spec.hidden, "scalar")


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
            spec_of_shape(row.shape)
        except ProfileError as error:
            return "shape", error.problem
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

    # ---- files --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        header = {
            "schema": SCHEMA, "version": VERSION, "device": asdict(self.device),
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
        try:
            device = DeviceSpec(**_object(header, "device", where="header."))
        except (TypeError, ConfigError) as error:
            raise ProfileError(str(error), where="header.device") from None
        for name in ("dtype", "date", "source"):
            if not isinstance(header.get(name), str):
                raise ProfileError("missing or not text", where=f"header.{name}")
        return cls(
            device=device,
            rows=_read_rows(data.get("columns"), data.get("rows")),
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


# ---- answers ----------------------------------------------------------------------------------

_Key = tuple[str, str, tuple[int | str, ...], int]  # component, operation, dimensions, tp


class TableCosts:
    """``LayerCosts`` from a table's rows, and from ``fallback`` where there are none.

    A missing tp or model width takes the fallback's seconds, times measured / fallback at the
    nearest width and tp that were measured (its form, this machine's level).
    """

    def __init__(self, table: CostTable, fallback: LayerCosts) -> None:
        self.table = table
        self.fallback = fallback
        self.surfaces: dict[_Key, Surface] = {}
        self._specs: dict[_Key, ModelSpec] = {}
        self._answers: dict[tuple[object, ...], Cost] = {}
        self._warned: set[_Key] = set()
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
        key = (component, operation, component_shape(spec, component), tp)
        surface = self.surfaces.get(key)
        if surface is None:
            return self._scaled_fallback(spec, component, operation, tp, size, length)
        cost = surface.at(size, length)
        if cost.provenance is Provenance.EXTRAPOLATED and key not in self._warned:
            self._warned.add(key)
            logger.warning(
                "%s %s of %s at tp %d: size %d, length %d is outside what was measured (%s)",
                component, operation, spec.name, tp, size, length, surface.range_text,
            )  # fmt: skip
        return cost

    def _scaled_fallback(
        self, spec: ModelSpec, component: Component, operation: Operation, tp: int, size: int,
        length: int,
    ) -> Cost:  # fmt: skip
        guess = self.fallback.layer(spec, component, operation, tp=tp, size=size, length=length)
        key = self._nearest(spec, component, operation, tp)
        if key is None:
            return Cost(guess.seconds, Provenance.ROOFLINE)
        near, near_tp = self._specs[key], key[3]
        there = self.fallback.layer(
            near, component, operation, tp=near_tp, size=size, length=length
        )
        measured_s = self.surfaces[key].at(size, length).seconds
        return Cost(guess.seconds * measured_s / there.seconds, Provenance.ROOFLINE)

    def _nearest(
        self, spec: ModelSpec, component: Component, operation: Operation, tp: int
    ) -> _Key | None:
        """The measured surface of this operation at the most alike width and tp."""

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
        return self.optimizer.at(num_parameters, 0)

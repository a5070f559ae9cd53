"""``plan.json``: the file form of an ``ExecutionPlan``, and the only place that knows it.

``save_plan`` and ``load_plan`` are exact inverses. The file is self-contained and meant to be
edited; one that breaks the schema is refused with the JSON path of the first bad field and what
would be right. A deleted line is never a silent default: every field is required but those that
their type calls optional (``ep``), which are written where they are not the default.
"""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from planner.graph import DataflowGraph
from planner.mesh import DeviceMesh
from planner.plan import (
    SCHEMA_VERSION,
    Allocation,
    Estimate,
    ExecutionPlan,
    Problem,
    Workload,
    validate_plan,
)
from profiles.errors import PlanError, UserError
from profiles.hardware import Cluster, ClusterSpec, MixedCluster
from profiles.models import ModelSpec

SCHEMA_NAME = "realplan-plan"
READABLE_VERSIONS = (4, SCHEMA_VERSION)

# The file's sections in order: what people edit first. Every one is a field of the plan or of
# its problem, with this type.
_SECTIONS: Mapping[str, Any] = {
    "seed": int,
    "algorithm": str,
    "allocations": Mapping[str, Allocation],
    "estimate": Estimate | None,
    "baselines": Mapping[str, float],
    "workload": Workload,
    "cluster": Cluster,
    "models": Mapping[str, ModelSpec],
    "paths": Mapping[str, str],
    "graph": DataflowGraph,
    "config": Mapping[str, Any],
    "provenance": Mapping[str, Any],
}
_PROBLEM_FIELDS = tuple(field.name for field in fields(Problem))


# ---- values -> JSON ---------------------------------------------------------------------------


def plan_to_dict(plan: ExecutionPlan) -> dict[str, Any]:
    """Plain JSON values in a fixed order of keys."""
    data: dict[str, Any] = {"schema": SCHEMA_NAME, "version": plan.schema_version}
    for name in _SECTIONS:
        owner = plan.problem if name in _PROBLEM_FIELDS else plan
        data[name] = _to_json(getattr(owner, name))
    return data


def _to_json(value: Any) -> Any:
    if isinstance(value, DeviceMesh):
        return [value.first, value.num_devices]
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {
            f.name: _to_json(getattr(value, f.name))
            for f in fields(value)
            if "optional" not in f.metadata or getattr(value, f.name) != f.default
        }
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(_to_json(item) for item in value)
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    return value


def dumps(value: Any, *, width: int = 100, indent: int = 0) -> str:
    """JSON with every object and list that fits ``width`` columns on one line.

    >>> print(dumps({"mesh": [0, 8], "long": ["x" * 60, "y" * 60]}, width=70))
    {
      "mesh": [0, 8],
      "long": [
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"
      ]
    }
    """
    line = json.dumps(value, allow_nan=False, ensure_ascii=False)
    if not isinstance(value, dict | list) or (indent > 0 and indent + len(line) <= width):
        return line
    pad, inner = " " * indent, " " * (indent + 2)
    if isinstance(value, dict):
        items = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: "
            f"{dumps(item, width=width - len(key) - 4, indent=indent + 2)}"
            for key, item in value.items()
        ]
        return "{\n" + ",\n".join(items) + f"\n{pad}}}" if items else "{}"
    items = [f"{inner}{dumps(item, width=width, indent=indent + 2)}" for item in value]
    return "[\n" + ",\n".join(items) + f"\n{pad}]" if items else "[]"


def save_plan(plan: ExecutionPlan, path: str | Path) -> None:
    """Write ``plan`` so that the file is whole or absent.

    Raises:
        PlanError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(dumps(plan_to_dict(plan)) + "\n", encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PlanError(
            f"cannot be written ({error.strerror})",
            where=str(target),
            remedy="name a file in a folder that exists",
        ) from None


# ---- JSON -> values ---------------------------------------------------------------------------


def load_plan(path: str | Path) -> ExecutionPlan:
    """The plan of a file; see the module's docstring.

    Raises:
        PlanError: no such file, cut off, not JSON, of another schema or version, a field missing,
            unknown or of a wrong type, or a plan that cannot run.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"cannot be read ({error.strerror})",
            where=str(file),
            remedy="make a plan with realplan search -o plan.json",
        ) from None
    except UnicodeDecodeError:
        raise PlanError("is not a text file in UTF-8", where=str(file)) from None
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        body = text.strip()
        ended = body.endswith("}") and error.pos < len(text.rstrip())
        cut_off = not body or (body.startswith("{") and not ended)
        problem = "is cut off" if cut_off else "is not JSON"
        raise PlanError(
            f"{problem} at line {error.lineno}, column {error.colno} ({error.msg})",
            where=str(file),
            remedy="restore the file or search again" if cut_off else "mend it there",
        ) from None
    except PlanError as error:
        raise PlanError(error.problem, where=str(file), remedy=error.remedy) from None
    return plan_from_dict(data, where=str(file))


def plan_from_dict(data: Any, *, where: str = "plan") -> ExecutionPlan:
    """The inverse of ``plan_to_dict``; raises ``PlanError`` naming the JSON path of a bad field."""
    if not isinstance(data, Mapping):
        raise PlanError(f"holds {_kind(data)}, not a plan's object", where=where)
    if data.get("schema") != SCHEMA_NAME:
        raise PlanError(
            f"schema is {data.get('schema')!r}",
            where=f"{where}: schema",
            remedy=f'a plan has "schema": "{SCHEMA_NAME}"',
        )
    version = data.get("version")
    if version not in READABLE_VERSIONS or isinstance(version, bool):
        raise PlanError(
            f"version is {version!r}",
            where=f"{where}: version",
            remedy=f"this realplan reads versions {' and '.join(map(str, READABLE_VERSIONS))}",
        )
    try:
        if version == 4:
            data = _from_version_4(data)
        _check_fields({"schema", "version", *_SECTIONS}, data, "")
        values = {name: _read(hint, data[name], name) for name, hint in _SECTIONS.items()}
        problem = Problem(**{name: values.pop(name) for name in _PROBLEM_FIELDS})
        plan = ExecutionPlan(problem=problem, **values)
        validate_plan(plan)
    except UserError as error:
        inner = f"{where}: {error.where}" if error.where else where
        raise PlanError(error.problem, where=inner, remedy=error.remedy) from None
    return plan


def _from_version_4(data: Mapping[str, Any]) -> dict[str, Any]:
    """As version 5: nothing was offloaded and nothing generated ahead; all else is alike."""

    def with_field(value: Any, name: str, default: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            return value  # not what it must be: refused where it is read
        if name in value:
            raise PlanError(
                f"is a field of version {SCHEMA_VERSION}", where=f"{where}.{name}",
                remedy=f'set "version": {SCHEMA_VERSION} at the top',
            )  # fmt: skip
        return {**value, name: default}

    found = dict(data)
    calls = found.get("allocations")
    if isinstance(calls, Mapping):
        found["allocations"] = {
            call: with_field(allocation, "offload", False, f"allocations.{call}")
            for call, allocation in calls.items()
        }
    if "graph" in found:
        found["graph"] = with_field(found["graph"], "max_staleness", 0, "graph")
    return found


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PlanError(f"the field '{key}' stands twice in one object", remedy="delete one")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise PlanError(f"{text} is not a number that JSON allows", remedy="use a finite number")


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    return "a list" if isinstance(value, list) else "an object"


def _wrong(value: Any, wanted: str, where: str) -> PlanError:
    return PlanError(f"is {_kind(value)}", where=where, remedy=f"it must be {wanted}")


def _check_fields(
    known: set[str], data: Mapping[str, Any], where: str, *, optional: frozenset[str] = frozenset()
) -> None:
    prefix = f"{where}." if where else ""
    for name in data:
        if name not in known:
            raise PlanError(
                "unknown field",
                where=f"{prefix}{name}",
                remedy=f"known: {', '.join(sorted(known))}",
            )
    for name in sorted(known - optional):
        if name not in data:
            raise PlanError("missing field", where=f"{prefix}{name}", remedy="add it")


def _read_float(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(value, "a number", where)
    return float(value)


def _read_int(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(value, "a whole number", where)
    return value


def _read_str(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, "a text", where)
    return value


def _read_bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, "true or false", where)
    return value


def _read_mesh(value: Any, where: str) -> DeviceMesh:
    if not isinstance(value, list) or len(value) != 2:
        raise _wrong(value, "[first device, number of devices]", where)
    return DeviceMesh(_read_int(value[0], f"{where}[0]"), _read_int(value[1], f"{where}[1]"))


def _read_cluster(value: Any, where: str) -> Cluster:
    """Equal nodes, or where there are ``groups`` a list of these."""
    mixed = isinstance(value, Mapping) and "groups" in value
    found: Cluster = _read_object(MixedCluster if mixed else ClusterSpec, value, where)
    return found


_LEAVES: Mapping[Any, Callable[[Any, str], Any]] = {
    int: _read_int,
    float: _read_float,
    str: _read_str,
    bool: _read_bool,
    DeviceMesh: _read_mesh,
    Cluster: _read_cluster,
    Any: lambda value, where: value,
}


def _read(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``; raises ``PlanError`` at ``where`` or below it."""
    if hint in _LEAVES:
        return _LEAVES[hint](value, where)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        assert args[1] is type(None), hint
        return None if value is None else _read(args[0], value, where)
    if origin is Literal:
        return _read_choice(args, value, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(_read_choice([member.value for member in hint], value, where))
    if is_dataclass(hint) and isinstance(hint, type):
        return _read_object(hint, value, where)
    if origin in (tuple, frozenset):
        if not isinstance(value, list):
            raise _wrong(value, "a list", where)
        return origin(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    assert issubclass(origin or object, Mapping), hint
    if not isinstance(value, Mapping):
        raise _wrong(value, "an object", where)
    return {key: _read(args[1], item, f"{where}.{key}") for key, item in value.items()}


def _read_choice(allowed: Any, value: Any, where: str) -> Any:
    if isinstance(value, bool) or value not in allowed:
        raise _wrong(value, f"one of {', '.join(map(str, allowed))}", where)
    return value


@lru_cache(maxsize=64)
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _read_object(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(value, "an object", where)
    hints = _hints(kind)
    optional = frozenset(f.name for f in fields(kind) if "optional" in f.metadata)
    _check_fields(set(hints), value, where, optional=optional)
    values = {
        name: _read(hint, value[name], f"{where}.{name}")
        for name, hint in hints.items()
        if name in value
    }
    try:
        return kind(**values)
    except UserError as error:
        raise PlanError(error.problem, where=error.where or where, remedy=error.remedy) from None

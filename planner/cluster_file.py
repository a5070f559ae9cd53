"""A cluster of the user's own as YAML, and single fields of any cluster as overrides.

    base: dgx-a100              # optional: a server of the catalogue (realplan devices), or a GPU
    name: our cluster
    num_nodes: 16               # or --gpus
    devices_per_node: 8
    device:
      memory_bytes: 40GiB       # bytes with a unit, or a plain number
      dollars_per_hour: 1.20    # of one GPU: yours instead of the catalogue's
    inter_link:
      bytes_per_s: 12.5GB       # of one device, one direction
      latency_s: 5e-6

Unlike nodes are groups, each with such fields of its own, and with nodes of its own number:

    groups:
      - {base: dgx-h100, num_nodes: 8}
      - base: l40s-box
        num_nodes: 4
        inter_link: {bytes_per_s: 25GB}

Without ``base`` every field of ``ClusterSpec`` must be there (a ``source`` need not). A field that
is unknown, missing or of a wrong type is refused with its path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from profiles.clusters import PLATFORMS, SYSTEMS, make_cluster
from profiles.errors import ConfigError, UserError, unknown_name
from profiles.hardware import Cluster, ClusterSpec, DeviceSpec, LinkSpec, MixedCluster
from profiles.units import parse_bytes

_PARTS: Mapping[str, type] = {
    "device": DeviceSpec, "intra_link": LinkSpec, "inter_link": LinkSpec, "host_link": LinkSpec,
}  # fmt: skip


class _OneOfEach(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML in which a field that stands twice is a mistake, where else the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                where = f"line {key.start_mark.line + 1}"
                raise ConfigError(
                    f"the field '{key.value}' stands twice", where=where, remedy="delete one"
                )
            seen.add(str(key.value))
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def is_cluster_file(name: str) -> bool:
    """Does ``--cluster`` name a file, not a device?"""
    return name.endswith((".yaml", ".yml")) or "/" in name or Path(name).is_file()


def load_cluster(path: str | Path, *, num_devices: int | None = None) -> Cluster:
    """The cluster of a YAML file, with ``num_devices`` in place of its own number if given.

    Raises:
        ConfigError: no such file, not YAML, or a field that is wrong, with its path.
    """
    file = Path(path)
    try:
        data = _OneOfEach(file.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", where=str(file),
            remedy="give a file, a name of realplan devices, or local",
        ) from None  # fmt: skip
    except ConfigError as error:
        where = f"{file}: {error.where}"
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"is not YAML{at}", where=str(file), remedy="mend it there") from None
    if not isinstance(data, dict):
        raise ConfigError(f"holds {_kind(data)}, not fields of a cluster", where=str(file))
    return cluster_from_dict(data, where=str(file), num_devices=num_devices)


def cluster_from_dict(
    data: Mapping[Any, Any], *, where: str, num_devices: int | None = None
) -> Cluster:
    """The cluster of a file's values; see the module."""
    if "groups" in data:
        return _mixed(data, where=where, num_devices=num_devices)
    return _equal_nodes(data, where=where, num_devices=num_devices, prefix="")


def _mixed(data: Mapping[Any, Any], *, where: str, num_devices: int | None) -> MixedCluster:
    """Groups of nodes; the cluster itself has nothing but a name besides."""
    if num_devices is not None:
        raise ConfigError(
            f"{where} says how many of each group", where="--gpus", remedy="leave it out"
        )
    for key in data:
        if key not in ("name", "groups"):
            raise ConfigError(
                "stands beside groups", where=f"{where}: {key}",
                remedy="write it in the group that it is of",
            )  # fmt: skip
    if not isinstance(data["groups"], list):
        raise ConfigError(
            f"is {_kind(data['groups'])}", where=f"{where}: groups", remedy="give a list"
        )
    found = []
    for index, group in enumerate(data["groups"]):
        path = f"groups[{index}]"
        if not isinstance(group, Mapping):
            raise ConfigError(
                f"is {_kind(group)}", where=f"{where}: {path}", remedy="give a group's fields"
            )
        found.append(_equal_nodes(group, where=where, num_devices=None, prefix=f"{path}."))
    name = _text(data.get("name", file_stem(where)), f"{where}: name")
    try:
        return MixedCluster(name=name, groups=tuple(found))
    except ConfigError as error:
        place = (error.where or "").removeprefix("cluster.")
        raise ConfigError(error.problem, where=f"{where}: {place}", remedy=error.remedy) from None


def _equal_nodes(
    data: Mapping[Any, Any], *, where: str, num_devices: int | None, prefix: str
) -> ClusterSpec:
    """A cluster or a group of one; ``prefix``: of its fields' paths."""
    values = dict(data)
    base = values.pop("base", None)
    start: dict[str, Any] = {}
    if base is not None:
        known = {**PLATFORMS, **SYSTEMS}
        if not isinstance(base, str) or base not in known:
            raise unknown_name("base", str(base), known, where=f"{where}: {prefix}base")
        start = make_cluster(base, known[base].devices_per_node).to_dict()
        start["name"] = f"{file_stem(where)} ({base})"
    _update(start, values, where=where, prefix=prefix, kind=ClusterSpec)
    if num_devices is not None:
        _set_count(start, num_devices, given="num_nodes" in values, where=where)
    start.setdefault("name", file_stem(where))
    start.setdefault("num_nodes", 1)
    _check_complete(start, where=where, prefix=prefix)
    if prefix and "name" not in values:
        start["name"] = _group_name(start)
    return _build(start, where=where, prefix=prefix or "cluster.")


def _group_name(values: Mapping[str, Any]) -> str:
    """``64 x h100``, as groups of the catalogue are called."""
    count = values["num_nodes"] * values["devices_per_node"]
    return f"{count} x {values['device']['name']}"


def override_cluster(cluster: Cluster, changes: Mapping[str, Any]) -> Cluster:
    """``cluster`` with fields changed by path: ``{"inter_link.bytes_per_s": 25e9}``.

    Of groups the path begins with the group's number: ``{"groups.0.device.memory_bytes": …}``.

    Raises:
        ConfigError: no such field, or a value that it cannot have.
    """
    if isinstance(cluster, MixedCluster):
        groups = list(cluster.groups)
        for path, value in changes.items():
            index, field = _group_field(path, len(groups))
            prefix = f"cluster.groups.{index}."
            groups[index] = _override(groups[index], {field: value}, prefix=prefix)
        return replace(cluster, groups=tuple(groups))
    return _override(cluster, changes, prefix="cluster.")


def _group_field(path: str, count: int) -> tuple[int, str]:
    """``groups.1.device.launch_s`` -> (1, ``device.launch_s``)."""
    found = re.fullmatch(r"groups\.(\d+)\.(.+)", path)
    if found is None or int(found[1]) >= count:
        raise ConfigError(
            f"this cluster has {count} groups of unlike nodes", where=f"cluster.{path}",
            remedy=f"write cluster.groups.N.FIELD with N from 0 to {count - 1}",
        )  # fmt: skip
    return int(found[1]), found[2]


def _override(cluster: ClusterSpec, changes: Mapping[str, Any], *, prefix: str) -> ClusterSpec:
    values = cluster.to_dict()
    for path, value in changes.items():
        nested: Any = value
        for part in reversed(path.split(".")):
            nested = {part: nested}
        _update(values, nested, where="", prefix=prefix, kind=ClusterSpec)
    return _build(values, where="", prefix=prefix)


def file_stem(where: str) -> str:
    return Path(where).stem


def _set_count(values: dict[str, Any], num_devices: int, *, given: bool, where: str) -> None:
    """``--gpus``: as many nodes as hold them, or one smaller node."""
    per_node = values.get("devices_per_node", num_devices)
    if given and values["num_nodes"] * per_node != num_devices:
        raise ConfigError(
            f"{num_devices} devices, but {where} has {values['num_nodes']} nodes of {per_node}",
            where="--gpus", remedy="leave out one of the two",
        )  # fmt: skip
    per_node = min(per_node, num_devices)
    if num_devices % per_node:
        low = num_devices // per_node * per_node
        raise ConfigError(
            f"{num_devices} devices do not fill nodes of {per_node}", where="--gpus",
            remedy=f"use {low} or {low + per_node}",
        )  # fmt: skip
    values.update(num_nodes=num_devices // per_node, devices_per_node=per_node)


def _update(
    values: dict[str, Any], changes: Mapping[Any, Any], *, where: str, prefix: str, kind: type
) -> None:
    """Put checked ``changes`` into plain ``values`` of a dataclass ``kind``."""
    hints = get_type_hints(kind)
    if kind is DeviceSpec and "dollars_per_hour" in changes:
        values["price_source"] = "given by the user"
    for key, value in changes.items():
        path = _path(where, f"{prefix}{key}")
        if key not in hints:
            raise unknown_name("field", str(key), hints, where=path)
        if key not in _PARTS:
            values[key] = _leaf(key, hints[key], value, path)
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"is {_kind(value)}", where=path, remedy="give its fields below it")
        part = values.setdefault(key, {})
        _update(part, value, where=where, prefix=f"{prefix}{key}.", kind=_PARTS[key])


def _leaf(key: str, hint: Any, value: Any, path: str) -> Any:
    """A plain value of the field's type; texts become numbers where numbers are wanted."""
    if hint is str:
        return _text(value, path)
    if hint is int or hint is float:
        return _number(key, value, path, whole=hint is int)
    allowed = get_args(hint)
    if allowed and value in allowed:
        return value
    known = ", ".join(map(str, allowed))
    raise ConfigError(f"is {_kind(value)}", where=path, remedy=f"use {known}")


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"is {_kind(value)}", where=path, remedy="give a text")
    return value


def _number(key: str, value: Any, path: str, *, whole: bool) -> int | float:
    """A finite number; of bytes with a unit: ``80GiB``, ``25GB``."""
    read: Callable[[str], float] = float
    if "bytes" in key:
        read = lambda text: parse_bytes(text.removesuffix("/s"), where=path)  # noqa: E731
    try:
        number = read(value) if isinstance(value, str) else value
        bad = isinstance(number, bool) or not math.isfinite(number)
    except (ValueError, TypeError, OverflowError):
        bad, number = True, 0
    if bad:
        raise ConfigError(f"is {_kind(value)}", where=path, remedy="give a number")
    if whole and number != int(number):
        raise ConfigError(f"is {_kind(value)}", where=path, remedy="give a whole number")
    return int(number) if whole else float(number)


def _check_complete(values: Mapping[str, Any], *, where: str, prefix: str) -> None:
    for kind, part, data in [
        (ClusterSpec, "", values),
        *((kind, f"{name}.", values.get(name, {})) for name, kind in _PARTS.items()),
    ]:
        for field in fields(kind):
            if field.name in data or field.default is not MISSING or field.name in _PARTS:
                continue
            raise ConfigError(
                "missing", where=_path(where, f"{prefix}{part}{field.name}"),
                remedy=f"add it, or start from a server with base: {' or '.join(PLATFORMS)}",
            )  # fmt: skip


def _build(values: Mapping[str, Any], *, where: str, prefix: str) -> ClusterSpec:
    try:
        return ClusterSpec.from_dict(values)
    except UserError as error:
        own = error.where.removeprefix("cluster.")
        place = _path(where, error.where if own == error.where else f"{prefix}{own}")
        raise ConfigError(error.problem, where=place, remedy=error.remedy) from None


def _path(where: str, path: str) -> str:
    return f"{where}: {path}" if where else path


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"the text '{value}'"
    names = {type(None): "nothing", bool: str(value).lower(), list: "a list", dict: "an object"}
    return names.get(type(value), f"{value!r}")

"""Shipped tables of measured kernels: ``profiles/data/<device>/<table>.csv.gz``.

The first line of a file is ``#`` and a JSON header (schema, version, table, device, unit, rows,
source with its version, dtype), the second the columns, then one kernel a line. ``load_table``
accepts nothing that it cannot explain: an error names the file, the row and the column.
``scripts/build_profiles.py`` writes them; ``kernels.py`` answers from them.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from profiles.bounds import kernel_bound_s
from profiles.devices import DEVICES
from profiles.errors import ProfileError
from profiles.hardware import DeviceSpec
from profiles.units import US

SCHEMA = "realplan-kernels"
VERSION = 1
UNIT = "us"
DATA_FOLDER = Path(__file__).parent / "data"

# Table -> its whole-number columns; the last column of every table is ``latency_us``.
TABLES: Mapping[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "prefill_attention": ("batch", "length", "heads", "kv_heads", "head_dim"),
    "decode_attention": ("batch", "length", "heads", "kv_heads", "head_dim"),
    "all_reduce": ("workers", "num_bytes"),
    "all_gather": ("workers", "num_bytes"),
    "reduce_scatter": ("workers", "num_bytes"),
    "send_recv": ("workers", "num_bytes"),  # one message inside a node
}
LATENCY = "latency_us"

# No kernel takes less than a hundredth of a microsecond or more than ten minutes: such a number
# is in another unit.
SMALLEST_US, LARGEST_US = 1e-2, 6e8
# Nor does any take less than a tenth of what the device's peak rates allow (out of a cache the
# L40S' take a fifth), or so many times that and 20 us to start. The most that was ever measured:
# 3 times (products), 34 and 117 (attention with one head), 700 (eight L40S without peer access).
LEAST_OF_BOUND, START_S = 0.1, 20 * US
MOST_OF_BOUND: Mapping[str, float] = {
    "gemm": 100, "prefill_attention": 200, "decode_attention": 400, "all_reduce": 3000,
    "all_gather": 3000, "reduce_scatter": 3000, "send_recv": 3000,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTable:
    """``rows``: the whole-number columns of ``TABLES[name]`` -> seconds.

    ``sustained``, ``sustained_from``: a product among others takes so many times the seconds of
    the same product measured alone, where no dimension is below ``sustained_from``.
    """

    name: str
    device: str
    source: str
    dtype: str
    rows: Mapping[tuple[int, ...], float]
    sustained: float = 1.0
    sustained_from: int = 1


def shipped_devices() -> tuple[str, ...]:
    """Names of the devices that have tables."""
    return tuple(sorted(path.parent.name for path in DATA_FOLDER.glob("*/gemm.csv.gz")))


def has_table(device: str, name: str) -> bool:
    """Is there such a table of ``device`` in this package?"""
    return (DATA_FOLDER / device / f"{name}.csv.gz").exists()


@lru_cache(maxsize=64)
def shipped_table(device: str, name: str) -> KernelTable:
    """A table of this package; raises ``ProfileError`` where the file is damaged."""
    return load_table(DATA_FOLDER / device / f"{name}.csv.gz", device=device, name=name)


def load_table(path: Path, *, device: str, name: str) -> KernelTable:
    """The table of a file.

    Raises:
        ProfileError: missing, truncated or no gzip; a foreign schema, version, device, unit or
            table; a row that is no row, is repeated, or whose latency is no plausible time of
            that kernel on that device.
            Names the file, the row (from 1, below the columns) and the column.
    """
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ProfileError(
            f"cannot be read, or is cut off ({error})", where=str(path),
            remedy="install the package again, or run scripts/build_profiles.py",
        ) from None  # fmt: skip
    lines = text.splitlines()
    header = _header(lines[0] if lines else "", path)
    expected = {
        "schema": SCHEMA, "version": VERSION, "table": name, "device": device, "unit": UNIT,
    }  # fmt: skip
    for key, value in expected.items():
        if header.get(key) != value:
            raise ProfileError(
                f"{header.get(key)!r}", where=f"{path}: header.{key}",
                remedy=f"this program reads {value!r} here",
            )  # fmt: skip
    for key in ("source", "dtype"):
        if not isinstance(header.get(key), str):
            raise ProfileError("missing or not text", where=f"{path}: header.{key}")
    columns = (*TABLES[name], LATENCY)
    if len(lines) < 2 or tuple(lines[1].split(",")) != columns:
        raise ProfileError(f"not {','.join(columns)}", where=f"{path}: columns")
    if header.get("rows") != len(lines) - 2:
        raise ProfileError(
            f"{len(lines) - 2} rows, the header says {header.get('rows')!r}",
            where=f"{path}: row {len(lines) - 1}", remedy="the file is cut off or was edited",
        )  # fmt: skip
    rows: dict[tuple[int, ...], float] = {}
    for number, line in enumerate(lines[2:], start=1):
        point, seconds = _row(line, columns, f"{path}: row {number}")
        if point in rows:
            raise ProfileError("the same point again", where=f"{path}: row {number}")
        if device in DEVICES:
            _check_unit(seconds, DEVICES[device], name, point, f"{path}: row {number}")
        rows[point] = seconds
    factor, least = _sustained(header, path)
    return KernelTable(
        name=name, device=device, source=header["source"], dtype=header["dtype"], rows=rows,
        sustained=factor, sustained_from=least,
    )  # fmt: skip


def _check_unit(
    seconds: float, device: DeviceSpec, table: str, point: tuple[int, ...], where: str
) -> None:
    bound_s = kernel_bound_s(device, table, point)
    if LEAST_OF_BOUND * bound_s <= seconds <= MOST_OF_BOUND[table] * (bound_s + START_S):
        return
    raise ProfileError(
        f"{seconds / US:g} us, where the peak rates of {device.name} allow {bound_s / US:.3g} us",
        where=f"{where}.{LATENCY}", remedy="is it in another unit than microseconds?",
    )  # fmt: skip


def _sustained(header: Mapping[str, Any], path: Path) -> tuple[float, int]:
    """(factor, smallest dimension) of ``header.sustained``; one where it says nothing."""
    found = header.get("sustained", {"factor": 1.0, "from": 1})
    where = f"{path}: header.sustained"
    if not isinstance(found, dict) or set(found) != {"factor", "from"}:
        raise ProfileError(f"{found!r} has not a factor and a from", where=where)
    factor, least = found["factor"], found["from"]
    if not isinstance(factor, int | float) or not 1.0 <= factor <= 2.0:
        raise ProfileError(f"{factor!r} is no factor from 1 to 2", where=f"{where}.factor")
    if not isinstance(least, int) or least < 1:
        raise ProfileError(f"{least!r} is no positive whole number", where=f"{where}.from")
    return float(factor), least


def _header(line: str, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(line.removeprefix("#")) if line.startswith("#") else None
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict):
        raise ProfileError("no '#' and JSON in the first line", where=f"{path}: header")
    return header


def _row(line: str, columns: tuple[str, ...], where: str) -> tuple[tuple[int, ...], float]:
    values = line.split(",")
    if len(values) != len(columns):
        raise ProfileError(f"{len(values)} values, not {len(columns)}", where=where)
    point = []
    for column, value in zip(columns[:-1], values, strict=False):
        # isdecimal also holds of other scripts' digits, which no writer of ours makes.
        if not (value.isascii() and value.isdecimal()) or int(value) < 1:
            raise ProfileError(f"{value!r} is no positive whole number", where=f"{where}.{column}")
        point.append(int(value))
    try:
        latency_us = float(values[-1])
    except ValueError:
        latency_us = math.nan
    if not SMALLEST_US <= latency_us <= LARGEST_US:
        raise ProfileError(
            f"{values[-1]!r} is no time of a kernel in microseconds", where=f"{where}.{LATENCY}"
        )
    return tuple(point), latency_us * US

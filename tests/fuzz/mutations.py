"""Damage to a file, and whether what is left can still be the file that it was.

``mutate`` changes bytes, or a value of a parsed file. ``is_broken`` is the oracle: the file is
parsed again and compared with the sound one, without any of the code under test.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

# What people, editors and other programs put in the place of a value.
VALUES: Sequence[Any] = (
    None, True, False, 0, -1, 1, 3, 7, 2.5, -0.5, 1e308, 1e-320, 10**18, 10**30, 10**400,
    -(10**18), "", "x", "1", "nan", "inf", "é\u0000", "../..", "a" * 5000, [], {}, [0], [None],
    {"a": 1}, [[[[]]]], math.nan, math.inf,
)  # fmt: skip

Path = tuple[Any, ...]


def damage_text(data: bytes, rng: random.Random) -> bytes:
    """Cut off, holes, repeats, flipped bits, foreign bytes."""
    kind = rng.choice(("cut", "hole", "repeat", "flip", "insert", "empty", "swap"))
    if not data or kind == "empty":
        return rng.choice((b"", b"\n", b"\xef\xbb\xbf", b"null", b"[]", b"{}", b"0", b"\x00" * 9))
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind == "cut":
        return data[:a]
    if kind == "hole":
        return data[:a] + data[min(b, a + rng.randrange(1, 40)) :]
    if kind == "repeat":
        return data[:b] + data[a:b] + data[b:]
    if kind == "flip":
        place = rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == "insert":
        foreign = rng.choice((b"\x00", b"\xff\xfe", b"}", b"{", b"]", b'"', b",", b"\n", b"1e999"))
        return data[:a] + foreign + data[a:]
    c = min(len(data), b + (b - a))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def places(value: Any, at: Path = ()) -> list[Path]:
    """The path of every value inside of a parsed file."""
    found = [at] if at else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:50]):
            found += places(item, (*at, index))
    return found


def _parent(value: Any, at: Path) -> Any:
    for key in at[:-1]:
        value = value[key]
    return value


def damage_value(parsed: Any, rng: random.Random) -> Any:
    """One value taken away, renamed, replaced, repeated, or exchanged with another."""
    changed = copy.deepcopy(parsed)
    found = places(changed)
    at = rng.choice(found)
    holder, key = _parent(changed, at), at[-1]
    kind = rng.choice(("delete", "rename", "replace", "replace", "replace", "repeat", "exchange"))
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", "", "unknown"))] = holder.pop(key)
    elif kind == "repeat" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "exchange":
        other = rng.choice(found)
        value = copy.deepcopy(_parent(changed, other)[other[-1]])
        holder[key] = value
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return changed


def mutate_json(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.35:
        return damage_text(text.encode(), rng)
    return json.dumps(damage_value(json.loads(text), rng)).encode()


def mutate_lines(text: str, rng: random.Random) -> bytes:
    """As ``mutate_json``, in one line of JSONL."""
    lines = text.encode().splitlines(keepends=True)
    index = rng.randrange(len(lines))
    lines[index] = mutate_json(lines[index].decode(), rng).rstrip(b"\n") + b"\n"
    return b"".join(lines)


# ---- the oracle -------------------------------------------------------------------------------


def same_kind(a: Any, b: Any) -> bool:
    """Of one JSON type, and finite: which numbers are whole is for others to test."""
    if isinstance(a, bool) or isinstance(b, bool):
        return isinstance(a, bool) and isinstance(b, bool)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(b) < 1e300
    return type(a) is type(b)


# Where a number is from, what a device costs, and the only unit that there is.
OPTIONAL = {"source", "dollars_per_hour", "price_source", "unit"}


def is_broken(sound: Any, found: Any, *, free: Callable[[Path], bool], at: Path = ()) -> bool:
    """Whether ``found`` lacks a field of ``sound``, has one more, or one of another type.

    ``free``: parts whose keys and types are nobody's business but their owner's.
    """
    if free(at) or sound is None:
        return False
    if not same_kind(sound, found):
        return True
    if isinstance(sound, dict):
        if set(sound) - OPTIONAL != set(found) - OPTIONAL:
            return True
        common = [k for k in sound if k in found]
        return any(is_broken(sound[k], found[k], free=free, at=(*at, k)) for k in common)
    if isinstance(sound, list) and sound:
        return any(is_broken(sound[0], item, free=free, at=(*at, 0)) for item in found)
    return False


def parse(data: bytes) -> tuple[bool, Any]:
    """(is JSON, its value)."""
    try:
        return True, json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return False, None

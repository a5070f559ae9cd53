"""The only place with unit factors: everywhere else are seconds, bytes and FLOPs."""

from __future__ import annotations

import re

from profiles.errors import ConfigError

KIB = 1024
MIB = 1024**2
GIB = 1024**3
GB = 10**9
TFLOPS = 10**12
MS = 1e-3
US = 1e-6

_BYTE_SUFFIXES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4,
}  # fmt: skip


def parse_bytes(text: str | int | float, *, where: str = "") -> int:
    """Bytes of ``"80GiB"``, ``"40 GB"`` or a plain number.

    Raises:
        ConfigError: the text is not a number with a byte suffix.

    >>> parse_bytes("80GiB") == 80 * GIB
    True
    >>> parse_bytes(512)
    512
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match.group(2).lower() not in _BYTE_SUFFIXES:
        raise ConfigError(
            f"'{text}' is not a number of bytes", where=where, remedy="write it like 80GiB or 40GB"
        )
    return int(float(match.group(1)) * _BYTE_SUFFIXES[match.group(2).lower()])


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least one.

    >>> format_bytes(3 * GIB)
    '3.00 GiB'
    """
    for factor, suffix in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.2f} {suffix}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds with a unit that a person reads at a glance.

    >>> format_seconds(0.0042)
    '4.20 ms'
    >>> format_seconds(75)
    '75.00 s'
    """
    if abs(seconds) >= 600:
        return f"{seconds / 60:.1f} min"
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= MS:
        return f"{seconds / MS:.2f} ms"
    return f"{seconds / US:.1f} us"

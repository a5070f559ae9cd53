"""The questions that a planner asks of a profile, and the shape of an answer.

``LayerCosts`` is answered by ``table.TableCosts`` (layers measured here), by
``kernel_costs.KernelCosts`` (shipped tables of kernels) and by ``roofline.RooflineCosts`` (peak
rates); all say where each number comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

from profiles.models import ModelSpec

Component = Literal["block", "embedding", "head"]
Operation = Literal["forward", "backward", "decode"]


class Provenance(str, Enum):
    """Where a number comes from, best first."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    ROOFLINE = "roofline"


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, and how they are known.

    ``provenance``: of most of the seconds. ``shares``: seconds by ``Provenance``, in its order,
    where the answer is a sum of parts that are known differently.
    """

    seconds: float
    provenance: Provenance
    shares: tuple[float, float, float, float] | None = None

    @classmethod
    def total(cls, parts: Iterable[Cost], times: float = 1.0) -> Cost:
        """The sum of ``parts``, ``times`` over."""
        shares = dict.fromkeys(Provenance, 0.0)
        for part in parts:
            split = part.shares or tuple(
                part.seconds if kind is part.provenance else 0.0 for kind in Provenance
            )
            for kind, seconds in zip(Provenance, split, strict=True):
                shares[kind] += seconds * times
        a, b, c, d = shares.values()
        return cls(a + b + c + d, max(shares, key=lambda kind: shares[kind]), (a, b, c, d))


class LayerCosts(Protocol):
    """Seconds of one tensor-parallel shard's compute, without its collectives."""

    def layer(
        self,
        spec: ModelSpec,
        component: Component,
        operation: Operation,
        *,
        tp: int,
        size: int,
        length: int,
    ) -> Cost:
        """One block, the embedding, or the head (final norm + head + loss or log-probs).

        ``forward`` / ``backward``: ``size`` packed tokens in sequences of ``length`` tokens.
        ``decode``: ``size`` sequences, one new token each, ``length`` tokens of live context.
        ``head`` in ``decode`` gives the logits of ``size`` rows and chooses a token of each, from
        the whole vocabulary on every shard; a scalar head has no decode.
        """
        ...

    def optimizer_step(self, num_parameters: int) -> Cost:
        """Adam with fp32 states over ``num_parameters`` held by this device."""
        ...

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
# decode_alone: by a CPU worker whose neighbours rest, with the memory bandwidth of them all.
Operation = Literal["forward", "backward", "decode", "decode_alone"]


class Provenance(str, Enum):
    """Where a number comes from, best first; ``roofline`` is any formula (modelled)."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    ROOFLINE = "roofline"


Shares = tuple[float, float, float, float]  # seconds by Provenance, in its order
NOTHING: Shares = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, and how they are known.

    ``provenance``: of most of the seconds. ``source``: whose numbers they are, with version and
    device, where all are of one. Of a sum of parts that are known differently ``shares`` are its
    seconds by ``Provenance``, in its order, and ``sources`` the same for every source.
    """

    seconds: float
    provenance: Provenance
    shares: Shares | None = None
    source: str = ""
    sources: tuple[tuple[str, Shares], ...] = ()

    @property
    def by_source(self) -> tuple[tuple[str, Shares], ...]:
        """(source, seconds by ``Provenance``) of each source."""
        return self.sources or ((self.source, self._own_shares()),)

    def _own_shares(self) -> Shares:
        if self.shares is not None:
            return self.shares
        a, b, c, d = (self.seconds if p is self.provenance else 0.0 for p in Provenance)
        return a, b, c, d

    @classmethod
    def total(cls, parts: Iterable[Cost], times: float = 1.0) -> Cost:
        """The sum of ``parts``, ``times`` over."""
        found: dict[str, Shares] = {}
        for part in parts:
            for source, (a, b, c, d) in part.by_source:
                x = found.get(source, NOTHING)
                found[source] = (
                    x[0] + a * times, x[1] + b * times, x[2] + c * times, x[3] + d * times
                )  # fmt: skip
        a, b, c, d = (sum(shares[i] for shares in found.values()) for i in range(4))
        most = max(zip(Provenance, (a, b, c, d), strict=True), key=lambda pair: pair[1])[0]
        return cls(a + b + c + d, most, (a, b, c, d), sources=tuple(found.items()))

    def only(self, source: str | None) -> Cost:
        """The same seconds, of which only those from ``source`` are in ``shares``; None: none."""
        shares = next((found for name, found in self.by_source if name == source), NOTHING)
        return Cost(self.seconds, self.provenance, shares)


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
        ``decode_alone`` is ``decode`` where nobody measured it. ``head`` in ``decode`` gives the
        logits of ``size`` rows and chooses a token of each, from the whole vocabulary on every
        shard; a scalar head has no decode.
        """
        ...

    def optimizer_step(self, num_parameters: int) -> Cost:
        """Adam with fp32 states over ``num_parameters`` held by this device."""
        ...

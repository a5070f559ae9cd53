"""``CostModel``: what prices a call (the cluster, layers' seconds, collectives), and ``CallCost``.

A model keeps the answers that it has given; it is one value to pass around, not a global.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from planner.cost.pipeline import LinkClass, StagesAlike
from planner.cost.stage import ZERO, Priced, StageCosts, StageShape, stage_shapes
from planner.mesh import DeviceMesh
from planner.plan import Allocation
from profiles.calibration import Calibration
from profiles.collectives import Collectives
from profiles.costs import LayerCosts, Provenance
from profiles.hardware import ClusterSpec
from profiles.models import ModelSpec
from profiles.roofline import RooflineCosts

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCost:
    """Seconds of one call alone on its mesh.

    ``parts`` sum to ``seconds``: compute, tensor_parallel, pipeline_bubble, pipeline_p2p,
    data_parallel, optimizer; or prefill and decode. So do the seconds in ``provenance``.
    """

    seconds: float
    parts: Mapping[str, float]
    provenance: Mapping[Provenance, float]

    @classmethod
    def of(cls, parts: Mapping[str, Priced], factor: float = 1.0) -> CallCost:
        """The sum of ``parts``, each ``factor`` times as long."""
        total = ZERO
        parts = {name: priced * factor for name, priced in parts.items()}
        for priced in parts.values():
            total = total + priced
        return cls(
            seconds=sum(priced.seconds for priced in parts.values()),
            parts={name: priced.seconds for name, priced in parts.items()},
            provenance=total.by_provenance(),
        )


class CostModel:
    """Prices calls, reallocations and transfers on ``cluster``.

    ``function_s``: seconds of one sequence in a FUNCTION call. 1e-4 is ample for rules on an
    answer's text (tokenizer included); a function that calls out is the user's to declare.
    ``kernels``: prices what recomputation and sequence parallelism change of a block.
    ``stops_early``: full recomputation of a block stops at the last thing that backward needs, as
    the executor's does (torch's non-reentrant checkpointing); else it runs the block to its end.
    ``calibration``: its factors correct each kind of call, and reallocations.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        layer_costs: LayerCosts,
        collectives: Collectives,
        *,
        function_s: float = 1e-4,
        kernels: RooflineCosts | None = None,
        stops_early: bool = True,
        calibration: Calibration | None = None,
    ) -> None:
        self.cluster = cluster
        self.layer_costs = layer_costs
        self.collectives = collectives
        self.function_s = function_s
        self.calibration = calibration
        self.corrections = {} if calibration is None else calibration.factors
        self.stages = StageCosts(
            cluster.device, layer_costs, collectives, kernels, stops_early=stops_early
        )
        self.known_calls: dict[tuple[object, ...], float] = {}
        self._answers: dict[tuple[object, ...], object] = {}
        self._known_hops: dict[tuple[frozenset[LinkClass], float, float], Priced] = {}
        self.known_reallocations: dict[tuple[object, ...], float] = {}

    def once(self, question: tuple[object, ...], ask: Callable[[], Answer]) -> Answer:
        """The answer of ``ask``, or its earlier answer to an equal ``question``.

        For parts of calls that many allocations share; a question begins with its own name.
        """
        found = self._answers.get(question)
        if found is None:
            found = self._answers[question] = ask()
        return cast(Answer, found)

    def rests_beside(self, mesh: DeviceMesh) -> bool:
        """Does a call on ``mesh`` have one CPU worker of several, whose memory they share?

        The others are taken to rest: what runs beside generation computes on caches, and
        decoding on memory.
        """
        cluster = self.cluster
        return (
            cluster.device.kind == "cpu" and mesh.num_devices == 1 and cluster.devices_per_node > 1
        )

    @property
    def value_bytes(self) -> int:
        """Of a weight or an activation."""
        return self.stages.value_bytes

    def stages_alike(self, spec: ModelSpec, allocation: Allocation) -> Sequence[StagesAlike]:
        """The stages of a pipeline by shape and by the links to the next, in order."""
        s, first = allocation.strategy, allocation.mesh.first
        question = ("stages", spec.num_layers, s.pp, s.dp * s.tp, first)
        return self.once(question, lambda: self._stages_alike(spec, s.pp, s.dp * s.tp, first))

    def _stages_alike(
        self, spec: ModelSpec, pp: int, width: int, first: int
    ) -> Sequence[StagesAlike]:
        counts: Counter[tuple[StageShape, frozenset[LinkClass]]] = Counter()
        for index, shape in enumerate(stage_shapes(spec, pp)):
            start, links = first + index * width, set[LinkClass]()
            for lane in () if shape.last else (start, start + width - 1):
                inside = self.cluster.node_of(lane) == self.cluster.node_of(lane + width)
                links.add("intra" if inside else "inter")
            counts[shape, frozenset(links)] += 1
        return [StagesAlike(*what, count) for what, count in counts.items()]

    def hops(
        self, stages: Sequence[StagesAlike], num_bytes: float, directions: float = 1.0
    ) -> list[Priced]:
        """Seconds of ``num_bytes`` from each of ``stages`` to the next, on every lane at once.

        ``directions``: 2 where as much comes back afterwards.
        """
        return [self._hop(alike.links, num_bytes, directions) for alike in stages]

    def _hop(self, links: frozenset[LinkClass], num_bytes: float, directions: float) -> Priced:
        question = (links, num_bytes, directions)
        answer = self._known_hops.get(question)
        if answer is None:
            found = (self.collectives.p2p(num_bytes, *self.two_devices(link)) for link in links)
            answer = max(
                (Priced.of(cost, directions) for cost in found),
                key=lambda hop: hop.seconds, default=ZERO,
            )  # fmt: skip
            self._known_hops[question] = answer
        return answer

    def two_devices(self, link: LinkClass) -> tuple[int, int]:
        """Two devices that are joined by a link of this class."""
        return (0, 1) if link == "intra" else (0, self.cluster.devices_per_node)

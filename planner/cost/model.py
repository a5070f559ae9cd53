"""``CostModel``: what prices a call (the cluster, layers' seconds, collectives), and ``CallCost``.

A model keeps the answers that it has given; it is one value to pass around, not a global. It is of
equal nodes; ``MixedCosts`` has one for each group of a ``MixedCluster``. Who prices something on a
mesh asks ``at(mesh)`` first, which of both gives the model there and the mesh as it knows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from planner.cost.pipeline import LinkClass, StagesAlike
from planner.cost.stage import ZERO, Priced, StageCosts, StageShape, stage_shapes
from planner.mesh import DeviceMesh
from planner.plan import Allocation
from profiles.calibration import Calibration
from profiles.collectives import Collectives
from profiles.costs import LayerCosts, Provenance
from profiles.hardware import ClusterSpec, MixedCluster, slower_link
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

    def at(self, mesh: DeviceMesh) -> tuple[CostModel, DeviceMesh]:
        """What prices calls on ``mesh``, and the mesh as numbered there: both as they are."""
        return self, mesh

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
        return cluster.kind == "cpu" and mesh.num_devices == 1 and cluster.devices_per_node > 1

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


class MixedCosts:
    """Prices on unlike groups: each call by the model of its mesh's group.

    ``models``: one for each of ``cluster.groups``, on devices numbered from 0.
    """

    calibration: Calibration | None = None  # what one group's runs have shown says nothing of all

    def __init__(self, cluster: MixedCluster, models: Sequence[CostModel]) -> None:
        assert [model.cluster for model in models] == list(cluster.groups), cluster.name
        self.cluster = cluster
        self.models = tuple(models)
        self._starts = cluster.starts
        self._bridges: dict[tuple[int, int], Bridge] = {}

    def at(self, mesh: DeviceMesh) -> tuple[CostModel, DeviceMesh]:
        """The model of the group that ``mesh`` is in, and the mesh as numbered there."""
        group = self.cluster.group_index(mesh.first)
        start = self._starts[group]
        return self.models[group], mesh.shifted(-start) if start else mesh

    def between(self, a: DeviceMesh, b: DeviceMesh) -> Bridge:
        """The way from one group to another."""
        pair = self.cluster.group_index(a.first), self.cluster.group_index(b.first)
        if pair not in self._bridges:
            self._bridges[pair] = Bridge(*(self.models[index] for index in pair))
        return self._bridges[pair]


class Bridge:
    """The way from one group of unlike nodes to another, between two devices.

    A device of either group sends or takes at the rate of its own network, so that a message gets
    the slower of both; its latency is the longer one. ``ends``: the source's collectives and the
    target's, each with its own share of its rate, between devices 0 and 1.
    ``known_reallocations``: seconds by layouts.
    """

    def __init__(self, source: CostModel, target: CostModel) -> None:
        self.source, self.target = source, target
        clusters = source.cluster, target.cluster
        self.latency_s = slower_link(*(cluster.inter_link for cluster in clusters)).latency_s
        self.ends = self._end(source), self._end(target)
        self.known_reallocations: dict[tuple[object, ...], float] = {}

    def _end(self, model: CostModel) -> Collectives:
        link = replace(model.cluster.inter_link, latency_s=self.latency_s)
        # Every device is a node of its own, as none shares one with a device of the other group.
        apart = replace(model.cluster, num_nodes=2, devices_per_node=1, inter_link=link)
        return model.collectives.on(apart)

    @property
    def correction(self) -> float:
        """Of reallocations, where one end's or both ends' runs were measured: the larger one."""
        found = [model.corrections.get("reallocate") for model in (self.source, self.target)]
        return max((factor for factor in found if factor is not None), default=1.0)


Costs = CostModel | MixedCosts

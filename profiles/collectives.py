"""Seconds of an all-reduce, all-gather, reduce-scatter, all-to-all, a message and a direct read.

A group of devices is a Python ``range`` (first, stop, stride): consecutive devices for tensor
parallelism, ``stride = tp`` for data parallelism, ``stride = dp * tp`` for neighbouring pipeline
stages. So whether a group spans nodes is exact. Inside a node a table's measured rows are used
where there are any; otherwise and between nodes the alpha-beta formulas below, with the
shares of a link's rate that were measured.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Literal

from profiles.costs import Cost, Provenance
from profiles.hardware import ClusterSpec, LinkSpec
from profiles.interpolate import Messages, Point
from profiles.kernel_tables import has_table, shipped_table
from profiles.table import CostTable
from profiles.units import US

# Ours -> the shipped tables'.
_SHIPPED = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "p2p": "send_recv",
}  # fmt: skip
CollectiveOperation = Literal["all_reduce", "all_gather", "reduce_scatter"]


def ring_all_reduce_s(
    num_bytes: float, count: int, link: LinkSpec, *, efficiency: float = 1.0
) -> float:
    """Seconds of a ring all-reduce of ``num_bytes`` over ``count`` devices; zero for one.

    2 (n - 1) / n * bytes / bandwidth + 2 (n - 1) * latency.
    Source: Thakur, Rabenseifner and Gropp 2005 (MPICH collectives); Patarasuk and Yuan 2009.

    >>> link = LinkSpec(bytes_per_s=100.0, latency_s=1.0)
    >>> ring_all_reduce_s(1000, 2, link)
    12.0
    """
    steps = 2 * (count - 1)
    return steps / count * num_bytes / (link.bytes_per_s * efficiency) + steps * link.latency_s


def ring_gather_s(
    num_bytes: float, count: int, link: LinkSpec, *, efficiency: float = 1.0
) -> float:
    """Seconds of a ring all-gather to, or reduce-scatter of, ``num_bytes``; zero for one device.

    (n - 1) / n * bytes / bandwidth + (n - 1) * latency. ``num_bytes`` are the whole tensor's.
    Source: as ``ring_all_reduce_s``, of which this is one half.
    """
    steps = count - 1
    return steps / count * num_bytes / (link.bytes_per_s * efficiency) + steps * link.latency_s


class Collectives:
    """Collectives on ``cluster``; ``table`` gives measured rows inside a node.

    ``shipped``: what ``table`` lacks comes from the package's tables of this device.

    ``bandwidth_efficiency``: share of a link's datasheet rate that messages get. NCCL's own model
    (graph/tuning.cc) bounds an A100 node's bus bandwidth by 235 of 300 GB/s, 0.78; Vidur (Agrawal
    et al. 2024) measures messages of 64 MiB at 228 of 300 GB/s on A100 and 348 of 450 GB/s on
    H100 nodes: 0.77. Not applied where rows are measured.

    ``network_efficiency``, ``network_start_s``: the same of the network between nodes, and what
    a message or a collective takes there besides its steps. Vidur measures 35.9 GB/s of a
    400 Gb/s adapter between two H100 nodes, 0.72, and 17 us for the smallest message (24 us
    between A100 nodes): NCCL's own 14 us to start (graph/tuning.cc: baseLat, LL128) and a step's.
    ``scripts/validate_profiles.py`` holds the formula against all sizes.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        table: CostTable | None = None,
        *,
        bandwidth_efficiency: float = 0.77,
        network_efficiency: float = 0.72,
        network_start_s: float = 14 * US,
        shipped: str | None = None,
    ) -> None:
        self.cluster = cluster
        self.efficiency = bandwidth_efficiency
        self.network_efficiency = network_efficiency
        self.network_start_s = network_start_s
        points: dict[str, dict[Point, float]] = defaultdict(dict)
        self._sources: dict[str, str] = {}
        for row in table.rows if table is not None else ():
            if row.component == "collective":
                points[row.operation][(row.size, row.workers)] = row.seconds
                self._sources[row.operation] = table.label if table is not None else ""
        for name, file in _SHIPPED.items() if shipped else ():
            if name not in points and shipped and has_table(shipped, file):  # measured here wins
                found = shipped_table(shipped, file)
                points[name] = {(size, count): s for (count, size), s in found.rows.items()}
                self._sources[name] = f"collectives: {found.source}"
        self._measured = {name: Messages(found) for name, found in points.items()}
        self._answers: dict[tuple[str, int, int, int], Cost] = {}
        self._messages: dict[tuple[float, bool], Cost] = {}

    def on(self, cluster: ClusterSpec) -> Collectives:
        """The formulas with the same shares of a rate on other links; nothing is measured there."""
        return Collectives(
            cluster, bandwidth_efficiency=self.efficiency,
            network_efficiency=self.network_efficiency, network_start_s=self.network_start_s,
        )  # fmt: skip

    def all_reduce(self, num_bytes: float, devices: range) -> Cost:
        """Every device gets the sum of all devices' ``num_bytes``."""
        return self._collective("all_reduce", num_bytes, devices)

    def all_gather(self, num_bytes: float, devices: range) -> Cost:
        """Every device gets all of ``num_bytes``, of which each holds 1 / n."""
        return self._collective("all_gather", num_bytes, devices)

    def reduce_scatter(self, num_bytes: float, devices: range) -> Cost:
        """Every device gets 1 / n of the sum of all devices' ``num_bytes``."""
        return self._collective("reduce_scatter", num_bytes, devices)

    def all_to_all(self, num_bytes: float, devices: range) -> Cost:
        """Every device sends 1 / n of its ``num_bytes`` to each of n devices, itself included.

        Inside a node as the all-gather that brings a device as many bytes, (n - 1) / n of them,
        at the level that was measured for it. Of l devices on a node (n - l) / n cross the
        network, at its rate of one device and its latency for each node but the own; the rest
        goes inside. Source: pairwise exchange, Thakur, Rabenseifner and Gropp 2005, section 3.4.
        """
        count = len(devices)
        if count <= 1 or num_bytes <= 0:
            return Cost(0.0, Provenance.ROOFLINE)
        per_node, num_nodes = self.spread(devices)
        inside = self._in_node("all_gather", round(num_bytes * per_node / count), per_node)
        modelled = Cost(
            inside.seconds, Provenance.ROOFLINE, source=f"as an all-gather: {inside.source}"
        )
        if num_nodes == 1:
            return modelled
        link = self.cluster.inter_link
        rate = link.bytes_per_s * self.network_efficiency
        wire_s = num_bytes * (count - per_node) / count / rate
        outer_s = self.network_start_s + wire_s + (num_nodes - 1) * link.latency_s
        return Cost.total([_of_link(outer_s, link), modelled])

    def p2p(self, num_bytes: float, src: int, dst: int) -> Cost:
        """One message: bytes / bandwidth + latency; nothing to itself."""
        if src == dst or num_bytes <= 0:
            return Cost(0.0, Provenance.ROOFLINE)
        near = self.cluster.node_of(src) == self.cluster.node_of(dst)
        answer = self._messages.get((num_bytes, near))
        if answer is None:
            answer = self._messages[num_bytes, near] = self._message(num_bytes, near)
        return answer

    def read(self, num_bytes: float, src: int, dst: int) -> Cost:
        """``dst`` reads the memory of ``src``, where that was measured; elsewhere a message.

        CPU workers do so with weights that move from layout to layout inside a node.
        """
        near = self.cluster.node_of(src) == self.cluster.node_of(dst)
        if "read" not in self._measured or not near or src == dst or num_bytes <= 0:
            return self.p2p(num_bytes, src, dst)
        return self._from_rows("read", max(1, round(num_bytes)), 2)

    def _message(self, num_bytes: float, near: bool) -> Cost:
        link = self.cluster.intra_link if near else self.cluster.inter_link
        if not near:
            wire_s = num_bytes / (link.bytes_per_s * self.network_efficiency)
            return _of_link(self.network_start_s + link.latency_s + wire_s, link)
        if "p2p" in self._measured:
            return self._from_rows("p2p", max(1, round(num_bytes)), 2)
        return _of_link(num_bytes / (link.bytes_per_s * self.efficiency) + link.latency_s, link)

    def _from_rows(self, operation: str, num_bytes: int, count: int) -> Cost:
        cost = self._measured[operation].at(num_bytes, count)
        return Cost(cost.seconds, cost.provenance, source=self._sources[operation])

    # ---- groups -------------------------------------------------------------------------------

    def _collective(self, operation: CollectiveOperation, num_bytes: float, devices: range) -> Cost:
        per_node, num_nodes = self.spread(devices)
        question = (operation, round(num_bytes), per_node, num_nodes)
        answer = self._answers.get(question)
        if answer is None:
            answer = self._answers[question] = self._hierarchical(*question)
        return answer

    def spread(self, devices: range) -> tuple[int, int]:
        """(most devices of the group on one node, nodes that it touches)."""
        cluster = self.cluster
        if not devices or cluster.node_of(devices[0]) == cluster.node_of(devices[-1]):
            return len(devices), 1
        nodes = Counter(cluster.node_of(device) for device in devices)
        return max(nodes.values()), len(nodes)

    def _hierarchical(self, operation: str, num_bytes: int, per_node: int, num_nodes: int) -> Cost:
        """Within nodes, and between them for the share of each device.

        With l devices on each of k nodes an all-reduce is a reduce-scatter over the l, an
        all-reduce of bytes / l over the k at the network's rate of one device, and an all-gather
        over the l. Source: NCCL's and Horovod's hierarchical all-reduce; Cho et al. 2019
        (BlueConnect), of which this is the case of two levels.
        """
        if num_bytes <= 0:
            return Cost(0.0, Provenance.ROOFLINE)
        if num_nodes == 1:
            return self._in_node(operation, num_bytes, per_node)
        between = ring_all_reduce_s if operation == "all_reduce" else ring_gather_s
        link = self.cluster.inter_link
        outer_s = self.network_start_s + between(
            num_bytes / per_node, num_nodes, link, efficiency=self.network_efficiency
        )
        halves = ("reduce_scatter", "all_gather") if operation == "all_reduce" else (operation,)
        inner = [self._in_node(half, num_bytes, per_node) for half in halves if per_node > 1]
        return Cost.total([_of_link(outer_s, link), *inner])

    def _in_node(self, operation: str, num_bytes: int, count: int) -> Cost:
        if count <= 1:
            return Cost(0.0, Provenance.ROOFLINE)
        ring = ring_all_reduce_s if operation == "all_reduce" else ring_gather_s
        link = self.cluster.intra_link
        model_s = ring(num_bytes, count, link, efficiency=self.efficiency)
        if operation not in self._measured:
            return _of_link(model_s, link)
        counts = self._measured[operation].workers
        if counts[0] <= count <= counts[-1]:
            return self._from_rows(operation, num_bytes, count)
        # Another number of devices than any measured: the formula, at the measured level.
        near = min(counts, key=lambda c: abs(c - count))
        near_s = ring(num_bytes, near, link, efficiency=self.efficiency)
        measured = self._from_rows(operation, num_bytes, near)
        seconds = model_s * measured.seconds / near_s
        return Cost(seconds, Provenance.EXTRAPOLATED, source=measured.source)


def _of_link(seconds: float, link: LinkSpec) -> Cost:
    """Seconds of a formula on a link's rate."""
    return Cost(seconds, Provenance.ROOFLINE, source=f"alpha-beta of a link: {link.source}")

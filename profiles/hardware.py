"""What a cluster is made of: devices, links, nodes; and which link joins two devices.

Read ``ClusterSpec`` first: equal nodes. ``MixedCluster`` is several of these joined by their
networks; it has no device of its own, so whoever needs one asks for the group of a mesh. Rows with
real figures are in ``catalogue.py``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Literal, get_args

from profiles.errors import ConfigError

DeviceKind = Literal["cuda", "cpu"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator, or the share of a CPU that one worker has.

    ``dollars_per_hour`` is a default to be replaced by what a user pays; ``price_source`` says
    who asked for so much, for what, and when.
    """

    name: str
    kind: DeviceKind
    peak_flops: float  # dense, in the training dtype (bf16 on GPUs, fp32 on CPUs), per second
    memory_bytes: int
    memory_bytes_per_s: float
    launch_s: float  # host time to start one kernel
    source: str = ""
    dollars_per_hour: float = 0.0  # 0 where no price is known
    price_source: str = ""

    def __post_init__(self) -> None:
        for field in ("name", "source", "price_source"):
            if not isinstance(getattr(self, field), str):
                raise ConfigError("must be text", where=f"device.{field}")
        if self.kind not in get_args(DeviceKind):
            raise ConfigError(f"{self.kind!r} is not cuda or cpu", where=f"device {self.name}.kind")
        for field in ("peak_flops", "memory_bytes", "memory_bytes_per_s", "launch_s"):
            value = getattr(self, field)
            if not _is_number(value) or not (value > 0 or (value == 0 and field == "launch_s")):
                raise ConfigError("must be above zero", where=f"device {self.name}.{field}")
        if not _is_number(self.dollars_per_hour) or self.dollars_per_hour < 0:
            raise ConfigError(
                f"{self.dollars_per_hour!r} is no price",
                where=f"device {self.name}.dollars_per_hour",
                remedy="give dollars, or 0 where it is unknown",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One direction of the path from one device to its peers."""

    bytes_per_s: float
    latency_s: float
    source: str = ""

    def __post_init__(self) -> None:
        numbers = _is_number(self.bytes_per_s) and _is_number(self.latency_s)
        if not numbers or not self.bytes_per_s > 0 or self.latency_s < 0:
            raise ConfigError("a link needs bytes_per_s > 0 and latency_s >= 0", where="link")


# Devices are looked at one by one; a larger number is a slip of the pen.
MAX_DEVICES = 2**17


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """``num_nodes`` equal nodes of ``devices_per_node`` devices; device d is on node d // per node.

    ``intra_link`` joins devices of a node, ``inter_link`` is one device's share of the network
    between nodes, ``host_link`` its path to host memory (offload).
    """

    name: str
    device: DeviceSpec
    num_nodes: int
    devices_per_node: int
    intra_link: LinkSpec
    inter_link: LinkSpec
    host_link: LinkSpec

    def __post_init__(self) -> None:
        for field in ("num_nodes", "devices_per_node"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{value!r} is not a positive whole number", where=f"cluster.{field}"
                )
        if self.num_devices > MAX_DEVICES:
            raise ConfigError(
                f"{self.num_devices} devices", where="cluster", remedy=f"at most {MAX_DEVICES}"
            )

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def kind(self) -> DeviceKind:
        return self.device.kind

    @property
    def groups(self) -> tuple[ClusterSpec, ...]:
        """Parts of equal nodes, as of a ``MixedCluster``: this one."""
        return (self,)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first device of each group."""
        return (0,)

    def __str__(self) -> str:
        """For tables of scenarios."""
        return self.name

    def group_index(self, device: int) -> int:
        """Which of ``groups`` a device is in."""
        return 0

    def group_of(self, device: int) -> ClusterSpec:
        """The equal nodes among which a device is."""
        return self

    def node_of(self, device: int) -> int:
        return device // self.devices_per_node

    def link_between(self, a: int, b: int) -> LinkSpec:
        """The link that a message from device ``a`` to device ``b`` takes."""
        return self.intra_link if self.node_of(a) == self.node_of(b) else self.inter_link

    def with_memory_limit(self, memory_bytes: int) -> ClusterSpec:
        return replace(self, device=replace(self.device, memory_bytes=memory_bytes))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "cluster") -> ClusterSpec:
        """The inverse of ``to_dict``; raises ``ConfigError`` that names the field."""
        nested = {"device": DeviceSpec, "intra_link": LinkSpec, "inter_link": LinkSpec,
                  "host_link": LinkSpec}  # fmt: skip
        values = dict(data)
        for key, kind in nested.items():
            if not isinstance(values.get(key), Mapping):
                raise ConfigError("missing or not an object", where=f"{where}.{key}")
            try:
                values[key] = kind(**values[key])
            except TypeError as error:
                raise ConfigError(str(error), where=f"{where}.{key}") from error
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(str(error), where=where) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedCluster:
    """Groups of unlike nodes; devices are numbered on from group to group.

    A message between groups takes the slower of their two networks. All devices are of one kind
    (``cuda`` or ``cpu``), as weights of one role have one type everywhere.

    Raises:
        ConfigError: fewer than two groups, GPUs beside CPUs, or too many devices.
    """

    name: str
    groups: tuple[ClusterSpec, ...]

    def __post_init__(self) -> None:
        if len(self.groups) < 2:
            raise ConfigError(
                f"{len(self.groups)} groups", where="cluster.groups",
                remedy="give two or more, or the fields of one group without groups",
            )  # fmt: skip
        if len(kinds := {group.device.kind for group in self.groups}) > 1:
            raise ConfigError(
                f"has devices of kinds {' and '.join(sorted(kinds))}", where="cluster.groups",
                remedy="plan for one kind",
            )  # fmt: skip
        if self.num_devices > MAX_DEVICES:
            raise ConfigError(
                f"{self.num_devices} devices", where="cluster", remedy=f"at most {MAX_DEVICES}"
            )

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    @property
    def num_nodes(self) -> int:
        return sum(group.num_nodes for group in self.groups)

    @property
    def kind(self) -> DeviceKind:
        return self.groups[0].kind

    @property
    def starts(self) -> tuple[int, ...]:
        """The first device of each group."""
        return (0, *accumulate(group.num_devices for group in self.groups[:-1]))

    def __str__(self) -> str:
        """For tables of scenarios."""
        return self.name

    def group_index(self, device: int) -> int:
        """Which of ``groups`` a device is in."""
        return bisect_right(self.starts, device) - 1

    def group_of(self, device: int) -> ClusterSpec:
        """The equal nodes among which a device is."""
        return self.groups[self.group_index(device)]

    def node_of(self, device: int) -> int:
        """Nodes are numbered on from group to group, too."""
        index = self.group_index(device)
        before = sum(group.num_nodes for group in self.groups[:index])
        return before + self.groups[index].node_of(device - self.starts[index])

    def link_between(self, a: int, b: int) -> LinkSpec:
        """The link that a message from device ``a`` to device ``b`` takes."""
        i, j = self.group_index(a), self.group_index(b)
        if i != j:
            return slower_link(self.groups[i].inter_link, self.groups[j].inter_link)
        return self.groups[i].link_between(a - self.starts[i], b - self.starts[i])

    def with_memory_limit(self, memory_bytes: int) -> MixedCluster:
        """Devices that have less keep what they have."""
        limited = (g.with_memory_limit(min(memory_bytes, g.device.memory_bytes))
                   for g in self.groups)  # fmt: skip
        return replace(self, groups=tuple(limited))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "groups": [group.to_dict() for group in self.groups]}


Cluster = ClusterSpec | MixedCluster


def slower_link(a: LinkSpec, b: LinkSpec) -> LinkSpec:
    """What a message gets that takes both: the lower rate, the longer latency."""
    slow = a if a.bytes_per_s <= b.bytes_per_s else b
    return replace(slow, latency_s=max(a.latency_s, b.latency_s))

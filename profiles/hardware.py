"""What a cluster is made of: devices, links, nodes; and which link joins two devices.

Read ``ClusterSpec`` first. Rows with real figures are in ``catalogue.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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

"""From what a user names to values: a cluster, a profile, the costs of a problem or a plan.

Both command lines and the notebook's ``WhatIf`` come through here, so that the same words mean
the same everywhere. Start with ``resolve_cluster`` and ``make_costs``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from planner.arguments import whole
from planner.cluster_file import is_cluster_file, load_cluster
from planner.cost import CostModel, Costs, MixedCosts
from planner.plan import ExecutionPlan
from profiles.clusters import PLATFORMS, SYSTEMS, local_cluster, make_cluster, make_groups
from profiles.errors import ConfigError
from profiles.hardware import Cluster, ClusterSpec, DeviceSpec
from profiles.shipped import shipped_costs, tables_of
from profiles.table import CostTable
from profiles.table_costs import TableCosts

_DEFAULT_GPUS = {"local": 2, "laptop": 1}


def resolve_cluster(
    cluster: str | None, device: str | None, gpus: str | None, table: CostTable | None
) -> Cluster:
    """The cluster that ``--cluster``, ``--device`` and ``--gpus`` mean; a file may be a cluster's.

    ``h100:64+l40s:32`` in one of the first two is a cluster of such groups.

    With ``--cluster local`` the device is the one that ``table`` was measured on, if there is
    one.

    Raises:
        ConfigError: an unknown device, a count that is none or does not fill its nodes, or both
            flags with different devices.
    """
    if cluster and is_cluster_file(cluster):
        if device is not None:
            raise ConfigError(
                f"{cluster} says which device it has", where="--device",
                remedy="leave it out, or write cluster.device.FIELD=… after the flags",
            )  # fmt: skip
        given = None if gpus is None else whole(gpus, "--gpus", least=1)
        return load_cluster(cluster, num_devices=given)
    name = cluster or device or "a100"
    if ":" in name:
        return _groups(name, "--cluster" if cluster else "--device", cluster and device, gpus)
    has = SYSTEMS[name].device if name in SYSTEMS else name
    if device and device not in (name, has):
        raise ConfigError(
            f"--cluster {cluster} and --device {device} name two devices", where="--device",
            remedy="give one of them",
        )  # fmt: skip
    count = whole(gpus or str(_DEFAULT_GPUS.get(name, 8)), "--gpus", least=1)
    try:
        if name != "local":
            return make_cluster(name, count)
        return _this_machine(count, table)
    except ConfigError as error:
        where = {"--devices": "--gpus", "--workers": "--gpus"}.get(error.where, error.where)
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None


def _groups(text: str, flag: str, device: str | None, gpus: str | None) -> Cluster:
    """Groups with their numbers; what says so again is refused."""
    for other, given in (("--device", device), ("--gpus", gpus)):
        if given is not None:
            raise ConfigError(
                f"{text} says which devices there are, and how many", where=other,
                remedy="leave it out",
            )  # fmt: skip
    return make_groups(text, where=flag)


def _this_machine(count: int, table: CostTable | None) -> ClusterSpec:
    """One node of ``count`` devices as measured; CPU workers where nothing was."""
    cpu = local_cluster(count)
    if table is None:
        return cpu
    if table.device.kind == "cpu":
        measured = dataclasses.replace(table.device, memory_bytes=cpu.device.memory_bytes)
        return dataclasses.replace(cpu, device=measured)
    # The links of the server that usually has this GPU; PCIe where it is unknown.
    platform = PLATFORMS[tables_of(table.device) or "l40s"]
    return ClusterSpec(
        name=f"{count} x {table.device.name}", device=table.device, num_nodes=1,
        devices_per_node=count, intra_link=platform.intra, inter_link=platform.inter,
        host_link=platform.host,
    )  # fmt: skip


def make_costs(cluster: Cluster, table: CostTable | None) -> Costs:
    """Costs on ``cluster``: measured where ``table`` has rows, else the shipped tables of the

    device, else from peak rates. Of unlike groups ``table`` is for those of its own device.

    Raises:
        ConfigError: the table is of another kind of device, or of none of several groups.
    """
    if isinstance(cluster, ClusterSpec):
        return _group_costs(cluster, table)
    own = [table is not None and is_of(table, group.device) for group in cluster.groups]
    if table is not None and not any(own):
        kinds = ", ".join(dict.fromkeys(group.device.name for group in cluster.groups))
        raise ConfigError(
            f"was measured on {table.device.name}, the cluster has {kinds}", where="--profile",
            remedy="measure one of its devices with realexec profile",
        )  # fmt: skip
    models = [
        _group_costs(group, table if measured else None)
        for group, measured in zip(cluster.groups, own, strict=True)
    ]
    return MixedCosts(cluster, models)


def is_of(table: CostTable, device: DeviceSpec) -> bool:
    """Was ``table`` measured on such a device? Of one name, or known by one in the catalogue."""
    known = tables_of(device)
    return table.device.name == device.name or (
        known is not None and tables_of(table.device) == known
    )


def _group_costs(cluster: ClusterSpec, table: CostTable | None) -> CostModel:
    layers, collectives = shipped_costs(cluster, table)
    if table is None:
        return CostModel(cluster, layers, collectives)
    if table.device.kind != cluster.kind:
        raise ConfigError(
            f"was measured on {table.device.name} ({table.device.kind}), the plan is for "
            f"{cluster.device.name} ({cluster.kind})",
            where="--profile",
            remedy="measure that device with realexec profile",
        )
    measured = TableCosts(table, layers)
    return CostModel(cluster, measured, collectives, calibration=table.calibration)


def load_table(path: str | None) -> CostTable | None:
    """The table of ``--profile``, where one was given; raises ``ProfileError``."""
    return None if path is None else CostTable.load(path)


def costs_of_plan(plan: ExecutionPlan, profile: str | None, note: Callable[[str], None]) -> Costs:
    """Costs from ``profile``, else from the profile that the plan names, else peak rates.

    ``note`` is told in a sentence where the plan's profile cannot be found.
    """
    return make_costs(plan.problem.cluster, table_of_plan(plan, profile, note))


def table_of_plan(
    plan: ExecutionPlan, profile: str | None, note: Callable[[str], None]
) -> CostTable | None:
    """The measured costs of ``costs_of_plan``; None where it takes peak rates."""
    recorded = plan.provenance.get("profile")
    if profile is None and isinstance(recorded, str):
        if Path(recorded).is_file():
            profile = recorded
        else:
            note(f"the plan's profile {recorded} is not here: costs are as without one")
    return load_table(profile)


Reprice = Callable[[Cluster], Costs]


def hardware_levers(table: CostTable | None) -> tuple[Reprice | None, Reprice | None]:
    """(costs with other links, costs with another device), as ``planner.explain`` takes them.

    None where the costs are measured: a table says nothing of hardware that was not there.
    """

    def reprice(cluster: Cluster) -> Costs:
        return make_costs(cluster, table)

    measured = table is not None and any(row.component == "collective" for row in table.rows)
    return (None if measured else reprice), (reprice if table is None else None)

"""A Ray cluster: one actor a node of the plan, in a placement group that packs whole nodes.

A bundle has all devices of one of the plan's nodes, so that what the plan takes for neighbours are
neighbours; Ray may put two bundles on one machine that has room for both. The actors run
``agent.run_node``; the output folder must be shared by all nodes. When this process ends, Ray ends
the actors, and they their ranks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from executor.launch.agent import POLL_S, run_node, stops_by_signal
from executor.launch.job import Job, load_job
from executor.optional import optional_package
from executor.run import Run
from profiles.errors import ConfigError

# address: of the cluster, as ray.init takes it (default: RAY_ADDRESS, or the one that runs here).
OPTIONS = ("address", "bind", "placement_timeout_s")
PLACEMENT_TIMEOUT_S = 600.0


def import_ray() -> Any:
    return optional_package("ray", where="--launcher ray", remedy="pip install 'realplan[ray]'")


def _check_reachable(address: str) -> None:
    """Ray itself asks an address where nobody listens for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10.0).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(error) from None


def _unreachable(error: Exception) -> ConfigError:
    return ConfigError(
        f"no Ray cluster can be reached ({error})", where="--launcher ray",
        remedy="ray start --head, or --set address=HOST:PORT",
    )  # fmt: skip


def bundles(job: Job, run: Run) -> list[dict[str, float]]:
    """What each of the plan's nodes needs of a machine, in Ray's words."""
    kind = "GPU" if run.plan.problem.cluster.kind == "cuda" else "CPU"
    found = []
    for node in range(job.num_nodes):
        count = float(len(job.ranks_of(node)))
        found.append({"CPU": count, kind: count})
    return found


def start(job: Job, run: Run, options: Mapping[str, str]) -> None:
    """Run every node's agent in an actor of its own; returns when all have ended."""
    ray = import_ray()
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    address = options.get("address", os.environ.get("RAY_ADDRESS", "auto"))
    _check_reachable(address)
    # Actors find these modules as this process does, whatever is installed on their nodes.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(job.python_path)}}
    try:
        ray.init(
            address=address, runtime_env=environment, log_to_driver=False, logging_level="warning",
        )  # fmt: skip
    except ConnectionError as error:
        raise _unreachable(error) from None
    wanted = bundles(job, run)
    group = placement_group(wanted, strategy="PACK")
    try:
        _wait_for_placement(ray, group, wanted, options)
        actor = ray.remote(max_restarts=0)(_Agent)
        agents = []
        for node, bundle in enumerate(wanted):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
            agents.append(
                actor.options(
                    num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0),
                    scheduling_strategy=place, name=f"realexec-{job.token}-node{node}",
                ).remote(job.output, node)
            )  # fmt: skip
        with stops_by_signal(job):
            _wait(ray, job, [agent.run.remote() for agent in agents])
    finally:
        remove_placement_group(group)
        ray.shutdown()


def _wait_for_placement(
    ray: Any, group: Any, wanted: list[dict[str, float]], options: Mapping[str, str]
) -> None:
    timeout_s = float(options.get("placement_timeout_s", PLACEMENT_TIMEOUT_S))
    ready, _ = ray.wait([group.ready()], timeout=timeout_s)
    if not ready:
        raise ConfigError(
            f"Ray found no place for {wanted} within {timeout_s:g} s; it has "
            f"{ray.available_resources()}",
            where="--launcher ray", remedy="add nodes, or search a plan for those that there are",
        )  # fmt: skip


def _wait(ray: Any, job: Job, futures: list[Any]) -> None:
    """Until all agents have ended; an actor that is lost counts as a node that failed."""
    left = dict(zip(futures, range(len(futures)), strict=True))
    while left:
        ended, _ = ray.wait(list(left), timeout=POLL_S)
        for future in ended:
            node = left.pop(future)
            try:
                ray.get(future)
            except ray.exceptions.RayActorError:
                job.tell_first(
                    "failed", node=node, rank=job.ranks_of(node).start,
                    hang=f"node {node} (ranks {_span(job.ranks_of(node))}) was lost",
                )  # fmt: skip


def _span(ranks: range) -> str:
    return f"{ranks.start} to {ranks.stop - 1}" if len(ranks) > 1 else str(ranks.start)


class _Agent:
    """The actor: ``run_node`` on the node where Ray has put it."""

    def __init__(self, output: str, node: int) -> None:
        self.job = load_job(output)
        self.node = node

    def run(self) -> None:
        run_node(self.job, self.node)


def describe(job: Job, run: Run, options: Mapping[str, str]) -> str:
    """What would be asked of Ray."""
    lines = [f"ray.init(address={options.get('address', 'auto')!r})", "placement_group(["]
    lines += [f"    {bundle}," for bundle in bundles(job, run)]
    lines += ["], strategy='PACK')"]
    for node in range(job.num_nodes):
        lines.append(
            f"actor realexec-{job.token}-node{node} in bundle {node}: ranks "
            f"{_span(job.ranks_of(node))}, logs in {job.logs}"
        )
    return "\n".join(lines)

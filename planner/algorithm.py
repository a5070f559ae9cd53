"""``Algorithm``: what an RLHF algorithm tells the planner and the executor, found by its name.

An algorithm is light here (graph, configuration, models it needs) and names the module of its
torch half. Ours and a user's are found alike, through the entry-point group
``realplan.algorithms``; nothing imports an algorithm directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from planner.graph import DataflowGraph
from planner.plan import Problem, Workload
from profiles.errors import ConfigError
from profiles.hardware import ClusterSpec
from profiles.models import HeadKind, ModelSpec

ENTRY_POINT_GROUP = "realplan.algorithms"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """Which of the user's models a role is (``--model`` or ``--critic``), and its head."""

    source: Literal["model", "critic"]
    head: HeadKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """A named algorithm.

    ``config_class`` is a dataclass with a default for every field; ``graph``, ``workload`` and
    ``roles`` are functions of such a configuration. ``functions`` is the import path of the
    module with the torch half, which has ``make_functions(config) -> {call name: function}``.
    """

    name: str
    config_class: type
    graph: Callable[[Any], DataflowGraph]
    workload: Callable[[Any], Workload]
    roles: Callable[[Any], Mapping[str, RoleSpec]]
    functions: str


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of this name.

    Raises:
        ConfigError: no installed package offers it; lists those that are offered.
    """
    offered = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in offered:
        raise ConfigError(
            f"unknown algorithm '{name}'",
            where="--algorithm",
            remedy=f"installed: {', '.join(sorted(offered)) or 'none (is the package installed?)'}",
        )
    algorithm = offered[name].load()
    assert isinstance(algorithm, Algorithm), (name, type(algorithm))
    return algorithm


def make_config(
    config_class: type, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Any:
    """An instance of ``config_class`` from ``base`` (plain values) and Hydra overrides.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class C:
    ...     lr: float = 0.1
    >>> make_config(C, ["lr=1e-3"]).lr
    0.001

    Raises:
        ConfigError: an override is not ``key=value``, names no field, or has a wrong type.
    """
    config = OmegaConf.structured(config_class)
    try:
        config = OmegaConf.merge(config, OmegaConf.create(dict(base or {})))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error), where="config") from None
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
            if override.is_delete() or override.is_sweep_override() or override.is_add():
                raise ConfigError("only key=value is understood", where=f"override '{text}'")
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except HydraException as error:
            raise ConfigError(
                _first_line(error), where=f"override '{text}'", remedy="write key=value"
            ) from None
        except OmegaConfBaseException as error:
            raise ConfigError(
                _first_line(error), where=f"override '{text}'",
                remedy=f"keys here: {_keys_near(config, text)}",
            ) from None  # fmt: skip
    return OmegaConf.to_object(config)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values of a configuration: what a plan stores."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _keys_near(config: Any, text: str) -> str:
    parent, _, _ = text.split("=", 1)[0].rpartition(".")
    node = config
    for part in parent.split(".") if parent else []:
        node = node.get(part, None) if part in node else None
        if node is None or not OmegaConf.is_dict(node):
            node = config
            break
    return ", ".join(sorted(str(key) for key in node))


def make_problem(
    algorithm: Algorithm,
    config: Any,
    *,
    model: ModelSpec,
    critic: ModelSpec,
    cluster: ClusterSpec,
    paths: Mapping[str, str] | None = None,
) -> Problem:
    """The planning problem of an algorithm with a user's models on a cluster."""
    graph = algorithm.graph(config)
    roles = algorithm.roles(config)
    sources = {"model": model, "critic": critic}
    models = {role: sources[roles[role].source].with_head(roles[role].head) for role in graph.roles}
    return Problem(
        algorithm=algorithm.name,
        config=config_to_dict(config),
        graph=graph,
        models=models,
        workload=algorithm.workload(config),
        cluster=cluster,
        paths=dict(paths or {}),
    )

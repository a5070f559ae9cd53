"""``Algorithm``: what an RLHF algorithm tells the planner and the executor, found by its name.

An algorithm is light here (graph, configuration, models it needs) and names the module of its
torch half. Ours and a user's are found alike: by name through the entry-point group
``realplan.algorithms``, or in a Python file that defines ``ALGORITHM``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from planner.graph import DataflowGraph
from planner.plan import Problem, Workload
from planner.run_config import RunConfig
from profiles.errors import ConfigError
from profiles.hardware import Cluster
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
    module with the torch half, which has ``make_functions(config) -> {call name: function}``;
    of an algorithm in a file it may be a ``.py`` file beside it. ``data`` is what a line of the
    data is: a prompt, a prompt with its answer, or a pair of answers.
    """

    name: str
    config_class: type
    graph: Callable[[Any], DataflowGraph]
    workload: Callable[[Any], Workload]
    roles: Callable[[Any], Mapping[str, RoleSpec]]
    functions: str
    data: Literal["prompts", "answers", "pairs"] = "prompts"


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of this name, or that a ``.py`` file defines as ``ALGORITHM``.

    The latter is named by its file's whole path, so that a plan finds it again.

    Raises:
        ConfigError: no installed package offers it (lists those that are offered), or no such
            file, one that cannot be imported, or one without an ``ALGORITHM``.
    """
    if name.endswith(".py"):
        return _algorithm_of_file(Path(name).resolve())
    offered = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in offered:
        raise ConfigError(
            f"unknown algorithm '{name}'",
            where="--algorithm",
            remedy=f"installed: {', '.join(sorted(offered)) or 'none (is the package installed?)'};"
            " or name a .py file that defines ALGORITHM",
        )
    algorithm = offered[name].load()
    assert isinstance(algorithm, Algorithm), (name, type(algorithm))
    return algorithm


def _algorithm_of_file(file: Path) -> Algorithm:
    found = getattr(import_file(file), "ALGORITHM", None)
    if not isinstance(found, Algorithm):
        raise ConfigError(
            "defines no ALGORITHM" if found is None else f"its ALGORITHM is {found!r}",
            where=str(file), remedy="write ALGORITHM = planner.algorithm.Algorithm(...)",
        )  # fmt: skip
    functions = found.functions
    if functions.endswith(".py"):
        functions = str((file.parent / functions).resolve())
    return replace(found, name=str(file), functions=functions)


def import_file(file: Path) -> ModuleType:
    """The module of a Python file, imported once; its folder is not searched for others.

    Raises:
        ConfigError: no such file, a syntax error in it, or an import that it makes fails.
    """
    # A name of its own: two users' files may have one name, and data classes look it up.
    name = f"realplan_file_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ConfigError("no such file", where=str(file), remedy="name an existing .py file")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        del sys.modules[name]
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(
            f"cannot be imported ({error.msg})", where=f"{file}{line}",
            remedy="mend it, or install what it imports",
        ) from None  # fmt: skip
    return module


def import_functions(algorithm: Algorithm) -> ModuleType:
    """The module of an algorithm's torch half: an import path, or a file."""
    if algorithm.functions.endswith(".py"):
        return import_file(Path(algorithm.functions))
    return importlib.import_module(algorithm.functions)


def role_paths(
    algorithm: Algorithm, config: Any, *, model: str, critic: str | None
) -> dict[str, str]:
    """Each role's Hugging Face folder, where ``--model`` or ``--critic`` is one.

    A trained scalar head (a critic) starts from the actor's weights where ``critic`` is None. A
    frozen one (a reward model) never does: its head must have been trained.
    """
    graph, found = algorithm.graph(config), {}
    folders = {"model": model, "critic": critic or model}
    for role, spec in algorithm.roles(config).items():
        if role not in graph.roles:
            continue
        needs_own = spec.head == "scalar" and graph.train_call(role) is None
        given = spec.source == "critic" and critic is not None
        if Path(folders[spec.source]).is_dir() and (given or not needs_own):
            found[role] = folders[spec.source]
    return found


# Of a whole number that no float holds, given for one, OmegaConf raises Python's own error.
_NOT_OF_ITS_TYPE = (OmegaConfBaseException, OverflowError)


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
        _check_elements(config)
    except _NOT_OF_ITS_TYPE as error:
        key = getattr(error, "full_key", None)
        problem = f"{key}: {_first_line(error)}" if key else _first_line(error)
        raise ConfigError(problem, where="config") from None
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
            if override.is_delete() or override.is_sweep_override() or override.is_add():
                raise ConfigError("only key=value is understood", where=f"override '{text}'")
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            _check_elements(config)
        except HydraException as error:
            raise ConfigError(
                _first_line(error), where=f"override '{text}'", remedy="write key=value"
            ) from None
        except _NOT_OF_ITS_TYPE as error:
            raise ConfigError(
                _first_line(error), where=f"override '{text}'",
                remedy=f"keys here: {_keys_near(config, text)}",
            ) from None  # fmt: skip
    return OmegaConf.to_object(config)


def _check_elements(config: Any) -> None:
    """Raise OmegaConf's error for a list within a list of numbers, which a merge lets through."""
    OmegaConf.structured(OmegaConf.to_object(config))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values of a configuration: what a plan stores.

    Raises:
        ConfigError: a number is infinite or none, which JSON cannot hold and no option means.
    """
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    _check_finite(plain)
    return {str(key): value for key, value in plain.items()}


def _check_finite(value: Any, where: str = "") -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_finite(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_finite(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} is not a finite number", where=where)


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


def planned_workload(algorithm: Algorithm, config: RunConfig) -> Workload:
    """What the algorithm says of a step's data, with lengths as ``config.data`` says.

    Raises:
        ConfigError: lengths that no prompt or no answer can have.
    """
    workload, data = algorithm.workload(config), config.data
    return replace(
        workload, response_lengths=data.answer_lengths(workload.response_tokens),
        mean_prompt_tokens=data.mean_prompt(workload.prompt_tokens) or workload.mean_prompt_tokens,
    )  # fmt: skip


def make_problem(
    algorithm: Algorithm,
    config: Any,
    *,
    model: ModelSpec,
    critic: ModelSpec,
    cluster: Cluster,
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
        workload=planned_workload(algorithm, config),
        cluster=cluster,
        paths=dict(paths or {}),
    )

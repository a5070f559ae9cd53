"""The dataflow graph of one RLHF step: model function calls, and the data keys that join them.

Read ``ModelFunctionCall``, then ``DataflowGraph``. An algorithm's graph is built in
``experiments/<name>/graph.py``; where and how a call runs is the plan's (``plan.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import networkx as nx

from profiles.errors import PlanError


class CallKind(str, Enum):
    """What a call does with its role's model."""

    GENERATE = "generate"
    INFER = "infer"
    TRAIN = "train"
    FUNCTION = "function"  # no model: a reward computed by code


@dataclass(frozen=True, slots=True, kw_only=True)
class DataKey:
    """One named quantity of every sequence: as long as its tokens, or a single value.

    ``once``: a group (a prompt's sequences) has it once, not each of its sequences.
    """

    name: str
    per: Literal["token", "sequence"]
    dtype: Literal["int64", "float32"] = "float32"
    once: bool = False

    @property
    def bytes_per_value(self) -> int:
        return 8 if self.dtype == "int64" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFunctionCall:
    """One GENERATE, INFER or TRAIN of a role's model, or a FUNCTION of the data.

    ``inputs`` and ``outputs`` are names of data keys. A FUNCTION call has no role. A TRAIN call
    passes ``num_epochs`` times over its data, in ``num_mini_batches`` optimizer steps each time.
    Inside the call a key ``prefix + name`` of the graph is ``name``: with ``prefix="greedy_"``
    the engine's ``sequences`` are the graph's ``greedy_sequences``.
    """

    name: str
    kind: CallKind
    role: str | None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    num_mini_batches: int = 1
    num_epochs: int = 1
    prefix: str = ""

    @property
    def num_optimizer_steps(self) -> int:
        """Of a TRAIN call, in one step of the algorithm."""
        return self.num_mini_batches * self.num_epochs

    def inner_name(self, key: str) -> str:
        """What the call's function knows the graph's ``key`` as.

        >>> call = ModelFunctionCall(name="g", kind=CallKind.GENERATE, role="a", prefix="greedy_")
        >>> call.inner_name("greedy_sequences"), call.inner_name("prompts")
        ('sequences', 'prompts')
        """
        return key.removeprefix(self.prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterAverage:
    """After each step a frozen role moves towards a trained one: w += ``rate`` (w_of - w)."""

    role: str
    of: str
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataflowGraph:
    """Calls in an order in which they may run, and the keys that they exchange.

    ``source_keys`` are read from the data set: every rank can produce them from (seed, step).
    ``averages`` are taken at the step's end. ``max_staleness`` 1: generation makes the answers of
    the next step while this step trains, with weights that lack one step's update (the newest where
    it reads them in the layout in which they are trained); 0: it waits for the newest.

    Raises:
        PlanError: two calls of one name, a key that nothing produces or that two calls produce,
            a call before its producer, two TRAIN calls of one role, a FUNCTION with a role,
            one call on tokens of whole groups and of single sequences, an average that is not
            of a frozen role over a trained one, or a staleness other than 0 and 1.
    """

    name: str
    calls: tuple[ModelFunctionCall, ...]
    keys: tuple[DataKey, ...]
    source_keys: frozenset[str] = field(default_factory=frozenset)
    averages: tuple[ParameterAverage, ...] = ()
    max_staleness: int = 0

    def __post_init__(self) -> None:
        self._check_names()
        if self.max_staleness not in (0, 1):
            raise PlanError(
                f"{self.max_staleness!r} steps are not supported", where="graph.max_staleness",
                remedy="use 0 or 1",
            )  # fmt: skip
        produced = set(self.source_keys)
        for call in self.calls:
            for key in call.inputs:
                if key not in produced:
                    raise PlanError(
                        f"nothing before it produces '{key}'", where=f"graph.{call.name}.inputs",
                        remedy=f"produced so far: {', '.join(sorted(produced)) or 'nothing'}",
                    )  # fmt: skip
            for key in call.outputs:
                if key in produced:
                    raise PlanError(f"'{key}' is produced twice", where=f"graph.{call.name}")
                produced.add(key)
        trained = [call.role for call in self.calls if call.kind is CallKind.TRAIN]
        if len(trained) != len(set(trained)):
            raise PlanError("a role is trained by two calls", where=f"graph {self.name}")
        for average in self.averages:
            frozen = average.role in self.roles and average.role not in trained
            if not frozen or average.of not in trained or not 0 < average.rate <= 1:
                raise PlanError(
                    f"{average} is not of a frozen role over a trained one, at a rate in (0, 1]",
                    where=f"graph {self.name}.averages",
                )

    def _check_names(self) -> None:
        names = [call.name for call in self.calls]
        known = {key.name for key in self.keys}
        if not names or len(names) != len(set(names)):
            raise PlanError("needs calls with distinct names", where=f"graph {self.name}")
        for call in self.calls:
            if (call.kind is CallKind.FUNCTION) != (call.role is None):
                raise PlanError(
                    "a FUNCTION call has no role, every other call has one",
                    where=f"graph.{call.name}.role",
                )
            for name in ("num_mini_batches", "num_epochs"):
                if getattr(call, name) < 1:
                    raise PlanError("must be at least 1", where=f"graph.{call.name}.{name}")
            for key in (*call.inputs, *call.outputs):
                if key not in known:
                    raise PlanError(f"'{key}' is not a declared key", where=f"graph.{call.name}")
            if call.kind in (CallKind.INFER, CallKind.TRAIN):
                tokens = {self.key(k).once for k in call.inputs if self.key(k).per == "token"}
                if len(tokens) > 1:
                    raise PlanError(
                        "reads tokens that a group has once and tokens of each of its sequences",
                        where=f"graph.{call.name}.inputs",
                    )

    @property
    def ahead(self) -> tuple[ModelFunctionCall, ...]:
        """Calls that work for the next step: with ``max_staleness`` a trained role's generation.

        It reads the data set alone: what else it might read the next step would have to make.
        """
        if self.max_staleness == 0:
            return ()
        return tuple(
            call
            for call in self.calls
            if call.kind is CallKind.GENERATE
            and call.role
            and self.train_call(call.role)
            and self.source_keys.issuperset(call.inputs)
        )

    @property
    def step_calls(self) -> tuple[ModelFunctionCall, ...]:
        """In the order in which a device takes them: ``calls``, those for the next step last."""
        ahead = self.ahead
        return (*(call for call in self.calls if call not in ahead), *ahead)

    def call(self, name: str) -> ModelFunctionCall:
        return next(call for call in self.calls if call.name == name)

    def key(self, name: str) -> DataKey:
        return next(key for key in self.keys if key.name == name)

    def sequences_per_group(self, call: ModelFunctionCall, group_size: int) -> int:
        """Sequences of every group that ``call`` works on: all, or the one that it has once."""
        keys = (self.key(name) for name in (*call.inputs, *call.outputs))
        return group_size if any(not key.once for key in keys) else 1

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles with a model, in order of first use."""
        return tuple(dict.fromkeys(call.role for call in self.calls if call.role is not None))

    def calls_of(self, role: str) -> tuple[ModelFunctionCall, ...]:
        return tuple(call for call in self.calls if call.role == role)

    def train_call(self, role: str) -> ModelFunctionCall | None:
        """The call that trains ``role``, or None for a frozen role."""
        trains = (c for c in self.calls_of(role) if c.kind is CallKind.TRAIN)
        return next(trains, None)

    def producer(self, key: str) -> ModelFunctionCall | None:
        """The call that produces ``key``; None where it comes from the data set."""
        return next((call for call in self.calls if key in call.outputs), None)

    def predecessors(self, call: ModelFunctionCall) -> tuple[ModelFunctionCall, ...]:
        """Calls of the same step whose data ``call`` reads, or whose role it must not overtake.

        A TRAIN call follows every other call of its role in the step: they read the weights
        that it changes.
        """
        producers = [self.producer(key) for key in call.inputs]
        found = [p for p in producers if p is not None]
        if call.kind is CallKind.TRAIN and call.role is not None:
            found += [c for c in self.calls_of(call.role) if c.kind is not CallKind.TRAIN]
        return tuple(dict.fromkeys(found))

    def to_networkx(self) -> nx.DiGraph[str]:
        """Calls as nodes; ``keys`` on an edge; parameter-version edges carry ``next_step=True``."""
        graph: nx.DiGraph[str] = nx.DiGraph(name=self.name)
        for call in self.calls:
            graph.add_node(call.name, call=call)
            for before in self.predecessors(call):
                shared = sorted(set(before.outputs) & set(call.inputs))
                graph.add_edge(before.name, call.name, keys=shared, next_step=False)
        for role in self.roles:
            train = self.train_call(role)
            for call in self.calls_of(role) if train else ():
                if train is not None and call.name != train.name:
                    graph.add_edge(train.name, call.name, keys=[], next_step=True)
        return graph

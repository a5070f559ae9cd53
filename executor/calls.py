"""What an algorithm's torch half offers for each call of its graph.

``make_functions(config)`` of the module that ``Algorithm.functions`` names returns one of these
for every call; the worker (``worker.py``) runs the model and calls them. None of them knows
about meshes, strategies or other ranks: ``sum_over_dp`` is all the communication they see. One
that keeps numbers over steps (a KL controller, running moments) also is a ``Stateful``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from executor.batch import SequenceBatch
from executor.context import RankContext
from executor.generate.sampling import SamplingParams

Head = Callable[[Tensor], Tensor]  # hidden [rows, hidden] -> logits [rows, vocab / tp] or scores
Sum = Callable[[Tensor], Tensor]  # sums a tensor over data-parallel ranks
Records = Sequence[Mapping[str, Any]]  # the data set's records of a batch's samples


class GenerateFunction(Protocol):
    """GENERATE: how to sample. The engine returns ``sequences``, ``prompt_lengths``,
    ``finished`` and ``log_probs``."""

    def sampling(self, stop_token_ids: tuple[int, ...]) -> SamplingParams: ...


class InferFunction(Protocol):
    """INFER: values of a micro-batch from the last stage's hidden states [tokens, hidden]."""

    def read(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext
    ) -> Mapping[str, Tensor]:
        """The call's output keys: [tokens] or [num_sequences] each."""
        ...


class TrainFunction(Protocol):
    """TRAIN: from experience to a loss."""

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        """Adds what the loss needs (advantages, returns) to a rank's whole share of the batch."""
        ...

    def count(self, batch: SequenceBatch) -> Tensor:
        """What the loss of a mini-batch is divided by (its number of answer tokens), float64 [];
        or [2]: that, and what its other statistics are divided by.

        The worker sums it over data-parallel ranks, so that no split changes a gradient.
        """
        ...

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        """(loss, statistics) of a micro-batch; both are sums over tokens / ``denominator``."""
        ...


class Stopping(Protocol):
    """TRAIN that may end a step's training before all of its optimizer steps."""

    @property
    def may_stop(self) -> bool:
        """False: ``stops`` need not be asked."""
        ...

    def stops(self, statistics: Mapping[str, float]) -> bool:
        """Asked of every mini-batch before its optimizer step: True leaves out this one and all
        that would follow in the call. ``statistics`` are those of the whole mini-batch."""
        ...


class DataFunction(Protocol):
    """FUNCTION: output keys from data alone."""

    def run(self, batch: SequenceBatch, records: Records) -> Mapping[str, Tensor] | SequenceBatch:
        """The call's output keys, [tokens] or [num_sequences] of ``batch`` each; or, where it
        makes or chooses sequences, a batch of them by the numbers of their ``samples``."""
        ...


class Stateful(Protocol):
    """What a function keeps over steps, equal on all ranks of its call, goes into checkpoints."""

    def state(self) -> Mapping[str, Any]:
        """JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

"""Data between calls: what a rank holds of the step's samples, and the parcels between ranks.

Who sends which groups to whom is the program's (``planner.program.Transfer``); here are only
the bytes. A parcel is two messages: a header with the lengths of its values of tokens, so that
the receiver knows the sizes, and one payload with all keys of all its sequences.

Parcels go through the host's memory and over gloo, between GPUs too. The program rests on sends
that nobody waits for: two ranks may each send to the other before they receive. NCCL's wait: a
send is over when its receiver has taken it, and the first one of a pair makes a communicator of
both, which blocks the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from executor.batch import SequenceBatch
from planner.graph import DataflowGraph, DataKey, ModelFunctionCall
from planner.program import Transfer
from planner.transfers import Parcel

_DTYPES = {"int64": torch.int64, "float32": torch.float32}


class SampleStore:
    """The keys of the sequences that a rank holds in the current step.

    ``values[key][sequence]``; what a group has once stands at its first sequence.
    """

    def __init__(self, graph: DataflowGraph, device: torch.device, group_size: int) -> None:
        self.graph = graph
        self.device = device
        self.group_size = group_size
        self.values: dict[str, dict[int, Tensor]] = {}

    def clear(self) -> None:
        self.values.clear()

    def sequences(self, groups: Sequence[int], per_group: int) -> list[int]:
        """Numbers of the first ``per_group`` sequences of each group."""
        return [group * self.group_size + k for group in groups for k in range(per_group)]

    def put(self, batch: SequenceBatch, call: ModelFunctionCall) -> None:
        """Keep the outputs of ``call``, which ``batch`` knows by their inner names."""
        for name in call.outputs:
            self.put_key(batch, name, batch.get(call.inner_name(name)))

    def put_key(self, batch: SequenceBatch, name: str, value: Tensor) -> None:
        """Keep ``value`` ([tokens] or [num_sequences] of ``batch``) as the graph's ``name``."""
        key, offsets = self.graph.key(name), batch.offsets
        held = self.values.setdefault(name, {})
        value = value.to(device=self.device, dtype=_DTYPES[key.dtype])
        for i, sequence in enumerate(batch.samples):
            if key.once and sequence % self.group_size:
                continue
            if key.per == "token":
                held[sequence] = value[offsets[i] : offsets[i + 1]]
            else:
                held[sequence] = value[i : i + 1]

    def gather(
        self, groups: Sequence[int], call: ModelFunctionCall, per_group: int
    ) -> SequenceBatch:
        """The inputs of ``call``, by their inner names, of ``per_group`` sequences of each group.

        A value that a group has once is given to each of its sequences. Prompts are not among
        the inputs that are gathered: the data set has them.
        """
        samples = self.sequences(groups, per_group)
        per_token: dict[str, Tensor] = {}
        per_sequence: dict[str, Tensor] = {}
        lengths = [0] * len(samples)
        for name in call.inputs:
            if name == "prompts":
                continue
            key = self.graph.key(name)
            held = self.values.get(name, {})
            first = self.group_size if key.once else 1
            parts = [held[sample - sample % first] for sample in samples]
            empty = torch.zeros(0, dtype=_DTYPES[key.dtype], device=self.device)
            joined = torch.cat(parts) if parts else empty
            inner = call.inner_name(name)
            if key.per == "token":
                per_token[inner], lengths = joined, [len(part) for part in parts]
            else:
                per_sequence[inner] = joined
        return SequenceBatch(
            samples=tuple(samples),
            lengths=tuple(lengths),
            per_token=per_token,
            per_sequence=per_sequence,
        )

    # ---- parcels ----

    def pieces(self, groups: Sequence[int], keys: Sequence[DataKey]) -> list[tuple[DataKey, int]]:
        """(key, sequence) of all in a parcel, in its order; wide keys first, for alignment."""
        return [
            (key, sequence)
            for key in sorted(keys, key=lambda key: (-key.bytes_per_value, key.name))
            for sequence in self.sequences(groups, 1 if key.once else self.group_size)
        ]

    def pack(self, groups: Sequence[int], keys: Sequence[DataKey]) -> tuple[Tensor, Tensor]:
        """(header int64: the length of every piece of tokens, payload uint8 [bytes]); host's."""
        pieces = self.pieces(groups, keys)
        values = [self.values[key.name][sequence] for key, sequence in pieces]
        lengths = [len(v) for (key, _), v in zip(pieces, values, strict=True) if _counted(key)]
        payload = torch.cat([value.contiguous().view(torch.uint8) for value in values])
        return torch.tensor(lengths, dtype=torch.int64), payload.cpu()

    def header_size(self, groups: Sequence[int], keys: Sequence[DataKey]) -> int:
        return sum(_counted(key) for key, _ in self.pieces(groups, keys))

    def sizes(
        self, groups: Sequence[int], keys: Sequence[DataKey], header: Sequence[int]
    ) -> list[int]:
        """Bytes of every piece of a parcel with this header."""
        lengths = iter(header)
        return [
            key.bytes_per_value * (next(lengths) if _counted(key) else 1)
            for key, _ in self.pieces(groups, keys)
        ]

    def unpack(
        self, groups: Sequence[int], header: Sequence[int], payload: Tensor,
        keys: Sequence[DataKey],
    ) -> None:  # fmt: skip
        """Keep the pieces of a payload, which comes from the host."""
        parts = payload.to(self.device).split(self.sizes(groups, keys, header))
        for (key, sequence), part in zip(self.pieces(groups, keys), parts, strict=True):
            self.values.setdefault(key.name, {})[sequence] = part.view(_DTYPES[key.dtype])


def _counted(key: DataKey) -> bool:
    """A piece whose length the header tells: the others are one value long."""
    return key.per == "token"


Pending = tuple[dist.Work | None, Tensor]  # a message, and its memory until it is there


def wait_for_all(pending: list[Pending]) -> None:
    """Until every message has left or come; empties the list."""
    for work, _ in pending:
        if work is not None:
            work.wait()
    pending.clear()


class Exchange:
    """Carries out a rank's ``Transfer`` instructions over the world group.

    Sends do not wait: their handles and buffers are kept until ``finish``, at the step's end.
    """

    def __init__(self, store: SampleStore) -> None:
        self.store = store
        self.pending: list[Pending] = []

    def run(self, transfer: Transfer) -> int:
        """Bytes sent and received by this rank."""
        keys = [self.store.graph.key(name) for name in transfer.keys]
        moved = sum(self._send(parcel, keys, transfer.transfer) for parcel in transfer.sends)
        for parcel in transfer.receives:
            moved += self._receive(parcel, keys, transfer.transfer)
        return moved

    def _send(self, parcel: Parcel, keys: Sequence[DataKey], number: int) -> int:
        header, payload = self.store.pack(parcel.samples, keys)
        for offset, tensor in enumerate((header, payload)):
            if tensor.numel() == 0:  # no value of tokens: the receiver knows all lengths
                continue
            work = dist.isend(tensor, parcel.peer, tag=_tag(number, offset))
            self.pending.append((work, tensor))
        return payload.numel()

    def _receive(self, parcel: Parcel, keys: Sequence[DataKey], number: int) -> int:
        num_lengths = self.store.header_size(parcel.samples, keys)
        header = torch.empty(num_lengths, dtype=torch.int64)
        if num_lengths:
            dist.recv(header, parcel.peer, tag=_tag(number, 0))
        lengths = header.tolist()
        size = sum(self.store.sizes(parcel.samples, keys, lengths))
        payload = torch.empty(size, dtype=torch.uint8)
        dist.recv(payload, parcel.peer, tag=_tag(number, 1))
        self.store.unpack(parcel.samples, lengths, payload, keys)
        return size

    def finish(self) -> None:
        """Wait until every send of the step has left."""
        wait_for_all(self.pending)


# Apart from the tags of pipeline stages and reallocations, which start at 0.
_FIRST_TAG = 1 << 16


def _tag(number: int, offset: int) -> int:
    return _FIRST_TAG + 2 * number + offset

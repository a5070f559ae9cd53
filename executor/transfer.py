"""Data between calls: what a rank holds of the step's samples, and the parcels between ranks.

Who sends which samples to whom is the program's (``planner.program.Transfer``); here are only
the bytes. A parcel is two messages: a header with the sequences' lengths, so that the receiver
knows the sizes, and one payload with all keys of all its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from executor.batch import SequenceBatch
from planner.graph import DataflowGraph, DataKey
from planner.program import Parcel, Transfer

_DTYPES = {"int64": torch.int64, "float32": torch.float32}


class SampleStore:
    """The keys of the samples that a rank holds in the current step."""

    def __init__(self, graph: DataflowGraph, device: torch.device) -> None:
        self.graph = graph
        self.device = device
        self.lengths: dict[int, int] = {}
        self.values: dict[str, dict[int, Tensor]] = {}

    def clear(self) -> None:
        self.lengths.clear()
        self.values.clear()

    def put(self, batch: SequenceBatch, keys: Iterable[str]) -> None:
        """Keep ``keys`` of every sequence of ``batch``."""
        offsets = batch.offsets
        for sample, length in zip(batch.samples, batch.lengths, strict=True):
            self.lengths[sample] = length
        for name in keys:
            key, value = self.graph.key(name), batch.get(name)
            held = self.values.setdefault(name, {})
            value = value.to(device=self.device, dtype=_DTYPES[key.dtype])
            for i, sample in enumerate(batch.samples):
                if key.per == "token":
                    held[sample] = value[offsets[i] : offsets[i + 1]]
                else:
                    held[sample] = value[i : i + 1]

    def gather(self, samples: Sequence[int], keys: Iterable[str]) -> SequenceBatch:
        """The batch of ``samples`` with ``keys``, in that order."""
        per_token: dict[str, Tensor] = {}
        per_sequence: dict[str, Tensor] = {}
        for name in keys:
            key = self.graph.key(name)
            parts = [self.values[name][sample] for sample in samples]
            empty = torch.zeros(0, dtype=_DTYPES[key.dtype], device=self.device)
            joined = torch.cat(parts) if parts else empty
            (per_token if key.per == "token" else per_sequence)[name] = joined
        return SequenceBatch(
            samples=tuple(samples),
            lengths=tuple(self.lengths[sample] for sample in samples),
            per_token=per_token,
            per_sequence=per_sequence,
        )

    # ---- parcels ----

    def pack(self, samples: Sequence[int], keys: Sequence[DataKey]) -> tuple[Tensor, Tensor]:
        """(header [num_samples] int64, payload [bytes] uint8); wide keys first, for alignment."""
        header = torch.tensor([self.lengths[s] for s in samples], device=self.device)
        parts = [
            self.values[key.name][sample].contiguous().view(torch.uint8)
            for key in _wide_first(keys)
            for sample in samples
        ]
        return header, torch.cat(parts)

    def payload_bytes(self, lengths: Sequence[int], keys: Sequence[DataKey]) -> int:
        return sum(
            key.bytes_per_value * (sum(lengths) if key.per == "token" else len(lengths))
            for key in keys
        )

    def unpack(
        self, samples: Sequence[int], lengths: Sequence[int], payload: Tensor,
        keys: Sequence[DataKey],
    ) -> None:  # fmt: skip
        """Keep the samples of a payload."""
        self.lengths.update(zip(samples, lengths, strict=True))
        start = 0
        for key in _wide_first(keys):
            held = self.values.setdefault(key.name, {})
            for sample, length in zip(samples, lengths, strict=True):
                count = length if key.per == "token" else 1
                end = start + count * key.bytes_per_value
                held[sample] = payload[start:end].view(_DTYPES[key.dtype])
                start = end


def _wide_first(keys: Sequence[DataKey]) -> list[DataKey]:
    return sorted(keys, key=lambda key: (-key.bytes_per_value, key.name))


class Exchange:
    """Carries out a rank's ``Transfer`` instructions over the world group.

    Sends do not wait: their handles and buffers are kept until ``finish``, at the step's end.
    """

    def __init__(self, store: SampleStore) -> None:
        self.store = store
        self.pending: list[tuple[dist.Work | None, Tensor]] = []

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
            work = dist.isend(tensor, parcel.peer, tag=_tag(number, offset))
            self.pending.append((work, tensor))
        return payload.numel()

    def _receive(self, parcel: Parcel, keys: Sequence[DataKey], number: int) -> int:
        device = self.store.device
        header = torch.empty(len(parcel.samples), dtype=torch.int64, device=device)
        dist.recv(header, parcel.peer, tag=_tag(number, 0))
        lengths = header.tolist()
        size = self.store.payload_bytes(lengths, keys)
        payload = torch.empty(size, dtype=torch.uint8, device=device)
        dist.recv(payload, parcel.peer, tag=_tag(number, 1))
        self.store.unpack(parcel.samples, lengths, payload, keys)
        return size

    def finish(self) -> None:
        """Wait until every send of the step has left."""
        for work, _ in self.pending:
            if work is not None:
                work.wait()
        self.pending.clear()


# Apart from the tags of pipeline stages and reallocations, which start at 0.
_FIRST_TAG = 1 << 16


def _tag(number: int, offset: int) -> int:
    return _FIRST_TAG + 2 * number + offset

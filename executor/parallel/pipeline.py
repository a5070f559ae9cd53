"""Pipeline parallelism: micro-batches through the stages, forward only or 1F1B.

Read ``schedule_1f1b`` first: who computes what when is integers. Every stage walks its own list;
what a stage computed crosses in one batch with what it needs next, so that two neighbours that
give to each other never wait for one another. Sizes are known to all: every stage has the
micro-batches' token ids, from which it follows what of them is computed (``model.shared``): their
common beginnings once. pp 1 is the same walk with nobody to send to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from executor.batch import SequenceBatch
from executor.model.shared import Computed, whole_or_shared
from executor.model.transformer import BlockDone, DecoderStage

Action = tuple[Literal["forward", "backward"], int]  # (what, micro-batch)
Transfer = tuple[int, int]  # (pipeline stage, micro-batch)
Read = Callable[[Tensor, SequenceBatch], Mapping[str, Tensor]]
Loss = Callable[[Tensor, SequenceBatch], tuple[Tensor, Mapping[str, Tensor]]]


def schedule_1f1b(num_stages: int, stage: int, num_micro_batches: int) -> tuple[Action, ...]:
    """What ``stage`` does, in order: fill, one forward and one backward in turn, drain.

    At most ``num_stages - stage`` micro-batches have run forward and not yet backward.
    Source: Narayanan et al. 2019 (PipeDream), with a flush as in Narayanan et al. 2021.

    >>> [f"{what[0]}{index}" for what, index in schedule_1f1b(2, 0, 3)]
    ['f0', 'f1', 'b0', 'f2', 'b1', 'b2']
    """
    warm_up = min(num_micro_batches, num_stages - stage - 1)
    actions: list[Action] = [("forward", index) for index in range(warm_up)]
    for index in range(warm_up, num_micro_batches):
        actions += [("forward", index), ("backward", index - warm_up)]
    actions += [("backward", i) for i in range(num_micro_batches - warm_up, num_micro_batches)]
    return tuple(actions)


def schedule_forward(num_micro_batches: int) -> tuple[Action, ...]:
    """What every stage does where nothing is trained."""
    return tuple(("forward", index) for index in range(num_micro_batches))


def transfers(
    num_stages: int, stage: int, actions: Sequence[Action]
) -> tuple[tuple[Transfer | None, Transfer | None], ...]:
    """(what is sent, what is received) before the first action and after each.

    After an action its result goes to the neighbour that waits for it, together with the receipt
    of what the next action needs.
    """

    def neighbour(action: Action | None, *, gives: bool) -> Transfer | None:
        if action is None:
            return None
        what, index = action
        peer = stage + 1 if (what == "forward") == gives else stage - 1
        return (peer, index) if 0 <= peer < num_stages else None

    ends: list[Action | None] = [None, *actions, None]
    return tuple(
        (neighbour(done, gives=True), neighbour(following, gives=False))
        for done, following in pairwise(ends)
    )


def forward_only(
    stage: DecoderStage, micro_batches: Sequence[SequenceBatch], *, read: Read
) -> list[Mapping[str, Tensor]] | None:
    """``read(hidden [tokens, hidden], micro_batch)`` of every micro-batch, without gradients.

    All ranks of a data-parallel replica call it with the same micro-batches: with their token ids,
    and on the last stage with what ``read`` looks at. Returns the results on the last stage, None
    elsewhere. Of an empty micro-batch ``read`` gets no rows.
    """
    results: list[Mapping[str, Tensor]] = []
    computed = _computed(stage, micro_batches)

    def forward(index: int, inputs: Tensor | None) -> Tensor:
        hidden = _forward(stage, micro_batches[index], computed[index], inputs)
        if stage.ctx.is_last_stage:
            results.append(read(hidden, micro_batches[index]))
        return hidden

    with torch.no_grad():
        _walk(stage, computed, schedule_forward(len(micro_batches)), forward, _no_backward)
    return results if stage.ctx.is_last_stage else None


def train_1f1b(
    stage: DecoderStage, micro_batches: Sequence[SequenceBatch], *, loss: Loss,
    block_done: BlockDone | None = None,
) -> list[Mapping[str, Tensor]] | None:  # fmt: skip
    """Adds the gradients of sum over micro-batches of ``loss(hidden, micro_batch)[0]``.

    ``loss`` gives (loss, statistics) from hidden [tokens, hidden]; it divides by the global
    count of tokens, so nothing is scaled here. Gradients land in the stage's flat tensor, not
    yet reduced over dp. Called as ``forward_only``; on the last stage returns the statistics,
    detached, with the loss as ``loss`` unless they have one; None elsewhere. ``block_done`` is told
    of each block that the last micro-batch's backward has left, where that has tokens.
    """
    results: list[Mapping[str, Tensor]] = []
    under_way: dict[int, tuple[Tensor | None, Tensor]] = {}  # micro-batch -> (inputs, output)
    computed = _computed(stage, micro_batches)

    def forward(index: int, inputs: Tensor | None) -> Tensor:
        micro_batch = micro_batches[index]
        if inputs is not None:
            inputs.requires_grad_()
        last = index == len(micro_batches) - 1
        output = hidden = _forward(
            stage, micro_batch, computed[index], inputs, block_done if last else None
        )
        if stage.ctx.is_last_stage:
            output, statistics = loss(hidden, micro_batch)
            found = {"loss": output, **statistics}
            results.append({name: value.detach() for name, value in found.items()})
        under_way[index] = (inputs, output if micro_batch.num_tokens > 0 else hidden)
        return output.detach()

    def backward(index: int, gradient: Tensor | None) -> Tensor | None:
        inputs, output = under_way.pop(index)
        if micro_batches[index].num_tokens > 0:
            torch.autograd.backward(output, gradient)
        elif stage.serves:  # nothing of its own to go back through, but others' tokens
            torch.autograd.backward(output, torch.zeros_like(output))
        return None if inputs is None else inputs.grad

    assert stage.gradients is not None, "a stage without gradients cannot be trained"
    if not any(micro_batch.num_tokens for micro_batch in micro_batches):
        stage.gradients.zero_()  # else the first backward pass writes over what is there
    actions = schedule_1f1b(stage.ctx.layout.pp, stage.ctx.pp_rank, len(micro_batches))
    _walk(stage, computed, actions, forward, backward)
    assert not under_way, sorted(under_way)
    return results if stage.ctx.is_last_stage else None


def _no_backward(index: int, gradient: Tensor | None) -> Tensor | None:
    raise AssertionError(f"backward of micro-batch {index} in a forward-only schedule")


def _computed(stage: DecoderStage, micro_batches: Sequence[SequenceBatch]) -> list[Computed]:
    """What is computed of each micro-batch.

    Of all before the first pass: on a GPU, looking at token ids waits for what is under way.
    """
    return [
        whole_or_shared(micro_batch.token_ids, micro_batch.lengths, stage.ctx.device)
        for micro_batch in micro_batches
    ]


def _forward(
    stage: DecoderStage, micro_batch: SequenceBatch, computed: Computed, inputs: Tensor | None,
    block_done: BlockDone | None = None,
) -> Tensor:  # fmt: skip
    """What ``DecoderStage.forward`` gives, on the last stage of all tokens of the micro-batch.

    ``inputs`` [rows, hidden] of the stage before, if any. Nothing runs on an empty micro-batch, on
    any shard, but what experts do for other replicas.
    """
    if micro_batch.num_tokens == 0:
        return stage.serve() if stage.serves else _empty_hidden(stage, computed)
    if inputs is None:
        inputs = computed.select(micro_batch.token_ids).to(stage.ctx.device)
    hidden = stage.forward(inputs, computed.packed, block_done=block_done)
    return computed.expand(hidden) if stage.ctx.is_last_stage else hidden


def _empty_hidden(stage: DecoderStage, computed: Computed) -> Tensor:
    """Room for the hidden states of a micro-batch between stages, [rows, hidden]."""
    return torch.empty(
        stage.region(computed.num_tokens).num_rows,
        stage.spec.hidden,
        dtype=stage.buffer.flat.dtype,
        device=stage.ctx.device,
    )


def _walk(
    stage: DecoderStage,
    computed: Sequence[Computed],
    actions: Sequence[Action],
    forward: Callable[[int, Tensor | None], Tensor],
    backward: Callable[[int, Tensor | None], Tensor | None],
) -> None:
    """Runs ``actions``, each on what was received for it, and gives on what each returned."""
    ctx = stage.ctx
    sent = _Sent(ctx.layout.pp)
    result: Tensor | None = None
    crossings = transfers(ctx.layout.pp, ctx.pp_rank, actions)
    for step, (give, take) in enumerate(crossings):
        operations: list[dist.P2POp] = []
        received: Tensor | None = None
        if take is not None:
            received = _empty_hidden(stage, computed[take[1]])
            if received.numel():
                operations.append(dist.P2POp(dist.irecv, received, ctx.stage_rank(take[0])))
        if give is not None and result is not None and result.numel():
            result = result.contiguous()
            operations.append(dist.P2POp(dist.isend, result, ctx.stage_rank(give[0])))
        sent.exchange(operations)
        if step < len(actions):
            what, index = actions[step]
            result = forward(index, received) if what == "forward" else backward(index, received)
    sent.wait()


class _Sent:
    """Sends that are not known to be over, at most ``limit``, with the tensors that they read."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open: deque[tuple[dist.Work, Tensor]] = deque()

    def exchange(self, operations: Sequence[dist.P2POp]) -> None:
        """Posts all at once; waits for receipts, and only keeps what is being sent."""
        if not operations:
            return
        works = dist.batch_isend_irecv(list(operations))
        if len(works) != len(operations):  # NCCL: one handle for all, and waiting only orders
            for work in works:
                work.wait()
            return
        for work, operation in zip(works, operations):
            if operation.op is dist.irecv:
                work.wait()
            else:
                self.open.append((work, operation.tensor))
        self.wait(self.limit)

    def wait(self, remaining: int = 0) -> None:
        """Until at most ``remaining`` sends are open, the oldest first."""
        while len(self.open) > remaining:
            self.open.popleft()[0].wait()

"""Generation: prompts in, prompts with sampled answers out.

Read ``generate`` first. Sequences stand in rows of a cache and get one token a turn; those that
end leave at once and waiting prompts take their places (continuous batching, Yu et al. 2022,
Orca), so a turn's forward pass holds one token of old rows and whole prompts of new ones.
What a new prompt has in common with one that is there is not computed again (``prefixes.py``): rows
of one and the same prompt begin as copies, and differ by their noise.

With pipeline stages, sequences are in groups, and every stage works on another group. All
stages keep the same books, tick by tick: in a tick every stage runs the turn that it holds, then
turns move one stage on and the last stage tells everybody its tokens. For pp 2 and 2 groups:

    tick         0     1     2     3     4
    stage 0      g0    g1    g0'   g1'   g0''
    stage 1            g0    g1    g0'   g1'

Replicas whose experts lie on one another's ranks tick together, to the last tick of the slowest: in
a tick in which a stage holds no turn, its experts compute for the others' tokens.

Which token is chosen is ``sampling.py``'s, where keys and values lie ``kv_cache.py``'s, turns
without prompts as CUDA graphs ``static_step.py``'s, and what stays of both ``caches.py``'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from executor.batch import SequenceBatch
from executor.cuda_graph import Capture
from executor.generate.answers import Answer, batch_of, begun
from executor.generate.caches import Caches, shares
from executor.generate.kv_cache import KVCache, Turn
from executor.generate.prefixes import Alike, Prefixes
from executor.generate.sampling import SamplingParams, sample, uniform
from executor.generate.static_step import StaticDecode
from executor.model.linear import packed_weights
from executor.model.transformer import DecoderStage
from executor.parallel.experts import anyone
from executor.parallel.tensor import gather_vocab
from planner.cost.stage import MAX_PROMPT_TOKENS
from profiles.errors import ConfigError


def generate(
    stage: DecoderStage,
    prompts: Sequence[Tensor],
    *,
    samples: Sequence[int],
    params: SamplingParams,
    seed: int,
    step: int,
    num_groups: int = 1,
    max_rows: int | None = None,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    capture: Capture | None = None,
    caches: Caches | None = None,
) -> SequenceBatch:
    """Answers to ``prompts`` (int64 token ids [length] each), in their order.

    All ranks of a data-parallel replica call it with the same arguments and get the same batch,
    on the stage's device. A token depends on the weights and on (``seed``, ``step``, its sample,
    its position), and not on layout, groups, rows or the other prompts, up to rounding.

    Args:
        samples: places of the prompts in the step's whole batch.
        num_groups: groups under way at once; the number of pipeline stages keeps all busy.
        max_rows: sequences under way at once over all groups; None: all.
        max_prompt_tokens: prompt tokens of one turn, unless a single prompt has more.
        capture: what makes a graph of a turn without prompts, where the model has no experts;
            None: none is made. All ranks of a tensor-parallel group have one or none.
        caches: of earlier generations by this call, which this one leaves to the next; None: its
            own are gone with it. Where they are too small they give their memory up, for its own.

    Returns:
        per token: ``sequences`` (prompt and answer with its stop token) and ``log_probs`` fp32
        (of each answer token given those before it, as ``sampling.sample`` defines it; 0 in the
        prompt). Per sequence: ``prompt_lengths`` int64 and ``finished`` fp32 (1: a stop token
        ended it; 0: cut off by ``max_new_tokens`` or the model's ``max_positions``).

    Raises:
        ConfigError: an empty or too long prompt, a token outside the vocabulary, no row.
        FloatingPointError: a logit is not finite; names the sample.
    """
    assert stage.spec.head == "lm", stage.spec.head
    for name, count in (("num_groups", num_groups), ("max_rows", max_rows)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} is {count}, not at least 1", where="generation")
    sequences = begun(stage.spec, prompts, samples, params)
    num_rows = min(len(sequences), max_rows or len(sequences))
    rows = shares(num_rows, min(num_groups, num_rows))
    longest = max((sequence.limit for sequence in sequences), default=0)
    if caches is not None and not caches.suffice(rows, longest):
        caches.clear()
        caches = None
    held = (caches or Caches(rows, longest)).begin(stage, params, (seed, step), capture)
    groups = [
        _Group(max_rows=own, cache=cache, static=static) for own, (cache, static) in zip(rows, held)
    ]
    waiting = deque(sequences)
    with torch.no_grad(), packed_weights(stage.linear_weights()):
        _Ticks(stage, groups, waiting, params, (seed, step), max_prompt_tokens).run()
    return batch_of(sequences, stage.ctx.device)


@dataclass(slots=True, kw_only=True)
class _Group:
    """Sequences that take their turns together, in at most ``max_rows`` rows of one cache.

    ``static``: runs the turns without prompts, or None: they run as the others do.
    """

    max_rows: int
    cache: KVCache
    static: StaticDecode | None = None
    sequences: list[Answer] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A group's turn on its way through the stages; ``inputs`` [tokens] on the first, or None.

    ``turn`` None: ``group.static`` runs it, with one token of every row.
    """

    group: _Group
    num_tokens: int
    turn: Turn | None
    inputs: Tensor | None


class _Ticks:
    """The loop. ``flights[s]`` is the turn that stage s runs in this tick; all ranks agree."""

    def __init__(
        self,
        stage: DecoderStage,
        groups: Sequence[_Group],
        waiting: deque[Answer],
        params: SamplingParams,
        noise_key: tuple[int, int],  # (seed, step)
        max_prompt_tokens: int,
    ) -> None:
        self.stage = stage
        self.ctx = stage.ctx
        self.waiting = waiting
        self.params = params
        self.noise_key = noise_key
        self.max_prompt_tokens = max_prompt_tokens
        self.stops = frozenset(params.stop_token_ids)
        self.idle = deque(groups)  # groups without a turn under way, longest idle first
        self.flights: deque[_Flight | None] = deque([None] * self.ctx.layout.pp)
        self.sent: list[tuple[dist.Work, Tensor]] = []  # the last tick's, and what they read

    def run(self) -> None:
        """Ticks until nobody waits and no row is left."""
        hidden: Tensor | None = None  # [tokens, hidden] from the stage before
        while True:
            self.flights.pop()
            self.flights.appendleft(self._next_flight())
            busy = any(flight is not None for flight in self.flights)
            if not anyone(busy, self.ctx.ep_group, self.ctx.device):
                break
            mine = self.flights[self.ctx.pp_rank]
            result = None if mine is None else self._compute(mine, hidden)
            if mine is None and self.stage.serves:
                self.stage.serve()
            hidden, chosen = self._exchange(result)
            last = self.flights[-1]
            if last is not None:
                assert chosen is not None
                self._append(last.group, chosen)
                self.idle.append(last.group)
        for work, _ in self.sent:
            work.wait()

    # ---- books, the same on every stage ---------------------------------------------------------

    def _next_flight(self) -> _Flight | None:
        """The next turn of the group that has been idle longest, if it has rows to run."""
        for _ in range(len(self.idle)):
            group = self.idle.popleft()
            old = group.sequences
            new, alike = self._admit(group)
            if old or new:
                group.sequences = [*old, *new]
                if group.static is not None and not new:
                    group.cache.lengthen()
                    return _Flight(group=group, num_tokens=len(old), turn=None, inputs=None)
                turn = group.cache.turn([len(one.prompt) for one in new], alike)
                inputs = None
                if self._is_first:
                    inputs = _input_ids(old, new, turn.packed.lengths).to(self.ctx.device)
                num_tokens = turn.packed.num_tokens
                return _Flight(group=group, num_tokens=num_tokens, turn=turn, inputs=inputs)
            # Without rows and with nobody waiting, the group has nothing to do ever again.
        return None

    def _admit(self, group: _Group) -> tuple[list[Answer], list[Alike]]:
        """Waiting sequences that enter in one turn, and what others have of each."""
        new: list[Answer] = []
        alike: list[Alike] = []
        old = group.sequences
        free_rows = group.max_rows - len(old)
        if not self.waiting or not free_rows:
            return new, alike
        prefixes = Prefixes()
        for row, sequence in enumerate(old):
            prefixes.add(sequence.key, row)
        num_tokens = 0
        while self.waiting and len(new) < free_rows:
            sequence = self.waiting[0]
            same = prefixes.find(sequence.key)
            num_tokens += len(sequence.prompt) - same.num_tokens
            if new and num_tokens > self.max_prompt_tokens:
                break
            prefixes.add(sequence.key, len(old) + len(new))
            new.append(self.waiting.popleft())
            alike.append(same)
        return new, alike

    def _append(self, group: _Group, chosen: Tensor) -> None:
        """``chosen`` [2, rows]: token and log-probability of every row; rows that end leave."""
        kept = []
        tokens, log_probs = chosen.tolist()
        for row, sequence in enumerate(group.sequences):
            sequence.append(int(tokens[row]), log_probs[row])
            sequence.finished = sequence.answer[-1] in self.stops
            if not sequence.finished and sequence.length < sequence.limit:
                kept.append(row)
        if len(kept) < len(group.sequences):
            order = group.cache.compact(kept)
            group.sequences = [group.sequences[row] for row in order]

    # ---- work of one stage ----------------------------------------------------------------------

    @property
    def _is_first(self) -> bool:
        return self.ctx.is_first_stage

    def _compute(self, flight: _Flight, hidden: Tensor | None) -> Tensor:
        """Hidden states [tokens, hidden] for the next stage; what was chosen on the last."""
        turn, static = flight.turn, flight.group.static
        if turn is None:
            assert static is not None
            return static.run(flight.group.sequences, hidden)
        inputs = flight.inputs if self._is_first else hidden
        assert inputs is not None
        hidden = self.stage.forward(inputs, turn.packed, turn)
        if not self.ctx.is_last_stage:
            return hidden
        last_tokens = turn.last_tokens
        return self._choose(flight.group, hidden if last_tokens is None else hidden[last_tokens])

    def _choose(self, group: _Group, hidden: Tensor) -> Tensor:
        """Token and log-probability of every row, [2, rows] float64: both are exact in it.

        ``hidden`` [rows, hidden]. Every tensor shard sees the same logits and chooses the same.
        """
        logits = gather_vocab(self.stage.head(hidden), self.ctx)  # [rows, vocab]
        keys = [[sequence.sample, sequence.length] for sequence in group.sequences]
        samples, positions = torch.tensor(keys, device=logits.device).T
        u = uniform(*self.noise_key, samples, positions)
        allow_stop = None
        answers = [len(sequence.answer) for sequence in group.sequences]
        if min(answers) < self.params.min_new_tokens:
            allow = [length >= self.params.min_new_tokens for length in answers]
            allow_stop = torch.tensor(allow, device=logits.device)
        tokens, log_probs = sample(logits, u, self.params, allow_stop)
        return torch.stack((tokens.double(), log_probs.double()))

    def _exchange(self, result: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Ends a tick: (hidden states for this stage's next turn, what the last stage chose).

        One batch of messages, of which no two between a pair of ranks go the same way; a rank
        waits for its receipts only, which depend on no later tick. Sizes are known to all.
        """
        ctx, flights = self.ctx, self.flights
        stage, last = ctx.pp_rank, ctx.layout.pp - 1
        if last == 0:
            return None, result
        sends: list[dist.P2POp] = []
        receives: list[dist.P2POp] = []
        hidden, chosen = None, result if stage == last else None
        if result is not None and stage < last:
            sends.append(dist.P2POp(dist.isend, result.contiguous(), ctx.stage_rank(stage + 1)))
        if stage > 0 and (coming := flights[stage - 1]) is not None:
            shape = (coming.num_tokens, self.stage.spec.hidden)
            hidden = torch.empty(shape, dtype=self.stage.buffer.flat.dtype, device=ctx.device)
            receives.append(dist.P2POp(dist.irecv, hidden, ctx.stage_rank(stage - 1)))
        if (ending := flights[last]) is not None:
            if chosen is not None:
                sends += [dist.P2POp(dist.isend, chosen, ctx.stage_rank(s)) for s in range(last)]
            else:
                shape = (2, len(ending.group.sequences))
                chosen = torch.empty(shape, dtype=torch.float64, device=ctx.device)
                receives.append(dist.P2POp(dist.irecv, chosen, ctx.stage_rank(last)))
        self._post(sends, receives)
        return hidden, chosen

    def _post(self, sends: list[dist.P2POp], receives: list[dist.P2POp]) -> None:
        """All at once; waits for this tick's receipts and for the last tick's sends."""
        works = dist.batch_isend_irecv([*sends, *receives]) if sends or receives else []
        waits_for = [work for work, _ in self.sent]
        if len(works) == len(sends) + len(receives):
            self.sent = [(work, send.tensor) for work, send in zip(works, sends)]
            waits_for += works[len(sends) :]
        else:  # NCCL: one handle for all; waiting for it orders the streams and blocks nobody
            self.sent = []
            waits_for += works
        for work in waits_for:
            work.wait()


def _input_ids(old: Sequence[Answer], new: Sequence[Answer], lengths: Sequence[int]) -> Tensor:
    """The last token of each old sequence, then of new prompts the last ones: [tokens] int64.

    ``lengths``: tokens of each.
    """
    last = torch.tensor([sequence.answer[-1] for sequence in old], dtype=torch.long)
    own = [one.prompt[len(one.prompt) - n :] for one, n in zip(new, lengths[len(old) :])]
    return torch.cat([last, *own])

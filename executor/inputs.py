"""What a run reads besides weights, checked before any process starts: data, tokenizers, rewards.

Read ``check_inputs``; the workers open the same data again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from executor.boards import import_wandb
from executor.dataset import Dataset, Item, MockData, Prompts
from executor.run import Run, functions_of
from executor.text import TextCodec
from planner.graph import CallKind
from planner.run_config import DataConfig
from profiles.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


def model_folder(run: Run) -> Path | None:
    """The folder whose tokenizer the run uses: that of the first generating or first role."""
    graph = run.plan.problem.graph
    generating = [c.role for c in graph.calls if c.kind is CallKind.GENERATE]
    role = generating[0] if generating else graph.roles[0]
    path = run.model_path(role) if role else None
    return Path(path) if path else None


def open_data(run: Run, text: TextCodec) -> Prompts:
    """The run's data, checked; random tokens for a benchmark without data."""
    config, problem = run.config, run.plan.problem
    if not config.data.path and text.tokenizer is None:
        vocab = min(spec.vocab for spec in problem.models.values())
        return MockData(
            vocab=vocab, seed=config.seed, kind=run.algorithm.data, prompt_len=config.prompt_len,
            response_len=config.response_len,
        )  # fmt: skip
    return _dataset(run, text, config.data, num_passes=config.total_epochs)


def open_evaluation(run: Run, text: TextCodec) -> Dataset | None:
    """The evaluation's data in its own order, checked; None where ``eval_every`` is 0.

    Raises:
        ConfigError: it has fewer examples than a batch.
    """
    if not run.config.eval_every:
        return None
    data = _dataset(run, text, run.config.eval_data, shuffle=False)
    if data.num_prompts < run.config.batch_size:
        raise ConfigError(
            f"has {data.num_prompts} examples, fewer than batch_size={run.config.batch_size}",
            where=run.config.eval_data.path, remedy="evaluation takes whole batches: add examples",
        )  # fmt: skip
    return data


def _dataset(run: Run, text: TextCodec, data: DataConfig, **order: Any) -> Dataset:
    config = run.config
    if data.path and text.tokenizer is None:
        raise ConfigError(
            "random weights have no tokenizer to read it with", where=f"data {data.path}",
            remedy="give the path of a model, or no data",
        )  # fmt: skip
    return Dataset(
        Path(data.path),
        kind=run.algorithm.data,
        seed=config.seed,
        chat_template=data.chat_template,
        tokenizer=text.tokenizer,
        max_prompt_tokens=config.prompt_len,
        max_answer_tokens=config.response_len,
        stop_token_ids=text.stop_token_ids,
        **order,
    )


# ---- before a run -----------------------------------------------------------------------------


def check_inputs(run: Run) -> Run:
    """The run with ``total_steps`` as ``total_epochs`` says.

    Raises:
        ConfigError: data that cannot be used (names file and line), an unknown reward, a package
            that is missing, sequences longer than a model can take.
        CheckpointError: no tokenizer, two roles read tokens in different ways, or a role cannot
            read tokens that it meets.
    """
    if run.config.wandb_project:
        import_wandb()
    functions_of(run)  # finds reward functions
    check_tokenizers(run)
    text = TextCodec(model_folder(run))
    data = open_data(run, text)
    evaluation = open_evaluation(run, text)
    items = [i for one in (data, evaluation) if isinstance(one, Dataset) for i in one.items]
    check_vocabularies(run, text, items)
    check_lengths(run, items)
    if not run.config.total_epochs:
        return run
    if data.num_prompts is None:
        raise ConfigError("random data has no end", where="total_epochs", remedy="give total_steps")
    steps = ceil(run.config.total_epochs * data.num_prompts / run.config.batch_size)
    return replace(run, config=replace(run.config, total_steps=steps))


def check_tokenizers(run: Run) -> None:
    """Raise ``CheckpointError`` unless all roles that read the same tokens mean the same by them.

    A role whose folder has no ``tokenizer.json`` is taken to have been trained with the others'.
    """
    vocabularies: dict[str, tuple[Path, dict[str, Any]]] = {}
    for role in run.plan.problem.graph.roles:
        path = run.model_path(role)
        file = Path(path) / "tokenizer.json" if path else None
        if file is not None and file.is_file():
            vocabularies[role] = file, _vocabulary(file)
    roles = list(vocabularies)
    for role in roles[1:]:
        (first, wanted), (file, found) = vocabularies[roles[0]], vocabularies[role]
        if found == wanted:
            continue
        unlike = next(
            token for token in {**wanted, **found} if wanted.get(token) != found.get(token)
        )
        raise CheckpointError(
            f"its tokenizer is not {roles[0]}'s: {unlike!r} is token {found.get(unlike)} of "
            f"{file}, {wanted.get(unlike)} of {first}",
            where=f"{role}.path", remedy=f"use a {role} model of {roles[0]}'s family",
        )  # fmt: skip


def check_vocabularies(run: Run, text: TextCodec, items: Sequence[Item]) -> None:
    """Raise ``CheckpointError`` unless every role's embedding has all tokens that it will meet.

    Those of the data; a role that generates stops at its end tokens; others read what it makes,
    which is any token of the tokenizer that its own vocabulary has.
    """
    models = run.plan.problem.models
    used = [max((_largest(item), item.where) for item in items)] if items else []
    known = max(text.tokenizer.get_vocab().values()) + 1 if text.tokenizer else math.inf
    writers = _generating(run)
    made = [(min(models[r].vocab, known) - 1, f"which {r} may generate") for r in writers]
    stops = [(stop, "an end token") for stop in text.stop_token_ids]
    for role in run.plan.problem.graph.roles:
        vocab = models[role].vocab
        token, source = max([*used, *(stops if role in writers else made)], default=(0, ""))
        if token >= vocab:
            raise CheckpointError(
                f"its vocabulary has {vocab} tokens, which token {token} ({source}) is not among",
                where=f"{role}.path", remedy=f"give {role} a model with the tokenizer's vocabulary",
            )  # fmt: skip


def _largest(item: Item) -> int:
    return max(int(ids.max()) for ids in (item.prompt, *item.answers))


def _generating(run: Run) -> list[str]:
    """Roles that generate."""
    calls = run.plan.problem.graph.calls
    return list(dict.fromkeys(c.role for c in calls if c.kind is CallKind.GENERATE and c.role))


def check_lengths(run: Run, items: Sequence[Item]) -> None:
    """Raise ``ConfigError`` where a sequence has more positions than a model that learned them,
    or a prompt leaves no room for an answer. Warn of answers that are cut and of rotary positions
    beyond those of training: both can be computed."""
    config, models = run.config, run.plan.problem.models
    writers = _generating(run)
    prompt, where = config.prompt_len, "prompt_len"
    longest = prompt + config.response_len, "prompt_len + response_len"
    if items:
        prompt, where = max((len(item.prompt), item.where) for item in items)
        longest = max(
            (len(item.prompt) + max(map(len, item.answers), default=0), item.where)
            for item in items
        )
    for role in writers:
        most = models[role].max_positions
        if prompt >= most:
            raise ConfigError(
                f"a prompt of {prompt} tokens leaves no room for an answer in the {most} "
                f"positions of {role}",
                where=where, remedy="shorten it or use a model of more positions",
            )  # fmt: skip
        wanted = prompt + config.response_len
        if wanted > most:
            log.warning(
                "answers are cut at the %d positions of %s: prompts of up to %d tokens and "
                "response_len=%d make %d", most, role, prompt, config.response_len, wanted,
            )  # fmt: skip
        longest = min(wanted, most), "prompt_len + response_len"
    beyond = [
        role
        for role in run.plan.problem.graph.roles
        if role not in writers and longest[0] > models[role].max_positions
    ]
    for role in beyond:
        if models[role].positions == "learned":
            raise ConfigError(
                f"a sequence of {longest[0]} tokens, but {role} has "
                f"{models[role].max_positions} positions",
                where=longest[1], remedy="shorten it or use a model of more positions",
            )  # fmt: skip
    if beyond:
        log.warning(
            "sequences of up to %d tokens are longer than those that %s was made for (%d)",
            longest[0], ", ".join(beyond), min(models[role].max_positions for role in beyond),
        )  # fmt: skip


def _vocabulary(file: Path) -> dict[str, Any]:
    """Token -> id, added tokens among them."""
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
        words = parsed.get("model", {}).get("vocab", {})
        if isinstance(words, list):  # unigram: [token, score] by id
            words = {token: i for i, (token, _) in enumerate(words)}
        added = {entry["content"]: entry["id"] for entry in parsed.get("added_tokens", [])}
        return {**words, **added}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"is damaged ({error})", where=str(file), remedy="copy it anew from the model's source"
        ) from None

"""Lines of data files as people have them, checked: prompts, prompts with answers, pairs.

JSONL in UTF-8, one object a line, or a folder that ``datasets`` has saved; other fields are kept
for reward functions. Texts may be lists of chat messages (``{"role", "content"}``) wherever it
says messages.

    prompts   {"prompt": text or messages}
    answers   {"prompt": text or messages, "answer": text}, or {"messages": [..., assistant]}
    pairs     {"prompt", "pos_answers": [text], "neg_answers": [text]} of equal lengths, or
              {"prompt", "chosen": text, "rejected": text}, or {"chosen", "rejected"} as messages

Errors name file and line and say what would be right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from executor.optional import optional_package
from profiles.errors import ConfigError

Record = Mapping[str, Any]
DataKind = Literal["prompts", "answers", "pairs"]
Prompt = str | tuple[Mapping[str, str], ...]  # a text, or messages

_SHAPES: Mapping[DataKind, str] = {
    "prompts": '{"prompt": "…"}',
    "answers": '{"prompt": "…", "answer": "…"} or {"messages": […]}',
    "pairs": '{"prompt": "…", "chosen": "…", "rejected": "…"} or with pos_answers, neg_answers',
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt with the answers of its group (none, one, or chosen and rejected)."""

    where: str  # file:line, or folder:row
    record: Record
    prompt: Prompt
    answers: tuple[str, ...] = ()


def read_examples(path: Path, kind: DataKind) -> list[Example]:
    """All examples of a file, in order. A record without an ``id`` gets its line number as one.

    Raises:
        ConfigError: no path or file, not UTF-8, empty, or a line that is not as the module says;
            names file and line.
    """
    found: list[Example] = []
    for where, fields in (
        _rows(path) if path.is_dir() and str(path) != "." else _objects(path, kind)
    ):
        record = {"id": int(where.rpartition(":")[2]), **fields}
        for prompt, answers in _READERS[kind](record, where):
            text = prompt if isinstance(prompt, str) else joined(prompt)
            own = {**record, "prompt": text}  # reward functions take a text
            found.append(Example(where=where, record=own, prompt=prompt, answers=answers))
    if not found:
        raise ConfigError(
            "no examples in it", where=str(path), remedy=f"write {_SHAPES[kind]} lines"
        )
    return found


def _objects(path: Path, kind: DataKind) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line of a JSONL file, lines counted from 1."""
    for number, line in _lines(path):
        yield f"{path}:{number}", _object(line, f"{path}:{number}", kind)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(folder:row, fields) of a data set saved by ``save_to_disk``, rows counted from 0."""
    where = str(path)
    datasets = optional_package(
        "datasets", where=f"{where} is a folder",
        remedy="pip install 'realplan[data]', or give a JSONL file",
    )  # fmt: skip
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ConfigError(
            f"has several splits ({', '.join(splits)})", where=where,
            remedy=f"give one: {path / splits[0]}",
        )  # fmt: skip
    try:
        rows = datasets.load_from_disk(where)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            f"is no data set ({str(error).splitlines()[0]})", where=where,
            remedy="give what datasets' save_to_disk wrote, or a JSONL file",
        ) from None  # fmt: skip
    for number, row in enumerate(rows):
        # Arrow fills fields that a row lacks with None.
        yield f"{path}:{number}", {k: v for k, v in row.items() if v is not None}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if str(path) in ("", "."):
        raise ConfigError("no data", where="data.path", remedy="give data.path=prompts.jsonl")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # without a byte order mark, if there is one
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", where=str(path), remedy="give data.path=FILE"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError("not UTF-8", where=f"{path}:{line}", remedy="save as UTF-8") from None
    return ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())


def _object(line: str, where: str, kind: DataKind) -> dict[str, Any]:
    remedy = f"write {_SHAPES[kind]}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON ({error.msg})", where=where, remedy=remedy) from None
    except RecursionError:
        raise ConfigError("brackets nested too deeply", where=where, remedy=remedy) from None
    except ValueError:  # Python refuses to convert an integer of thousands of digits
        raise ConfigError(
            "an integer of too many digits", where=where, remedy="write it as a text"
        ) from None
    if not isinstance(record, dict):
        raise ConfigError("not a JSON object", where=where, remedy=remedy)
    return record


def joined(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as a text without a chat template."""
    return "\n".join(message["content"] for message in messages)


# ---- fields -----------------------------------------------------------------------------------


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(
            f"{name} is {value!r}", where=where, remedy=f"every line needs a text under {name}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            f"the {name} has half of a surrogate pair", where=where,
            remedy="repair its \\u escapes",
        ) from None  # fmt: skip
    return value


def _messages(value: Any, name: str, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"{name} is {value!r}", where=where, remedy="give a list of messages")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"{name}[{i}] is {message!r}", where=where,
                remedy='a message is {"role": "user", "content": "…"}',
            )  # fmt: skip
        content = _text(message.get("content"), f"{name}[{i}].content", where)
        found.append({"role": message["role"], "content": content})
    return tuple(found)


def _prompt(record: Record, where: str) -> Prompt:
    value = record.get("prompt")
    return (
        _messages(value, "prompt", where)
        if isinstance(value, list)
        else _text(value, "prompt", where)
    )


def _dialogue(value: Any, name: str, where: str) -> tuple[Prompt, str]:
    """Messages that end with the assistant's, as the ones before it and its text."""
    messages = _messages(value, name, where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ConfigError(
            f"{name} does not end with an assistant's message after others", where=where,
            remedy="its last message is the answer",
        )  # fmt: skip
    return messages[:-1], messages[-1]["content"]


_Parsed = Iterator[tuple[Prompt, tuple[str, ...]]]


def _read_prompt(record: Record, where: str) -> _Parsed:
    yield _prompt(record, where), ()


def _read_answer(record: Record, where: str) -> _Parsed:
    if "messages" in record:
        prompt, answer = _dialogue(record["messages"], "messages", where)
    else:
        prompt, answer = _prompt(record, where), _text(record.get("answer"), "answer", where)
    yield prompt, (answer,)


def _read_pairs(record: Record, where: str) -> _Parsed:
    if "pos_answers" in record or "neg_answers" in record:
        prompt = _prompt(record, where)
        good, bad = record.get("pos_answers"), record.get("neg_answers")
        if not isinstance(good, list) or not isinstance(bad, list) or len(good) != len(bad):
            raise ConfigError(
                "pos_answers and neg_answers are not two lists of one length", where=where,
                remedy="give one rejected answer for each chosen one",
            )  # fmt: skip
        for i, (chosen, rejected) in enumerate(zip(good, bad, strict=True)):
            yield (
                prompt,
                (
                    _text(chosen, f"pos_answers[{i}]", where),
                    _text(rejected, f"neg_answers[{i}]", where),
                ),
            )
        return
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not isinstance(chosen, list) and not isinstance(rejected, list):
        yield _prompt(record, where), (
            _text(chosen, "chosen", where), _text(rejected, "rejected", where)
        )  # fmt: skip
        return
    (prompt, good_answer), (other, bad_answer) = (
        _dialogue(value, name, where)
        for name, value in (("chosen", chosen), ("rejected", rejected))
    )
    if prompt != other:
        raise ConfigError(
            "chosen and rejected differ before their last message", where=where,
            remedy="a pair has one prompt",
        )  # fmt: skip
    yield prompt, (good_answer, bad_answer)


_READERS: Mapping[DataKind, Callable[[Record, str], _Parsed]] = {
    "prompts": _read_prompt,
    "answers": _read_answer,
    "pairs": _read_pairs,
}

"""Protects the order of the data (a plan must not change it) and the words about bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from executor.dataset import Dataset, MockData, answer_ids, prompt_ids
from executor.records import DataKind
from profiles.errors import ConfigError


class Letters:
    """A tokenizer of one token a character but ~, of which it makes none."""

    chat_template = None

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text if c != "~"]}


def dataset(
    path: Path, *, longest: int = 20, seed: int = 1, kind: DataKind = "prompts", num_passes: int = 0
) -> Dataset:
    return Dataset(
        path, kind=kind, seed=seed, chat_template=True, tokenizer=Letters(),
        max_prompt_tokens=longest, max_answer_tokens=longest, stop_token_ids=(7,),
        num_passes=num_passes,
    )  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "extra": i}) + "\n" for i in range(7)))
    return path


def test_every_pass_sees_every_prompt_once_in_an_order_of_its_own(file: Path) -> None:
    data = dataset(file)
    seen = [item.record["prompt"] for step in range(7) for item in data.batch(step, 3)]
    passes = [seen[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(one) == [f"p{i}" for i in range(7)] for one in passes)
    assert passes[0] != passes[1]


def test_what_comes_after_the_last_pass_only_fills_the_batch(file: Path) -> None:
    data = dataset(file, num_passes=2)
    items = [item for step in range(3) for item in data.batch(step, 5)]
    assert [item.fills_batch for item in items] == [False] * 14 + [True]
    endless = dataset(file)
    assert not any(item.fills_batch for step in range(3) for item in endless.batch(step, 5))


def test_a_batch_follows_from_seed_and_step_alone(file: Path) -> None:
    first, again = dataset(file).batch(4, 5), dataset(file).batch(4, 5)
    assert [a.record for a in first] == [b.record for b in again]
    assert all(torch.equal(a.prompt, b.prompt) for a, b in zip(first, again))
    assert [a.record for a in dataset(file, seed=2).batch(4, 5)] != [a.record for a in first]
    assert "".join(chr(i) for i in first[0].prompt) == first[0].record["prompt"]
    assert "extra" in first[0].record


def test_records_have_an_id_of_their_own_or_their_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "id": "q"}\n\n{"prompt": "b"}\n')
    items = dataset(path).batch(0, 2)
    assert {item.record["prompt"]: item.record["id"] for item in items} == {"a": "q", "b": 3}


def test_mock_prompts_are_the_same_everywhere_and_of_the_lengths_asked() -> None:
    data = MockData(vocab=50, prompt_len=8, seed=3, kind="pairs", response_len=4)
    prompts, again = ([item.prompt for item in data.batch(2, 40)] for _ in range(2))
    answers = [answer for item in data.batch(2, 40) for answer in item.answers]
    assert len(answers) == 80
    assert {len(answer) for answer in answers} == {2, 3, 4}
    assert all(torch.equal(a, b) for a, b in zip(prompts, again))
    assert {len(p) for p in prompts} == set(range(4, 9))
    assert max(int(p.max()) for p in prompts) < 50


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"prompt": "a"}\n{"prompt": ', r"jsonl:2: not JSON"),
        (b'{"prompt": "a"}\n\n["a"]', r"jsonl:3: not a JSON object"),
        (b'{"question": "a"}', r"jsonl:1: prompt is None"),
        (b'{"prompt": "  "}', r"jsonl:1: prompt is '  '"),
        (b'{"prompt": 5}', r"jsonl:1: prompt is 5"),
        (b"\n" + b'{"a":' * 100_000, r"jsonl:2: brackets nested too deeply; write"),
        (b'{"prompt": "a", "n": ' + b"9" * 6000 + b"}", r"jsonl:1: an integer of too many digits"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', r"jsonl:2: not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "a"}\n\xff', r"jsonl:2: not UTF-8"),
        (b'{"prompt": "a\\ud800"}', r"jsonl:1: .* half of a surrogate pair"),
        (b'{"prompt": "a"}\n{"prompt": "~"}', r"jsonl:2: the tokenizer makes no tokens"),
        (b"\n", r"jsonl: no examples in it"),
        (b'{"prompt": "a"}\n{"prompt": "123456789012345678901"}', r"jsonl:2: .* 21 tokens"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        dataset(path)


def test_a_missing_file_and_no_file_are_two_things() -> None:
    with pytest.raises(ConfigError, match=r"absent\.jsonl: cannot be read"):
        dataset(Path("absent.jsonl"))
    with pytest.raises(ConfigError, match=r"give data\.path=prompts\.jsonl"):
        dataset(Path(""))


def chat(*texts: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("kind", "line", "texts"),
    [
        ("answers", {"prompt": "ab", "answer": "c"}, [("ab", "c\a")]),
        ("answers", {"messages": chat("ab", "c")}, [("ab\n", "c\a")]),
        (
            "pairs",
            {"prompt": "ab", "pos_answers": ["x", "y"], "neg_answers": ["!", "?"]},
            [("ab", "x\a", "!\a"), ("ab", "y\a", "?\a")],
        ),
        ("pairs", {"prompt": "ab", "chosen": "x", "rejected": "!"}, [("ab", "x\a", "!\a")]),
        (
            "pairs",
            {"chosen": chat("ab", "x"), "rejected": chat("ab", "!")},
            [("ab\n", "x\a", "!\a")],
        ),
    ],
)
def test_answers_and_pairs_are_read_in_every_form(
    tmp_path: Path, kind: DataKind, line: dict[str, object], texts: list[tuple[str, ...]]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(line) + "\n")
    items = dataset(path, kind=kind).items
    read = [
        tuple("".join(chr(i) for i in ids) for ids in (item.prompt, *item.answers))
        for item in items
    ]
    assert read == texts


@pytest.mark.parametrize(
    ("kind", "line", "sentence"),
    [
        ("answers", {"prompt": "a"}, "jsonl:1: answer is None"),
        ("answers", {"prompt": "a", "answer": "b" * 20}, "jsonl:1: .* 21 tokens.*response_len=21"),
        ("answers", {"messages": chat("ab")}, "jsonl:1: messages does not end with"),
        ("answers", {"messages": [{"content": "ab"}]}, r"jsonl:1: messages\[0\] is"),
        ("pairs", {"prompt": "a", "pos_answers": ["a"], "neg_answers": []}, "jsonl:1: pos_answers"),
        ("pairs", {"prompt": "a", "pos_answers": ["a"], "neg_answers": [""]}, r"neg_answers\[0\]"),
        ("pairs", {"prompt": "a", "chosen": "x"}, "jsonl:1: rejected is None"),
        ("pairs", {"chosen": chat("a", "x"), "rejected": chat("b", "x")}, "differ before their"),
    ],
)
def test_a_bad_answer_or_pair_is_named(
    tmp_path: Path, kind: DataKind, line: dict[str, object], sentence: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=sentence):
        dataset(path, kind=kind)


class Chat(Letters):
    """Letters with a template: <u> before the user's text, <a> before the assistant's, a bell."""

    chat_template = "yes"  # type: ignore[assignment]

    def apply_chat_template(
        self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        marks = {"user": "<u>", "assistant": "<a>"}
        text = "".join(marks[t["role"]] + t["content"] + "\a\n" for t in turns)
        return text + ("<a>" if add_generation_prompt else "")


def test_an_answer_is_what_the_template_adds_to_its_prompt_with_one_end_token() -> None:
    tokenizer = Chat()
    prompt = prompt_ids(tokenizer, "hi", chat_template=True)
    answer = answer_ids(tokenizer, "hi", "yo", chat_template=True, stops=(7,))
    assert "".join(map(chr, prompt)) == "<u>hi\a\n<a>"
    assert "".join(map(chr, answer)) == "yo\a"
    plain = answer_ids(tokenizer, "hi", "yo", chat_template=False, stops=(7,))
    assert plain == answer

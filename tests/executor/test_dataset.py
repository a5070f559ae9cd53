"""Protects the order of the data (a plan must not change it) and the words about bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from executor.dataset import MockPrompts, PromptDataset
from profiles.errors import ConfigError


class Letters:
    """A tokenizer of one token a character but ~, of which it makes none."""

    chat_template = None

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text if c != "~"]}


def dataset(path: Path, *, longest: int = 20, seed: int = 1) -> PromptDataset:
    return PromptDataset(
        path, seed=seed, chat_template=True, tokenizer=Letters(), max_prompt_tokens=longest
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "extra": i}) + "\n" for i in range(7)))
    return path


def test_every_pass_sees_every_prompt_once_in_an_order_of_its_own(file: Path) -> None:
    data = dataset(file)
    seen = [record["prompt"] for step in range(7) for record in data.batch(step, 3)[1]]
    passes = [seen[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(one) == [f"p{i}" for i in range(7)] for one in passes)
    assert passes[0] != passes[1]


def test_a_batch_follows_from_seed_and_step_alone(file: Path) -> None:
    first, again = dataset(file).batch(4, 5), dataset(file).batch(4, 5)
    assert first[1] == again[1]
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0]))
    assert dataset(file, seed=2).batch(4, 5)[1] != first[1]
    assert "".join(chr(i) for i in first[0][0]) == first[1][0]["prompt"]
    assert "extra" in first[1][0]


def test_records_have_an_id_of_their_own_or_their_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "id": "q"}\n\n{"prompt": "b"}\n')
    _, records = dataset(path).batch(0, 2)
    assert {record["prompt"]: record["id"] for record in records} == {"a": "q", "b": 3}


def test_mock_prompts_are_the_same_everywhere_and_of_the_lengths_asked() -> None:
    prompts, _ = MockPrompts(vocab=50, prompt_len=8, seed=3).batch(2, 40)
    again, _ = MockPrompts(vocab=50, prompt_len=8, seed=3).batch(2, 40)
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
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', r"jsonl:2: not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "a"}\n\xff', r"jsonl:2: not UTF-8"),
        (b'{"prompt": "a\\ud800"}', r"jsonl:1: .* half of a surrogate pair"),
        (b'{"prompt": "a"}\n{"prompt": "~"}', r"jsonl:2: the tokenizer makes no tokens"),
        (b"\n", r"jsonl: no prompts in it"),
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

"""Protects the cost and memory models against published runs: ``scripts/validate_published.py``."""

from __future__ import annotations

import re

import pytest

from scripts import validate_published
from scripts.validate_published import iteration_parts, main, published


def test_estimates_are_within_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^GPT .* s +[+-][\d.]+%", out, re.M)) == 8
    assert len(re.findall(r"^GPT .* of +[\d.]+ +[+-][\d.]+%$", out, re.M)) == 8


@pytest.mark.parametrize("limit", ["MEAN_LIMIT", "ROW_LIMIT", "MEMORY_LIMIT"])
def test_a_miss_exits_with_1(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_published, limit, 0.001)
    assert main([]) == 1


def test_interleaving_is_what_shrinks_the_bubble() -> None:
    row = next(row for row in published("training") if row["interleave"] == "3")
    interleaved, plain = iteration_parts(row), iteration_parts({**row, "interleave": "1"})
    assert interleaved["pipeline_bubble"] == pytest.approx(plain["pipeline_bubble"] / 3)
    assert interleaved["pipeline_p2p"] > 2 * plain["pipeline_p2p"]
    assert interleaved["compute"] == plain["compute"]

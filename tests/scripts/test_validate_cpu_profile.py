"""Protects validate_cpu_profile: errors are relative to what was measured, a miss exits with 1, and
no case is a point of a profile's grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from executor.profile_worker import LIMITS, WorkerJob, tasks_of
from profiles.catalogue import MODELS
from profiles.table import CostTable
from scripts import validate_cpu_profile as script
from tests.profiles.test_table import make_table

SPEC = MODELS["smollm2-135m"]


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.08, 0), (1.2, 1), (0.8, 1)])
def test_a_miss_exits_with_1(
    factor: float,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measured times are scripted: ``factor`` times the predicted ones."""
    path = tmp_path / "profile.json"
    make_table().save(path)
    table = CostTable.load(path)

    def measure(spec: object, workers: int) -> Iterator[tuple[float, float]]:
        for case in script.CASES:
            yield factor * script.predict(table, SPEC, case, workers).seconds, 0.0

    monkeypatch.setattr(script, "measure", measure)
    assert script.main([str(path)]) == code
    text = capsys.readouterr().out
    assert text.count("\n") == len(script.CASES) + 1 + 4, "a row for each case, and the errors"
    assert f"all: median error {abs(1 / factor - 1):.1%} (limit 10%)" in text


def test_no_profile_is_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_no_case_is_a_point_of_the_grid() -> None:
    job = WorkerJob(
        spec=SPEC, tps=(1,), kind="cpu", workers=2, num_threads=1, limits=LIMITS["cpu"],
        done=frozenset(),
    )  # fmt: skip
    grids = {task.name: task.grid for task in tasks_of(job)}
    train, decode = grids["block train tp 1"], grids["block decode tp 1"]
    for case in script.CASES:
        assert case.length not in train.lengths
        assert case.sequences * case.length not in train.sizes
        if case.kind == "generate":
            assert case.sequences not in decode.sizes

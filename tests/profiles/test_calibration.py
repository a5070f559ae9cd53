"""Protects a profile's corrections: kept through a file, and refused where they are impossible."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.calibration import Calibration, Correction
from profiles.errors import ProfileError
from profiles.hardware import DeviceSpec
from profiles.table import CostRow, CostTable


def calibration() -> Calibration:
    return Calibration(
        corrections=(
            Correction(phase="train", factor=1.2, low=1.1, high=1.3, spread=0.1, observations=4),
            Correction(
                phase="infer", factor=0.9, low=None, high=None, spread=None, observations=1
            ),
        ),
        source="two runs",
        date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def table() -> CostTable:
    device = DeviceSpec(
        name="d", kind="cpu", peak_flops=1e9, memory_bytes=1 << 34, memory_bytes_per_s=1e9,
        launch_s=1e-6,
    )  # fmt: skip
    row = CostRow(component="optimizer", operation="step", size=100, seconds=1e-3)
    return CostTable(device=device, rows=(row,), dtype="fp32", date="2026-01-01", source="s")


def test_a_profile_keeps_its_corrections(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    replace(table(), calibration=calibration()).save(path)
    found = CostTable.load(path)
    assert found.calibration == calibration()
    assert found.calibration.factors == {"train": 1.2, "infer": 0.9}
    assert found.uncorrected == table()


@pytest.mark.parametrize(
    ("index", "column", "value", "problem"),
    [
        (0, "phase", "tea", "'tea' is unknown"),
        (0, "phase", "infer", "second correction"),
        (0, "factor", -1.2, "factor -1.2"),
        (0, "factor", 0.0, "factor 0.0"),
        (0, "factor", 1e3, "factor 1000.0"),
        (0, "factor", "1.2", "factor '1.2'"),
        (0, "factor", True, "factor True"),
        (0, "low", 1.25, "no interval"),
        (0, "high", 1.15, "no interval"),
        (0, "low", None, "low None"),
        (0, "spread", -0.1, "no interval"),
        (0, "spread", float("nan"), "spread nan"),
        (0, "observations", 0, "observations 0"),
        (0, "observations", 2.5, "observations 2.5"),
        (1, "low", 0.8, "no interval"),
    ],
)
def test_an_impossible_correction_is_named(
    index: int, column: str, value: object, problem: str, tmp_path: Path
) -> None:
    data: dict[str, Any] = copy.deepcopy(table().to_dict())
    data["header"]["calibration"] = json.loads(json.dumps(calibration().to_dict()))
    data["header"]["calibration"]["corrections"][index][column] = value
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=problem) as caught:
        CostTable.load(path)
    assert "header.calibration" in caught.value.where


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"corrections": 3, "source": "s", "date": "d"},
        {"corrections": [3], "source": "s", "date": "d"},
        {"corrections": [{"phase": "train"}], "source": "s", "date": "d"},
        {"corrections": [], "date": "d"},
    ],
)
def test_what_is_no_calibration_is_refused(broken: object) -> None:
    with pytest.raises(ProfileError, match="calibration"):
        Calibration.from_dict(broken)

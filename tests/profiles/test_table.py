"""Protects profile files: exact round trip, atomic writing, and refusal of every damage by name;
and ``TableCosts``: where an answer comes from, and that it says so.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.catalogue import MODELS
from profiles.costs import Provenance
from profiles.devices import DEVICES
from profiles.errors import ProfileError
from profiles.roofline import RooflineCosts
from profiles.shapes import shape_key, spec_of_shape
from profiles.table import LARGEST_SECONDS, CostRow, CostTable
from profiles.table_costs import TableCosts

SPEC = MODELS["smollm2-135m"]
SHAPE = shape_key(SPEC)


def block(size: int, length: int, seconds: float, *, operation: str = "forward", tp: int = 1):  # type: ignore[no-untyped-def]
    return CostRow(
        component="block", operation=operation, shape=SHAPE, tp=tp, size=size, length=length,
        seconds=seconds,
    )  # fmt: skip


ROWS = (
    block(256, 256, 1e-3),
    block(1024, 256, 3e-3),
    block(1024, 1024, 4e-3),
    block(4, 512, 5e-4, operation="decode"),
    CostRow(component="optimizer", operation="step", size=10**6, seconds=2e-3),
    CostRow(component="collective", operation="all_reduce", workers=2, size=4096, seconds=1e-4),
)


# A machine on which ``ROWS`` are possible.
SERVER = replace(DEVICES["cpu"], peak_flops=2e12, memory_bytes_per_s=100e9)


def make_table(rows: tuple[CostRow, ...] = ROWS) -> CostTable:
    return CostTable(
        device=SERVER, rows=rows, dtype="fp32", date="2026-01-01", source="test",
        versions={"torch": "2.13"},
    )  # fmt: skip


def test_a_saved_table_is_loaded_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    make_table().save(path)
    assert CostTable.load(path) == make_table()
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    make_table().save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_table(ROWS[:1]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_shape_key_gives_the_layer_back() -> None:
    for spec in MODELS.values():
        for head in ("lm", "scalar"):
            again = spec_of_shape(shape_key(spec.with_head(head)))  # type: ignore[arg-type]
            assert again.block_parameters == spec.block_parameters
            assert (again.vocab, again.head) == (spec.vocab, head)


def _damage(column: str, value: Any) -> Any:
    def apply(data: dict[str, Any]) -> None:
        data["rows"][1][data["columns"].index(column)] = value

    return apply


def _drop_column(data: dict[str, Any]) -> None:
    index = data["columns"].index("seconds")
    for row in (data["columns"], *data["rows"]):
        del row[index]


def _add_column(data: dict[str, Any]) -> None:
    data["columns"].append("latency")


def _set(*path: Any, value: Any) -> Any:
    def apply(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return apply


DAMAGES = {
    r"rows\[1\]\.seconds: nan is not finite": _damage("seconds", float("nan")),
    r"rows\[1\]\.seconds: inf is not finite": _damage("seconds", float("inf")),
    r"rows\[1\]\.seconds: -0\.1 is not above zero": _damage("seconds", -0.1),
    r"rows\[1\]\.seconds: 0 is not above zero": _damage("seconds", 0),
    r"rows\[1\]\.seconds: '3 ms' is not a number": _damage("seconds", "3 ms"),
    r"rows\[1\]\.seconds: 30000\.0 is hours.*another unit": _damage("seconds", 3e4),
    r"rows\[1\]\.seconds: 100\.0 s, where this device's rates suggest .* another unit": _damage(
        "seconds", 100.0  # ms written as seconds
    ),
    r"rows\[1\]\.seconds: 1e-06 s, where .* another unit": _damage("seconds", 1e-6),
    r"header\.unit: 'ms'; this program reads seconds": _set("header", "unit", value="ms"),
    r"header\.dtype: 'fp8'; known: bf16, fp32": _set("header", "dtype", value="fp8"),
    r"header\.extra: no such field": _set("header", "extra", value=1),
    r"rows\[1\]\.spread: nan": _damage("spread", float("nan")),
    r"rows\[1\]\.spread: -0\.5 is below zero": _damage("spread", -0.5),
    r"rows\[1\]\.samples: nan is not a whole number": _damage("samples", float("nan")),
    r"rows\[1\]\.length: -1 is not a whole number of at least 0": _damage("length", -1),
    r"rows\[1\]\.size: 1000000000000000000000 is more than": _damage("size", 10**21),
    r"rows\[1\]\.tp: 2 does not divide the 9 heads": _damage("tp", 2),
    r"rows\[1\]\.component: 'blok' is unknown; known: block": _damage("component", "blok"),
    r"rows\[1\]\.component: \[\] is not text": _damage("component", []),
    r"rows\[1\]\.shape: None is not text": _damage("shape", None),
    r"rows\[1\]\.operation: 'step' is not one of block's": _damage("operation", "step"),
    r"rows\[1\]\.size: 0 is not a whole number of at least 1": _damage("size", 0),
    r"rows\[1\]\.size: 1\.5 is not": _damage("size", 1.5),
    r"rows\[1\]\.tp: True is not": _damage("tp", True),
    r"rows\[1\]\.workers: 2 for a block": _damage("workers", 2),
    r"rows\[1\]\.shape: 'h8' is not a shape": _damage("shape", "h8"),
    r"rows\[1\]: not a list of 10 values": _set("rows", 1, value=[1, 2]),
    r"column 'seconds' is missing": _drop_column,
    r"unknown column 'latency'": _add_column ,
    r"header: schema 'other' version 1.*reads 'realplan-profile' version 1": _set(
        "header", "schema", value="other"
    ),
    r"header: schema 'realplan-profile' version 2": _set("header", "version", value=2),
    r"header\.device: .*peak_flops": _set("header", "device", "peak_flops", value=-1.0),
    r"header\.device: missing": _set("header", "device", value=None),
    r"header\.date: missing": _set("header", "date", value=5),
    r"columns, rows: missing": _set("rows", value=None),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_refused_by_file_row_and_column(tmp_path: Path, message: str) -> None:
    path = tmp_path / "profile.json"
    data = make_table().to_dict()
    DAMAGES[message](data)
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=message) as caught:
        CostTable.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("model", ["tiny", "smollm2-135m", "llama-7b"])
@pytest.mark.parametrize("slower", [0.5, 2.0, 20.0])
def test_a_table_in_another_unit_is_refused(tmp_path: Path, model: str, slower: float) -> None:
    """Times from half to twenty times what rates suggest are sound; a thousand times are not."""
    spec, roofline = MODELS[model], RooflineCosts(SERVER)
    points = [(op, size) for op in ("forward", "backward", "decode") for size in (16, 64, 256)]
    rows = [
        CostRow(
            component="block", operation=op, shape=shape_key(spec), size=size, length=256,
            seconds=slower * roofline.layer(spec, "block", op, tp=1, size=size, length=256).seconds,
        )
        for op, size in points
    ]  # fmt: skip
    path = tmp_path / "profile.json"
    make_table(tuple(rows)).save(path)
    assert len(CostTable.load(path).rows) == len(rows)
    for factor in (1e3, 1e6, 1e-3):
        other = tuple(replace(row, seconds=row.seconds * factor) for row in rows)
        if max(row.seconds for row in other) > LARGEST_SECONDS:
            continue
        make_table(other).save(path)
        with pytest.raises(ProfileError, match=r"rows\[\d\]\.seconds: .* in another unit than"):
            CostTable.load(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    make_table().save(path)
    text = path.read_text().rstrip()
    for end in range(0, len(text), 97):
        path.write_text(text[:end])
        with pytest.raises(ProfileError, match=r"profile\.json.*cut off"):
            CostTable.load(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2]", b"null", b'"text"', b"{}"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=re.escape(str(path))):
        CostTable.load(path)
    with pytest.raises(ProfileError, match="no such file; make one with realexec profile"):
        CostTable.load(tmp_path / "none.json")


def test_a_point_may_not_have_two_values() -> None:
    again = replace(ROWS[0], seconds=2e-3)
    with pytest.raises(ProfileError, match=r"rows\[1\]\.seconds: 0\.002, but rows\[0\] has 0\.001"):
        make_table((ROWS[0], again))
    assert len(make_table((ROWS[0], ROWS[0])).rows) == 2


# ---- answers ----------------------------------------------------------------------------------


def costs(rows: tuple[CostRow, ...] = ROWS) -> TableCosts:
    return TableCosts(make_table(rows), RooflineCosts(DEVICES["cpu"]))


def test_a_measured_point_is_given_back() -> None:
    cost = costs().layer(SPEC, "block", "forward", tp=1, size=1024, length=256)
    assert (cost.seconds, cost.provenance) == (3e-3, Provenance.MEASURED)


def test_models_of_one_width_share_rows() -> None:
    critic = replace(SPEC, num_layers=5, name="critic").with_head("scalar")
    cost = costs().layer(critic, "block", "forward", tp=1, size=1024, length=256)
    assert cost.provenance is Provenance.MEASURED


def test_extrapolation_is_said_once_with_the_range(caplog: pytest.LogCaptureFixture) -> None:
    table = costs()
    with caplog.at_level(logging.WARNING):
        for size in (10**5, 10**6):
            cost = table.layer(SPEC, "block", "forward", tp=1, size=size, length=256)
            assert cost.provenance is Provenance.EXTRAPOLATED
    assert len(caplog.records) == 1
    assert "sizes 256 to 1024" in caplog.text


def test_a_missing_tp_has_the_form_of_the_fallback_at_the_measured_level() -> None:
    table, roofline = costs(), RooflineCosts(DEVICES["cpu"])
    question = {"size": 1024, "length": 256}
    found = table.layer(SPEC, "block", "forward", tp=3, **question)
    level = 3e-3 / roofline.layer(SPEC, "block", "forward", tp=1, **question).seconds
    expected = level * roofline.layer(SPEC, "block", "forward", tp=3, **question).seconds
    assert found.seconds == pytest.approx(expected)
    assert found.provenance is Provenance.ROOFLINE


def test_a_missing_component_is_the_fallbacks() -> None:
    found = costs().layer(SPEC, "head", "forward", tp=1, size=64, length=64)
    roofline = RooflineCosts(DEVICES["cpu"])
    assert found == roofline.layer(SPEC, "head", "forward", tp=1, size=64, length=64)
    assert costs(ROWS[:1]).optimizer_step(1000) == roofline.optimizer_step(1000)


def test_decoding_alone_is_decoding_where_nobody_measured_it() -> None:
    row = replace(ROWS[0], operation="decode", size=4, length=64, seconds=4e-4)
    alone = replace(row, operation="decode_alone", seconds=3e-4)
    question = {"tp": 1, "size": 4, "length": 64}
    both = costs((row, alone))
    assert both.layer(SPEC, "block", "decode", **question).seconds == 4e-4
    assert both.layer(SPEC, "block", "decode_alone", **question).seconds == 3e-4
    assert costs((row,)).layer(SPEC, "block", "decode_alone", **question).seconds == 4e-4
    roofline = RooflineCosts(DEVICES["cpu"])
    assert costs(ROWS[:1]).layer(SPEC, "head", "decode_alone", **question) == roofline.layer(
        SPEC, "head", "decode", **question
    )


def test_a_decode_step_is_a_graph_where_one_was_measured_and_runs() -> None:
    """Also where its tp was not measured: at the graphs' level. Experts' steps are no graphs."""
    row = replace(ROWS[0], operation="decode", size=4, length=64, seconds=4e-4)
    graph = replace(row, operation="decode_graph", seconds=1e-4)
    table, plain = costs((row, graph)), costs((row,))
    experts = replace(SPEC, family="mixtral", num_experts=4, experts_per_token=2)
    for tp in (1, 2):
        question = {"tp": tp, "size": 4, "length": 64}
        eager = plain.layer(SPEC, "block", "decode", **question)
        found = table.layer(SPEC, "block", "decode", **question)
        assert found.seconds == pytest.approx(eager.seconds / 4)
        assert found.provenance is eager.provenance
        assert table.layer(experts, "block", "decode", **question) == plain.layer(
            experts, "block", "decode", **question
        )


def test_the_optimizer_is_interpolated_over_parameters() -> None:
    table = costs()
    assert table.optimizer_step(10**6).provenance is Provenance.MEASURED
    assert table.optimizer_step(4 * 10**6).seconds == pytest.approx(8e-3)

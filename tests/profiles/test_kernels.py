"""Shipped kernel tables: damage is refused with its place, and the second source agrees."""

from __future__ import annotations

import gzip
import logging
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.devices import DEVICES
from profiles.errors import ProfileError
from profiles.kernel_tables import DATA_FOLDER, LATENCY, TABLES, load_table, shipped_table
from profiles.kernels import KernelSurfaces, product_bytes
from profiles.shipped import shipped_costs
from scripts.validate_profiles import (
    MAPE_LIMIT,
    MEDIAN_LIMIT,
    P95_LIMIT,
    against_vidur,
    held_out,
)

HEADER = (
    '#{"schema": "realplan-kernels", "version": 1, "table": "gemm", "device": "a100", '
    '"unit": "us", "dtype": "bf16", "source": "test", "rows": 2}'
)
TEXT = f"{HEADER}\nm,n,k,{LATENCY}\n1,32,64,2.5\n2,32,64,2.75\n"


def load(folder, text):
    path = folder / "gemm.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return load_table(path, device="a100", name="gemm")


def test_a_sound_file_is_read_in_seconds(tmp_path):
    assert load(tmp_path, TEXT).rows == {
        (1, 32, 64): pytest.approx(2.5e-6), (2, 32, 64): pytest.approx(2.75e-6)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("2.75", "-2.75", rf"row 2\.{LATENCY}"),
        ("2.75", "nan", rf"row 2\.{LATENCY}"),
        ("2.75", "2.75e-6", rf"row 2\.{LATENCY}"),  # seconds, not microseconds
        ("2.75", "2.75e9", rf"row 2\.{LATENCY}"),  # femtoseconds
        ("2.75", "2750", rf"row 2\.{LATENCY}: 2750 us.*another unit"),  # nanoseconds
        ("2.75", "inf", rf"row 2\.{LATENCY}"),
        ("2.75", "", rf"row 2\.{LATENCY}"),
        ('"gemm"', '"all_reduce"', r"header\.table"),
        ('"schema": "realplan-kernels"', '"schema": "other"', r"header\.schema"),
        ('"dtype": "bf16", ', "", r"header\.dtype"),
        ('"rows": 2', '"sustained": {"factor": 9, "from": 1}, "rows": 2', r"sustained\.factor: 9"),
        ('"rows": 2', '"sustained": 1.1, "rows": 2', r"header\.sustained: 1\.1 has not"),
        ("1,32,64", "1,32.5,64", r"row 1\.n"),
        ("1,32,64", "0,32,64", r"row 1\.m"),
        ("2,32,64", "1,32,64", "row 2.*same point"),
        ("2,32,64,2.75\n", "", "row 2.*header says 2"),
        ("1,32,64,2.5", "1,32,64", "row 1.*3 values"),
        ('"version": 1', '"version": 2', r"header\.version"),
        ('"us"', '"ms"', r"header\.unit"),
        ('"a100"', '"h100"', r"header\.device"),
        ("m,n,k", "n,m,k", "columns"),
    ],
)
def test_damage_is_refused_with_row_and_column(tmp_path, old, new, match):
    with pytest.raises(ProfileError, match=match):
        load(tmp_path, TEXT.replace(old, new, 1))


# One row of each table that is shipped: a whole number below 1, and time in other units.
ROWS = {
    "gemm": "4096,4096,4096",
    "prefill_attention": "8,2048,32,32,128",
    "decode_attention": "64,2048,32,8,128",
    "all_reduce": "8,16777216",
    "all_gather": "8,16777216",
    "reduce_scatter": "8,16777216",
    "send_recv": "2,16777216",
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda point, us: (point, us), None),
        (lambda point, us: (point, us / 1000), r"row 1\.latency_us.*another unit"),
        (lambda point, us: (point, us * 1e6), r"row 1\.latency_us"),
        (lambda point, us: (point, -us), r"row 1\.latency_us"),
        (lambda point, us: (point, math.nan), r"row 1\.latency_us: 'nan'"),
        (lambda point, us: (f"-{point}", us), r"row 1\.(m|batch|workers): '-\d+' is no positive"),
        (lambda point, us: (f"nan{point.lstrip('0123456789')}", us), r"row 1\.\w+: 'nan'"),
        (lambda point, us: (f"{point},1", us), r"row 1: \d values, not \d"),
    ],
)
def test_every_table_refuses_what_its_device_cannot_do(tmp_path, name, damage, match):
    source = shipped_table("a100", name)
    point = tuple(map(int, ROWS[name].split(",")))
    near = min(source.rows, key=lambda row: sum(abs(a - b) for a, b in zip(row, point)))
    text, us = damage(",".join(map(str, near)), source.rows[near] * 1e6)
    header = HEADER.replace('"gemm"', f'"{name}"').replace('"rows": 2', '"rows": 1')
    path = tmp_path / f"{name}.csv.gz"
    lines = [header, ",".join((*TABLES[name], LATENCY)), f"{text},{us:.6g}"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    if match is None:
        assert load_table(path, device="a100", name=name).rows[near] == pytest.approx(us * 1e-6)
    else:
        with pytest.raises(ProfileError, match=match):
            load_table(path, device="a100", name=name)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 4000), byte=st.integers(1, 255))
def test_a_changed_or_cut_file_never_passes(tmp_path, cut, byte):
    path = DATA_FOLDER / "a100" / "all_reduce.csv.gz"
    data = bytearray(path.read_bytes())
    at = 10 + cut % (len(data) - 10)  # behind gzip's header, whose date and name may change
    broken = tmp_path / "all_reduce.csv.gz"
    for damaged in (data[:at], data[:at] + bytes([data[at] ^ byte]) + data[at + 1 :]):
        broken.write_bytes(damaged)
        with pytest.raises(ProfileError):
            load_table(broken, device="a100", name="all_reduce")


@pytest.mark.parametrize("device", ["a100", "h100"])
def test_products_agree_with_the_second_source(device):
    assert against_vidur(device)[0] <= MAPE_LIMIT


def test_the_most_scattered_table_predicts_what_is_held_out():
    """L40S products; ``scripts/validate_profiles.py`` does this with every table."""
    count, errors = held_out("l40s", "gemm")
    assert count > 1000
    assert errors[count // 2] <= MEDIAN_LIMIT
    assert errors[int(0.95 * count)] <= P95_LIMIT


def test_a_product_out_of_a_cache_counts_as_out_of_memory():
    """14 MB measured at 1.3 times the memory's rate; in a run its weights come from memory."""
    spec = DEVICES["l40s"]
    surfaces = KernelSurfaces.shipped(spec, spec)
    row, num_bytes = (4, 3584, 2048), product_bytes(4, 3584, 2048)
    measured_s = shipped_table("l40s", "gemm").rows[row]
    assert measured_s < num_bytes / spec.memory_bytes_per_s
    cold_s = num_bytes / (surfaces.cold_share * spec.memory_bytes_per_s)
    assert surfaces.product(*row).seconds == pytest.approx(cold_s)
    assert 0.7 < surfaces.cold_share < 0.9
    # Twice the memory's rate halves it: the share is the table's, the rate the question's.
    fast = KernelSurfaces.shipped(
        replace(spec, memory_bytes_per_s=2 * spec.memory_bytes_per_s), spec
    )
    assert fast.product(*row).seconds == pytest.approx(cold_s / 2, rel=0.3)


def test_a_measured_point_is_answered_exactly():
    table, spec = shipped_table("a100", "gemm"), DEVICES["a100"]
    surfaces = KernelSurfaces.shipped(spec, spec)
    for point in list(table.rows)[::997]:
        cost = surfaces.product(*point)
        assert cost.seconds == pytest.approx(table.rows[point])
        assert cost.provenance == "measured"


def test_extrapolation_is_flagged_and_said_once(caplog):
    surfaces = KernelSurfaces.shipped(DEVICES["a100"], DEVICES["a100"])
    with caplog.at_level(logging.WARNING):
        costs = [surfaces.product(100_000 + i, 4096, 4096) for i in range(3)]
    assert all(cost.provenance == "extrapolated" for cost in costs)
    assert len(caplog.records) == 1
    assert "1 to 8192" in caplog.text


# One LLaMA layer with its all-reduces, ms at tp 1/2/4/8, from the same tables by another
# program; it has no allowance for sustained products, which adds up to a tenth to a forward pass.
SANITY = {
    ("a100", "llama-7b", "forward"): (3.8, 2.3, 1.5, 1.1),
    ("h100", "llama-70b", "forward"): (5.0, 2.9, 1.7, 1.2),
    ("a100", "llama-70b", "decode"): (1.29, 0.72, 0.44, 0.30),
}


@pytest.mark.parametrize(("key", "expected"), SANITY.items())
def test_a_layer_takes_what_is_known(key, expected):
    device, model, operation = key
    layers, collectives = shipped_costs(make_cluster(device, 8))
    spec, (size, length) = MODELS[model], (64, 1024) if operation == "decode" else (2048, 2048)
    for tp, ms in zip((1, 2, 4, 8), expected, strict=True):
        block = layers.layer(spec, "block", operation, tp=tp, size=size, length=length)
        reduce_s = collectives.all_reduce(2 * size * spec.hidden, range(tp)).seconds
        assert 1e3 * (block.seconds + 2 * reduce_s) == pytest.approx(ms, rel=0.15)
        assert sum(block.shares) == pytest.approx(block.seconds)

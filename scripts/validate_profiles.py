"""How well the shipped tables predict what they do not hold.

    python scripts/validate_profiles.py [DEVICE ...]

Prints (a) the products' times against another publisher's measurements of LLaMA's shapes,
(b) for each table of kernels and of collectives its held-out points predicted from the rest,
(c) the network's formula against that publisher's messages between two nodes, (d) a LLaMA layer's
seconds. Exits with 1 where (a) is above 12.5% on average, or (b) above 5% in the median or 15% at
the 95th percentile; ``HeldOutCollectives`` says of which collectives.
"""

from __future__ import annotations

import csv
import gzip
import logging
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.bounds import attention_bound_s, attention_point
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.collectives import Collectives
from profiles.costs import Cost, Operation, Provenance
from profiles.devices import DEVICES
from profiles.interpolate import Messages
from profiles.kernel_tables import DATA_FOLDER, has_table, shipped_devices, shipped_table
from profiles.kernels import KernelSurfaces
from profiles.shipped import shipped_costs

MAPE_LIMIT, MEDIAN_LIMIT, P95_LIMIT = 0.125, 0.05, 0.15
# Of these rows every HELD_OUT-th is left out at once, from each of OFFSETS on.
HELD_OUT, OFFSETS = 29, (0, 7, 13)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send_recv")
KERNELS = ("gemm", "prefill_attention", "decode_attention")


def against_vidur(device: str) -> tuple[float, dict[int, float]]:
    """(mean absolute error, measured / predicted by rows) of Vidur's products."""
    surfaces = KernelSurfaces.shipped(DEVICES[device], DEVICES[device])
    errors, ratios = [], defaultdict(list)
    with gzip.open(DATA_FOLDER / "check" / f"vidur_{device}.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            m, n, k = (int(row[name]) for name in "mnk")
            ratio = float(row["latency_us"]) * 1e-6 / surfaces.product(m, n, k).seconds
            errors.append(abs(1.0 / ratio - 1.0))
            ratios[m].append(ratio)
    return statistics.mean(errors), {m: statistics.median(r) for m, r in ratios.items()}


def held_out(device: str, name: str) -> tuple[int, list[float]]:
    """(rows, relative errors) of rows that lie inside the grid, predicted from the rest."""
    table, spec = shipped_table(device, name), DEVICES[device]
    errors: list[float] = []
    for offset in OFFSETS:
        held = dict(sorted(table.rows.items())[offset::HELD_OUT])
        others = {row: s for row, s in table.rows.items() if row not in held}
        surfaces = KernelSurfaces(
            spec, spec,
            {n: shipped_table(device, n) for n in KERNELS} | {name: replace(table, rows=others)},
        )  # fmt: skip
        for row, seconds in held.items():
            predicted, taken_s = predict(surfaces, name, row, seconds)
            # A missing corner of the grid is no hole in it: the answer is EXTRAPOLATED there.
            if predicted.provenance is not Provenance.EXTRAPOLATED:
                errors.append(abs(predicted.seconds / taken_s - 1.0))
    return len(errors), sorted(errors)


def predict(
    surfaces: KernelSurfaces, name: str, row: tuple[int, ...], seconds: float
) -> tuple[Cost, float]:
    """A row's predicted seconds, and the measured ``seconds``, or more where a cache served."""
    if name == "gemm":
        m, n, k = row
        return surfaces.product(m, n, k), surfaces.least_s(m, n, k, seconds)
    batch, length, heads, kv_heads, head_dim = row
    decode = name == "decode_attention"
    cost = surfaces.attention(
        decode=decode, batch=batch, length=length, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim,
    )  # fmt: skip
    point = attention_point(batch, length, heads, kv_heads, head_dim)
    return cost, max(seconds, attention_bound_s(surfaces.device, point, decode=decode))


def disorder(device: str) -> list[float]:
    """By how much each held-out product breaks the order of its neighbours, relative, ascending.

    More rows, columns or depth save no time in sound measurements of one kernel; where they do,
    another kernel was chosen, a cache held the operands, or the measurement was disturbed.
    """
    rows = shipped_table(device, "gemm").rows
    axes = [sorted({row[i] for row in rows}) for i in range(3)]

    def neighbours(row: tuple[int, ...], step: int) -> list[float]:
        found = []
        for i, axis in enumerate(axes):
            at = axis.index(row[i]) + step
            if 0 <= at < len(axis):
                found.append(rows.get((*row[:i], axis[at], *row[i + 1 :])))
        return [seconds for seconds in found if seconds is not None]

    breaks = []
    for offset in OFFSETS:
        for row, seconds in sorted(rows.items())[offset::HELD_OUT]:
            low = max(neighbours(row, -1), default=0.0)
            high = min(neighbours(row, 1), default=math.inf)
            breaks.append(max(0.0, low / seconds - 1.0, 1.0 - high / seconds))
    return sorted(breaks)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutCollectives:
    """Relative errors of a table's sizes but the ends, each predicted without itself, ascending.

    ``lawful``: of those at which the law of one protocol holds: from the size before to it, and
    from it to the size after, the seconds neither fall nor grow by more than the bytes do (a
    message can be sent in parts). Where they do, the library changed its protocol, or something
    disturbed the measurement; a series without that size cannot tell.
    ``limit``: of the 95th percentile. No prediction is nearer to a measurement than the
    measurement's own repetition.
    """

    errors: list[float]
    lawful: list[float]
    limit: float

    @property
    def median(self) -> float:
        return statistics.median(self.errors)

    @property
    def is_bad(self) -> bool:
        return self.median > MEDIAN_LIMIT or percentile_95(self.lawful) > self.limit


def percentile_95(ascending: Sequence[float]) -> float:
    return ascending[int(0.95 * len(ascending))]


def repeat_errors(device: str) -> list[float]:
    """How far NCCL's all-gathers are from the same ones of another type, relative, ascending."""
    with gzip.open(DATA_FOLDER / "check" / f"repeat_{device}.csv.gz", "rt") as file:
        rows = [(float(row["half_us"]), float(row["int8_us"])) for row in csv.DictReader(file)]
    return sorted(abs(again / once - 1.0) for once, again in rows)


def held_out_collectives(device: str, name: str) -> HeldOutCollectives:
    """Each size from its workers' other sizes: the answer that a size between measured ones gets.

    No other series helps: what is not measured of one is measured of none. With a size left out
    its neighbours are four times apart, not two as those of a user's size.
    """
    repeats = repeat_errors(device)
    tolerance = 1.0 + statistics.median(repeats)
    rows = shipped_table(device, name).rows
    errors, lawful = [], []
    for workers in sorted({workers for workers, _ in rows}):
        line = {size: s for (count, size), s in rows.items() if count == workers}
        sizes = sorted(line)
        for low, size, high in zip(sizes, sizes[1:], sizes[2:]):
            others = {(other, workers): s for other, s in line.items() if other != size}
            found = Messages(others).at(size, workers)
            assert found.provenance is Provenance.INTERPOLATED, found
            errors.append(abs(found.seconds / line[size] - 1.0))
            growths = [(line[size] / line[low], size / low), (line[high] / line[size], high / size)]
            if all(1.0 / tolerance <= g <= most * tolerance for g, most in growths):
                lawful.append(errors[-1])
    return HeldOutCollectives(
        errors=sorted(errors), lawful=sorted(lawful), limit=max(P95_LIMIT, percentile_95(repeats))
    )


def print_collectives(devices: Sequence[str]) -> bool:
    """Whether a table is beyond its limit."""
    failed = False
    print("collectives, one size left out at a time, so that its neighbours are four times apart;")
    print("unlawful: twice the bytes in less time, or in more than twice (a change of protocol, or")
    print("a disturbed measurement). Limits: median of all; p95 of the lawful, or of repetitions")
    for device in devices:
        repeats = repeat_errors(device)
        print(
            f"{device} repeated all-gathers: median {statistics.median(repeats):.1%}, "
            f"p95 {percentile_95(repeats):.1%}"
        )
        for name in [n for n in COLLECTIVES if has_table(device, n)]:
            found = held_out_collectives(device, name)
            failed |= found.is_bad
            print(
                f"{device} {name}: {len(found.errors)}, median {found.median:.1%}, "
                f"p95 {percentile_95(found.errors):.1%}; without "
                f"{len(found.errors) - len(found.lawful)} unlawful p95 "
                f"{percentile_95(found.lawful):.1%} (limit {found.limit:.1%})"
                f"{'  ABOVE THE LIMIT' if found.is_bad else ''}"
            )
    return failed


def network_check(device: str) -> tuple[float, list[float]]:
    """(rate of the link in bytes/s, relative errors) of messages between two nodes by the formula.

    The H100s had a DGX's adapters; of the A100s' network no rate is known, it is taken from the
    largest message.
    """
    with gzip.open(DATA_FOLDER / "check" / f"network_{device}.csv.gz", "rt") as file:
        rows = {
            int(row["num_bytes"]): float(row["latency_us"]) * 1e-6
            for row in csv.DictReader(file) if row["operation"] == "send_recv"
        }  # fmt: skip
    cluster = make_cluster(device, 16)
    if device == "a100":
        largest = max(rows)
        rate = largest / rows[largest] / Collectives(cluster).network_efficiency
        cluster = replace(cluster, inter_link=replace(cluster.inter_link, bytes_per_s=rate))
    model = Collectives(cluster)
    errors = [abs(model.p2p(size, 0, 8).seconds / s - 1.0) for size, s in rows.items()]
    return cluster.inter_link.bytes_per_s, sorted(errors)


def layer_ms(device: str, model: str, operation: Operation, size: int, length: int) -> list[str]:
    """Milliseconds of a block with its two all-reduces at tp 1, 2, 4, 8."""
    layers, collectives = shipped_costs(make_cluster(device, 8))
    spec, found = MODELS[model], []
    for tp in (1, 2, 4, 8):
        block = layers.layer(spec, "block", operation, tp=tp, size=size, length=length)
        reduce_s = collectives.all_reduce(2 * size * spec.hidden, range(tp)).seconds
        found.append(f"{1e3 * (block.seconds + 2 * reduce_s):.2f}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    devices = list(sys.argv[1:] if argv is None else argv) or list(shipped_devices())
    logging.disable(logging.WARNING)
    failed = False
    for device in [d for d in devices if d in ("a100", "h100")]:
        mape, ratios = against_vidur(device)
        failed |= mape > MAPE_LIMIT
        print(f"{device} products against Vidur: mean error {mape:.1%} (limit {MAPE_LIMIT:.1%})")
        print(
            "  measured / predicted by rows: " + " ".join(f"{m}:{r:.2f}" for m, r in ratios.items())
        )
    for device in devices:
        for name in KERNELS:
            count, errors = held_out(device, name)
            median, p95 = statistics.median(errors), percentile_95(errors)
            bad = median > MEDIAN_LIMIT or p95 > P95_LIMIT
            failed |= bad
            print(
                f"{device} {name}: {count} held out, median {median:.1%}, p95 {p95:.1%}"
                f"{'  ABOVE THE LIMIT' if bad else ''}"
            )
        breaks = disorder(device)
        print(
            f"  {sum(b > P95_LIMIT for b in breaks) / len(breaks):.1%} of these products break "
            f"their neighbours' order by more than {P95_LIMIT:.0%} (more work in less time)"
        )
    failed |= print_collectives(devices)
    for device in [d for d in devices if d in ("a100", "h100")]:
        rate, errors = network_check(device)
        print(
            f"{device} messages between nodes ({rate / 1e9:.1f} GB/s): {len(errors)} sizes, median "
            f"error {statistics.median(errors):.1%}, worst {errors[-1]:.1%}"
        )
    for device in devices:
        for model in ("llama-7b", "llama-70b"):
            forward = "/".join(layer_ms(device, model, "forward", 2048, 2048))
            decode = "/".join(layer_ms(device, model, "decode", 64, 1024))
            print(f"{device} {model} layer, ms at tp 1/2/4/8: forward {forward}, decode {decode}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

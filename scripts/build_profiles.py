"""Build ``profiles/data`` from the published kernel tables.

    python scripts/build_profiles.py SOURCE_FOLDER

SOURCE_FOLDER holds ``aiconfigurator/`` and ``vidur/`` (their LICENSE files beside the data).
Needs pandas and pyarrow, which the package itself does not. Prints one line for each file.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from profiles.kernel_tables import DATA_FOLDER, LATENCY, SCHEMA, TABLES, UNIT, VERSION

# Device -> folder of aiconfigurator, engine and version of kernels, version of NCCL.
SOURCES = {
    "a100": ("a100_sxm", "trtllm/1.0.0", "2.27.3"),
    "h100": ("h100_sxm", "trtllm/1.3.0rc20", "2.29.2"),
    "h200": ("h200_sxm", "trtllm/1.3.0rc20", "2.29.2"),
    "b200": ("b200_sxm", "trtllm/1.3.0rc20", "2.29.2"),
    "gb200": ("gb200", "trtllm/1.3.0rc20", "2.29.2"),
    "l40s": ("l40s", "trtllm/1.3.0rc20", "2.27.3"),
}
# A product among others over the same product alone, and from how many rows, columns and values
# inside on: see ``profiles.kernel_costs``. Found on A100 and H100, taken for all.
SUSTAINED = {"factor": 1.1, "from": 512}
# Vidur's folder of servers like ours.
NETWORKS = {"a100": "a100_dgx", "h100": "h100_dgx"}
NETWORK_BYTES = tuple(2**i for i in range(11, 27))
# Of the finer newer grids the points of the oldest one: the rest changes no answer by much.
GEMM_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048,
             4096, 8192, 16384, 32768)  # fmt: skip
# Vidur's names of a block's products, in the order of ``_vidur_rows``.
CHECK_COLUMNS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")


def bf16(frame: pd.DataFrame) -> pd.DataFrame:
    for column in ("gemm_dtype", "attn_dtype", "kv_cache_dtype", "allreduce_dtype"):
        if column in frame:
            frame = frame[frame[column] == "bfloat16"]
    return frame[frame["window_size"] == 0] if "window_size" in frame else frame


def write(
    device: str, name: str, frame: pd.DataFrame, source: str, **facts: Mapping[str, float]
) -> None:
    """One table of ``frame``'s "latency" (ms); ``facts`` go into its header."""
    columns = list(TABLES[name])
    frame = frame.assign(us=frame["latency"] * 1000.0)
    frame = frame[columns + ["us"]].groupby(columns, sort=True).median().reset_index()
    header = {
        "schema": SCHEMA, "version": VERSION, "table": name, "device": device, "unit": UNIT,
        "dtype": "bf16", "source": source, **facts, "rows": len(frame),
    }  # fmt: skip
    lines = [f"#{json.dumps(header)}", ",".join([*columns, LATENCY])]
    for values in frame.itertuples(index=False):
        lines.append(",".join([*(str(int(v)) for v in values[:-1]), f"{values[-1]:.5g}"]))
    path = DATA_FOLDER / device / f"{name}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0))
    print(f"{path.relative_to(DATA_FOLDER)}: {len(frame)} rows, {path.stat().st_size} bytes")


def build_device(folder: Path, device: str) -> None:
    name, engine, nccl = SOURCES[device]
    data = folder / "aiconfigurator" / "data" / name
    source = f"aiconfigurator {name} {engine}"
    gemm = bf16(pd.read_parquet(data / "gemm" / engine / "gemm_perf.parquet"))
    gemm = gemm[gemm["m"].isin(GEMM_ROWS)]
    write(device, "gemm", gemm, source, sustained=SUSTAINED)
    names = {"batch_size": "batch", "num_heads": "heads", "num_key_value_heads": "kv_heads"}
    for table, file in (("prefill_attention", "context"), ("decode_attention", "generation")):
        frame = bf16(
            pd.read_parquet(data / "attention" / engine / f"{file}_attention_perf.parquet")
        )
        frame = frame[frame["head_dim"].isin((64, 128))].rename(columns=names)
        length = frame["isl"] if file == "context" else frame["step"] + frame["isl"]
        write(device, table, frame.assign(length=length), source)
    collectives = pd.read_parquet(data / "comm" / "nccl" / nccl / "nccl_perf.parquet")
    half = collectives[collectives["nccl_dtype"] == "half"].rename(columns={"num_gpus": "workers"})
    half = half.assign(num_bytes=half["message_size"] * 2)
    repeats = gather_repeats(collectives)
    build_repeat_check(device, repeats)
    write(device, "all_gather", repeats, f"aiconfigurator {name} NCCL {nccl}")
    scatter = half[half["op_name"] == "reduce_scatter"]
    write(device, "reduce_scatter", scatter, f"aiconfigurator {name} NCCL {nccl}")
    custom = bf16(pd.read_parquet(data / "comm" / engine / "custom_allreduce_perf.parquet"))
    custom = custom.rename(columns={"num_gpus": "workers"})
    custom = custom.assign(num_bytes=custom["message_size"] * 2)
    both = pd.concat([custom, half[half["op_name"] == "all_reduce"]])
    # The faster of the two paths, as engines choose.
    best = both.groupby(["workers", "num_bytes"])["latency"].min().reset_index()
    write(device, "all_reduce", best, f"aiconfigurator {name} {engine} and NCCL {nccl}")
    if device in NETWORKS:
        messages = vidur_network(folder, device, "send_recv")
        write(device, "send_recv", messages[messages["nodes"] == 1], f"vidur {NETWORKS[device]}")
        shutil.copy(folder / "vidur" / "LICENSE", DATA_FOLDER / device / "LICENSE.vidur")
    text = SOURCE_TEXT.format(device=device, name=name, engine=engine, nccl=nccl)
    text += SEND_RECV_TEXT.format(network=NETWORKS[device]) if device in NETWORKS else ""
    (DATA_FOLDER / device / "SOURCE.md").write_text(text, encoding="utf-8")
    shutil.copy(folder / "aiconfigurator" / "LICENSE", DATA_FOLDER / device / "LICENSE")


def gather_repeats(collectives: pd.DataFrame) -> pd.DataFrame:
    """All-gathers of both types: one that moves as many bytes does the same, measured again."""
    gathers = collectives[collectives["op_name"] == "all_gather"]
    width = gathers["nccl_dtype"].map({"half": 2, "int8": 1})
    gathers = gathers.assign(num_bytes=gathers["message_size"] * width)
    return gathers.rename(columns={"num_gpus": "workers"})


def build_repeat_check(device: str, repeats: pd.DataFrame) -> None:
    """Both measurements of each all-gather: how far a measurement is from its repetition."""
    times = repeats.pivot_table(
        index=["workers", "num_bytes"], columns="nccl_dtype", values="latency"
    )
    times = (times.dropna() * 1000.0).round(2).add_suffix("_us").reset_index()
    path = DATA_FOLDER / "check" / f"repeat_{device}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(times.to_csv(index=False).encode(), 9, mtime=0))
    print(f"{path.relative_to(DATA_FOLDER)}: {len(times)} rows")


SOURCE_TEXT = """# Kernels measured on {device}

From NVIDIA's aiconfigurator (github.com/ai-dynamo/aiconfigurator, Apache-2.0, LICENSE beside this
file), `data/{name}`: GEMM and attention of TensorRT-LLM (`{engine}`), custom all-reduce of the
same, NCCL {nccl}. Made by `scripts/build_profiles.py`; nothing was changed but:

- bfloat16 rows only (NCCL: half; of all-gathers also int8, which move bytes alike, the mean of
  both), no sliding window, head sizes 64 and 128, GEMM rows (m) on one
  grid; NCCL's and the custom all-reduce joined, the faster of both at each point;
- milliseconds are microseconds (`latency_us`), elements are bytes (`num_bytes`, the whole tensor),
  a decode step's `length` is its context with the new token; repeated points are their median.

The publisher states no date of the measurements; each table's first line has its version, and the
products' what a product among others takes over one alone (`scripts/build_profiles.py`).
"""
SEND_RECV_TEXT = """
`send_recv`: medians of Vidur (github.com/microsoft/vidur, MIT, LICENSE.vidur beside this file),
`data/profiling/network/{network}`, two devices of one node.
"""


def vidur_network(folder: Path, device: str, operation: str) -> pd.DataFrame:
    """Vidur's medians near powers of two: workers, nodes, num_bytes, latency (ms)."""
    path = folder / "vidur" / "network" / NETWORKS[device] / f"{operation}.csv.gz"
    frame = pd.read_csv(path)
    sizes = sorted(frame["size"].unique())
    near = {min(sizes, key=lambda size: abs(size - wanted)) for wanted in NETWORK_BYTES}
    frame = frame[frame["size"].isin(near)]
    return pd.DataFrame(
        {
            "workers": frame["num_workers"],
            "nodes": frame["num_workers"] // frame["devices_per_node"],
            "num_bytes": frame["size"],
            "latency": frame[f"time_stats.{operation}.median"],
        }
    )


def build_check(folder: Path) -> None:
    """Vidur's measured projections, which validate_profiles.py holds the GEMM tables against."""
    target = DATA_FOLDER / "check"
    target.mkdir(parents=True, exist_ok=True)
    for device in ("a100", "h100"):
        rows = []
        for path in sorted((folder / "vidur" / "compute" / device).glob("*/*lama*2*/mlp.csv.gz")):
            rows += _vidur_rows(pd.read_csv(path), path.parent.name)
        for path in sorted((folder / "vidur" / "compute" / device).glob("*/Code*/mlp.csv.gz")):
            rows += _vidur_rows(pd.read_csv(path), path.parent.name)
        frame = pd.DataFrame(rows, columns=["model", "product", "tp", "m", "n", "k", LATENCY])
        path = target / f"vidur_{device}.csv.gz"
        path.write_bytes(gzip.compress(frame.to_csv(index=False).encode(), 9, mtime=0))
        print(f"{path.relative_to(DATA_FOLDER)}: {len(frame)} rows")
        build_network_check(folder, device)
    shutil.copy(folder / "vidur" / "LICENSE", target / "LICENSE")
    (target / "SOURCE.md").write_text(CHECK_TEXT, encoding="utf-8")


def build_network_check(folder: Path, device: str) -> None:
    """Vidur's messages and all-reduces between nodes."""
    frames = []
    for operation in ("send_recv", "all_reduce"):
        frame = vidur_network(folder, device, operation).assign(operation=operation)
        frame[LATENCY] = (frame["latency"] * 1000.0).round(2)
        keys = ["operation", "workers", "nodes", "num_bytes"]
        medians = frame[frame["nodes"] > 1].groupby(keys, sort=True)[LATENCY].median()
        frames.append(medians.reset_index())
    path = DATA_FOLDER / "check" / f"network_{device}.csv.gz"
    text = pd.concat(frames).to_csv(index=False)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{path.relative_to(DATA_FOLDER)}: {sum(map(len, frames))} rows")


CHECK_TEXT = """# The second source

Median times of LLaMA's linear layers from Vidur (github.com/microsoft/vidur, MIT, LICENSE beside
this file), `data/profiling/compute/{a100,h100}`: Llama-2 7B and 70B, CodeLlama 34B, tensor
parallel 1, 2, 4, 8, tokens on powers of two and some between. `latency_us`: microseconds of
[m, k] x [k, n]. `network_*`: medians of its `data/profiling/network/{a100,h100}_dgx` between
nodes, `num_bytes` of the whole tensor. `repeat_*`: NCCL's all-gathers of as many bytes as half and
as int8, from the tables' own source (LICENSE beside those). No plan rests on them:
`scripts/validate_profiles.py` compares the tables and the formulas of the network with them.
"""


def _vidur_rows(frame: pd.DataFrame, model: str) -> list[tuple[object, ...]]:
    tokens = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096)
    frame = frame[frame["num_tokens"].isin(tokens)]
    keys = ["num_tokens", "num_tensor_parallel_workers"]
    medians = frame.groupby(keys).median(numeric_only=True).reset_index()
    found: list[tuple[object, ...]] = []
    for _, row in medians.iterrows():
        tp, h, ffn = int(row[keys[1]]), int(row["n_embd"]), int(row["n_expanded_embd"])
        head = h // int(row["n_head"])
        qkv = h // tp + 2 * max(1, int(row["n_kv_head"]) // tp) * head
        shapes = ((qkv, h), (h, h // tp), (2 * ffn // tp, h), (h, ffn // tp))
        for product, (n, k) in zip(CHECK_COLUMNS, shapes, strict=True):
            us = float(row[f"time_stats.{product}.median"]) * 1000.0
            found.append((model, product, tp, int(row["num_tokens"]), n, k, round(us, 2)))
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    for device in SOURCES:
        build_device(Path(sys.argv[1]), device)
    build_check(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Protects cluster.yaml: what is written is what is planned for, and every mistake is one sentence
with the field's path.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cluster_file import cluster_from_dict, load_cluster, override_cluster
from planner.resolve import resolve_cluster
from profiles.clusters import make_cluster
from profiles.errors import ConfigError
from profiles.units import GIB


def test_a_whole_cluster_comes_back(tmp_path: Path) -> None:
    cluster = make_cluster("h100", 32)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(cluster.to_dict()))
    assert load_cluster(file) == cluster


def test_a_base_with_changes(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(
        "base: dgx-a100\nnum_nodes: 4\ndevice: {memory_bytes: 40GiB}\n"
        "inter_link:\n  bytes_per_s: 12.5GB/s\n  latency_s: 5e-6\n"
    )
    cluster = load_cluster(file)
    assert cluster.num_devices == 32
    assert cluster.device.memory_bytes == 40 * GIB
    assert cluster.inter_link.bytes_per_s == 12.5e9
    assert cluster.inter_link.latency_s == 5e-6
    assert cluster.intra_link == make_cluster("a100", 8).intra_link


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML would take the last of them without a word."""
    file = tmp_path / "ours.yaml"
    file.write_text("base: p4d\ndevice:\n  memory_bytes: 40GiB\n  memory_bytes: 80GiB\n")
    with pytest.raises(ConfigError, match=r"ours\.yaml: line 4: the field 'memory_bytes' stands"):
        load_cluster(file)


def test_a_folder_is_no_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); give a file"):
        resolve_cluster(str(tmp_path), None, None, None)


def test_a_price_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("base: p4d\ndevice: {dollars_per_hour: 1.2}\n")
    device = load_cluster(file).device
    assert (device.name, device.dollars_per_hour) == ("a100-40g", 1.2)
    assert device.price_source == "given by the user"
    changed = override_cluster(make_cluster("h100", 8), {"device.dollars_per_hour": 2})
    assert changed.device.dollars_per_hour == 2
    with pytest.raises(ConfigError, match=r"dollars_per_hour: -2\.0 is no price"):
        override_cluster(make_cluster("h100", 8), {"device.dollars_per_hour": -2})


def test_a_named_cluster_of_so_many_gpus() -> None:
    cluster = resolve_cluster("dgx-h100", None, "32", None)
    assert (cluster.num_nodes, cluster.devices_per_node, cluster.device.name) == (4, 8, "h100")
    assert resolve_cluster("dgx-h100", "h100", "32", None) == cluster
    with pytest.raises(ConfigError, match="name two devices"):
        resolve_cluster("dgx-h100", "a100", "32", None)


def test_gpus_fill_the_nodes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("base: h100\n")
    assert load_cluster(file).num_devices == 8
    assert resolve_cluster(str(file), None, "24", None).num_nodes == 3
    assert resolve_cluster(str(file), None, "4", None).devices_per_node == 4
    with pytest.raises(
        ConfigError, match=r"--gpus: 12 devices do not fill nodes of 8; use 8 or 16"
    ):
        resolve_cluster(str(file), None, "12", None)
    file.write_text("base: h100\nnum_nodes: 2\n")
    with pytest.raises(ConfigError, match=r"--gpus: 8 devices, but .* has 2 nodes of 8"):
        resolve_cluster(str(file), None, "8", None)
    with pytest.raises(ConfigError, match=r"--device: .* says which device it has"):
        resolve_cluster(str(file), "h100", None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: a1000", "c.yaml: base: unknown base 'a1000'; did you mean a100"),
        ("base: a100\nnode: 3", "c.yaml: node: unknown field 'node'"),
        ("base: a100\nnum_nodes: many", "num_nodes: is the text 'many'; give a number"),
        ("base: a100\nnum_nodes: 1.5", "num_nodes: is 1.5; give a whole number"),
        ("base: a100\nnum_nodes: 0", "num_nodes: 0 is not a positive whole number"),
        ("base: a100\ndevice: h100", "device: is the text 'h100'; give its fields below it"),
        ("base: a100\ndevice: {memory: 3}", "device.memory: unknown field 'memory'; did you mean"),
        ("base: a100\ndevice: {memory_bytes: lots}", "memory_bytes: 'lots' is not a number of b"),
        ("base: a100\ndevice: {kind: tpu}", "device.kind: is the text 'tpu'; use cuda, cpu"),
        ("base: a100\ninter_link: {bytes_per_s: -1}", "a link needs bytes_per_s > 0"),
        ("base: a100\ninter_link: {latency_s: .nan}", "inter_link.latency_s: is nan"),
        ("num_nodes: 2", "c.yaml: devices_per_node: missing; add it, or start from a server"),
        ("- a100", "c.yaml: holds a list, not fields of a cluster"),
        ("base: [", "c.yaml: is not YAML at line"),
        ("", "c.yaml: holds nothing, not fields"),
    ],
)
def test_a_mistake_names_its_field(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_cluster(file)


_ODD: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(
    field=st.sampled_from([
        "base", "name", "num_nodes", "devices_per_node", "device", "inter_link.bytes_per_s",
        "device.kind", "device.memory_bytes", "intra_link.latency_s", "what",
    ]),
    value=_ODD,
)  # fmt: skip
def test_no_value_ends_in_a_traceback(field: str, value: Any) -> None:
    nested = value
    for part in reversed(field.split(".")):
        nested = {part: nested}
    with suppress(ConfigError):
        cluster = cluster_from_dict({"base": "a100", **nested}, where="c.yaml")
        assert cluster.num_devices >= 1


def test_overrides_change_one_field() -> None:
    cluster = make_cluster("a100", 16)
    changed = override_cluster(cluster, {"inter_link.bytes_per_s": "12.5GB"})
    assert changed.inter_link.bytes_per_s == 12.5e9
    assert override_cluster(changed, {"inter_link.bytes_per_s": 25e9}) == cluster
    with pytest.raises(ConfigError, match=r"cluster.inter_link.speed: unknown field 'speed'"):
        override_cluster(cluster, {"inter_link.speed": 1})
    with pytest.raises(ConfigError, match=r"cluster.num_nodes.x|cluster.num_nodes: is an object"):
        override_cluster(cluster, {"num_nodes.x": 1})

"""Protects the catalogue: shapes against published parameter counts, and what users mistype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiles.catalogue import MODELS, resolve_model
from profiles.clusters import DEVICES, PLATFORMS, local_cluster, machine_memory_bytes, make_cluster
from profiles.errors import ConfigError
from profiles.units import GIB

# Of the checkpoints on the Hugging Face hub: the sum of their tensors' sizes.
PUBLISHED_PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-34b": 33_743_970_304,
    "llama-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_241_732_096,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_models_have_the_published_number_of_parameters(name: str) -> None:
    assert MODELS[name].num_parameters == PUBLISHED_PARAMETERS[name]


def test_every_row_has_a_source() -> None:
    assert set(MODELS) == {*PUBLISHED_PARAMETERS, "tiny"}
    rows = [*MODELS.values(), *DEVICES.values()]
    links = [link for p in PLATFORMS.values() for link in (p.intra, p.inter, p.host)]
    assert all(row.source for row in rows)
    assert all(link.source for link in links)
    assert set(PLATFORMS) == set(DEVICES) - {"cpu"}


def test_a_scalar_head_of_a_tied_model_is_not_tied() -> None:
    critic = resolve_model("smollm2-135m", head="scalar")
    assert critic.head == "scalar"
    assert not critic.tied_embedding
    # One row of the head more than the tied language model.
    assert critic.num_parameters == 134_515_008 + critic.hidden


def test_a_folder_is_resolved_by_its_config(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 3, "intermediate_size": 16, "vocab_size": 32,
        "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = resolve_model(str(tmp_path), head="scalar")
    assert (spec.num_layers, spec.hidden, spec.head) == (3, 8, "scalar")


def test_an_unknown_model_lists_near_names() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*llama-7b.* Hugging Face folder"):
        resolve_model("lama-7b")


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ConfigError, match=r"models/nothing.*no such file"):
        resolve_model("models/nothing")


def test_clusters_are_whole_nodes_or_a_part_of_one() -> None:
    assert (make_cluster("h100", 16).num_nodes, make_cluster("h100", 16).devices_per_node) == (2, 8)
    assert (make_cluster("a100", 4).num_nodes, make_cluster("a100", 4).devices_per_node) == (1, 4)
    assert make_cluster("a100", 1).num_devices == 1


@pytest.mark.parametrize("count", [0, -8, 3.5, True, "8", None])
def test_a_count_that_is_no_count_is_refused(count: object) -> None:
    with pytest.raises(ConfigError, match=r"--devices: .* is not a positive whole number"):
        make_cluster("a100", count)  # type: ignore[arg-type]


def test_devices_that_do_not_fill_their_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"12 devices do not fill nodes of 8.* use 8 or 16"):
        make_cluster("a100", 12)


def test_an_unknown_device_lists_near_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'A10O'; did you mean a100"):
        make_cluster("A10O", 8)


def test_local_workers_share_the_machine() -> None:
    one, four = local_cluster(1), local_cluster(4)
    assert four.num_devices == 4
    assert four.device.memory_bytes == machine_memory_bytes() // 4
    assert four.device.peak_flops <= one.device.peak_flops
    assert machine_memory_bytes() > GIB // 8
    with pytest.raises(ConfigError, match="--workers"):
        local_cluster(0)

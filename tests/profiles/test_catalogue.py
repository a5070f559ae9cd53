"""Protects the catalogue: shapes against published parameter counts, and what users mistype."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from planner.layout import parameters
from profiles.catalogue import MODELS, resolve_model
from profiles.clusters import (
    CLUSTER_NAMES,
    PLATFORMS,
    SYSTEMS,
    local_cluster,
    machine_memory_bytes,
    make_cluster,
)
from profiles.devices import DEVICES
from profiles.errors import ConfigError
from profiles.hf_config import hf_config, spec_from_hf
from profiles.units import GIB

# Of the checkpoints on the Hugging Face hub: the sum of their tensors' sizes.
PUBLISHED_PARAMETERS = {
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-30b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-34b": 33_743_970_304,
    "llama-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "phi3-mini": 3_821_079_552,
    "phi3-medium": 13_960_238_080,
    "phi4": 14_659_507_200,
}

# Of these only the rounded total is known to us, in billions.
PUBLISHED_BILLIONS = {"qwen2-57b-a14b": 57.4}

# Billions that one token passes through, as the models' cards say.
PUBLISHED_ACTIVE = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39.0,
    "qwen1.5-moe-a2.7b": 2.7,
    "qwen2-57b-a14b": 14.0,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22.0,
    "llama-7b": 6.7,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_models_have_the_published_number_of_parameters(name: str) -> None:
    assert MODELS[name].num_parameters == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_models_have_the_published_size(name: str) -> None:
    assert round(MODELS[name].num_parameters / 1e9, 1) == PUBLISHED_BILLIONS[name]


@pytest.mark.parametrize("name", PUBLISHED_ACTIVE)
def test_models_have_the_published_number_of_active_parameters(name: str) -> None:
    assert MODELS[name].active_parameters / 1e9 == pytest.approx(PUBLISHED_ACTIVE[name], rel=0.04)


def test_the_shape_like_deepseek_v2_lite_is_of_its_size() -> None:
    """15.7 billion, of which a token passes 2.4 (its card); plain attention has some more."""
    spec = MODELS["deepseek-v2-lite-type"]
    assert spec.num_parameters / 1e9 == pytest.approx(15.7, rel=0.05)
    assert spec.active_parameters / 1e9 == pytest.approx(2.4, rel=0.15)


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_has_every_parameter_that_is_counted(name: str) -> None:
    for head in ("lm", "scalar"):
        spec = MODELS[name].with_head(head)
        assert sum(prod(p.shape) for p in parameters(spec)) == spec.num_parameters


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_read_back_from_its_config(name: str) -> None:
    """A row has exactly the switches of its family."""
    spec = MODELS[name]
    config = hf_config(spec) | {"tie_word_embeddings": spec.tied_embedding}
    found = spec_from_hf(config, name=name, where=spec.source)
    assert found == spec


def test_every_row_has_a_source() -> None:
    ours = {"tiny", "deepseek-v2-lite-type"}
    assert set(MODELS) == {*PUBLISHED_PARAMETERS, *PUBLISHED_BILLIONS, *ours}
    assert all(MODELS[name].source.startswith("ours: ") for name in ours)
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
    with pytest.raises(ConfigError, match=r"'A10O'; did you mean a10g or a100"):
        make_cluster("A10O", 8)


def test_every_gpu_has_a_price_that_says_whose_and_when() -> None:
    for device in [*DEVICES.values(), *(system.device_spec() for system in SYSTEMS.values())]:
        assert (device.dollars_per_hour > 0) == (device.kind == "cuda"), device.name
        assert bool(re.search(r"20\d\d-\d\d", device.price_source)) == (device.kind == "cuda")


@pytest.mark.parametrize("name", CLUSTER_NAMES)
def test_a_named_cluster_is_whole_and_says_where_its_figures_are_from(name: str) -> None:
    cluster = make_cluster(name, 8)
    assert cluster.num_devices == 8
    for link in (cluster.intra_link, cluster.inter_link, cluster.host_link):
        assert link.source
        assert 1e9 <= link.bytes_per_s <= 1e12, "bytes of one direction in a second"
    if name in SYSTEMS:
        assert cluster.device.name == SYSTEMS[name].device
        assert cluster.inter_link.bytes_per_s <= cluster.intra_link.bytes_per_s


def test_a_bare_device_is_in_its_makers_server() -> None:
    assert PLATFORMS["a100"].name == "dgx-a100"
    assert PLATFORMS["h100"].name == "dgx-h100"
    assert make_cluster("p5", 16).device.dollars_per_hour == pytest.approx(55.04 / 8)
    assert make_cluster("h100", 16).device.dollars_per_hour < 55.04 / 8
    # AWS: 400 Gb/s for eight GPUs is 6.25 GB/s for each.
    assert make_cluster("p4d", 16).inter_link.bytes_per_s == pytest.approx(6.25e9)


def test_more_than_a_rack_is_refused() -> None:
    assert make_cluster("gb200-nvl72", 72).num_nodes == 18
    with pytest.raises(ConfigError, match="80 devices, but one gb200-nvl72 has 72"):
        make_cluster("gb200", 80)


def test_a_price_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device h100\.dollars_per_hour: -1 is no price"):
        replace(DEVICES["h100"], dollars_per_hour=-1)


def test_a_laptop_is_shared_by_its_workers() -> None:
    one, four = make_cluster("laptop", 1), make_cluster("laptop", 4)
    assert one.device.memory_bytes == 16 * GIB == 4 * four.device.memory_bytes
    assert one.device.peak_flops == pytest.approx(4 * four.device.peak_flops)


def test_local_workers_share_the_machine() -> None:
    one, four = local_cluster(1), local_cluster(4)
    assert four.num_devices == 4
    assert four.device.memory_bytes == machine_memory_bytes() // 4
    assert four.device.peak_flops <= one.device.peak_flops
    assert machine_memory_bytes() > GIB // 8
    with pytest.raises(ConfigError, match="--workers"):
        local_cluster(0)

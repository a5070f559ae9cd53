"""Protects what people touch of a cluster of unlike groups: its file, its flags, its plan on disk,
scenarios, and what is said of such a plan.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from planner.cli import main
from planner.cluster_file import load_cluster, override_cluster
from planner.plan_schema import load_plan, plan_to_dict
from planner.whatif import WhatIf
from profiles.clusters import make_groups
from profiles.errors import ConfigError
from profiles.hardware import MixedCluster
from profiles.units import GIB

GROUPS = "groups:\n- {base: dgx-h100, num_nodes: 1}\n- {base: l40s-box, num_nodes: 2}\n"
WORDS = ["batch_size=32", "--prompt-len", "128", "--response-len", "128", "--time-limit", "5"]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "ours.yaml").write_text(GROUPS)
    path = folder / "plan.json"
    words = ["search", "--model", "llama-7b", "--cluster", str(folder / "ours.yaml"), *WORDS]
    assert main([*words, "-o", str(path)]) == 0
    return path


# ---- the file ---------------------------------------------------------------------------------


def test_groups_of_a_file_are_those_of_the_flag(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(GROUPS)
    cluster, flag = load_cluster(file), make_groups("dgx-h100:8+l40s-box:16")
    assert isinstance(cluster, MixedCluster)
    assert isinstance(flag, MixedCluster)
    assert [g.device for g in cluster.groups] == [g.device for g in flag.groups]
    assert [g.num_devices for g in cluster.groups] == [8, 16]
    file.write_text(yaml.safe_dump(cluster.to_dict()))
    assert load_cluster(file) == cluster


def test_one_field_of_one_group_is_overridden() -> None:
    cluster = make_groups("h100:8+l40s:8")
    assert isinstance(cluster, MixedCluster)
    changed = override_cluster(cluster, {"groups.1.device.memory_bytes": "40GiB"})
    assert [g.device.memory_bytes for g in changed.groups] == [
        cluster.groups[0].device.memory_bytes, 40 * GIB,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: []", "groups: 0 groups; give two or more"),
        ("groups: [{base: dgx-h100}]", "groups: 1 groups; give two or more"),
        ("groups: {a: 1}", "groups: is an object; give a list"),
        ("groups: [{base: dgx-h100}, 3]", r"groups\[1\]: is 3; give a group's fields"),
        ("groups: [{base: dgx-h100}, {base: nix}]", r"groups\[1\].base: unknown base 'nix'"),
        (
            "groups: [{base: dgx-h100}, {base: g5, num_nodes: 0}]",
            r"groups\[1\].num_nodes: 0 is not a positive whole number",
        ),
        ("groups: [{base: g5, devic: 3}, {base: p5}]", r"groups\[0\].devic: unknown field"),
        ("num_nodes: 3\ngroups: []", "num_nodes: stands beside groups"),
    ],
)
def test_a_mistake_names_its_group(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_cluster(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h100:8+l40s:8", "--gpus", "8"], "leave it out"),
        (["--device", "h100:8+cpu:2"], "cpu is one machine, not a group of nodes"),
        (["--device", "h100+l40s:8"], "'h100' is no group of devices; write NAME:NUMBER"),
        (["--device", "h100:8+g5:8", "cluster.groups.2.num_nodes=1"], "N from 0 to 1"),
        (["--device", "h100:8+g5:8", "memory_limit=2.5GiB"], "each h100 needs"),
    ],
)
def test_a_mistake_of_the_command_line_is_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    assert main(["search", "--model", "llama-7b", *WORDS, *words, "-o", str(output)]) == 2
    (sentence,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("realplan: ")
    ]
    assert message in sentence
    assert not output.exists()


# ---- the plan ---------------------------------------------------------------------------------


def test_a_plan_on_disk_has_its_groups(plan_file: Path) -> None:
    plan = load_plan(plan_file)
    assert plan_to_dict(plan) == json.loads(plan_file.read_text())
    groups = plan.problem.cluster.groups
    assert [group.device.name for group in groups] == ["h100", "l40s"]
    assert plan.estimate is not None
    assert 0 < plan.estimate.lower_bound_s <= plan.estimate.step_s


@pytest.mark.parametrize("verb", ["show", "explain"])
def test_every_call_says_its_kind_of_device(
    verb: str, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, str(plan_file)]) == 0
    printed = capsys.readouterr().out
    if verb == "show":
        plan = load_plan(plan_file)
        for name, allocation in plan.allocations.items():
            device = plan.problem.cluster.group_of(allocation.mesh.first).device.name
            (row,) = [line for line in printed.splitlines() if line.startswith(f" {name} ")]
            assert f" {device} " in row
    assert "pace" in printed or "per step" in printed


def test_a_mesh_over_two_groups_is_refused(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(plan_file.read_text())
    values["allocations"]["actor_train"]["mesh"] = [0, 16]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(values))
    assert main(["show", str(broken)]) == 2
    assert "actor_train" in capsys.readouterr().err


def test_a_report_and_baselines(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(plan_file), "-o", str(page)]) == 0
    assert "l40s" in page.read_text()
    words = ["--model", "llama-7b", "--device", "h100:8+l40s:8", *WORDS[:5]]
    assert main(["baselines", *words]) == 0
    assert "symmetric" in capsys.readouterr().out


def test_scenarios_of_unlike_nodes_stand_beside_equal_ones(plan_file: Path) -> None:
    what = WhatIf(load_plan(plan_file))
    found = what.sweep(device=["h100:8+l40s:8", "h100:8"])
    mixed_s, equal_s = found["seconds"]
    assert 0 < mixed_s <= equal_s * 1.02  # more devices: worse by no more than the search's gap

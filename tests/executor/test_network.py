"""Protects a run's store and interface: a stranger reads nothing and what he writes is refused."""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from executor.launch.network import ForgedValueError, GuardedStore, choose_interface, interfaces
from profiles.errors import ConfigError

SECRET = b"s" * 32


@pytest.fixture
def served() -> tuple[GuardedStore, dist.TCPStore]:
    """A guarded store and a stranger's plain connection to the same port."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    timeout = timedelta(seconds=5)
    inner = dist.TCPStore(
        "127.0.0.1", port, 2, is_master=True, wait_for_workers=False, timeout=timeout,
        master_listen_fd=listening.detach(),
    )  # fmt: skip
    stranger = dist.TCPStore(
        "127.0.0.1", port, 2, is_master=False, wait_for_workers=False, timeout=timeout
    )
    return GuardedStore(inner, SECRET), stranger


def test_workers_of_one_job_share_what_they_set(
    served: tuple[GuardedStore, dist.TCPStore],
) -> None:
    guarded, stranger = served
    other = GuardedStore(stranger, SECRET)
    guarded.set("a", "one")
    assert other.get("a") == b"one"
    assert other.compare_set("gate", "", "go") == b"go"
    assert guarded.compare_set("gate", "", "stop") == b"go"
    assert guarded.compare_set("gate", "go", "late") == b"late"
    assert guarded.add("n", 2) + other.add("n", 3) == 2 + 5
    assert guarded.check(["a", "gate"])
    assert not guarded.check(["b"])


def test_a_stranger_knows_no_key_and_his_values_are_refused(
    served: tuple[GuardedStore, dist.TCPStore],
) -> None:
    guarded, stranger = served
    guarded.set("metrics/0", '{"reward": 1}')
    assert not stranger.check(["metrics/0"])
    stranger.set("metrics/1", "forged")
    assert not guarded.check(["metrics/1"])
    (hidden,) = [key for key in stranger.list_keys() if "metrics" not in key]
    assert b"reward" in stranger.get(hidden)  # sealed, not encrypted: who can list can read
    stranger.set(hidden, "x" * 40)
    with pytest.raises(ForgedValueError, match="'metrics/0' was not written by a worker"):
        guarded.get("metrics/0")
    # A genuine value under another key is refused as well.
    guarded.set("a", "1")
    guarded.set("b", "2")
    stranger.set(guarded._key("a"), stranger.get(guarded._key("b")))
    with pytest.raises(ForgedValueError):
        guarded.get("a")
    stranger.set(guarded._key("b"), GuardedStore(stranger, b"t" * 32)._sealed("b", "2").hex())
    with pytest.raises(ForgedValueError):
        guarded.get("b")


def test_an_interface_is_found_by_name_and_by_address() -> None:
    assert interfaces()["lo"] == "127.0.0.1"
    assert choose_interface("lo") == choose_interface("127.0.0.1") == ("lo", "127.0.0.1")
    name, address = choose_interface("")
    assert interfaces()[name] == address
    for wrong in ("no-such0", "203.0.113.7", "not an address"):
        with pytest.raises(ConfigError, match=re.escape(f"has no interface '{wrong}'")):
            choose_interface(wrong)


def test_nothing_here_unpickles_or_trusts_foreign_code() -> None:
    """By reading: the words that would do it stand nowhere in what is installed."""
    root = Path(__file__).parents[2]
    words = re.compile(
        r"\bpickle\b.*import|import pickle|pickle\.loads?|torch\.load\(|trust_remote_code|"
        r"broadcast_object|all_gather_object|gather_object|scatter_object|send_object|recv_object|"
        r"\beval\(|yaml\.load\("
    )
    found = [
        f"{file.relative_to(root)}:{number}: {line.strip()}"
        for package in ("profiles", "planner", "executor", "experiments")
        for file in (root / package).rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if words.search(line) and not re.search(r"\b\w+\.eval\(\)", line)
    ]
    assert found == []

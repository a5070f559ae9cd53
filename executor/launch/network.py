"""Where a run listens: on one interface, and only for those who hold the job's secret.

Rank 0 serves a key-value store; ``GuardedStore`` seals what is in it. The connections that gloo
and NCCL make for tensors know no secret: they are bound to the same interface, which should be
that of a private network.
"""

from __future__ import annotations

import fcntl
import hmac
import socket
import struct
import time
from datetime import timedelta
from ipaddress import AddressValueError, IPv4Address

import torch.distributed as dist

from executor.launch.job import Job
from profiles.errors import ConfigError, UserError

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>
_SEAL_BYTES = 32


def interfaces() -> dict[str, str]:
    """This machine's interfaces that have an IPv4 address: name -> address."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def choose_interface(bind: str) -> tuple[str, str]:
    """(interface, address) of an interface's name or of its address.

    Empty: the interface of the default route, or loopback where there is none.

    Raises:
        ConfigError: this machine has no such interface or address.
    """
    known = interfaces()
    wanted = bind or _default_address()
    if wanted in known:
        return wanted, known[wanted]
    try:
        address = str(IPv4Address(wanted))
    except AddressValueError:
        address = ""
    for name, its_address in known.items():
        if its_address == address:
            return name, address
    have = ", ".join(f"{name} ({address})" for name, address in known.items())
    raise ConfigError(
        f"{socket.gethostname()} has no interface '{wanted}'", where="--set bind",
        remedy=f"it has {have}",
    )  # fmt: skip


def _default_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # asks for the route (RFC 5737); sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


class ForgedValueError(UserError):
    """A value in the store was not written by a worker of this job."""


class GuardedStore(dist.Store):
    """A store whose keys and values make sense only to holders of ``secret``.

    A key travels as its HMAC, a value with one in front: a stranger who reaches the port knows
    no key, and what he writes is refused. He can still make the run fail, not make it go wrong.
    """

    def __init__(self, inner: dist.Store, secret: bytes) -> None:
        super().__init__()
        self.inner = inner
        self.secret = secret

    def _key(self, key: str) -> str:
        return hmac.digest(self.secret, key.encode(), "sha256").hex()

    def _sealed(self, key: str, value: str | bytes) -> bytes:
        data = value.encode() if isinstance(value, str) else bytes(value)
        return hmac.digest(self.secret, key.encode() + b"\0" + data, "sha256") + data

    def _opened(self, key: str, sealed: bytes) -> bytes:
        seal, data = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
        own = hmac.digest(self.secret, key.encode() + b"\0" + data, "sha256")
        if not hmac.compare_digest(seal, own):
            raise ForgedValueError(
                f"the value of '{key}' was not written by a worker of this job",
                where="the run's store", remedy="bind to a private network: --set bind=INTERFACE",
            )  # fmt: skip
        return data

    def set(self, key: str, value: str | bytes) -> None:
        self.inner.set(self._key(key), self._sealed(key, value))  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        return self._opened(key, self.inner.get(self._key(key)))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        before = self._sealed(key, expected) if expected else b""
        found = self.inner.compare_set(
            self._key(key),
            before,  # type: ignore[arg-type]
            self._sealed(key, desired),  # type: ignore[arg-type]
        )
        return self._opened(key, found)

    def add(self, key: str, amount: int) -> int:
        return self.inner.add(self._key(key), amount)

    def check(self, keys: list[str]) -> bool:
        return self.inner.check([self._key(key) for key in keys])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        hidden = [self._key(key) for key in keys]
        if timeout is None:
            self.inner.wait(hidden)
        else:
            self.inner.wait(hidden, timeout)

    def delete_key(self, key: str) -> bool:
        return self.inner.delete_key(self._key(key))

    def num_keys(self) -> int:
        return self.inner.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        self.inner.set_timeout(timeout)


def meet(job: Job, rank: int, address: str) -> GuardedStore:
    """The store of all ranks: rank 0 serves it at ``address`` and a free port, the others find it.

    Raises:
        UserError: rank 0 did not come within the job's ``hang_timeout_s``.
    """
    timeout = timedelta(seconds=job.hang_timeout_s)
    if rank == 0:
        # The store would listen on every interface: it is given a socket that does not.
        listening = socket.create_server((address, 0), backlog=4096)
        port = listening.getsockname()[1]
        served = dist.TCPStore(
            address, port, job.num_ranks, is_master=True, wait_for_workers=False, timeout=timeout,
            master_listen_fd=listening.detach(),
        )  # fmt: skip
        job.tell("address", host=address, port=port)
        return GuardedStore(served, bytes.fromhex(job.secret))
    deadline = time.monotonic() + job.hang_timeout_s
    while (told := job.told("address")) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 did not come within {job.hang_timeout_s:g} s", where=job.output,
                remedy="is this folder shared by all nodes?",
            )  # fmt: skip
        time.sleep(0.05)
    store = dist.TCPStore(
        told["host"], told["port"], job.num_ranks, is_master=False, wait_for_workers=False,
        timeout=timeout,
    )  # fmt: skip
    return GuardedStore(store, bytes.fromhex(job.secret))

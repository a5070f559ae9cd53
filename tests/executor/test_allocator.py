"""Protects the second use of freed memory: the kernel has no new pages to clear."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from executor.allocator import keep_freed_memory

keep_freed_memory()


def step():
    return [torch.ones(8 * 2**20, dtype=torch.uint8) for _ in range(25)]


for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_tensors_are_made_of_pages_that_were_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 5120  # of 51,200 pages

"""Runs the notebooks and stores them with their outputs, figures as pictures.

    python scripts/run_notebooks.py [experiments/notebooks/what_if.ipynb ...]

Needs the extra ``notebook`` and nbclient; figures become SVG with a Chrome or Chromium that is
installed. Without arguments all notebooks of ``experiments/notebooks``. Prints seconds and bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "experiments" / "notebooks"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb"))
    )
    args = parser.parse_args()
    os.environ["PLOTLY_RENDERER"] = "svg"  # of the kernels, which inherit it
    for path in args.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        began_s = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}},
            record_timing=False,
        ).execute()  # fmt: skip
        notebook.metadata.pop("widgets", None)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1000
        print(f"{path.name}: {time.monotonic() - began_s:.0f} s, {size:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Protects the notebooks: they run from top to bottom, are stored with what they show, small enough
to read on a code host, and a browser draws their figures.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "experiments" / "notebooks"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MOST_BYTES = 600_000
FIGURES = {"what_if": 8, "read_a_trace": 2}
LABELS = {
    "what_if": {"actor_gen", "critic_train", "128 gpus, h200", "response length", "lower bound"},
    "read_a_trace": {"actor_gen", "rank 0", "rank 1", "seconds"},
}
PALETTE = {(0, 114, 178), (230, 159, 0), (0, 158, 115)}


def stored(name: str) -> Any:
    nbformat = pytest.importorskip("nbformat", reason="comes with nbclient")
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook after a run; figures as data, which needs no browser."""
    pytest.importorskip("plotly", reason="figures need the extra notebook")
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    notebook = stored(name)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    client.NotebookClient(notebook, timeout=600, resources=resources).execute()
    return notebook


def check(name: str, notebook: Any) -> None:
    """No error, nothing on stderr, and as many figures with data as there should be."""
    assert not [out for out in outputs(notebook) if out.output_type == "error"]
    assert not [out for out in outputs(notebook) if out.get("name") == "stderr"]
    data = [out.data for out in outputs(notebook) if "data" in out]
    drawn = [d["application/vnd.plotly.v1+json"] for d in data if len(d) and next(iter(d)).endswith(
        "plotly.v1+json")]  # fmt: skip
    assert len(drawn) == FIGURES[name]
    assert all(figure["data"] for figure in drawn)


def test_a_trace_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    check("read_a_trace", run("read_a_trace", monkeypatch))


@pytest.mark.slow
@pytest.mark.timeout(900)  # about a minute on two cores that have nothing else to do
def test_a_70b_run_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    check("what_if", run("what_if", monkeypatch))


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_notebook_is_stored_with_what_it_shows(name: str) -> None:
    notebook, file = stored(name), NOTEBOOKS / f"{name}.ipynb"
    assert file.stat().st_size < MOST_BYTES
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [out.data["image/svg+xml"] for out in outputs(notebook)
                if "image/svg+xml" in out.get("data", {})]  # fmt: skip
    assert len(pictures) == FIGURES[name]
    shown = {text for svg in pictures for text in re.findall(r">([^<>]+)</text>", svg)}
    assert shown >= LABELS[name]
    assert not [out for out in outputs(notebook) if out.get("name") == "stderr"]
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", file.read_text())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_browser_draws_a_notebook(name: str, tmp_path: Path) -> None:
    """Its HTML with no network: every figure is a picture, and has the palette's colours."""
    nbconvert = pytest.importorskip("nbconvert")
    text, _ = nbconvert.HTMLExporter().from_notebook_node(stored(name))
    file, picture = tmp_path / "notebook.html", tmp_path / "notebook.png"
    file.write_text(text)
    assert CHROMIUM is not None
    subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000",
         "--window-size=1300,6000", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--screenshot={picture}", file.as_uri()],
        check=True, capture_output=True, timeout=180,
    )  # fmt: skip
    image = pytest.importorskip("PIL.Image").open(picture).convert("RGB")
    seen = {colour for count, colour in image.getcolors(1 << 24) if count > 300}
    assert seen >= PALETTE

"""Boards that show a run's numbers and answers beside the JSONL: TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from executor.optional import optional_package
from planner.algorithm import config_to_dict

Row = Mapping[str, Any]  # of a table of answers


class Board(Protocol):
    """Somewhere else that the numbers are shown."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def table(self, step: int, rows: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Events of the installed TensorBoard; a table of answers is a text."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        self.writer.add_text("samples", markdown(rows), step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.wandb = import_wandb()
        # One id an output folder: a resumed run goes on in the same curves.
        name = "-".join(folder.resolve().parts[-2:])
        self.run = self.wandb.init(
            project=project, name=name, id=name, resume="allow", dir=str(folder),
            config=dict(config),
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        columns = list(rows[0]) if rows else []
        data = [[row[column] for column in columns] for row in rows]
        self.run.log({"samples": self.wandb.Table(columns=columns, data=data)}, step=step)

    def close(self) -> None:
        self.run.finish()


def import_wandb() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    return optional_package(
        "wandb", where="wandb_project", remedy="pip install wandb, or leave wandb_project empty"
    )


def open_boards(folder: Path, config: Any, *, first_step: int) -> list[Board]:
    """TensorBoard where it is installed, Weights & Biases where ``wandb_project`` asks for it."""
    boards: list[Board] = []
    with contextlib.suppress(ImportError):  # an extra; JSONL has the same numbers
        boards.append(TensorBoard(folder / "tensorboard", first_step=first_step))
    if config.wandb_project:
        boards.append(WandB(config.wandb_project, folder, config_to_dict(config)))
    return boards


def markdown(rows: Sequence[Row]) -> str:
    """A table of answers; a cell's line breaks and bars do not break it.

    >>> print(markdown([{"prompt": "a|b", "reward": 0.5}]))
    | prompt | reward |
    | --- | --- |
    | a\\|b | 0.5 |
    """

    def line(cells: Sequence[Any]) -> str:
        texts = [str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells]
        return f"| {' | '.join(texts)} |"

    names = list(rows[0]) if rows else []
    return "\n".join(
        [line(names), line(["---"] * len(names)), *(line(list(r.values())) for r in rows)]
    )

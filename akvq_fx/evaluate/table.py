"""Recipe x model x task: `fill` measures what a store does not hold yet, `markdown` writes the table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Protocol

import akvq_fx
from akvq_fx.evaluate.settings import described
from akvq_fx.evaluate.store import Store


class Column(NamedTuple):
    """One measure: its name in a row, its title, decimals, and whether its standard error is written."""

    name: str
    title: str
    decimals: int = 3
    error: bool = True


class Suite(Protocol):
    """Tasks of one model. what: all that a cell's numbers depend on but the setting; headline: measure of wide."""

    model: str
    tasks: Sequence[str]
    columns: Sequence[Column]
    headline: str

    def what(self, task: str) -> dict[str, Any]: ...
    def count(self, task: str) -> int: ...

    def under(self, options: Mapping[str, Any] | None) -> AbstractContextManager[Callable[[str, int], dict]]:
        """measure(task, index of the sample) -> row, under these options."""
        ...


def fill(
    suite: Suite, settings: Mapping[str, Mapping[str, Any] | None], store: Store, progress: Callable | None = None
) -> list[dict]:
    """Measure every task under every setting, except samples that the store has already, and return the table's rows.

    settings   by the name that the table shows, options of the backend; None: the model's own cache
    progress   tqdm.tqdm, or None for no bars
    A row: model, task, setting, samples, and {measure: [mean, standard error or None]}. A setting is compiled once for
    all tasks, and not at all where nothing is missing.
    """
    cells = {}
    for name, options in settings.items():
        with ExitStack() as stack:
            measure = None
            for task in suite.tasks:
                what, count = cell_of(suite, task, options), suite.count(task)
                done = len(store.rows(what))
                if done < count:
                    measure = measure or stack.enter_context(suite.under(options))
                    title = f"{suite.model} {task} {name}"
                    bar = progress and progress(total=count, initial=done, desc=title, unit="sample", file=sys.stderr)
                    for index in range(done, count):
                        store.add(what, measure(task, index))
                        if bar:
                            bar.update()
                    if bar:
                        bar.close()
                cells[task, name] = store.rows(what)[:count]
    return [
        {
            "model": suite.model,
            "task": task,
            "setting": name,
            "samples": len(cells[task, name]),
            "measures": {column.name: list(mean(cells[task, name], column.name)) for column in suite.columns},
        }
        for task in suite.tasks
        for name in settings
    ]


def cell_of(suite: Suite, task: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """All that a cell's numbers depend on, its key in a store."""
    return {**suite.what(task), "options": described(options), "akvq_fx": akvq_fx.__version__}


def mean(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """Mean over the samples that have this measure, and its standard error: s / sqrt(n), s with n - 1.

    For shares of right answers that is sqrt(p (1 - p) / (n - 1)). No samples have no mean, one sample no error: None.
    """
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return None, None
    average = sum(values) / len(values)
    if len(values) == 1:
        return average, None
    variance = sum((value - average) ** 2 for value in values) / (len(values) - 1)
    return average, (variance / len(values)) ** 0.5


def markdown(table: Sequence[Mapping[str, Any]], columns: Sequence[Column], headline: str) -> str:
    """All measures, one line a cell; before it, if there are several tasks, the headline by setting and task."""
    tasks = list(dict.fromkeys(row["task"] for row in table))
    lines = [*wide(table, next(c for c in columns if c.name == headline), tasks), ""] if len(tasks) > 1 else []
    lines += head(["model", "task", "setting", "samples", *(column.title for column in columns)])
    for row in table:
        cells = [text(row["measures"][column.name], column) for column in columns]
        lines.append(line([row["model"], row["task"], row["setting"], str(row["samples"]), *cells]))
    return "\n".join(lines)


def wide(table: Sequence[Mapping[str, Any]], column: Column, tasks: Sequence[str]) -> list[str]:
    """Lines of one measure: models and settings down, tasks across, then the mean over tasks with its error."""
    found = {(row["model"], row["setting"], row["task"]): row["measures"][column.name] for row in table}
    lines = head(["model", "setting", *tasks, f"mean {column.title}"])
    for model, setting in dict.fromkeys((model, setting) for model, setting, _ in found):
        cells = [found.get((model, setting, task), [None, None]) for task in tasks]
        known = [cell for cell in cells if cell[0] is not None]
        average = sum(cell[0] for cell in known) / len(known) if known else None
        error = sum(cell[1] ** 2 for cell in known) ** 0.5 / len(known) if known and all_errors(known) else None
        lines.append(line([model, setting, *(text(cell, column) for cell in [*cells, [average, error]])]))
    return lines


def all_errors(cells: Sequence[Sequence[float | None]]) -> bool:
    return all(error is not None for _, error in cells)


def text(cell: Sequence[float | None], column: Column) -> str:
    """mean ± error; without the error where the column has none or one sample gives none; "-" for no mean."""
    value, error = cell
    if value is None:
        return "-"
    shown = f"{value:.{column.decimals}f}"
    return f"{shown} ± {error:.{column.decimals}f}" if column.error and error is not None else shown


def head(titles: Sequence[str]) -> list[str]:
    return [line(titles), "|" + "---|" * len(titles)]


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

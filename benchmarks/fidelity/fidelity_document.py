"""docs/fidelity.md from a store: tables and how they were made. Text between the marks is kept."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fidelity_parts import PARTS, settings_of
from suites import TextTasks, VisionTasks
from weights import SOURCES

from akvq_fx.evaluate.table import head, line, text, wide

BEGIN, END = "<!-- findings: written by hand, kept by a re-run -->", "<!-- end of findings -->"
EMPTY = "Nothing written yet."
COMMAND = "python benchmarks/fidelity/fidelity.py"
MEASURES = """\
- Of text, per predicted token, p from the model's own cache and p' from the packed one, natural logarithms: dNLL is
  log p(next) - log p'(next), KL is sum p log(p / p'), top-1 agreement is argmax p = argmax p', TV is sum |p - p'| / 2.
  Own NLL is of the model's own cache. The mean over a window's tokens is one sample.
- bits: per cached number after the last call, every overhead and spare capacity counted, as a model of 16 bits would
  have them; layers that stay unpacked count with 16. For recipes that are simulated: what a real cache of the method
  would take.
- ± is the standard error of the mean over windows or samples, s / sqrt(n). "-": not measured.
- The model is compiled with the backend (`inner="eager"`, `value_rotation="online"`): the product is measured."""


def findings_of(path: Path) -> str:
    """The text between the marks of a document, EMPTY where there is no document yet.

    Raises ValueError for a file without the two marks: it would be lost.
    """
    if not path.exists():
        return EMPTY
    content = path.read_text(encoding="utf-8")
    begin, end = content.find(BEGIN), content.find(END)
    if content.count(BEGIN) != 1 or content.count(END) != 1 or end < begin:
        raise ValueError(f"{path} has not both marks around its findings, once each: {BEGIN!r} and {END!r}. Put them "
                         "back, or name another file with --markdown")  # fmt: skip
    return content[begin + len(BEGIN) : end].strip("\n")


def write(path: Path, shown: Mapping[str, Any], missing: Iterable[str]) -> None:
    """Write the document; `shown` as fidelity.py keeps it in its store, `missing` are lines on what was not found."""
    content = document(shown, missing, findings_of(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(content, encoding="utf-8")
    os.replace(beside, path)


def document(shown: Mapping[str, Any], missing: Iterable[str], findings: str) -> str:
    parts = {part: with_results(shown["parts"].get(part, {})) for part in PARTS}
    blocks = ["# What a packed cache changes: fidelity", *summary(shown, parts, list(missing))]
    for part, entries in parts.items():
        if entries:
            blocks += [f"## {PARTS[part].title}", PARTS[part].about]
        for model, entry in entries.items():
            blocks += section(part, model, entry)
    return "\n\n".join([*blocks, "## Findings", f"{BEGIN}\n{findings}\n{END}"]) + "\n"


def with_results(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Models of a part that have results, in the order of the sources."""
    return {
        name: entries[name]
        for name in SOURCES
        if name in entries and (entries[name]["rows"] or entries[name]["failed"])
    }


def summary(shown: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], missing: list[str]) -> list[str]:
    """What was measured, on what, how much of it, when and with what."""
    texts = (entry["versions"] for entries in parts.values() for entry in entries.values())
    versions = sorted({version for text in texts for version in text.split("; ")})
    blocks = [
        "For whoever wants to know how much a model loses with its cache packed, by recipe, option and length. Written "
        f"by one command. `{shown['json']}` holds every sample, and a run that was stopped goes on from it:",
        f"```bash\n{COMMAND}\n```",
    ]
    done = [
        [PARTS[part].title, SOURCES[name].title, str(settings), samples_of(entry["rows"]), entry["day"]]
        for part, entries in parts.items()
        for name, entry in entries.items()
        if (settings := len({row["setting"] for row in entry["rows"]}))
    ]
    blocks += table(["part", "model", "settings", "windows or samples each", "measured"], done)
    models = [
        [
            SOURCES[name].title,
            shown["weights"][name]["file"],
            shown["weights"][name]["digest"],
            packed_layers(name, parts),
        ]
        + [SOURCES[name].about]
        for name in SOURCES
        if name in shown["weights"]
    ]
    blocks += table(["model", "weights", "sha256", "packed layers", "about"], models)
    texts = [
        [name, text["about"], f"{text['characters']:,}", text["digest"]]
        for name, text in shown["texts"].items()
        if any(row["task"] == name for entries in parts.values() for entry in entries.values() for row in entry["rows"])
    ]
    blocks += table(["text", "what", "characters", "sha256"], texts)
    blocks += ["Versions: " + "; ".join(versions) + "."] if versions else []
    blocks += ["Not found in the last run:\n\n" + "\n".join(f"- {entry}" for entry in missing)] if missing else []
    return [*blocks, MEASURES]


def packed_layers(name: str, parts: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [row for entries in parts.values() for row in entries.get(name, {"rows": []})["rows"]]
    return ", ".join(sorted({row["layers"] for row in rows if "layers" in row})) or "-"


def samples_of(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({row["samples"] for row in rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as one block; nothing where there are no rows."""
    return ["\n".join([*head(titles), *map(line, rows)])] if rows else []


def section(part: str, model: str, entry: Mapping[str, Any]) -> list[str]:
    """Tables of one model in one part. Settings that the part no longer has are left out."""
    vision, pages = SOURCES[model].vision, PARTS[part].pages
    order = list(settings_of(part, vision))
    rows = [row for row in entry["rows"] if row["setting"] in order]
    rows.sort(key=lambda row: order.index(row["setting"]))
    blocks = [f"### {SOURCES[model].title}", *(image_tables(rows) if vision and not pages else text_tables(rows))]
    failed = [f"- {name}: {reason}" for name, reason in entry["failed"].items()]
    return blocks + (["Not measured:\n\n" + "\n".join(failed)] if failed else [])


def text_tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table a text and length of the prefix."""
    columns, blocks = TextTasks.columns, []
    for task, at in dict.fromkeys((row["task"], row["at"]) for row in rows):
        of = [row for row in rows if (row["task"], row["at"]) == (task, at)]
        cells = [
            [row["setting"], str(row["samples"]), *(text(row["measures"][column.name], column) for column in columns)]
            for row in of
        ]
        blocks += [f"{task}: {at}", *table(["setting", "windows", *(column.title for column in columns)], cells)]
    return blocks


def image_tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings down and tasks across, a table each for accuracy and loss; before them bits and samples."""
    columns, blocks = {column.name: column for column in VisionTasks.columns}, []
    for at in dict.fromkeys(row["at"] for row in rows):
        of = [{**row, "model": ""} for row in rows if row["at"] == at]
        tasks, cells = list(dict.fromkeys(row["task"] for row in of)), []
        for setting in dict.fromkeys(row["setting"] for row in of):
            mine = [row for row in of if row["setting"] == setting]
            bits = sum(row["measures"]["bits"][0] for row in mine) / len(mine)
            cells.append([setting, f"{bits:.2f}", samples_of(mine)])
        blocks += [f"{at[:1].upper()}{at[1:]}", *table(["setting", "bits", "samples of each task"], cells)]
        for name, title in (("accuracy", "Accuracy"), ("nll", "NLL per answer token")):
            blocks += [title, "\n".join(without_first(wide(of, columns[name], tasks)))]
    return blocks


def without_first(lines: Sequence[str]) -> list[str]:
    """Table lines without their first column, which is the model, the same in all."""
    return ["|" + line.split("|", 2)[2] for line in lines]

"""Measure what a packed cache changes in the predictions of trained models; writes docs/fidelity.md and .json.

    python benchmarks/fidelity/fidelity.py [--part models,ablation,...] [--model smollm2,qwen,...] [--seconds 3600]
    python benchmarks/fidelity/fidelity.py --windows 2 --samples 2 --task match        a quick look
    python benchmarks/fidelity/fidelity.py --seconds 0                                 only write the document again

models   every recipe on text, language models       images     every recipe on multi-image questions
ablation one thing more, one thing less              context    prefixes of 1,024 to 8,000 tokens
pivots   with and without                            window     recent window of 0 to 128
text-bits  text at 4 bits in the first layers, or not
copying  tokens that stood 6,000 before                short      2,048 tokens after a prompt of 64

The JSON file holds every sample: a stopped run continues where it stopped, more windows or samples add
to those that it has, and parts that are not asked for stay in the document as they are. Weights and texts are found
where their packages are installed or at the paths given; what is not found is left out, and the document says how to
get it. Nothing is downloaded. Findings are written by hand, between the two marks in the document, and are kept. Code
that changes within one version of the package does not show: remove the JSON file to measure anew.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fidelity_document
import torch
from fidelity_parts import ASKED, PARTS, Part, settings_of
from suites import LanguageModel, PagesTasks, SeeingModel, TextTasks, VisionTasks
from texts import HOW, Text, file_text, handbook, python_help
from weights import CACHE, SOURCES, Source, digest

import akvq_fx
from akvq_fx.evaluate import Store, fill
from akvq_fx.evaluate.table import Suite, cell_of, mean

LONGEST = 8192  # tokens of a piece of text in the part on length
DOCS = Path(__file__).resolve().parents[2] / "docs"


class OutOfTime(Exception):
    """The seconds are used up; what was measured is stored."""


class Results(Store):
    """A Store that ends the run after the sample in which its seconds are used up. The document is made of `shown`."""

    def __init__(self, path: Path, seconds: float | None):
        super().__init__(path)
        self.measured = 0  # samples of this run
        self.end = None if seconds is None else time.monotonic() + seconds
        self.shown = self.content.setdefault("shown", {"json": path.name, "parts": {}, "weights": {}, "texts": {}})

    def check(self) -> None:
        if self.end is not None and time.monotonic() >= self.end:
            raise OutOfTime

    def add(self, what: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        super().add(what, row)
        self.measured += 1
        self.check()

    def write(self) -> None:
        """Like the base class, but one line a cell, so that the file is small and diffs are readable."""
        rest = {name: value for name, value in self.content.items() if name != "cells"}
        cells = ",\n".join(f"{json.dumps(key)}: {json.dumps(cell)}" for key, cell in self.content["cells"].items())
        beside = self.path.with_name(self.path.name + ".part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(rest)[:-1] + ',\n"cells": {\n' + cells + "\n}}\n")
        os.replace(beside, self.path)


def main(arguments: list[str] | None = None) -> int:
    args = arguments_of(arguments)
    try:
        fidelity_document.findings_of(args.markdown)
        results = Results(args.json, args.seconds)
        texts, missing = texts_of(args)
    except (OSError, ValueError) as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 1
    found = {}
    for name in args.model:
        path = getattr(args, name) or SOURCES[name].find(args.cache)
        if path is not None and path.exists():
            found[name] = path.resolve()
            show_weights(results.shown, name, found[name])
        else:
            missing.append(f"weights of {SOURCES[name].title}: {SOURCES[name].how}")
    for text in texts:
        show_text(results.shown, text)
    code = 0
    try:
        for name, path in found.items():
            try:
                measure_model(args, SOURCES[name], path, texts, results, missing)
            except (OSError, ValueError) as error:
                print(f"fidelity: {SOURCES[name].title}: {error}", file=sys.stderr)
                code = 1
    except OutOfTime:
        print("fidelity: the seconds are used up; the same command goes on", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nfidelity: stopped; {args.json} keeps what was measured, the same command goes on", file=sys.stderr)
        code = 130
    results.write()
    fidelity_document.write(args.markdown, results.shown, missing)
    return code


def measure_model(
    args, source: Source, path: Path, texts: Sequence[Text], results: Results, missing: Sequence[str]
) -> None:
    """All asked parts of one model, so that its weights are loaded once and freed before the next one's."""
    model = None if source.vision else LanguageModel(source, path, getattr(torch, args.dtype), args.device)
    vision = functools.cache(functools.partial(vision_tasks, args, source, path))
    for name in args.part:
        part = PARTS[name]
        if source.name not in part.models:
            continue
        entry = results.shown["parts"].setdefault(name, {}).setdefault(source.name, {"rows": [], "failed": {}})
        if part.pages:
            suites = page_suites(args, part, source, path, vision(False), texts)
        elif source.vision:
            suites = [(vision(part.every_task), f"{args.images} images a sample, {numerics(args)}")]
        else:
            suites = text_suites(args, part, model, texts if part.every_text else texts[:1])
        for suite, at in suites:
            settings, before = settings_of(name, source.vision), results.measured
            if args.setting:
                settings = {name: options for name, options in settings.items() if name in args.setting}
            try:
                measure(suite, settings, results, entry, at)
            finally:  # also where the run is stopped: then the document shows what there is
                merge(entry["rows"], rows_held(suite, settings, results, at))
                if results.measured > before or "day" not in entry:
                    entry |= {"day": f"{datetime.date.today()}", "versions": versions()}
        results.write()
        fidelity_document.write(args.markdown, results.shown, missing)
    if model is not None:
        model.__dict__.clear()
    gc.collect()


def measure(suite: Suite, settings: Mapping[str, Any], results: Results, entry: dict[str, Any], at: str) -> None:
    """fill, a setting at a time. A setting that raises is reported in the document, and the others go on."""
    from tqdm import tqdm

    for name, options in settings.items():
        results.check()
        entry["failed"].pop(f"{name}, {at}", None)
        try:
            fill(suite, {name: options}, results, tqdm)
        except OutOfTime:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"fidelity: {suite.model}, {name}: {reason}", file=sys.stderr)
            entry["failed"][f"{name}, {at}"] = reason


def rows_held(suite: Suite, settings: Mapping[str, Any], results: Results, at: str) -> list[dict]:
    """A row, as fill returns it, for every task and setting that has a sample; `at` tells runs apart."""
    table = []
    for task in suite.tasks:
        for name, options in settings.items():
            held = results.rows(cell_of(suite, task, options))
            if held:
                measures = {column.name: list(mean(held, column.name)) for column in suite.columns}
                row = {"task": task, "setting": name, "samples": len(held), "measures": measures, "at": at}
                if options is not None and "packed" in held[0]:
                    row["layers"] = f"{held[0]['packed']} of {held[0]['layers']}"
                table.append(row)
    return table


def merge(rows: list[dict], new: Sequence[dict]) -> None:
    """Put new rows in place of those of the same task and setting at the same sizes."""
    key = lambda row: (row["task"], row["setting"], row["at"])
    at = {key(row): index for index, row in enumerate(rows)}
    for row in new:
        if key(row) in at:
            rows[at[key(row)]] = row
        else:
            rows.append(row)


def text_suites(args, part: Part, model: LanguageModel, texts: Sequence[Text]) -> Iterator[tuple[TextTasks, str]]:
    prefixes = args.prefix or part.prefixes
    for prefix in prefixes:
        count = args.count or (part.total - prefix if part.total else part.count)
        calls = f" in calls of {part.step}" if part.step else ""
        what = f"{count} of them copied from {part.copied:,} before its end" if part.copied else f"{count} read over it"
        measured = f", the last {part.last} measured" if part.last else ""
        at = f"prefix of {prefix:,} tokens, {what}{calls}{measured}, {numerics(args)}"
        reach = LONGEST - count if part.last else max(prefixes)  # the same pieces of text as in the part on length
        yield TextTasks(model, texts, args.windows, prefix, count, reach, part.step, part.copied, part.last), at


def page_suites(
    args, part: Part, source: Source, path: Path, images: VisionTasks, texts: Sequence[Text]
) -> Iterator[tuple[PagesTasks, str]]:
    model = SeeingModel(source, path, images, getattr(torch, args.dtype), args.device)
    count = args.count or part.count
    at = f"{args.images} images and a question, {count:,} read after it in calls of {part.step}, {numerics(args)}"
    yield PagesTasks(model, texts, args.windows, images.tasks[0], count, part.step), at


def vision_tasks(args, source: Source, path: Path, every: bool) -> VisionTasks:
    kinds = {"images": args.images, "samples": args.samples, "dtype": getattr(torch, args.dtype), "device": args.device}
    kinds["trust_remote_code"] = True  # the folder that --vlm names is run, as its help says
    return VisionTasks(source, path, args.task or (None if every else ASKED), **kinds)


def show_weights(shown: dict[str, Any], name: str, path: Path) -> None:
    """Note in the document which weights these are, and drop rows of other weights under this name."""
    entry = {"file": path.name, "digest": digest(path)}
    if shown["weights"].get(name, entry)["digest"] != entry["digest"]:
        for models in shown["parts"].values():
            models.pop(name, None)
    shown["weights"][name] = entry


def show_text(shown: dict[str, Any], text: Text) -> None:
    """Note in the document what a text is, and drop rows of another text under this name."""
    entry = {"about": text.about, "characters": len(text.content), "digest": text.digest}
    if shown["texts"].get(text.name, entry)["digest"] != entry["digest"]:
        for models in shown["parts"].values():
            for model in models.values():
                model["rows"] = [row for row in model["rows"] if row["task"] != text.name]
    shown["texts"][text.name] = entry


def numerics(args) -> str:
    return f"{args.dtype} on {args.device}"


def versions() -> str:
    import transformers

    parts = {"akvq_fx": akvq_fx.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return ", ".join(f"{name} {version}" for name, version in parts.items()) + f", Python {platform.python_version()}"


def texts_of(args) -> tuple[list[Text], list[str]]:
    """(texts, lines on what was not found)."""
    if args.text:
        return [file_text(path) for path in args.text], []
    book = handbook(args.handbook)
    return [python_help(), *([book] if book else [])], [] if book else [f"the confirmation text: {HOW}"]


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    def names(known) -> Any:
        def parse(given: str) -> list[str]:
            asked = given.split(",")
            if wrong := [name for name in asked if name not in known]:
                raise argparse.ArgumentTypeError(f"{wrong[0]!r}; accepted, with commas between: {','.join(known)}")
            return asked

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=names(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--setting", nargs="+", metavar="NAME", help="as a table names it; default: all of a part")
    parser.add_argument("--model", type=names(SOURCES), default=list(SOURCES), help="default: all")
    for name, source in SOURCES.items():
        what = "folder with load.py, tasks.py, sprites.pkl" if source.vision else "GGUF file or transformers folder"
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=f"{source.title}: {what}")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="plain texts instead of the usual two")
    parser.add_argument(
        "--handbook", type=Path, metavar="PATH", help="the Debian handbook: folder of pages, or plain text"
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    parser.add_argument("--samples", type=int, default=32, help="samples of each image task")
    parser.add_argument(
        "--task", action="append", help="image task; repeatable. Default: all, or four in the small parts"
    )
    parser.add_argument("--images", type=int, default=14, help="images a sample")
    parser.add_argument("--prefix", type=int, nargs="+", help="tokens that are packed, instead of each part's own")
    parser.add_argument("--count", type=int, help="tokens read over them, instead of each part's own")
    parser.add_argument("--seconds", type=float, help="stop cleanly after about this time")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=DOCS / "fidelity.json")
    parser.add_argument("--markdown", type=Path, default=DOCS / "fidelity.md")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where weights that come in parts are joined")
    args = parser.parse_args(arguments)
    asked = ((part, SOURCES[model].vision) for part in args.part for model in PARTS[part].models)
    known = dict.fromkeys(name for part, vision in asked for name in settings_of(part, vision))
    unknown = [name for name in args.setting or () if name not in known]
    if unknown:
        parser.error(f"--setting: {', '.join(map(repr, unknown))} unknown, accepted: {', '.join(map(repr, known))}")
    args.part = [name for name in PARTS if name in args.part]
    return args


if __name__ == "__main__":
    sys.exit(main())

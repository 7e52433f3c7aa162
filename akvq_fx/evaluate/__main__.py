"""Measure what a packed cache costs a model: a table of settings, models and tasks, with standard errors over samples.

    python -m akvq_fx.evaluate fidelity  --model HuggingFaceTB/SmolLM2-135M --text book.txt --setting akvq
    python -m akvq_fx.evaluate fidelity  --model llava-hf/llava-1.5-7b-hf --prompts prompts.jsonl --setting akvq
    python -m akvq_fx.evaluate images    --folder my-vlm --trust-remote-code --setting none --setting akvq:window=128
    python -m akvq_fx.evaluate milebench --root MileBench --model llava-hf/llava-1.5-7b-hf --setting none --setting akvq

fidelity    how far predictions move against the model's own cache: dNLL, KL, top-1 agreement, 1 - total variation
images      accuracy and loss on multi-image questions of a folder with a model and a task generator, whose code is run
milebench   accuracy on a local copy of MileBench, scored as its released evaluator does, with unanswered ones counted

A setting is a recipe, or a recipe and options after a colon; "none" is the model's own cache. Each is measured by
compiling the model with the backend; weights are left alone. With --json, samples in the file are not measured again,
and a stopped run continues where it stopped (the file does not notice code changes within one version: use a new one
then). A hub name needs a network or a local copy. See `python -m akvq_fx.evaluate fidelity --help` and so on.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRAM = "python -m akvq_fx.evaluate"


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    from akvq_fx.evaluate.settings import NothingPacked, options_of
    from akvq_fx.evaluate.store import Store
    from akvq_fx.evaluate.table import fill, markdown

    try:
        settings = {text: options_of(text) for text in args.setting or args.default_settings}
        store, table, suite = Store(args.json), [], None
        from tqdm import tqdm

        for suite in args.suites(args):
            table += fill(suite, settings, store, functools.partial(tqdm, disable=None))  # bars on a terminal only
    except (OSError, ValueError, ImportError, NothingPacked) as error:
        print(f"akvq_fx.evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = (
            f"{args.json} keeps what was measured; the same command goes on"
            if args.json
            else "nothing is kept without --json"
        )
        print(f"\nakvq_fx.evaluate: stopped; {kept}", file=sys.stderr)
        return 130
    shown = markdown(table, suite.columns, suite.headline)
    print(shown)
    store.put_table(table)
    if args.markdown:
        args.markdown.write_text(shown + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--setting",
        action="append",
        help="none, or recipe[:option=value,...]; repeatable. Default: akvq, and for accuracies none too",
    )
    shared.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    shared.add_argument("--device", default="cpu")
    shared.add_argument("--json", type=Path, help="file of results; read first, so that a run can go on")
    shared.add_argument("--markdown", type=Path, help="write the table there too")
    top = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="fidelity | images | milebench")

    one = commands.add_parser("fidelity", parents=[shared], help="how far predictions move, on a text or on prompts")
    one.add_argument("--model", action="append", required=True, help="hub name or folder; repeatable")
    one.add_argument("--gguf", help="name of the GGUF file in that folder, where weights come as one")
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="UTF-8 text to predict, by a language model")
    source.add_argument(
        "--prompts",
        type=Path,
        help='JSON Lines for a vision-language model: {"prompt": ..., "following": ..., "images": [file, ...]}',
    )
    one.add_argument("--prefix", type=int, default=1024, help="tokens of the text that are packed")
    one.add_argument("--count", type=int, default=192, help="tokens read over them")
    one.add_argument("--windows", type=int, default=4, help="pieces of the text")
    one.add_argument(
        "--step", type=positive, help="tokens read in a call: with few, they are packed as they go; default: all"
    )
    one.set_defaults(suites=fidelity_suites, default_settings=["akvq"])

    two = commands.add_parser("images", parents=[shared], help="multi-image questions of a folder with its own model")
    two.add_argument("--folder", required=True, type=Path, help="holds load.py, tasks.py, sprites.pkl")
    two.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the folder's Python files and unpickle its sprites.pkl: needed",
    )
    two.add_argument("--task", action="append", help="repeatable; default: all that occur with so many images")
    two.add_argument("--images", type=int, default=14, help="images a sample")
    two.add_argument("--samples", type=int, default=32, help="samples a task")
    two.add_argument("--questions", type=int, default=1, help="questions a sample, at most")
    two.add_argument("--split", default="test", help="test or heldout")
    two.set_defaults(suites=image_suites, default_settings=["none", "akvq"])

    three = commands.add_parser("milebench", parents=[shared], help="MileBench, from a local copy")
    three.add_argument("--root", required=True, type=Path, help="folder of the tasks' folders, as released")
    three.add_argument("--model", action="append", required=True, help="hub name or folder; repeatable")
    three.add_argument(
        "--task",
        action="append",
        help="repeatable; all: every one there; default: those there of the AKVQ-VL paper's twelve",
    )
    three.add_argument("--samples", type=int, default=200, help="samples a task, at most")
    three.add_argument("--context", type=int, help="tokens of prompt and answer; longer prompts lose their oldest part")
    three.add_argument("--image-tokens", type=int, default=576, help="tokens of an image, for --context")
    three.add_argument("--new-tokens", type=int, default=512, help="tokens of an answer, at most")
    three.set_defaults(suites=milebench_suites, default_settings=["none", "akvq"])
    return top


def fidelity_suites(args) -> Iterator:
    """One suite a model. The tokenizer, which cuts the text, is loaded with the model, if something is missing."""
    from akvq_fx.evaluate.fidelity import FidelityTask
    from akvq_fx.evaluate.prompts import read_prompts

    source = args.text or args.prompts
    if args.text:
        entries, count = None, args.windows
        about = {"prefix": args.prefix, "count": args.count, "windows": args.windows}
    else:
        entries, about = read_prompts(source), {}
        count = len(entries)
    about |= {"source": hashlib.sha256(source.read_bytes()).hexdigest(), "gguf": args.gguf, **numerics(args)}
    for name in args.model:
        load = functools.cache(functools.partial(load_prompts, args, name, entries))
        yield FidelityTask(label(name), source.stem, count, {"model": name, **about}, load, args.step)


def load_prompts(args, name: str, entries: list[dict] | None) -> tuple:
    """(model, prompts) of one model."""
    from akvq_fx.evaluate.prompts import chat_prompts, text_prompts

    if entries is None:
        model, tokenizer = load_language(args, name)
        text = args.text.read_text(encoding="utf-8")
        return model, text_prompts(tokenizer, text, args.windows, args.prefix, args.count)
    model, processor = load_vision(args, name)
    return model, chat_prompts(processor, entries)


def image_suites(args) -> Iterator:
    import torch

    from akvq_fx.evaluate.vision_tasks import ImageTasks

    kinds = {"images": args.images, "samples": args.samples, "questions": args.questions, "split": args.split}
    kinds |= {"dtype": getattr(torch, args.dtype), "device": args.device, "trust_remote_code": args.trust_remote_code}
    yield ImageTasks(args.folder, args.task, **kinds)


def milebench_suites(args) -> Iterator:
    from akvq_fx.evaluate.milebench import MileBench, paper_tasks_in, tasks_in

    tasks = tasks_in(args.root) if args.task == ["all"] else args.task
    if tasks is None:
        tasks, missing = paper_tasks_in(args.root)
        if missing:
            print(f"not in {args.root}, and left out: {', '.join(missing)}", file=sys.stderr)
    limits = {"context": args.context, "image_tokens": args.image_tokens, "new_tokens": args.new_tokens}
    for name in args.model:
        load = functools.cache(functools.partial(load_vision, args, name))
        about = {"name": name, **numerics(args)}
        yield MileBench(args.root, label(name), load, tasks, samples=args.samples, **limits, about=about)


def load_language(args, name: str) -> tuple:
    """(causal language model, tokenizer). Raises OSError, in one line, where they cannot be had."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return load(args, name, AutoModelForCausalLM, AutoTokenizer, {"gguf_file": args.gguf} if args.gguf else {})


def load_vision(args, name: str) -> tuple:
    """(vision-language model, processor). Raises OSError, in one line, where they cannot be had."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return load(args, name, AutoModelForImageTextToText, AutoProcessor, {})


def load(args, name: str, models, readers, extra: dict) -> tuple:
    import torch

    try:
        reader = readers.from_pretrained(name, **extra)
        model = models.from_pretrained(name, dtype=getattr(torch, args.dtype), **extra)
    except Exception as error:  # what the hub's client raises without a network differs by its version
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if Path(name).exists():
            raise OSError(f"cannot load the model in {name}: {reason}") from error
        raise OSError(
            f"cannot load {name!r}: there is no such folder, and the hub did not give it (no network, no such name, or "
            f"offline mode): {reason}"
        ) from error
    return model.eval().to(args.device), reader


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; accepted: 1 or more")
    return int(text)


def numerics(args) -> dict:
    return {"dtype": args.dtype, "device": args.device.partition(":")[0]}


def label(name: str) -> str:
    """What the table calls a model."""
    return name.rstrip("/").rsplit("/", 1)[-1]


if __name__ == "__main__":
    sys.exit(main())

"""Measure what a packed cache does to a causal language model's predictions, for several settings side by side.

    python -m akvq_fx.evaluate --model HuggingFaceTB/SmolLM2-135M --text book.txt --setting akvq --setting akvq-vl
    python -m akvq_fx.evaluate --model folder --gguf weights.gguf --text book.txt --setting akvq:body_clip=0.9,window=64

Each setting is a recipe, or a recipe and options after a colon. Results go to --json as they come, and settings that are
there already are not measured again; --markdown writes the table. A hub name needs a network or a local copy.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from pathlib import Path

COLUMNS = ("setting", "bits", "dNLL", "KL", "top-1 agreement", "1 - TV", "windows")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m akvq_fx.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="hub name or folder of a causal language model and its tokenizer"
    )
    parser.add_argument("--gguf", help="name of the GGUF file in that folder, where weights come as one")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text to predict")
    parser.add_argument("--setting", action="append", help="recipe[:option=value,...]; repeatable; akvq unless told")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens that are packed")
    parser.add_argument("--count", type=int, default=192, help="tokens read over them")
    parser.add_argument("--windows", type=int, default=4, help="pieces of the text")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file of results; read first, so that a run can go on")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args(arguments)
    try:
        settings = {text: options_of(text) for text in args.setting or ["akvq"]}
        model, tokenizer = load(args)
        table = measure(args, model, tokenizer, settings)
    except (OSError, ValueError) as error:
        print(f"akvq_fx.evaluate: {error}", file=sys.stderr)
        return 1
    print(table)
    if args.markdown:
        args.markdown.write_text(table + "\n")
    return 0


def options_of(text: str) -> dict:
    """recipe[:option=value,...] as backend options. Raises ValueError for what AKVQConfig does not accept."""
    from akvq_fx.config import AKVQConfig

    recipe, _, rest = text.partition(":")
    options: dict = {"recipe": recipe}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"setting {text!r}: {part!r} is no option=value")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    AKVQConfig.from_options(options)
    return options


def load(args):
    """Model and tokenizer. Raises OSError, which says what is missing, where they cannot be had."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra = {"gguf_file": args.gguf} if args.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **extra)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **extra)
    return model.eval().to(args.device), tokenizer


def measure(args, model, tokenizer, settings: dict[str, dict]) -> str:
    from tqdm import tqdm

    from akvq_fx.evaluate import fidelity, windows_of

    text = args.text.read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    windows = windows_of(ids, args.windows, args.prefix + args.count)
    about = [args.model, args.gguf, args.dtype, args.prefix, args.count, args.windows]
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, options in settings.items():
        described = json.dumps([about, hashlib.sha256(text.encode()).hexdigest(), options], sort_keys=True)
        if described not in known:
            with tqdm(total=len(windows), desc=name, unit="window", file=sys.stderr) as bar:
                known[described] = fidelity(model, windows, args.prefix, options, bar.update).to_dict()
            if args.json:
                args.json.write_text(json.dumps(known, indent=1))
        found = known[described]
        both = lambda key, found=found: f"{found[key]:+.4f} ± {found[key + '_error']:.4f}"
        cells = (
            name,
            f"{found['bits']:.2f}",
            both("dnll"),
            f"{found['kl']:.4f}",
            f"{found['agree']:.3f}",
            f"{1 - found['tv']:.4f}",
        )
        lines.append("| " + " | ".join((*cells, str(found["windows"]))) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Measure a model on prompts of your own and write what was found: policy.json, report.md and pictures.

    python -m akvq_fx.analysis --model folder-or-hub-name --images photos --question "What is this?" --out found
    python -m akvq_fx.analysis --model folder --text book.txt --out found --ablate pivots=0,5,15 --ablate window=0,64

With --images every prompt holds --per-prompt pictures of the folder, in the order of their names, before the question.
With --text, prompts are pieces evenly spread over it; --ablate (text only) also measures how packing changes the
predictions after them. Pictures need matplotlib; where it is missing, a line on stderr says that they are left out.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m akvq_fx.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub name or folder of a model and its tokenizer or processor")
    parser.add_argument("--gguf", help="name of the GGUF file in that folder, where weights come as one (text only)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="UTF-8 text")
    source.add_argument("--images", type=Path, help="folder of pictures")
    parser.add_argument("--question", default="Describe the images.", help="asked after the pictures")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to; made where it is missing")
    parser.add_argument("--prompts", type=int, default=4, help="prompts to measure on")
    parser.add_argument("--per-prompt", type=int, default=4, help="pictures in a prompt")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a text prompt")
    parser.add_argument("--queries", type=int, default=64, help="most query tokens of a prompt")
    parser.add_argument(
        "--ratio", type=float, default=2.0, help="attention of a text token over a vision token's in TSA layers"
    )
    parser.add_argument("--ablate", action="append", default=[], help="option=value,value,...; repeatable")
    parser.add_argument("--count", type=int, default=64, help="tokens predicted after each prompt by --ablate")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    try:
        sweeps = dict(map(sweep_of, args.ablate))
        if sweeps and args.images:
            raise ValueError("--ablate predicts the tokens of a text: give --text")
        print(analyse(args, sweeps))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"akvq_fx.analysis: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nakvq_fx.analysis: stopped; {args.out} keeps the files that were written", file=sys.stderr)
        return 130
    return 0


def sweep_of(text: str) -> tuple[str, list]:
    """option=value,value,... Raises ValueError for anything else, or for what AKVQConfig does not accept."""
    from akvq_fx.config import AKVQConfig

    option, equals, rest = text.partition("=")
    if not equals or not rest:
        raise ValueError(f"--ablate {text!r}: accepted: option=value,value,...")
    values = []
    for value in rest.split(","):
        try:
            values.append(ast.literal_eval(value))
        except (SyntaxError, ValueError):
            values.append(value)
        AKVQConfig.from_options({option: values[-1]})
    return option, values


def analyse(args, sweeps: dict[str, list]) -> str:
    """Measure, write the files, and return the calibration's table."""
    from tqdm import tqdm

    from akvq_fx.analysis import ablation, save_figures
    from akvq_fx.analysis.calibrate import calibrate

    args.out.mkdir(parents=True, exist_ok=True)
    model, prompts, following = load_images(args) if args.images else load_text(args)
    with tqdm(total=len(prompts), desc="measuring", unit="prompt", file=sys.stderr, disable=None) as bar:
        calibration = calibrate(model, *prompts, queries=args.queries, ratio=args.ratio, progress=bar.update)
    calibration.save(args.out / "policy.json")
    ablations = []
    for option, values in sweeps.items():
        with tqdm(total=len(values) * len(following), desc=option, unit="prompt", file=sys.stderr, disable=None) as bar:
            ablations.append(ablation(model, following, option, values, progress=bar.update))
    tables = "".join(f"\n## {found.option}\n\n```\n{found}\n```\n" for found in ablations)
    report = f"# {args.model}\n\n```\n{calibration}\n```\n{tables}"
    try:
        pictures = save_figures(calibration, args.out, ablations)
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        pictures = []
    report += "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    (args.out / "report.md").write_text(report)
    return str(calibration)


def load_text(args):
    """(model, prompts, the same prompts with the tokens after them)."""
    from akvq_fx.evaluate.__main__ import load_language
    from akvq_fx.evaluate.fidelity import prompts_of, windows_of

    text = args.text.read_text(encoding="utf-8")
    model, tokenizer = load_language(args, args.model)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0].to(args.device)
    following = prompts_of(windows_of(ids, args.prompts, args.tokens + args.count), args.tokens)
    return model, [prompt.inputs for prompt in following], following


def load_images(args):
    """(model, prompts, nothing to predict)."""
    import torch
    from PIL import Image

    from akvq_fx.evaluate.__main__ import load_vision

    paths = sorted(path for path in args.images.iterdir() if path.suffix.lower() in SUFFIXES)
    groups = [paths[i : i + args.per_prompt] for i in range(0, len(paths), args.per_prompt)][: args.prompts]
    if not groups:
        raise ValueError(f"{args.images} holds no pictures; accepted: {', '.join(SUFFIXES)}")
    dtype = getattr(torch, args.dtype)
    model, processor = load_vision(args, args.model)
    prompts = []
    for group in groups:
        pictures = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in group]
        asked = [{"role": "user", "content": [*pictures, {"type": "text", "text": args.question}]}]
        inputs = processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompts.append(inputs.to(args.device, dtype))
    return model, prompts, []


if __name__ == "__main__":
    sys.exit(main())

"""The parts of docs/fidelity.md: which settings are measured on which models, and what a reader must know of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from akvq_fx import AKVQConfig
from akvq_fx.config import ALWAYS
from akvq_fx.recipes import RECIPES

Settings = Mapping[str, Mapping[str, Any] | None]
# fields in which the default recipe differs from the paper's
WORDS = {
    "center_keys": "centring",
    "balance_keys": "balancing",
    "psa_text_key_bits": "keys of text at 4 bits in every layer",
}
WORDS |= {"window": "half the window"}
NEEDS_VISION = "psa_text_key_bits"
# what layers do not do that keep text among images at more bits
WITHOUT_VISION = {
    "center_blocks": "means of blocks",
    "uneven_keys": "unequal bits of channels",
    "share_pairs": "statistics shared in pairs of channels",
    "symmetric_values": "values without minima",
}
WORDS |= WITHOUT_VISION
DEFAULT, EVEN, PAPER = "akvq", "akvq-even", "akvq-vl"
TEXT = ("smollm2", "qwen", "gemma", "heads128")  # models of the parts on length
# image tasks of the parts that do not take all; settings differ most in these
ASKED = ("match", "retrieval", "counting", "spatial")


@dataclasses.dataclass(frozen=True)
class Part:
    """models: names of weights.SOURCES; prefixes, count: of text windows, read `step` tokens a call, or all in one.

    total: tokens of a window, instead of `count`, so that every prefix is followed by the rest of the same window.
    copied: what is read is not what follows in the text but what stood so many tokens before the end of the prefix.
    last: measured are so many of the predicted tokens, the last; None: all.
    pages: after the images and a question of a sample, by a model that sees.
    every_text, every_task: all of them, else few.
    """

    title: str
    about: str
    models: tuple[str, ...]
    prefixes: tuple[int, ...] = (1024,)
    count: int = 192
    total: int | None = None
    step: int | None = None
    copied: int | None = None
    last: int | None = None
    pages: bool = False
    every_text: bool = False
    every_task: bool = False


def recipes() -> Settings:
    return {name: {"recipe": name} for name in RECIPES}


def added(vision: bool) -> dict[str, tuple[Any, Any]]:
    """Options in which the default recipe differs from the paper's and that matter: (its value, the paper's)."""
    paper = AKVQConfig(recipe=PAPER)
    pairs = {name: (value, getattr(paper, name)) for name, value in RECIPES[DEFAULT].options.items()}
    idle = WITHOUT_VISION if vision else (NEEDS_VISION,)
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b and name not in idle}


def ablation(vision: bool) -> Settings:
    """From plain rounding to the default recipe, adding one thing a row; then the default without one thing each.

    What depends on vision tokens is left out for language models.
    """
    steps = [("RTN, 2 bits", {}), ("+ WHT", {"rotate": True}), ("+ clip 0.8", {"body_clip": 0.8})]
    steps += [("+ window", {"window": 128})]
    if vision:
        steps += [("+ TSA", {"tsa_layers": (0, 1)})]
    found, built = {}, {"recipe": "rtn2"}
    for name, options in steps:
        built = built | options
        found[name] = built
    found[f"+ pivots = {PAPER}"] = {"recipe": PAPER}
    more, last = added(vision), {"recipe": PAPER}
    for number, (name, (value, _)) in enumerate(more.items(), 1):
        last = last | {name: value}
        ends = number == len(more)
        found[f"+ {WORDS.get(name, name)}" + (f" = {DEFAULT}" if ends else "")] = {"recipe": DEFAULT} if ends else last
    away = {"WHT (and so all of keys' changes)": {"rotate": False}}
    away |= {WORDS[name]: {name: paper} for name, (_, paper) in more.items() if name != "window"}
    away |= {"pivots": {"pivots": 0}, "any window": {"window": 0}}
    if vision:
        away |= {"clip": {"body_clip": 1.0}, "TSA": {"tsa_layers": ()}}
    return found | {f"{DEFAULT} without {name}": {"recipe": DEFAULT, **options} for name, options in away.items()}


def both(**options: tuple[Any, ...]) -> Settings:
    """Both recipes under every value of one option."""
    ((name, values),) = options.items()
    return {f"{r}, {name}={v}": {"recipe": r, name: v} for r in (DEFAULT, PAPER) for v in values}


def settings_of(part: str, vision: bool) -> Settings:
    """Settings by the name that the table shows."""
    if part == "models":
        return recipes()
    if part == "images":
        return {"none": None, **recipes()}
    if part == "ablation":
        return {"none": None, **ablation(True)} if vision else ablation(False)
    if part == "pages":
        blocks = {f"{DEFAULT}, center_blocks={ALWAYS}": {"recipe": DEFAULT, "center_blocks": ALWAYS}}
        return {name: {"recipe": name} for name in (DEFAULT, PAPER, "kivi", "rtn4")} | blocks
    if part in ("context", "copying", "short", "grown"):
        apart = {"recipe": DEFAULT, "share_pairs": False}
        less = {f"{DEFAULT}, share_pairs=False": apart}
        less |= {f"{DEFAULT}, share_pairs=False, center_blocks=False": {**apart, "center_blocks": False}}
        less |= {f"{EVEN}, center_blocks=True": {"recipe": EVEN, "center_blocks": True}}
        return {name: {"recipe": name} for name in (DEFAULT, EVEN, PAPER, "kivi", "rtn4")} | less
    if part == "pivots":
        return both(pivots=(15, 0))
    if part == "window":
        return {**both(window=(0, 16, 32, 64, 128)), "kivi": {"recipe": "kivi"}}
    if part == "text-bits":
        fewer = {"recipe": DEFAULT, "psa_text_key_bits": 2}
        return {**both(tsa_layers=((0, 1), ())), f"{DEFAULT}, psa_text_key_bits=2": fewer}
    raise ValueError(f"no part {part!r}; accepted: {', '.join(PARTS)}")


PARTS = {
    "models": Part(
        "Recipes on language models",
        "Every recipe at its own options. A window of text is a prefix that is packed and the tokens after it, read "
        "in one call: they see each other unpacked, and the prefix as it was packed, its most recent tokens as the "
        "recipe keeps them.",
        ("smollm2", "qwen", "gemma"),
        every_text=True,
    ),
    "images": Part(
        "Recipes on a vision-language model",
        "The prompt up to its last image token is packed, then a question is read over it. Accuracy is exact match of"
        " the greedy answer. `none` is the model's own cache.",
        ("vlm",),
        every_task=True,
    ),
    "ablation": Part(
        "Ablation",
        "As Table III of the paper: one thing more in each row, up to the default recipe; then the default recipe "
        "with one thing taken away. TSA needs vision tokens and is measured on the vision-language model only.",
        ("smollm2", "qwen", "vlm"),
    ),
    "context": Part(
        "Length of the context",
        "The same predicted tokens after prefixes of different length. The longest and the tokens read over it make "
        "8,192, which is SmolLM2's limit.",
        TEXT,
        prefixes=(1024, 4096, 8000),
        every_text=True,
    ),
    "copying": Part(
        "Copying from far back",
        "Read over the prefix are tokens that stand 6,000 before its end, which the model copies: every one depends on"
        " finding one place among thousands.",
        TEXT,
        prefixes=(8000,),
        copied=6000,
        every_text=True,
    ),
    "short": Part(
        "A long text after a short prompt",
        "The statistics that a cache is packed by come from a prompt of 64 tokens; 2,048 more are read 64 at a time.",
        TEXT,
        prefixes=(64,),
        count=2048,
        step=64,
        every_text=True,
    ),
    "grown": Part(
        "A cache that grew from a short prompt",
        "The tokens that are predicted after 4,096 tokens in the part on length, here after a prompt of 4,096 and after"
        " a prompt of 64 with 4,032 tokens more. Both go on 64 tokens a call: tokens of one call see each other "
        "unpacked, so calls of one size are compared.",
        TEXT,
        prefixes=(4096, 64),
        total=4288,
        step=64,
        last=191,
        every_text=True,
    ),
    "pages": Part(
        "Pages of text after images",
        "The statistics that a cache is packed by come from a prompt of images and a question; 2,048 tokens of text "
        "are read after it, 64 at a time. Fine-tuned on answers of a few words, the model reads prose worse than "
        "SmolLM2 does.",
        ("vlm",),
        count=2048,
        step=64,
        pages=True,
        every_text=True,
    ),
    "pivots": Part(
        "Pivots",
        "Pivot tokens at 16 bits in PSA layers: 15 as in the paper, or none.",
        ("smollm2", "qwen", "vlm"),
    ),
    "window": Part(
        "Recent window",
        "The most recent tokens at 16 bits: 128 as in the paper, fewer, or none. The tokens after the prefix are read"
        " 16 at a time, so that they leave the window one after the other, as generated tokens do.",
        ("smollm2", "qwen", "vlm"),
        step=16,
    ),
    "text-bits": Part(
        "Text tokens in TSA layers",
        "tsa_layers=(0, 1): text tokens of layers 0 and 1 at 4 bits, no pivots there. tsa_layers=(): these layers are"
        " as the later ones. psa_text_key_bits=2: keys of text at 2 bits in all other layers, as in the paper.",
        ("vlm",),
    ),
}

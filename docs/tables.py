"""Write the tables of docs/options.md, docs/recipes.md and docs/scale.md: defaults, accepted values, bits and bytes are
the code's, words are from here.

python docs/tables.py            rewrites these pages between their markers
python docs/tables.py --check    exits with 1 where a page is not what would be written
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import torch

from akvq_fx.config import CHOICES, AKVQConfig
from akvq_fx.cost import recipe_bits, recipe_table
from akvq_fx.recipes import RECIPES

DOCS = Path(__file__).parent
BEGIN, END = "<!-- table: begin, written by docs/tables.py -->", "<!-- table: end -->"
PAPER, OURS = "arXiv 2501.15021", "ours"

# option: (meaning, source)
OPTIONS = {
    "recipe": ("the method; see [recipes.md](recipes.md)", ""),
    "body_bits": (
        "bits of every token that is not kept at more bits; 16 is lossless mode, in which nothing is quantized",
        PAPER,
    ),
    "window": ("most recent tokens, kept at 16 bits in every layer", f"{PAPER}, section IV-A"),
    "pivots": ("pivot tokens, kept at 16 bits in PSA layers", f"{PAPER}, figure 8"),
    "tsa_layers": (
        'layers that attend to text first; `"auto"`: as `akvq_fx.calibrate` measured, else the paper\'s table for '
        "models that it names, else an error",
        f"{PAPER}, table I",
    ),
    "text_bits": (
        "bits of text tokens in TSA layers; 16 leaves these layers unpacked, "
        "no more than `body_bits` makes them like the others",
        f"{PAPER}, section III-B",
    ),
    "psa_text_key_bits": (
        "bits of the keys of text tokens in PSA layers, where vision tokens are known; 2 takes that back",
        OURS,
    ),
    "value_rotation": (
        '`"online"`: values are rotated when they are written, and attention rotates its output back; `"fold"`: by '
        'copies of the projection weights where the graph proves it exact, else online; `"off"`',
        f"{PAPER}, section III",
    ),
    "rotate": (
        "Walsh-Hadamard rotation of keys and values; without it nothing is centred or balanced either; off in lossless "
        "mode",
        f"{PAPER}, section III",
    ),
    "center_keys": ("subtract each head's mean key, which softmax does not notice", OURS),
    "center_blocks": (
        "codes of keys are differences from the mean of their block of 64 tokens, so that centres do not go stale; not "
        'in layers that keep text at more bits (prompts with images), but with `"always"`; see '
        "[recipes.md](recipes.md#means-of-blocks)",
        OURS,
    ),
    "balance_keys": ("divide key channels and multiply query channels by one gain: an exact identity", OURS),
    "uneven_keys": (
        "of a head's channels the quarter that moves scores most has 4 bits, the last quarter none; not in layers that "
        "keep text at more bits; see [recipes.md](recipes.md#prompts-without-images)",
        OURS,
    ),
    "share_pairs": (
        "with `uneven_keys`: the two channels that a rotary embedding turns into each other are ranked and balanced by "
        "statistics in common, the more the shorter the prompt; see [recipes.md](recipes.md#prompts-without-images)",
        OURS,
    ),
    "symmetric_values": ("values have a scale and no minimum; not in layers whose text has more bits", OURS),
    "body_clip": (
        "factor by which the range of a group is shrunk before it is quantized; with more than 2 bits, 1",
        f"{PAPER}, section IV-A",
    ),
    "text_clip": ("the same for text tokens", f"{PAPER}, section IV-A"),
    "group": (
        "channels that share a scale and a minimum; a head dim that is no multiple of it is one group",
        f"{PAPER}, section IV-A",
    ),
    "prefill": (
        '`"exact"`: the prompt attends to its own unpacked tokens; `"quantized"`: to its packed ones, '
        "as the paper evaluates",
        OURS,
    ),
    "pivot_mode": (
        '`"topk"`: every slot goes to the largest activations; `"massive"`: only to tokens above both limits below',
        OURS,
    ),
    "massive_floor": ("smallest activation that is called massive", "arXiv 2402.17762"),
    "massive_ratio": ("the same, as a multiple of the layer's median", "arXiv 2402.17762"),
    "capacity_step": ("tokens by which a growing cache is enlarged", OURS),
    "cuda_graphs": ("on a CUDA device, decode steps are replayed from CUDA graphs", OURS),
    "kept_share": (
        "share of the device's memory, or of the part that `torch.cuda.set_per_process_memory_fraction` leaves this "
        "process, that CUDA graphs may keep of finished caches, so that later generations capture "
        "nothing; 0 keeps none",
        OURS,
    ),
    "share_layers": ("layers of a graph that are alike are compiled once, and share what was compiled", OURS),
    "compile_uncached": (
        "graphs without a cache, such as vision towers and projectors, go to the inner compiler too; else they run as "
        "they are",
        OURS,
    ),
    "compile_prompts": (
        "graphs of prompts go to the inner compiler too; else they run as they are, with their caches packed",
        OURS,
    ),
    "inner": ("compiler of the rewritten graph", ""),
    "mode": (
        "Inductor's mode. `mode=` of `torch.compile` is this option. "
        '`"reduce-overhead"` is `cuda_graphs` with a warning where none can be made',
        "",
    ),
}

# option: what it takes, where that is no list of choices
ACCEPTED = {
    "recipe": "a name of recipes.md",
    "tsa_layers": 'layer numbers, or `"auto"`',
    "group": "a multiple of 8",
    "capacity_step": "an integer >= 1",
    **dict.fromkeys(("window", "pivots"), "an integer >= 0"),
    **dict.fromkeys(("body_clip", "text_clip"), "a number in (0, 1]"),
    **dict.fromkeys(("massive_floor", "massive_ratio"), "a number >= 0"),
    **dict.fromkeys(("rotate", "center_keys", "balance_keys"), "`True`, `False`"),
    "center_blocks": '`True`, `False`, `"always"`',
    **dict.fromkeys(("uneven_keys", "share_pairs", "symmetric_values"), "`True`, `False`"),
    **dict.fromkeys(("cuda_graphs", "share_layers", "compile_uncached", "compile_prompts"), "`True`, `False`"),
    "kept_share": "a number in [0, 1]",
    "mode": 'a mode of Inductor, with `inner="inductor"`',
}

# recipe: what it does
RECIPE_WORDS = {
    "akvq": "AKVQ-VL with centred and balanced keys, 4-bit keys of text in every layer and half the window; in prompts "
    "without images a key's channels have 4, 2 and 0 bits by their part in scores, blocks of keys have means of their "
    "own, and values no minimum",
    "akvq-even": "the same without what it does in prompts without images",
    "akvq-vl": "the paper's choices: text first in early layers, pivots in late ones, Walsh-Hadamard, 2 bits, folded "
    "values; its prompts are exact",
    "rtn2": "round to nearest per token, groups of 128; the baseline of every paper here",
    "rtn4": "the same at 4 bits",
    "smoothquant": "keys divided and queries multiplied per channel, then round to nearest at 2 bits",
    "kivi": "keys per channel in blocks of 128 tokens, values per token, groups of 32, recent tokens at 16 bits",
    "kivi-g128": "the same with groups of 128",
    "skvq": "channels reordered by clustering, clipped groups with fp8 ranges, recent and first tokens at 16 bits",
    "quarot": "Walsh-Hadamard of keys and values, then round to nearest; no token at 16 bits",
    "turboquant": "rotated unit vectors, each coordinate at the best levels of a normal distribution; "
    "without the QJL residual",
    "calibquant": "vision tokens at 1 bit per channel with calibrated scores, text at 16 bits",
    "fp8": "every number as e4m3 without a scale",
}


def code(value) -> str:
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def default_of(name: str) -> str:
    """What AKVQConfig() has, and what recipe="akvq-vl" has where that differs."""
    if name == "mode":
        return "none"
    own, paper = (getattr(AKVQConfig(recipe=recipe), name) for recipe in ("akvq", "akvq-vl"))
    if name == "recipe" or own == paper:
        return code(own)
    return f"{code(own)}; with `akvq-vl` {code(paper)}"


def accepted(name: str) -> str:
    return ", ".join(map(code, CHOICES[name])) if name in CHOICES else ACCEPTED.get(name, "")


def options_table() -> str:
    fields = [field.name for field in dataclasses.fields(AKVQConfig)]
    missing = sorted(set(fields) ^ OPTIONS.keys())
    if missing:
        raise SystemExit(f"docs/tables.py: fields of AKVQConfig and OPTIONS differ in {', '.join(missing)}")
    rows = [("option", "default", "accepted", "meaning", "source"), ("---",) * 5]
    rows += [(f"`{name}`", default_of(name), accepted(name), *OPTIONS[name]) for name in OPTIONS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def paper_of(source: str) -> str:
    """A recipe's source with its arXiv number as a link."""
    words = source.replace(",", " ,").split()
    linked = [f"[{w}](https://arxiv.org/abs/{w})" if w[:4].isdigit() and "." in w else w for w in words]
    return " ".join(linked).replace(" ,", ",")


def recipes_table() -> str:
    missing = sorted(set(RECIPES) ^ RECIPE_WORDS.keys())
    if missing:
        raise SystemExit(f"docs/tables.py: recipes and RECIPE_WORDS differ in {', '.join(missing)}")
    table = recipe_table()
    rows = [("recipe", "what it does", "cache", *(f"bits at {count:,} tokens" for count in table.tokens), "source")]
    rows += [("---",) * len(rows[0])]
    for row in table.rows:
        bits = (f"{b:.2f}" for b in row.bits)
        rows.append((f"`{row.name}`", RECIPE_WORDS[row.name], row.how, *bits, paper_of(row.source)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{table.about}"


# model: (layers, KV heads, GB of weights at 16 bits); heads of 128 channels
SCALED = {"LLaVA-1.5-7B": (32, 32, 14.1), "Qwen3-VL-8B": (36, 8, 17.5), "Qwen2.5-VL-7B": (28, 4, 16.6)}
USERS = ((1, 1_000_000), (1000, 4096))  # how many, tokens of each
MEMORY, FREE, BANDWIDTH = 141, 10, 4800  # an H200's, GB and GB a second by its data sheet; GB left for activations
HEAD, VISION = 128, 0.9


def scale_table() -> str:
    """Bytes of caches at 16 bits and packed, the GPUs that hold them, and the time to read all once on these."""
    rows = [("users x tokens", "model", "cache GB: 16 bits", "akvq", "H200s: 16 bits", "akvq ",
             "ms a step, at least: 16 bits", "akvq  "), ("---",) * 8]  # fmt: skip
    for users, tokens in USERS:
        for model, (layers, heads, weights) in SCALED.items():
            numbers = 2 * layers * heads * HEAD * tokens * users
            bits = (16, recipe_bits("akvq", HEAD, heads, tokens, VISION, layers, torch.bfloat16))
            sizes = [numbers * b / 8 / 1e9 for b in bits]
            # one user's cache is split with the weights; of many, each GPU has some, and the weights
            held = [(size + weights) / (MEMORY - FREE) if users == 1 else size / (MEMORY - FREE - weights)
                    for size in sizes]  # fmt: skip
            gpus = [math.ceil(x) for x in held]
            read = [size / n + (weights / n if users == 1 else weights) for size, n in zip(sizes, gpus, strict=True)]
            rows.append((f"{users:,} x {tokens:,}", model, *(f"{x:,.0f}" if x >= 10 else f"{x:.1f}" for x in sizes),
                         *map(str, gpus), *(f"{1e3 * x / BANDWIDTH:.1f}" for x in read)))  # fmt: skip
    about = (
        f'`recipe="akvq"`, {VISION:.0%} vision tokens, heads of {HEAD}. An H200 has {MEMORY} GB, of which {FREE} are\n'
        f"left for activations, and reads {BANDWIDTH / 1000:g} TB/s by its data sheet. One user's model and cache are\n"
        "split over the GPUs; of many users each GPU has a share, and the whole model."
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{about}"


TABLES = {"options.md": options_table, "recipes.md": recipes_table, "scale.md": scale_table}


def written(page: str, table: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> int:
    differ = []
    for name, table in TABLES.items():
        path = DOCS / name
        now = path.read_text()
        if (new := written(now, table())) != now:
            differ.append(name)
            if "--check" not in sys.argv:
                path.write_text(new)
    if differ and "--check" in sys.argv:
        print(f"not as docs/tables.py writes them: {', '.join(differ)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

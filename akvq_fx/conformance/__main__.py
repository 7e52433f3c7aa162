"""Does it work with ...? Every family of the installed transformers, and every hand-written spelling of a cache.

    python -m akvq_fx.conformance --results all.jsonl                       everything, one after the other
    python -m akvq_fx.conformance --shard 0/4 --results 0.jsonl             a quarter of it
    python -m akvq_fx.conformance --only llama,qwen3 --results few.jsonl    some of it
    python -m akvq_fx.conformance --join 0.jsonl 1.jsonl --page docs/conformance.md

Each family is built from its default configuration with small sizes and random weights, and generates from two text
prompts, one of them padded, with attn_implementation "sdpa" and "eager" and with a growing and a static cache:
uncompiled, in lossless mode, and at 2 bits. Spellings are those of tests/attention_models.py, where a checkout is at
hand. A line has a verdict: `same` or `DIFFERENT` (lossless tokens against uncompiled ones), `FAILED` (compiled only),
or `not run` with what transformers says where the family cannot be built or run so. The exit status is 0 if none was
DIFFERENT or FAILED. tests/zoo.py has fewer families, with images, and asks more of them.

Runs on a CPU, every case in a process of its own with a limit of time and of memory. What --results has already is not
run again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import os
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

import akvq_fx
from akvq_fx.transformers_names import cache_of

KINDS = {  # of families; "written" are hand-written spellings
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
LAYERS, WIDTH, HEADS, VOCABULARY = 3, 64, 4, 200
SIZES = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS)
SIZES |= dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), WIDTH)
SIZES |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), HEADS)
SIZES |= dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"), 96)
SIZES |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32)
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
SIZES |= dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2) | dict.fromkeys(("n_group", "topk_group"), 1)
SIZES |= dict.fromkeys(("max_position_embeddings", "n_positions"), 256)
SIZES |= dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY)
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "sliding_window": 8, "attention_window_size": 8}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size_per_layer_input": 8}
SIZES |= {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
# of latent attention, where head_dim is that of the part with RoPE
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": HEADS}
VISION = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "depth": 1,
    "patch_size": 14,
}
VISION |= {"num_attention_heads": 2, "num_heads": 2, "image_size": 28, "out_hidden_size": WIDTH, "projection_dim": 32}
IMAGE_TOKEN = VOCABULARY - 1
PACKED = {"inner": "eager", "window": 4, "pivots": 2}
MEMORY = 14 << 30  # bytes, for one case: default sizes may not have been shrunk
ATTENTION, CACHES = ("sdpa", "eager"), ("growing", "static")


def small(given: dict[str, Any], part: str = "") -> dict[str, Any]:
    """Small sizes for a configuration that has the fields `given`, and for its parts."""
    latent = given.get("qk_rope_head_dim") is not None
    sizes = VISION if "vision" in part else {**SIZES, **LATENT} if latent else SIZES
    made = {name: sizes[name] for name, value in given.items() if name in sizes and value is not None}
    if latent:
        made.pop("head_dim", None)
    if given.get("layer_types"):
        made["layer_types"] = (list(dict.fromkeys(given["layer_types"])) * LAYERS)[:LAYERS]
    for name, value in given.items():
        if isinstance(value, dict) and "model_type" in value:
            made[name] = {"model_type": value["model_type"], **small(value, name)}
        elif name.endswith(("_token_id", "_token_index")) and name not in made and isinstance(value, int):
            made[name] = IMAGE_TOKEN
    return made


def build(family: str, kind: str) -> nn.Module:
    made_of = configuration_auto.CONFIG_MAPPING[family]
    named = KINDS[kind][family]
    model = getattr(transformers, named if isinstance(named, str) else named[0])
    torch.manual_seed(0)
    model = model(made_of(**small(made_of().to_dict()))).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.08, generator=torch.Generator().manual_seed(weight.numel()))
    return model


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    name: str
    attention: str = ""  # "" for a spelling, which has its own
    cache: str = ""

    def __str__(self):
        return " ".join(filter(None, (self.kind, self.name, self.attention, self.cache)))


@dataclasses.dataclass
class Result:
    """sites, packed: caches' layers seen, and packed; bits: of a packed layer's numbers at 2 bits, by the report."""

    verdict: str
    sites: int = 0
    packed: int = 0
    bits: str = ""
    reasons: tuple[str, ...] = ()


def generate(case: Case, options: dict[str, Any] | None) -> tuple[torch.Tensor, Result]:
    """Tokens of a greedy generation, and what was packed."""
    torch._dynamo.reset()
    model = build(case.name, case.kind)
    model.set_attn_implementation(case.attention)
    if model.config._attn_implementation != case.attention:
        raise ValueError(f"{case.name} has no attention {case.attention}")
    model.generation_config.update(disable_compile=True, eos_token_id=None, pad_token_id=0)
    ids = torch.randint(3, IMAGE_TOKEN - 1, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if options is not None:
        model.compile(backend="akvq", options=options)
    asked = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    asked |= {"cache_implementation": "static"} if case.cache == "static" else {}
    out = model.generate(input_ids=ids, attention_mask=mask, **asked)
    if options is None:
        return out.sequences, Result("same")
    layers = getattr(cache_of(out), "layers", [])
    packed = sum(isinstance(getattr(layer, "keys", None), akvq_fx.PackedKV) for layer in layers)
    return out.sequences, reported(model, len(layers), packed)


def reported(model: nn.Module, sites: int, packed: int) -> Result:
    report = akvq_fx.report(model)
    bits = sorted({row.bits for row in report.packed}) if packed else []
    reasons = sorted({row.reason for row in report.refused})
    if not packed and not reasons:
        reasons = ["no attention over a cache was compiled"]
    return Result("same", sites, packed, ", ".join(bits), tuple(reasons))


def of_family(case: Case) -> Result:
    """Raises RuntimeError where the uncompiled model does not run."""
    try:
        tokens, _ = generate(case, None)
    except Exception as error:
        raise RuntimeError(first_line(error)) from error
    exact, _ = generate(case, {**PACKED, "body_bits": 16})
    _, result = generate(case, PACKED)
    result.verdict = "same" if torch.equal(tokens, exact) else "DIFFERENT"
    return result


def of_spelling(case: Case) -> Result:
    from tests import attention_models as models

    seen = models.evidence(models.Decoder(getattr(models, case.name)), models.LOSSLESS)
    tensors = [x for layer in seen.cache or () for x in layer or ()] or list(seen.model.buffers())
    packed = bool(tensors) and all(isinstance(x, (akvq_fx.PackedKV, akvq_fx.PackedBundle)) for x in tensors)
    result = reported(seen.model, 1, int(packed))
    result.verdict = "same" if seen.error <= 2e-6 else "DIFFERENT"
    return result


def spellings() -> list[str]:
    """Attention classes of tests/attention_models.py, none where there is no checkout."""
    try:
        from tests import attention_models as models
    except ImportError:
        return []
    found = [x for x in vars(models).values() if isinstance(x, type) and issubclass(x, models.Attention)]
    return [x.__name__ for x in found if x.__module__ == models.__name__]


def every_case(kinds: list[str]) -> list[Case]:
    cases = [Case("written", name) for name in spellings()] if "written" in kinds else []
    families = [(kind, name) for kind in KINDS if kind in kinds for name in sorted(KINDS[kind])]
    return [*cases, *(Case(kind, name, a, c) for kind, name in families for a in ATTENTION for c in CACHES)]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def examine(case: Case, answer) -> None:
    """Send a Result."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        answer.send(of_spelling(case) if case.kind == "written" else of_family(case))
    except RuntimeError as error:
        kind = "not run" if type(error) is RuntimeError and error.__cause__ is not None else "FAILED"
        answer.send(Result(kind, reasons=(str(error)[:200] if kind == "not run" else first_line(error),)))
    except BaseException as error:
        answer.send(Result("FAILED", reasons=(first_line(error),)))


def result_of(case: Case, seconds: int) -> Result:
    """What a process of its own says of the case."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=examine, args=(case, there))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else Result("not run", reasons=(f"more than {seconds} s",))
    except EOFError:
        return Result("not run", reasons=("the process ended",))
    finally:
        process.kill()
        process.join()


def read(paths: list[Path]) -> dict[Case, Result]:
    found = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.is_file() else ():
            case, result = json.loads(line)
            found[Case(**case)] = Result(**{**result, "reasons": tuple(result["reasons"])})
    return found


def page(found: dict[Case, Result]) -> str:
    """Markdown: what was run, and the names of what was not."""
    counts = Counter(result.verdict for result in found.values())
    lines = [
        "# Conformance",
        "",
        "Of families of transformers and hand-written spellings: are lossless tokens the uncompiled model's, how many",
        "layers are packed, and why the others are not. Tiny models with random weights, on a CPU. Written by",
        "`python -m akvq_fx.conformance`.",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}: "
        + (", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "nothing was run")
        + ".",
    ]
    for kind in ("written", *KINDS):
        rows = {case: result for case, result in found.items() if case.kind == kind}
        if rows:
            heads = ("spelling",) if kind == "written" else ("family", "attention", "cache")
            columns = (*heads, "layers", "packed", "bits", "lossless tokens", "why")
            lines += ["", f"## {kind}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            for case, r in sorted(rows.items(), key=lambda item: str(item[0])):
                names = (case.name,) if kind == "written" else (case.name, case.attention, case.cache)
                why = "; ".join(r.reasons).replace("|", "/")
                lines.append(f"| {' | '.join((*names, str(r.sites), str(r.packed), r.bits, r.verdict, why))} |")
    missing = sorted({case.name for case in every_case(["written", *KINDS])} - {case.name for case in found})
    if missing:
        lines += ["", "## Not run", "", *wrapped(missing)]
    return "\n".join(lines) + "\n"


def wrapped(words: list[str], width: int = 118) -> list[str]:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += f"{word}, "
    return [*(line.rstrip() for line in lines[:-1]), lines[-1].rstrip(", ") + "."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("written", *KINDS), action="append", help="all of them without it")
    parser.add_argument("--only", type=lambda text: text.split(","), help="families or spellings, with commas between")
    parser.add_argument("--shard", default="0/1", help="i/n: every n'th case, from the i'th on")
    parser.add_argument("--seconds", type=int, default=300, help="limit for one case")
    parser.add_argument("--results", type=Path, help="a file to which a line is added for every case")
    parser.add_argument("--join", type=Path, nargs="+", help="files of results: run nothing, write the page")
    parser.add_argument("--page", type=Path, default=Path("docs/conformance.md"))
    args = parser.parse_args()
    if args.join:
        args.page.write_text(page(read(args.join)))
        return 0
    sys.path.append(os.getcwd())  # where a checkout has its tests
    first, count = map(int, args.shard.split("/"))
    cases = [c for c in every_case(args.kind or ["written", *KINDS]) if not args.only or c.name in args.only]
    if args.only:
        cases.sort(key=lambda case: args.only.index(case.name))
    known, counts = read([args.results] if args.results else []), Counter()
    for case in cases[first::count]:
        result = known.get(case) or result_of(case, args.seconds)
        counts[result.verdict] += 1
        layers = f"{result.packed} of {result.sites} layers packed"
        print(f"{result.verdict:9} {case}: {'; '.join((layers, *result.reasons))}", flush=True)
        if args.results and case not in known:
            with args.results.open("a") as file:
                file.write(json.dumps([dataclasses.asdict(case), dataclasses.asdict(result)]) + "\n")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(bool(counts.keys() & {"DIFFERENT", "FAILED"}))


if __name__ == "__main__":
    sys.exit(main())

"""Every family of the installed transformers that generates text, tiny, with random weights: are the tokens the same?

    python benchmarks/conformance/families.py [--kind image-text] [--only llama,qwen3] [--part 0 --parts 2]

Each family is built from its default configuration with small sizes, and generates from two text prompts, one of
them padded: uncompiled, in lossless mode, and at 2 bits. A line says `same` or `DIFFERENT` (lossless tokens against
uncompiled ones), `FAILED` (compiled only), or `not run` with what transformers says where the family cannot be built or
run so; then the packed layers, the logits' largest change at 2 bits, and why other caches stay at 16 bits. The exit
status is 0 if none was DIFFERENT or FAILED. tests/zoo.py has fewer families, with images, and asks more of them. Runs
on a CPU, a process a family.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import sys
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

import akvq_fx
from akvq_fx.transformers_names import cache_of

KINDS = {
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
SECONDS, MEMORY = 120, 14 << 30  # limits for one family, whose default sizes may not have been shrunk


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


def generate(family: str, kind: str, options: dict[str, Any] | None) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Tokens and logits of a greedy generation, and what was packed."""
    torch._dynamo.reset()
    model = build(family, kind)
    model.generation_config.update(disable_compile=True, eos_token_id=None, pad_token_id=0)
    ids = torch.randint(3, IMAGE_TOKEN - 1, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if options is not None:
        model.compile(backend="akvq", options=options)
    asked = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(input_ids=ids, attention_mask=mask, **asked)
    note = ""
    if options is not None:
        layers = getattr(cache_of(out), "layers", [])
        packed = [isinstance(getattr(layer, "keys", None), akvq_fx.PackedKV) for layer in layers]
        reasons = sorted({row.reason for row in akvq_fx.report(model).refused})
        note = "; ".join([f"{sum(packed)} of {len(packed)} layers packed", *reasons])
    return out.sequences, torch.stack(out.logits), note


def examine(family: str, kind: str, answer) -> None:
    """Send (verdict, what there is to say)."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    first_line = lambda error: f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    try:
        tokens, logits, _ = generate(family, kind, None)
    except BaseException as error:
        answer.send(("not run", first_line(error)))
        return
    try:
        exact, _, _ = generate(family, kind, {**PACKED, "body_bits": 16})
        _, changed, note = generate(family, kind, PACKED)
        verdict = "same" if torch.equal(tokens, exact) else "DIFFERENT"
        answer.send((verdict, f"{note}; 2 bits change logits by {(changed - logits).abs().max().item():.1e}"))
    except BaseException as error:
        answer.send(("FAILED", first_line(error)))


def verdict_on(family: str, kind: str) -> tuple[str, str]:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=examine, args=(family, kind, there))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(SECONDS) else ("not run", f"more than {SECONDS} s")
    except EOFError:
        return "not run", "the process ended"
    finally:
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(KINDS), default="causal")
    parser.add_argument("--only", type=lambda text: text.split(","), help="families, with commas between")
    parser.add_argument("--part", type=int, default=0, help="of the families take every --parts'th, from this one on")
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    counts: dict[str, int] = {}
    for family in (args.only or sorted(KINDS[args.kind]))[args.part :: args.parts]:
        verdict, note = verdict_on(family, args.kind)
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"{verdict:9} {family}: {note}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(bool(counts.keys() & {"DIFFERENT", "FAILED"}))


if __name__ == "__main__":
    sys.exit(main())

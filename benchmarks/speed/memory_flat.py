"""Does memory stay flat? Many `generate` calls over a mixture of batch sizes and prompts, with images and without.

    python benchmarks/speed/memory_flat.py [--calls 200] [--layers 8] [--tokens 40] [--small]

The model is a LLaVA with random weights, built here. Every 20 calls a line says how many CUDA graphs were captured so
far, how many of them were given up, what they keep and what PyTorch's allocator has handed out. The last line is
"pass" if no graph was captured and no memory was added after the first fifth of the calls, else "FAIL", with exit
status 1. Every fourth cache stays alive for some calls more, as in a server whose requests overlap.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import akvq_fx
from akvq_fx.transformers_names import cache_of

IMAGE, PAD, PATCHES = 500, 0, 16
SLACK = 2**20  # bytes: a result of the last call may be alive
# (rows, image, tokens of text) of the requests, in turn
MIXTURE = [(1, True, 20), (4, True, 20), (2, False, 100), (4, True, 60), (1, False, 30), (8, False, 20), (2, True, 150),
           (3, False, 90)]  # fmt: skip


def model_of(layers: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, pad_token_id=PAD, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


def request(rows: int, image: bool, length: int, device: str, dtype: torch.dtype, seed: int) -> dict:
    """The inputs of one generation, its first row padded on the left."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 400, (rows, length), generator=random)
    given = {}
    if image:
        ids = torch.cat([ids[:, :1], torch.full((rows, PATCHES), IMAGE), ids[:, 1:]], 1)
        given["pixel_values"] = torch.randn(rows, 3, 32, 32, generator=random).to(device, dtype)
    mask = torch.ones_like(ids)
    if rows > 1:
        pads = torch.full((4,), PAD)
        ids[0], mask[0, :4] = torch.cat([pads, ids[0, :-4]]), 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), **given}


def counts(model) -> tuple[int, int, int]:
    """CUDA graphs captured, given up since, and the bytes that they keep."""
    found = [graph.capture for graph in akvq_fx.report(model).graphs if graph.capture is not None]
    return sum(c.captured for c in found), sum(c.dropped for c in found), sum(c.kept for c in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40, help="new tokens of a call")
    parser.add_argument("--small", action="store_true", help="16 calls of one layer, to see that it runs")
    args = parser.parse_args()
    if args.small:
        args.calls, args.layers, args.tokens = 16, 1, 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model_of(args.layers).to(device, dtype)
    model.compile(backend="akvq", options={"inner": "eager"} if args.small else {})
    allocated = lambda: torch.cuda.memory_allocated() if device == "cuda" else 0
    first, every, steady, good = args.calls // 5, max(1, args.calls // 10), None, True
    alive: collections.deque = collections.deque(maxlen=2)
    print("calls  captured  given up  kept MiB  allocated MiB  seconds", flush=True)
    begin = time.perf_counter()
    for call in range(1, args.calls + 1):
        given = request(*MIXTURE[call % len(MIXTURE)], device, dtype, seed=call)
        out = model.generate(
            **given, max_new_tokens=args.tokens, do_sample=False, return_dict_in_generate=True, use_cache=True
        )
        if call % 4 == 0:
            alive.append(cache_of(out))
        del out, given
        if call % every == 0:
            alive.clear()
            captured, dropped, held = counts(model)
            now = (captured, allocated())
            seconds = time.perf_counter() - begin
            print(f"{call:5}  {captured:8}  {dropped:8}  {held / 2**20:8.1f}  {now[1] / 2**20:13.1f}  {seconds:7.1f}",
                  flush=True)  # fmt: skip
            if call >= first and steady is None:
                steady = now
            elif steady is not None:
                good &= now[0] == steady[0] and now[1] <= steady[1] + SLACK
    if device == "cpu":
        print("no CUDA device: nothing was captured or measured")
    else:
        print("pass" if good else "FAIL: captures or memory went on growing after the first fifth of the calls")
    sys.exit(not good)


if __name__ == "__main__":
    main()

"""Bytes of a long packed cache: by the cost model, and as a compiled prompt allocates them, a layer of each kind.

Measured on the same decoder cut to MEASURED_LAYERS layers (layers of one kind are alike) through dynamo and the passes,
without Inductor; the whole model is that many layers of each kind. "images": a share of the tokens is marked as vision
tokens, so that layers 0 and 1 hold their text at 4 bits.
"""

from __future__ import annotations

import torch
from decoders import Decoder, build
from timing import Table
from torch import Tensor, nn
from transformers import DynamicCache

import akvq_fx
from akvq_fx import cost
from akvq_fx.transformers_names import cache_argument, cache_of

MEASURED_LAYERS = 3  # two that attend to text first (AKVQConfig.tsa_layers) and one of the others
IMAGE_TOKENS = 576  # of one image in LLaVA-1.5
IMAGES_OF = 6 / 4096  # images a prompt token: 6 in 4096, the rest is text


class WithImages(nn.Module):
    """The decoder, with some tokens marked as vision tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.name = model, cache_argument(model)

    def forward(self, ids: Tensor, is_image: Tensor, cache):
        embeds = akvq_fx.mark_vision(self.model.get_input_embeddings()(ids), is_image)
        return cache_of(self.model(inputs_embeds=embeds, **{self.name: cache}, use_cache=True, logits_to_keep=1))


def cache_sizes(decoder: Decoder, tokens: int) -> Table:
    shape, device = decoder.shape, decoder.device
    columns = [
        "prompt",
        "layers",
        "policy",
        "bytes computed",
        "bytes allocated",
        "bytes at 16 bits",
        "of 16 bits",
        "bits a number",
    ]
    table = Table(f"cache-bytes: {shape.title}, B=1, {tokens} tokens", columns, "Target: at most 0.20 of 16 bits.")
    cut = build(shape, min(MEASURED_LAYERS, shape.layers), device, decoder.dtype)
    ids = cut.prompt(1, tokens)
    for name in ("text", "images"):
        torch._dynamo.reset()
        is_image = torch.zeros(1, tokens, dtype=torch.bool, device=device)
        if name == "images":
            is_image[:, 8 : 8 + round(tokens * IMAGES_OF * IMAGE_TOKENS)] = True
        cache = DynamicCache(config=cut.model.config)
        if name == "images":
            run = torch.compile(WithImages(cut.model), backend="akvq", options={"inner": "eager"})
            cache = run(ids, is_image, cache)
        else:
            run = torch.compile(cut.model, backend="akvq", options={"inner": "eager"})
            past = {cache_argument(run): cache}
            cache = cache_of(run(input_ids=ids, **past, use_cache=True, logits_to_keep=1))
        add_rows(table, name, decoder, cache, tokens)
    torch._dynamo.reset()
    return table


def add_rows(table: Table, name: str, decoder: Decoder, cache, tokens: int) -> None:
    """One row a kind of layer, and one for all layers together; the last layer stands for all that were cut off."""
    shape = decoder.shape
    sizes: dict[str, list] = {}  # policy -> [layers, computed, allocated] of one layer each
    counted = len(cache.layers)
    for number, layer in enumerate(cache.layers):
        stats = akvq_fx.cache_stats([layer.keys, layer.values])
        if stats.packed_tensors != 2:
            raise RuntimeError(f"layer {number} is not packed")
        entry = sizes.setdefault(next(iter(stats.tokens)), [0, 0, 0])
        entry[0] += 1 if number + 1 < counted else shape.layers - counted + 1
        entry[1:] = [computed(layer.keys) + computed(layer.values), stats.packed_bytes]
    plain = shape.bytes_per_token(1) * tokens
    sums = [sum(count * entry for count, *rest in sizes.values() for entry in rest[i : i + 1]) for i in range(2)]
    for policy, (count, expected, allocated) in [*sizes.items(), ("all", (shape.layers, *sums))]:
        many = 1 if policy != "all" else count
        label = f"{count} of" if policy != "all" else count
        table.add(name, label, policy, f"{expected:,}", f"{allocated:,}", f"{many * plain:,}",
                  f"{allocated / (many * plain):.3f}", f"{16 * allocated / (many * plain):.2f}")  # fmt: skip


def computed(packed) -> int:
    """Bytes by the cost model, for this tensor's layout, capacity and text slots."""
    text = packed.text_codes.shape[2] if packed.text_codes is not None else 0
    sizes = {cost.B: packed.shape[0], cost.H: packed.shape[1], cost.C: packed.codes.shape[2], cost.CT: text}
    return int(cost.bytes_of(packed.layout_of).subs(sizes))

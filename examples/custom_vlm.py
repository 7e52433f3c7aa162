"""A hand-written vision-language model gets the 2-bit cache, one step at a time. Random weights, seconds on a CPU.

    python examples/custom_vlm.py

No transformers here: a fused qkv projection, its own RoPE, grouped-query attention and a cache that is a tuple of
tensors. What every step claims is asserted, so this file is a test as well.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import akvq_fx

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 4, 2, 32, 128
WIDTH = HEADS * HEAD_DIM
IMAGE_TOKENS, PATCH = 160, 48  # tokens of an image, numbers in one of its patches
OPTIONS = {"inner": "eager", "window": 32, "pivots": 4}  # a short window, so that a short prompt has something to pack


class Layer(nn.Module):
    """Attention over a growing (keys, values) tuple, then an MLP; the cache is returned, longer by the new tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, WIDTH] -> q [B, HEADS, T, D], k and v [B, KV_HEADS, T, D]; q and k with RoPE."""
        B, T, _ = x.shape
        sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        q, k, v = (part.view(B, T, -1, HEAD_DIM).transpose(1, 2) for part in self.qkv(x).split(sizes, dim=-1))
        return rope(q, positions), rope(k, positions), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor, positions: Tensor, past: tuple[Tensor, Tensor] | None):
        q, k, v = self.project(self.norm(x), positions)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attended = scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        return self.finish(x, attended), (k, v)


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate pairs of channels [0, D/2), [D/2, D) by the token's position."""
    frequency = 10000.0 ** (-torch.arange(HEAD_DIM // 2, device=x.device) / (HEAD_DIM // 2))
    angle = positions[:, None] * frequency
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class VLM(nn.Module):
    """Images are projected and put before the text; decode steps pass the cache and no image."""

    def __init__(self, marked: bool = True):
        super().__init__()
        self.marked = marked
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.vision = nn.Linear(PATCH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def embed(self, ids: Tensor, image: Tensor | None) -> Tensor:
        x = self.embedding(ids)
        if image is None:
            return x
        x = torch.cat([self.vision(image), x], dim=1)
        if self.marked:
            is_image = torch.arange(x.shape[1], device=x.device) < image.shape[1]
            x = akvq_fx.mark_vision(x, is_image.expand(x.shape[0], -1))
        return x

    def forward(self, ids: Tensor, image: Tensor | None = None, cache: tuple | None = None):
        x = self.embed(ids, image)
        start = 0 if cache is None else cache[0][0].shape[2]
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        new = []
        for i, layer in enumerate(self.layers):
            x, kept = layer(x, positions, None if cache is None else cache[i])
            new.append(kept)
        return self.head(x[:, -1]), tuple(new)


class StaticVLM(VLM):
    """The same model over buffers allocated beforehand, each of which holds a layer's keys and values."""

    def __init__(self, slots: int):
        super().__init__()
        for i in range(LAYERS):
            self.register_buffer(f"cache{i}", torch.zeros(2, 1, KV_HEADS, slots, HEAD_DIM))

    def forward(self, ids: Tensor, positions: Tensor, image: Tensor | None = None):
        x = self.embed(ids, image)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(layer.norm(x), positions)
            k_cache, v_cache = getattr(self, f"cache{i}").unbind()
            k_cache[:, :, positions] = k
            v_cache[:, :, positions] = v
            seen = torch.arange(k_cache.shape[2], device=x.device) <= positions[:, None]
            x = layer.finish(x, scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=seen, enable_gqa=True))
        return self.head(x[:, -1])


@torch.no_grad()
def generate(model: nn.Module, ids: Tensor, image: Tensor, steps: int) -> tuple[list[int], Tensor, tuple]:
    """Greedy tokens, all logits [steps, VOCABULARY] and the cache."""
    logits, cache = model(ids, image)
    tokens, seen = [int(logits.argmax())], [logits]
    for _ in range(steps - 1):
        logits, cache = model(torch.tensor([[tokens[-1]]]), None, cache)
        tokens.append(int(logits.argmax()))
        seen.append(logits)
    return tokens, torch.cat(seen), cache


def fresh(cls=VLM, *args) -> nn.Module:
    """A model with the same random weights every time."""
    torch.manual_seed(0)
    return cls(*args).eval()


def say(title: str, *lines) -> None:
    print(f"\n{title}\n{'-' * len(title)}")
    for line in lines:
        print(line)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter  # keeps the docstring's lines
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    torch.manual_seed(1)
    ids, image = torch.randint(VOCABULARY, (1, 40)), torch.randn(1, IMAGE_TOKENS, PATCH)
    plain_tokens, plain_logits, plain_cache = generate(fresh(), ids, image, 24)

    before_compiling(ids, image)
    packed_model, packed_cache = packed(ids, image, plain_logits, plain_cache)
    what_was_done(packed_model, packed_cache)
    lossless(ids, image, plain_tokens, plain_logits)
    refused(ids, image, plain_tokens)
    print("\nEverything above was asserted.")
    return 0


def before_compiling(ids: Tensor, image: Tensor) -> None:
    unmarked = akvq_fx.explain(fresh(VLM, False), ids, image, akvq_options=OPTIONS)
    assert len(unmarked.packed) == LAYERS and not unmarked.refused
    assert {row.policy for row in unmarked.packed} == {"PSA"}
    say(
        "1. Ask before compiling: akvq_fx.explain(model, ids, image)",
        "It runs the model once, changes nothing, and tells what the backend would do at every attention call:",
        unmarked,
        "All layers are packed, yet all under the rule for late layers (PSA): no graph tells images from text.",
    )
    marked = akvq_fx.explain(fresh(), ids, image, akvq_options=OPTIONS)
    assert [row.policy for row in marked.packed] == ["TSA", "TSA", "PSA", "PSA"]
    say(
        "2. Say which tokens are vision: x = akvq_fx.mark_vision(x, mask) where text and image embeddings meet",
        "An identity to the model. The first two layers, which attend to text, now give text 4 bits and vision 2:",
        marked,
        "(Models that place image features by masked_scatter or x[mask] = ... need no mark.)",
    )


def packed(ids: Tensor, image: Tensor, plain_logits: Tensor, plain_cache: tuple) -> tuple[nn.Module, tuple]:
    model = fresh()
    model.compile(backend="akvq", options=OPTIONS)
    tokens, logits, cache = generate(model, ids, image, 24)
    assert all(isinstance(t, akvq_fx.PackedKV) for pair in cache for t in pair)
    assert [t.shape for pair in cache for t in pair] == [t.shape for pair in plain_cache for t in pair]
    error = float((logits[0] - plain_logits[0]).abs().max())
    assert error < 1e-3, error  # the prompt attends to its own keys at full precision
    later = float((logits[1] - plain_logits[1]).norm() / plain_logits[1].norm())
    assert 0 < later < 0.5, later
    key, value = cache[-1]
    say(
        '3. Switch it on: model.compile(backend="akvq"), then prompt and decode loop as before',
        f"The cache that came back is the same tuple; one tensor of it is {key}.",
        f"The prompt's logits differ by {error:.1e} (it reads its own unpacked tokens),",
        f"those of the first decode step, which reads the packed ones, by {later:.1%}.",
        "Random weights make random attention, so no text is compared here; examples/quickstart.py does that.",
    )
    assert key.dequantize().shape == key.shape and torch.isfinite(value.dequantize()).all()
    return model, cache


def what_was_done(model: nn.Module, cache: tuple) -> None:
    report, stats = akvq_fx.report(model), akvq_fx.cache_stats(cache)
    assert {row.status for row in report.packed} == {"prompt", "packed"} and not report.refused
    assert stats.packed_tensors == 2 * LAYERS and stats.plain_tensors == 0
    assert stats.tokens["TSA"]["vision"] == IMAGE_TOKENS
    say("4. Look at what was done: akvq_fx.report(model) and akvq_fx.cache_stats(cache)", report, "", stats)
    print(
        "\nMost of these bits are the recent tokens, in the model's own float32. A 16-bit model halves them, and a\n"
        "longer prompt makes them vanish: 3 bits are left here, 2 of a code and 1 for the range of a head of 32."
    )


def lossless(ids: Tensor, image: Tensor, plain_tokens: list[int], plain_logits: Tensor) -> None:
    model = fresh()
    model.compile(backend="akvq", options={**OPTIONS, "body_bits": 16})
    tokens, logits, cache = generate(model, ids, image, 24)
    assert all(isinstance(t, akvq_fx.PackedKV) for pair in cache for t in pair)
    assert tokens == plain_tokens
    torch.testing.assert_close(logits, plain_logits)
    say(
        '5. In doubt, take the bits out of the question: options={"body_bits": 16}',
        "The cache goes through every rewrite and keeps all its bits. Tokens and logits equal those of the eager",
        "model: a difference that you see at 2 bits comes from the 2 bits, not from the rewriting.",
    )


@torch.no_grad()
def refused(ids: Tensor, image: Tensor, plain_tokens: list[int]) -> None:
    length = IMAGE_TOKENS + ids.shape[1]
    model = fresh(StaticVLM, length + 24)
    model.compile(backend="akvq", options=OPTIONS)
    tokens = [int(model(ids, torch.arange(length), image).argmax())]
    for position in range(length, length + 23):
        tokens.append(int(model(torch.tensor([[tokens[-1]]]), torch.tensor([position])).argmax()))
    report, stats = akvq_fx.report(model), akvq_fx.cache_stats(model)
    assert not report.packed and {row.layer for row in report.refused} == set(range(LAYERS))
    assert "are parts of one tensor" in report.refused[0].reason
    assert stats.packed_tensors == 0
    assert tokens == plain_tokens  # what is refused is exact
    say(
        "6. What a refusal looks like: the same model, which keeps a layer's keys and values in one buffer",
        f"layer {report.refused[0].layer}: {report.refused[0].status}, {report.refused[0].reason}",
        "Such layers run exactly as they did. To have them packed, give keys and values a buffer each, or let the",
        "model return torch.cat([past, k], dim=2), as in step 3.",
    )


if __name__ == "__main__":
    sys.exit(main())

"""Text decoders of known models, built on the device with random weights: only shapes matter to speed and memory.

What is built is the language model alone (no vision tower): of LLaVA-1.5-7B its Llama decoder, of Qwen2-VL-7B its Qwen2
decoder, with one-dimensional positions. Sources: the models' config.json on the Hugging Face hub.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

INIT_STD = 0.02  # initializer_range of all three


@dataclasses.dataclass(frozen=True)
class Shape:
    title: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    bias: bool = False  # queries, keys and values have one: the Qwen2 classes

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def bytes_per_token(self, layers: int, width: int = 2) -> int:
        """Bytes of one token in a cache of numbers `width` bytes wide."""
        return 2 * layers * self.kv_heads * self.head_dim * width


SHAPES = {
    "llava-1.5-7b": Shape("LLaVA-1.5-7B", 32, 4096, 32, 32, 11008, 32064),
    "qwen2-vl-7b": Shape("Qwen2-VL-7B", 28, 3584, 28, 4, 18944, 152064, bias=True),
    "llama-3-8b": Shape("Llama-3-8B", 32, 4096, 32, 8, 14336, 128256),
    "tiny": Shape("a tiny decoder", 2, 64, 4, 2, 128, 256),
}


@dataclasses.dataclass
class Decoder:
    """One model and what is known about it."""

    shape: Shape
    layers: int
    model: nn.Module
    weight_bytes: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def prompt(self, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
        """[batch, tokens] random ids."""
        draw = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(3, self.shape.vocab, (batch, tokens), generator=draw, device=self.device)


def build(shape: Shape, layers: int | None, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The decoder with `layers` layers (all where None), weights drawn on the device."""
    layers = layers or shape.layers
    config_class, model_class = (Qwen2Config, Qwen2ForCausalLM) if shape.bias else (LlamaConfig, LlamaForCausalLM)
    config = config_class(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=32768,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 or name.endswith("bias"):
            weight.normal_(0, INIT_STD)
    return Decoder(shape, layers, model, sum(p.nbytes for p in model.parameters()))

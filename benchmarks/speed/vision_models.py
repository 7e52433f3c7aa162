"""Vision-language models as transformers builds them, at full width with random weights; and prompts with images.

Weights are drawn on the device: only shapes matter to speed and memory. Sources: the models' config.json on the Hugging
Face hub, written out here so that nothing is downloaded. `tiny` keeps classes and token ids and cuts every width, to
see on any machine that a script runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

TINY_TEXT = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY_VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                   patch_size=8)  # fmt: skip
TINY_TOWER = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8, out_hidden_size=64)
TINY_SECTION = [2, 3, 3]  # of a rotary embedding in three dimensions: half of TINY_TEXT's head_dim


@dataclasses.dataclass(frozen=True)
class Image:
    """How one image stands in a prompt.

    pixels  shape of its pixel tensor; with `grid`, of its patches [patches, numbers of one]
    tokens  placeholders that it takes, each of id `token`, between `before` and `after`
    grid    patches by time, height and width, where the model asks for them
    types   name of the argument that marks placeholders, "" where there is none
    """

    pixels: tuple[int, ...]
    tokens: int
    token: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    grid: tuple[int, int, int] | None = None
    types: str = ""


def llava(layers: int | None, tiny: bool):
    text = dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers or 32,
                num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
                rms_norm_eps=1e-5)  # fmt: skip
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                  image_size=336, patch_size=14, vocab_size=32000, projection_dim=768)  # fmt: skip
    if tiny:
        text, vision = {**text, **TINY_TEXT, "num_key_value_heads": 4}, {**vision, **TINY_VISION}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    side = vision["image_size"]
    return config, Image((3, side, side), (side // vision["patch_size"]) ** 2, 32000)


def internvl(layers: int | None, tiny: bool):
    text = dict(vocab_size=151674, hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers or 28,
                num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6})  # fmt: skip
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                  image_size=448, patch_size=14, attention_bias=True)  # fmt: skip
    if tiny:
        text, vision = {**text, **TINY_TEXT}, {**vision, **TINY_VISION}
    side, patch = vision["image_size"], vision["patch_size"]
    tokens = (side // patch // 2) ** 2  # pixel shuffle joins two by two patches
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**text),
        vision_config=transformers.InternVLVisionConfig(
            **{**vision, "image_size": (side, side), "patch_size": (patch, patch)}
        ),
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    return config, Image((3, side, side), tokens, 151667, before=(151665,), after=(151666,))


QWEN_IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
QWEN_SIDE = 28  # patches a side: 392 pixels of 14, 448 of 16; 196 tokens


def qwen_image(side: int, patch: int) -> Image:
    """side * side patches of patch * patch pixels in two frames, joined two by two into tokens."""
    pixels = (side * side, 3 * 2 * patch * patch)
    wrap = dict(before=(QWEN_IDS["vision_start_token_id"],), after=(QWEN_IDS["vision_end_token_id"],))
    return Image(pixels, side * side // 4, QWEN_IDS["image_token_id"], grid=(1, side, side), types="mm_token_type_ids",
                 **wrap)  # fmt: skip


def qwen25(layers: int | None, tiny: bool):
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": TINY_SECTION if tiny else [16, 24, 24]}
    text = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers or 28,
                num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=128000, rms_norm_eps=1e-6,
                rope_parameters=rope)  # fmt: skip
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112,
                  fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=3584, tokens_per_second=2)  # fmt: skip
    if tiny:
        text = {**text, **TINY_TEXT}
        vision = {**vision, **TINY_TOWER, "fullatt_block_indexes": [1], "window_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS
    )
    return config, qwen_image(8 if tiny else QWEN_SIDE, vision["patch_size"])


def qwen3(layers: int | None, tiny: bool):
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": TINY_SECTION if tiny else [24, 20, 20],
            "mrope_interleaved": True}  # fmt: skip
    text = dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=layers or 36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=262144,
                rms_norm_eps=1e-6, rope_parameters=rope)  # fmt: skip
    vision = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16,
                  num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24], out_hidden_size=4096)  # fmt: skip
    if tiny:
        text = {**text, **TINY_TEXT}
        vision = {**vision, **TINY_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS)
    return config, qwen_image(8 if tiny else QWEN_SIDE, vision["patch_size"])


def gemma3(layers: int | None, tiny: bool):
    layers = layers or 34
    full = lambda i: i % 6 == 5 or (layers < 6 and i == layers - 1)  # the last of six; so a cut of a few keeps one
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = dict(vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=layers,
                num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
                sliding_window=1024, max_position_embeddings=131072, rope_parameters=rope,
                layer_types=["full_attention" if full(i) else "sliding_attention" for i in range(layers)])  # fmt: skip
    vision = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                  image_size=896, patch_size=14, vision_use_head=False)  # fmt: skip
    tokens = 256
    if tiny:
        text = {**text, **TINY_TEXT, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
        vision, tokens = {**vision, **TINY_VISION}, 4
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**vision),
        mm_tokens_per_image=tokens,
    )
    side = vision["image_size"]
    image = Image((3, side, side), tokens, config.image_token_id, before=(config.boi_token_index,),
                  after=(config.eoi_token_index,), types="token_type_ids")  # fmt: skip
    return config, image


# name -> title, class, (config, image) of a number of layers (None: all) and of tiny
MODELS: dict[str, tuple[str, str, Callable]] = {
    "llava-1.5-7b": ("LLaVA-1.5-7B", "LlavaForConditionalGeneration", llava),
    "qwen2.5-vl-7b": ("Qwen2.5-VL-7B", "Qwen2_5_VLForConditionalGeneration", qwen25),
    "qwen3-vl-8b": ("Qwen3-VL-8B", "Qwen3VLForConditionalGeneration", qwen3),
    "gemma-3-4b": ("Gemma-3-4B", "Gemma3ForConditionalGeneration", gemma3),
    "internvl3-8b": ("InternVL3-8B", "InternVLForConditionalGeneration", internvl),
}


def build(name: str, layers: int | None, tiny: bool, device: torch.device) -> tuple[nn.Module, Image]:
    """The model in bfloat16 (on a CPU float32), `layers` layers of its language model (None: all), and its image."""
    _, model_class, describe = MODELS[name]
    config, image = describe(layers or (2 if tiny else None), tiny)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            model = getattr(transformers, model_class)(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    how = model.generation_config
    how.eos_token_id, how.pad_token_id, how.do_sample = None, 0, False  # every row goes on to max_new_tokens
    return model, image


def prompt(image: Image, batch: int, images: int, text: int, vocab: int, device, dtype) -> dict[str, Tensor]:
    """Arguments of generate: every row has `images` random images, then `text` random tokens."""
    draw = torch.Generator(device).manual_seed(0)
    words = lambda count: torch.randint(3, min(vocab, 30000), (batch, count), generator=draw, device=device)
    repeated = lambda ids: torch.tensor(ids, dtype=torch.long, device=device).expand(batch, -1)
    of_image = repeated([*image.before, *[image.token] * image.tokens, *image.after])
    ids = torch.cat([words(1), *[of_image] * images, words(text)], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not images:
        return given
    count = batch * images
    if image.grid:
        shape = (count * image.pixels[0], *image.pixels[1:])
        given["image_grid_thw"] = torch.tensor([image.grid] * count, device=device)
    else:
        shape = (count, *image.pixels)
    given["pixel_values"] = torch.randn(shape, generator=draw, device=device).to(dtype)
    if image.types:
        given[image.types] = (ids == image.token).long()
    return given

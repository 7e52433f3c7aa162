"""A folder of images is encoded once and asked many times, also by later programs: its 2-bit cache is kept on disk.

    python examples/ask_again.py                                   # a small LLaVA with random weights, random images
    python examples/ask_again.py --vlm ../shared/vlm               # a small trained one, where its folder is there
    python examples/ask_again.py --images photos --kept prefixes --question "Which image shows the cat?"

Two starts, each a process of its own: the first encodes the images, the second finds them on disk and goes on from the
question. That both answer the same is asserted. With --kept a third one is as fast; without, the folder is removed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

IMAGE_ID, IMAGES, ANSWER = 300, 12, 12  # images that are made where none are given, tokens of an answer
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of images; random ones where none is given")
    parser.add_argument("--kept", type=Path, help="where prefixes are kept")
    parser.add_argument("--max-bytes", type=float, default=1e9, help="of all kept prefixes")
    parser.add_argument("--question", default="What is in image 2?")
    parser.add_argument("--vlm", type=Path, help="folder of the small trained LLaVA (load.py and its weights)")
    parser.add_argument("--once", action="store_true", help="one start, in this process")
    given = parser.parse_args()
    if given.once:
        start(given)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        images, kept = given.images or Path(folder, "images"), given.kept or Path(folder, "kept")
        if given.images is None:
            draw_images(images)
        again = [sys.executable, __file__, *sys.argv[1:], "--once", "--images", str(images), "--kept", str(kept)]
        answers = []
        for number in ("first", "second"):
            print(f"{number} start", flush=True)
            out = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(out, end="", flush=True)
            answers.append(out[out.index("answer") :].split("\n")[0].split("  (")[0])
    assert answers[0] == answers[1], answers
    print("both starts gave the same answer")
    return 0


def start(given) -> None:
    """Load the model, get the images' prefix, ask."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    import torch

    import akvq_fx

    torch._logging.set_logs(dynamo=logging.ERROR)  # transformers breaks a graph where it checks image sizes
    torch.set_num_threads(1)  # small ops on a busy machine are fastest on one
    model, text, inputs = trained(given) if given.vlm else random_one(given)
    prefixes = akvq_fx.Prefixes(given.kept, given.max_bytes)
    model.compile(backend="akvq", options={"inner": "eager"})  # without options: slower to compile, faster to run

    begin = time.perf_counter()
    prefix = prefixes.get(model, inputs)
    seconds, count = time.perf_counter() - begin, prefix.ids.shape[1]
    said = "read from disk" if prefix.from_disk else "encoded and kept"
    print(f"  {count:,} tokens of {len(inputs['pixel_values'])} images {said} in {seconds:.3f} s")

    begin = time.perf_counter()
    question = text(given.question)
    out = model.generate(**prefix.then(question), max_new_tokens=ANSWER, do_sample=False)
    new = out[0, count + question.shape[1] :]
    print(f"  answer {text(new)!r}  ({time.perf_counter() - begin:.2f} s, compiling included)")

    plain = sum(x.numel() * 2 for x in prefix.caches.values())
    size = prefixes.path(prefix.key).stat().st_size
    print(f"  {size:,} bytes on disk, {plain:,} at 16 bits: {plain / size:.2f} to 1", flush=True)


def pictures(folder: Path, side: int):
    """[n, 3, side, side] in [-1, 1], of the images in a folder in the order of their names."""
    import torch

    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        sys.exit(f"ask_again: {folder} has no images; accepted: {', '.join(SUFFIXES)}")
    found = []
    for path in paths:
        with Image.open(path) as image:
            data = bytearray(image.convert("RGB").resize((side, side)).tobytes())
        found.append(torch.frombuffer(data, dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1).float())
    return torch.stack(found) / 127.5 - 1


def draw_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for i in range(IMAGES):
        image = Image.frombytes("RGB", (5, 5), draw.randbytes(75)).resize((160, 160))
        image.save(folder / f"{i:02}.png")


def random_one(given):
    """(model, text, inputs): a LLaVA of two layers whose tokens are the bytes of a text. Its answers mean nothing."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                              image_size=160, patch_size=16)  # fmt: skip
    decoder = LlamaConfig(vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=decoder, image_token_id=IMAGE_ID)
    )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    pixels = pictures(given.images, 160)
    ids = [1]
    for i in range(len(pixels)):
        ids += [*f"Image {i + 1}:".encode(), *[IMAGE_ID] * 100]

    def text(given):
        return torch.tensor([[*given.encode()]]) if isinstance(given, str) else given.tolist()

    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels.bfloat16()}
    return model.eval().bfloat16(), text, inputs


def trained(given):
    """(model, text, inputs): the small trained LLaVA with SmolLM2's tokenizer."""
    import torch

    spec = importlib.util.spec_from_file_location("vlm_load", given.vlm / "load.py")
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    model, tokenizer = load.load()
    inputs = load.inputs(tokenizer, pictures(given.images, load.SIZE), "")
    ids = lambda words: torch.tensor([tokenizer(words, add_special_tokens=False).input_ids])
    inputs["input_ids"] = inputs["input_ids"][:, : -ids(load.prompt(0, "")[len("<|im_start|>user\n") :]).shape[1]]

    def text(given):
        if isinstance(given, str):
            return ids(load.prompt(0, given)[len("<|im_start|>user\n") :])
        return tokenizer.decode(given, skip_special_tokens=True)

    return model, text, {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}


if __name__ == "__main__":
    sys.exit(main())

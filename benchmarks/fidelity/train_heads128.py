"""Train a small Llama with heads of 128 channels for fidelity.py: no small model with such heads is at hand.

    python benchmarks/fidelity/train_heads128.py FOLDER [--seconds 240] [--device cuda]

It learns the Python sources of the installed packages and of the standard library, without the modules and topics
that fidelity.py measures. Two thirds of the time go into windows of 1,024 tokens, the last third into windows of
8,192, so that it can look as far back as it is measured. The folder holds weights and tokenizer in transformers' form.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

MEASURED = {"argparse", "tarfile", "typing", "subprocess", "inspect", "zipfile", "topics"}  # stems of files
VOCABULARY = 8192
END = "<|endoftext|>"
STAGES = ((1024, 2 / 3), (8192, 1.0))  # (tokens of a window, until this share of the time)
TOKENS_A_STEP = 65536
PEAK_RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--megabytes", type=float, default=120, help="of sources that are read")
    args = parser.parse_args()
    torch.manual_seed(0)
    files = sources(int(args.megabytes * 1e6))
    tokenizer = tokenizer_of(files)
    encoded = tokenizer.backend_tokenizer.encode_batch([text + END for text in files])
    ids = torch.tensor([i for one in encoded for i in one.ids], dtype=torch.int32).to(args.device)
    print(f"{len(files)} files, {len(ids) / 1e6:.1f} M tokens", flush=True)
    model = train(ids, args.seconds, args.device)
    model.to(torch.bfloat16).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


def sources(limit: int) -> list[str]:
    """Python files in a fixed order that mixes packages, until `limit` characters."""
    paths = sysconfig.get_paths()
    found = {path for name in ("stdlib", "purelib", "platlib") for path in Path(paths[name]).rglob("*.py")}
    found = sorted((path for path in found if path.stem not in MEASURED), key=lambda path: (path.name, str(path)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    texts, size = [], 0
    for at in order:
        text = found[at].read_text(encoding="utf-8", errors="ignore")
        if size < limit and 200 < len(text) < 1_000_000:
            texts.append(text)
            size += len(text)
    return texts


def tokenizer_of(texts: list[str]):
    """A byte-level BPE tokenizer of the texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts[: len(texts) // 8], vocab_size=VOCABULARY, special_tokens=[END])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def train(ids: Tensor, seconds: float, device: str) -> torch.nn.Module:
    """A model that predicts ids [T] int32, trained for about so many seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=6,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=8192, rope_parameters=rope,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    start = told = time.monotonic()
    for step, (batch, share) in enumerate(batches(ids, start, seconds)):
        rate = PEAK_RATE * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{told - start:.0f} s, step {step}, windows of {batch.shape[1]}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def batches(ids: Tensor, start: float, seconds: float) -> Iterator[tuple[Tensor, float]]:
    """(windows [n, T] of ids, share of the time that has passed) until the time is over."""
    while (share := (time.monotonic() - start) / seconds) < 1:
        length = next(length for length, until in STAGES if share < until)
        starts = torch.randint(len(ids) - length, (TOKENS_A_STEP // length, 1), device=ids.device)
        yield ids[starts + torch.arange(length, device=ids.device)].long(), share


if __name__ == "__main__":
    main()

"""Prompts for fidelity, from a text or from a file of prompts with images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from akvq_fx.evaluate.fidelity import Prompt, prompts_of, windows_of
from akvq_fx.evaluate.milebench import chat_inputs


def text_prompts(tokenizer: Any, text: str, windows: int, prefix: int, count: int) -> list[Prompt]:
    """Pieces of a text, evenly spread: `prefix` tokens that are packed and `count` that are read over them."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return prompts_of(windows_of(ids, windows, prefix + count), prefix)


def read_prompts(path: Path) -> list[dict]:
    """Lines of a JSON Lines file: {"prompt": text, "following": text, "images": [file, ...] (optional)}.

    Raises ValueError, naming the line, for what is not so.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entry = {
                "prompt": str(entry["prompt"]),
                "following": str(entry["following"]),
                "images": [path.parent / name for name in entry.get("images", [])],
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: accepted: {{"prompt": ..., "following": ..., "images": [...]}} ({error})'
            ) from error
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path} has no prompts")
    return entries


def chat_prompts(processor: Any, entries: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """One user message each, images first, through the chat template; `following` is read as the start of the reply."""
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts = []
    for entry in entries:
        ids = tokenizer(entry["following"], add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(chat_inputs(processor, [*entry["images"], entry["prompt"]]), torch.tensor(ids)))
    return prompts

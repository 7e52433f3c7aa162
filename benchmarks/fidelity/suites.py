"""Suites that fidelity.py fills: text windows of a language model, and the image questions of a folder.

Beside the measures of akvq_fx.evaluate a row has `bits`, as they would be in a 16-bit model (models here may run in
float32, where the window, pivots and unpacked layers take twice the bytes), and `packed` of `layers`: how many are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from texts import Text, piece_of
from torch import Tensor
from weights import Source, digest, load_language

import akvq_fx
from akvq_fx import cost
from akvq_fx.evaluate.fidelity import BITS, COLUMNS, compare
from akvq_fx.evaluate.settings import bits_of, original, prefill, read, running
from akvq_fx.evaluate.table import Column
from akvq_fx.evaluate.vision_tasks import ImageTasks
from akvq_fx.stats import tensors_of
from akvq_fx.transformers_names import cache_of

KEPT_BYTES = 2e9  # per model: logits of its own cache that are kept for the next setting


class LanguageModel:
    """A model, loaded when first needed, with the ids of texts and the logits of windows by its own cache."""

    def __init__(self, source: Source, path: Path, dtype: torch.dtype, device: str):
        self.source, self.path, self.dtype, self.device = source, path, dtype, device
        self.ids: dict[str, Tensor] = {}
        self.own: dict[tuple, Tensor] = {}

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load_language(self.path, self.dtype)
        return model.to(self.device), tokenizer

    def ids_of(self, text: Text) -> Tensor:
        """[T]"""
        if text.digest not in self.ids:
            found = self.loaded[1](text.content, add_special_tokens=False)["input_ids"]
            self.ids[text.digest] = torch.tensor(found)
        return self.ids[text.digest]

    def keep(self, key: tuple, logits: Tensor) -> None:
        if sum(x.nbytes for x in self.own.values()) + logits.nbytes <= KEPT_BYTES:
            self.own[key] = logits


class TextTasks:
    """A table.Suite: a task is a text, a row one window of it. Measures as akvq_fx.evaluate.fidelity defines them.

    prefix  tokens that are packed, the one for <bos> included;  count  tokens read over them in one call
    reach   tokens that every window has before those that are read; with equal `reach`, all prefixes predict the same
            tokens
    step    tokens read in a call, None for all
    copied  read are the tokens that stand so many before the end of the prefix, None for those after it
    last    measured are so many of the predicted tokens, the last, None for all
    """

    columns = (BITS, Column("nll", "own NLL", 3), *COLUMNS)
    headline = "kl"

    def __init__(
        self,
        model: LanguageModel,
        texts: Sequence[Text],
        windows: int,
        prefix: int,
        count: int,
        reach: int,
        step: int | None = None,
        copied: int | None = None,
        last: int | None = None,
    ):
        self.model, self._of = model.source.title, model
        self._texts = {text.name: text for text in texts}
        self.tasks = tuple(self._texts)
        self._windows, self._prefix, self._count, self._reach, self._step = windows, prefix, count, reach, step
        self._copied, self._last = copied, last

    def what(self, task: str) -> dict[str, Any]:
        return {
            "kind": "text windows",
            "model": self._of.source.name,
            "weights": digest(self._of.path),
            "dtype": str(self._of.dtype),
            "device": torch.device(self._of.device).type,
            "text": self._texts[task].digest,
            "prefix": self._prefix,
            "count": self._count,
            "reach": self._reach,
            **({"step": self._step} if self._step else {}),
            **({"copied": self._copied} if self._copied else {}),
            **({"last": self._last} if self._last else {}),
        }

    def count(self, task: str) -> int:
        return self._windows

    @contextmanager
    def under(self, options: Mapping[str, Any] | None) -> Iterator[Callable[[str, int], dict]]:
        with running(self._of.loaded[0], options) as run:
            yield functools.partial(self._measure, run)

    def window(self, task: str, index: int) -> tuple[Tensor, Tensor]:
        """(prefix ids [1, prefix], ids [count] after it)."""
        tokenizer, bos = self._of.loaded[1], int(self._of.source.bos)
        piece = piece_of(self._of.ids_of(self._texts[task]), self._reach - bos + self._count, index)
        start = self._reach - self._prefix
        prefix = piece[start : start + self._prefix - bos]
        if bos:
            prefix = torch.cat([torch.tensor([tokenizer.bos_token_id]), prefix])
        if self._copied:
            return prefix[None], prefix[-self._copied :][: self._count]
        return prefix[None], piece[-self._count :]

    def prompt(self, task: str, index: int) -> tuple[Mapping[str, Tensor], Tensor]:
        """(model inputs of what is packed in one call, ids [count] after it)."""
        prefix, following = self.window(task, index)
        return {"input_ids": prefix}, following

    @torch.no_grad()
    def _measure(self, run: Any, task: str, index: int) -> dict[str, Any]:
        inputs, following = self.prompt(task, index)
        key = (self._texts[task].digest, self._prefix, self._count, self._reach, self._copied, index)
        measured = slice(-self._last if self._last else None, None)
        if key not in self._of.own:
            own = logits_of(original(run), inputs, following, self._step)[0][measured]
            self._of.keep(key, own)
        else:
            own = self._of.own[key]
        packed, cache = logits_of(run, inputs, following, self._step)
        own, packed = (x.double().log_softmax(-1) for x in (own, packed[measured]))
        values = compare(own, packed, following[1:][measured].to(own.device))
        row = {name: value.mean().item() for name, value in values.items()}
        bits_of(cache, run)  # refuses a cache that is not packed
        return {**row, "overlap": 1 - row["tv"], **counted(cache)}


def logits_of(run: Any, inputs: Mapping[str, Any], following: Tensor, step: int | None) -> tuple[Tensor, Any]:
    """Logits [n - 1, V] of the tokens after the first one past the prefix `inputs`, and the cache."""
    logits, cache = read(run, following, prefill(run, inputs), step)
    return logits[:-1], cache


class VisionTasks(ImageTasks):
    """ImageTasks under the weights' digest, so that a copy in another folder is the same model."""

    def __init__(self, source: Source, path: Path, tasks: Sequence[str] | None, **kinds: Any):
        super().__init__(path, tasks, **kinds)
        self.model, self._name = source.title, source.name

    def what(self, task: str) -> dict[str, Any]:
        return {**super().what(task), "model": self._name, "weights": digest(self._folder)}

    @contextmanager
    def under(self, options: Mapping[str, Any] | None) -> Iterator[Callable[[str, int], dict]]:
        with running(self.loaded[0], options) as run:
            yield functools.partial(self._count_too, run)

    def _count_too(self, run: Any, task: str, index: int) -> dict[str, Any]:
        seen = FirstCache(run)
        row = self._measure(seen, task, index)
        return {**row, **counted(seen.cache)}


class FirstCache:
    """A model that remembers the cache of its first call, the prefix's; everything else is the model's."""

    def __init__(self, run: Any):
        self.run, self.cache = run, None

    def __call__(self, **inputs: Any) -> Any:
        out = self.run(**inputs)
        if self.cache is None:
            self.cache = cache_of(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)


def counted(cache: Any) -> dict[str, Any]:
    """bits per cached number in a model of 16 bits, with spare capacity and all overhead; layers, packed and in all.

    Of a simulated recipe: what its real cache would take.
    """
    stats = akvq_fx.cache_stats(cache)
    if stats.method_bits is not None:
        packed = stats.method_bits * stats.elements
    else:
        packed = sum(8 * bytes_at_16(x) for x in tensors_of(cache) if isinstance(x, akvq_fx.PackedKV))
    elements = stats.elements + stats.plain_elements
    layers = (stats.packed_tensors + stats.plain_tensors) // 2
    return {
        "bits": (packed + 16 * stats.plain_elements) / elements,
        "packed": stats.packed_tensors // 2,
        "layers": layers,
    }


def bytes_at_16(packed: Any) -> int:
    """Bytes of a packed tensor's buffers, had the model been float16."""
    layout = dataclasses.replace(packed.layout_of, dtype=torch.float16)
    text = 0 if packed.text_codes is None else packed.text_codes.shape[2]
    sizes = {cost.B: packed.shape[0], cost.H: packed.shape[1], cost.C: packed.codes.shape[2], cost.CT: text}
    return int(cost.bytes_of(layout).subs(sizes))


class SeeingModel(LanguageModel):
    """The language model of image tasks, under their weights."""

    def __init__(self, source: Source, path: Path, images: ImageTasks, dtype: torch.dtype, device: str):
        super().__init__(source, path, dtype, device)
        self.images = images

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        return self.images.loaded[:2]


class PagesTasks(TextTasks):
    """TextTasks over prompts of images and a question: a window's prefix is the sample of the same number."""

    def __init__(self, model: SeeingModel, texts: Sequence[Text], windows: int, asked: str, count: int, step: int):
        super().__init__(model, texts, windows, 0, count, 0, step)
        self._asked = asked

    def what(self, task: str) -> dict[str, Any]:
        images = {name: value for name, value in self._of.images.what(self._asked).items() if name != "kind"}
        return {**images, **super().what(task), "kind": "text after images", "task": self._asked}

    def prompt(self, task: str, index: int) -> tuple[Mapping[str, Tensor], Tensor]:
        ids = self._of.ids_of(self._texts[task])
        return self._of.images.prompts(self._asked, index)[0][0], piece_of(ids, self._count, index)

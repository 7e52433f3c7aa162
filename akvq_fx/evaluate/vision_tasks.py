"""Multi-image questions of a folder with a model and a task generator: accuracy and NLL per answer token.

The folder has load.py with load(dtype=...) -> (model, tokenizer) and inputs(tokenizer, images, question) -> model
inputs whose image tokens come before the question; tasks.py with TASKS, Bank, make, example, specs and render; and
sprites.pkl.

The prompt up to and including its last image token is run once and packed, then every question of the sample is asked
over a copy of that cache. Question and reference answer are read in one call. Greedy decoding gives the reference
answer if and only if, at every answer position and at the end token, the most likely token is the reference's: so exact
match of the greedy answer is counted without decoding.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from akvq_fx.evaluate.settings import bits_of, prefill, read, running
from akvq_fx.evaluate.table import Column

PROBES = 64  # samples drawn to see whether a task occurs; the rarest occurs in about every second sample


class ImageTasks:
    """A table.Suite. A row is one sample: accuracy and nll are means over its questions.

    images      images a sample;  samples   samples a task
    questions   questions a sample, of the task's own kind; fewer where a sample has fewer
    split       as tasks.example takes it
    trust_remote_code   the folder's Python files are run and its sprites.pkl is unpickled, which can do anything:
                        nothing is opened without it
    Raises PermissionError without trust_remote_code, ValueError for a task that the folder does not have or that does
    not occur with so many images, OSError for a folder without the files.
    """

    columns = (
        Column("bits", "bits", 2, error=False),
        Column("accuracy", "accuracy"),
        Column("nll", "NLL per answer token", 4),
    )
    headline = "accuracy"

    def __init__(
        self,
        folder: str | Path,
        tasks: Sequence[str] | None = None,
        *,
        images: int = 14,
        samples: int = 32,
        questions: int = 1,
        split: str = "test",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ):
        if not trust_remote_code:
            raise PermissionError(
                f"{folder}: its load.py and tasks.py would be run and its sprites.pkl unpickled, which can do anything "
                "on this machine; if you trust them, say --trust-remote-code (ImageTasks(..., trust_remote_code=True))"
            )
        if images < 2 or samples < 1 or questions < 1:
            raise ValueError(f"got {images=}, {samples=}, {questions=}; accepted: 2, 1 and 1, or more")
        self._folder = Path(folder)
        self._maker = module_at(self._folder / "tasks.py")
        self._bank = self._maker.Bank(str(self._folder / "sprites.pkl"))
        self._images, self._samples, self._questions, self._split = images, samples, questions, split
        self._dtype, self._device = dtype, device
        self.model = self._folder.resolve().name
        self.tasks = tuple(tasks) if tasks else tuple(task for task in self._maker.TASKS if self._occurs(task))
        for task in self.tasks:
            if task not in self._maker.TASKS:
                raise ValueError(f"no task {task!r} in {self._folder}; it has {', '.join(self._maker.TASKS)}")
            if not self._occurs(task):
                raise ValueError(f"task {task!r} does not occur with {images} images")

    def what(self, task: str) -> dict[str, Any]:
        return {
            "kind": "images",
            "model": str(self._folder),
            "dtype": str(self._dtype),
            "device": torch.device(self._device).type,
            "task": task,
            "images": self._images,
            "questions": self._questions,
            "split": self._split,
        }

    def count(self, task: str) -> int:
        return self._samples

    @contextmanager
    def under(self, options: Mapping[str, Any] | None) -> Iterator[Callable[[str, int], dict]]:
        with running(self.loaded[0], options) as run:
            yield functools.partial(self._measure, run)

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any, ModuleType, Tensor]:
        """The model, its tokenizer, the folder's load.py and the sprites."""
        loader = module_at(self._folder / "load.py")
        model, tokenizer = loader.load(dtype=torch.float32)
        for weight in model.parameters():  # not buffers: rotary frequencies rounded to 16 bits would make another model
            weight.data = weight.data.to(self._dtype)
        return model.eval().to(self._device), tokenizer, loader, self._bank.tensor()

    def _occurs(self, task: str) -> bool:
        scene = self._maker.TASKS.get(task)
        draws = (
            self._maker.make(random.Random(i), self._bank, self._split, scene, self._images) for i in range(PROBES)
        )
        return scene is None or any(task in draw.qa for draw in draws)

    def prompts(self, task: str, index: int) -> list[tuple[Mapping[str, Tensor], Tensor]]:
        """Model inputs of images and a question, and the answer's ids [m], for each question of a sample."""
        _, tokenizer, loader, sprites = self.loaded
        sample, *asked = self._maker.example(task, index, self._bank, split=self._split, n=self._images)
        pairs = list(dict.fromkeys([tuple(asked), *sample.qa[task]]))[: self._questions]
        spec, background = self._maker.specs([sample])
        pixels = self._maker.render(sprites, spec[0], background[0])
        return [
            (loader.inputs(tokenizer, pixels, question), answer_ids(tokenizer, answer)) for question, answer in pairs
        ]

    def _measure(self, run: Any, task: str, index: int) -> dict:
        image_id = self.loaded[0].config.image_token_id
        asked = [(*split(inputs, image_id), answer) for inputs, answer in self.prompts(task, index)]
        return ask(run, asked[0][0], [(rest, answer) for _, rest, answer in asked])


def split(inputs: Mapping[str, Tensor], image_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs of the prefix up to and including the last image token, ids [n] after it), of inputs of one row.

    Raises ValueError for a prompt without images.
    """
    places = (inputs["input_ids"][0] == image_id).nonzero()
    if not len(places):
        raise ValueError(f"akvq_fx.evaluate: the prompt has no image token {image_id}")
    end = int(places[-1]) + 1
    by_token = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    prefix = {name: value[:, :end] if name in by_token else value for name, value in inputs.items()}
    return prefix, inputs["input_ids"][0, end:]


def answer_ids(tokenizer: Any, answer: str) -> Tensor:
    """[m]: ids of an answer and the end token."""
    return torch.tensor([*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])


@torch.no_grad()
def ask(run: Any, prefix: Mapping[str, Any], questions: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy and NLL per answer token, means over (question ids, answer ids); and bits of the cached prefix."""
    cache = prefill(run, prefix)
    right, nll = [], []
    for question, answer in questions:
        logits, _ = read(run, torch.cat([question, answer]), copy.deepcopy(cache))
        log_probs = logits[-len(answer) - 1 : -1].double().log_softmax(-1).cpu()
        right.append(float((log_probs.argmax(-1) == answer).all()))
        nll.append(-log_probs.gather(1, answer[:, None]).mean().item())
    return {"accuracy": sum(right) / len(right), "nll": sum(nll) / len(nll), "bits": bits_of(cache, run)}


def module_at(path: Path) -> ModuleType:
    """A Python file as a module. Raises FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    spec = importlib.util.spec_from_file_location(f"akvq_fx_evaluate_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

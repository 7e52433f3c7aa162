"""MileBench (Song et al., arXiv 2404.18532) from a local copy of its released layout.

    <root>/<task>/<task>.json   {"meta_data": {"question_type", "task_instruction": instructions by number or key},
                                 "data": [{"sample_id", "task_instruction_id", "response",
                                           "task_instance": {"context", "images_path", "choice_list" (multi-choice)}}]}
    <root>/<task>/images/       what images_path names

The prompt is the instruction, a line break, the context with its images in place of {image#1}, {table#2} ..., and for
multi-choice the list of choices. `prompt_of` builds it, milebench_score scores the greedy answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from akvq_fx.evaluate.milebench_score import kind_of, letter_of, score
from akvq_fx.evaluate.settings import bits_of, running, to_model
from akvq_fx.evaluate.table import Column
from akvq_fx.transformers_names import cache_of

# The AKVQ-VL paper's Table II measures 12 tasks, 200 samples each. Known by name are the first, object existence, the
# last, document QA, and scene transition, webpage QA and textbook QA. The other seven are our reading: we take
# MileBench's own order between the first and the last, which gives its groups T-2 and S-1 whole, two tasks of T-4 and
# two of S-2.
PAPER_TASKS = (
    "ObjectExistence",
    "ObjectInteraction",
    "MovingAttribute",
    "ObjectShuffle",
    "StateChange",
    "SceneTransition",
    "WebQA",
    "TQA",
    "MultiModalQA",
    "WikiVQA",
    "SlideVQA",
    "DocVQA",
)
PLACE = re.compile(r"\{(?:image|table)#(\d+)\}")
NO_LETTERS = "GPR1200"  # more choices than letters: listed without them, as the benchmark does


class Sample(NamedTuple):
    """segments: the prompt's texts and image paths in order; reference: the answer; choices: () for open questions."""

    segments: list[str | Path]
    reference: str
    choices: tuple[str, ...]


class Task(NamedTuple):
    name: str
    kind: str  # of milebench_score
    samples: list[Sample]


def read_task(root: str | Path, name: str) -> Task:
    """One task of a local copy. Capitals, "_" and "-" in its name do not matter: released scripts differ in them.

    Raises OSError for a root without it, listing what is there, ValueError for a file in another layout.
    """
    folders = {simple(folder.name): folder for folder in sorted(Path(root).iterdir()) if folder.is_dir()}
    folder = folders.get(simple(name))
    if folder is None or not (file := folder / f"{folder.name}.json").is_file():
        there = ", ".join(tasks_in(root)) or "none"
        raise FileNotFoundError(f"no MileBench task {name!r} in {root}; tasks there: {there}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        about = content["meta_data"]
        samples = [sample_of(entry, about["task_instruction"], folder) for entry in content["data"]]
        return Task(folder.name, kind_of(folder.name, about["question_type"]), samples)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} is not in MileBench's layout: {type(error).__name__} {error}") from error


def tasks_in(root: str | Path) -> list[str]:
    """Names of all tasks of a local copy."""
    return sorted(file.parent.name for file in Path(root).glob("*/*.json") if file.stem == file.parent.name)


def paper_tasks_in(root: str | Path) -> tuple[list[str], list[str]]:
    """(those of PAPER_TASKS that a local copy has, as it names them; those that it lacks).

    Raises FileNotFoundError where it has none.
    """
    there = {simple(name): name for name in tasks_in(root)}
    found = [there[simple(name)] for name in PAPER_TASKS if simple(name) in there]
    if not found:
        others = ", ".join(there.values()) or "none"
        raise FileNotFoundError(
            f"none of the paper's twelve MileBench tasks in {root}; tasks there: {others}; "
            "name some with --task, or --task all"
        )
    return found, [name for name in PAPER_TASKS if simple(name) not in there]


def simple(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def sample_of(entry: Mapping[str, Any], instructions: Any, folder: Path) -> Sample:
    instance, number = entry["task_instance"], entry["task_instruction_id"]
    by_name = isinstance(instructions, Mapping) and number not in instructions
    instruction = instructions[str(number) if by_name else number]
    choices = tuple(map(str, instance.get("choice_list") or ()))
    images = [folder / "images" / path for path in instance["images_path"]]
    return Sample(
        prompt_of(instruction, instance["context"], images, choices, folder.name), str(entry["response"]), choices
    )


def prompt_of(
    instruction: str, context: str, images: Sequence[Path], choices: Sequence[str], task: str = ""
) -> list[str | Path]:
    """The prompt as texts and image paths in order. The first text is the instruction; {image#9} stays as text where
    there are fewer than 9 images."""
    if choices:
        letters = [f"{letter_of(i)}. " if task != NO_LETTERS else "" for i in range(len(choices))]
        listed = "\n".join(letter + choice for letter, choice in zip(letters, choices, strict=True))
        context = f"{context}\nChoice list: \n{listed}\nYour answer is: "
    segments: list[str | Path] = [instruction + "\n"]
    end = 0
    for place in PLACE.finditer(context):
        if 0 < int(place[1]) <= len(images):
            segments += [context[end : place.start()], images[int(place[1]) - 1]]
            end = place.end()
    return [part for part in (*segments, context[end:]) if part != ""]


def shorten(segments: Sequence[str | Path], tokenizer: Any, context: int, image_tokens: int) -> list[str | Path]:
    """The instruction and as much of the prompt's end as fits `context` tokens, an image taking `image_tokens`.

    As the released script does, whole pieces are left out, from the start; only a last text that is too long is cut.
    """
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    left = context - len(ids(segments[0]))
    kept: list[str | Path] = []
    for part in reversed(segments[1:]):
        cost = len(ids(part)) if isinstance(part, str) else image_tokens
        if cost > left:
            if not kept and isinstance(part, str) and left > 0:
                kept = [tokenizer.decode(ids(part)[-left:])]
            break
        kept.insert(0, part)
        left -= cost
    return [segments[0], *kept]


class MileBench:
    """A table.Suite. A row is one sample: accuracy (ROUGE-L of open-ended tasks), unanswered, released, answer.

    load           () -> (model, processor); called when the first sample is measured. The processor has a chat template
    tasks          names; None: those of PAPER_TASKS that are there;  samples   at most so many a task
    context        tokens that a prompt may have, None for any number; image_tokens of them an image. See `shorten`
    new_tokens     tokens of an answer, at most
    """

    columns = (
        Column("bits", "bits", 2, error=False),
        Column("accuracy", "accuracy"),
        Column("unanswered", "unanswered"),
        Column("released", "accuracy, released rule"),
    )
    headline = "accuracy"

    def __init__(
        self,
        root: str | Path,
        model: str,
        load: Callable[[], tuple[Any, Any]],
        tasks: Sequence[str] | None = None,
        *,
        samples: int = 200,
        context: int | None = None,
        image_tokens: int = 576,
        new_tokens: int = 512,
        about: Mapping[str, Any] | None = None,
    ):
        self._tasks = {task.name: task for task in (read_task(root, name) for name in tasks or paper_tasks_in(root)[0])}
        self.model, self.tasks = model, tuple(self._tasks)
        self._load, self._samples, self._about = load, samples, dict(about or {})
        self._context, self._image_tokens, self._new_tokens = context, image_tokens, new_tokens

    def what(self, task: str) -> dict[str, Any]:
        limits = {"context": self._context, "image_tokens": self._image_tokens, "new_tokens": self._new_tokens}
        return {"kind": "milebench", "model": self.model, "task": task, **limits, **self._about}

    def count(self, task: str) -> int:
        return min(self._samples, len(self._tasks[task].samples))

    @contextmanager
    def under(self, options: Mapping[str, Any] | None) -> Iterator[Callable[[str, int], dict]]:
        model, processor = self._load()
        with running(model, options) as run:
            yield lambda task, index: self._measure(run, processor, self._tasks[task], index)

    def _measure(self, run: Any, processor: Any, task: Task, index: int) -> dict:
        sample = task.samples[index]
        segments = sample.segments
        if self._context:
            segments = shorten(segments, processor.tokenizer, self._context - self._new_tokens, self._image_tokens)
        answer, bits = reply(run, processor, segments, self._new_tokens)
        result = score(task.kind, answer, sample.reference, sample.choices)
        numbers = {"accuracy": result.score, "unanswered": result.unanswered, "released": result.released, "bits": bits}
        return {**numbers, "answer": answer}


@torch.no_grad()
def reply(run: Any, processor: Any, segments: Sequence[str | Path], new_tokens: int) -> tuple[str, float]:
    """(greedy answer, bits per cached number) to a chat message of interleaved texts and images."""
    inputs = to_model(chat_inputs(processor, segments), run)
    out = run.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=True)
    generated = out.sequences[0, inputs["input_ids"].shape[1] :]
    return processor.decode(generated, skip_special_tokens=True).strip(), bits_of(cache_of(out), run)


def chat_inputs(processor: Any, segments: Sequence[str | Path]) -> dict[str, Any]:
    """Model inputs of one user message, up to where the answer starts."""
    from PIL import Image

    def part(segment: str | Path) -> dict:
        if isinstance(segment, str):
            return {"type": "text", "text": segment}
        with Image.open(segment) as image:
            return {"type": "image", "image": image.convert("RGB")}

    message = {"role": "user", "content": [part(segment) for segment in segments]}
    return dict(
        processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )

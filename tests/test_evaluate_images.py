"""Images: one packed prefix, questions asked over copies of it; teacher-forced exact match is greedy exact match."""

import functools
import math
import textwrap

import pytest
import torch

from akvq_fx.evaluate import ImageTasks, Store, fill
from akvq_fx.evaluate.settings import running
from akvq_fx.evaluate.table import cell_of
from akvq_fx.evaluate.vision_tasks import answer_ids, ask, split
from tests.zoo import IMG, ZOO

pytestmark = pytest.mark.usefixtures("one_layer")
trusted = functools.partial(ImageTasks, trust_remote_code=True)

SMALL = {"recipe": "akvq", "window": 4, "pivots": 1, "psa_text_key_bits": 2}  # an overlay is larger than these prompts

# what the folder's interface asks for, with drawn squares, a tiny model, and one task that needs two images
TASKS = """
import random
import torch
TASKS = {"first": "row", "pair": "row", "never": "row"}
class Bank:
    def __init__(self, path): self.size = len(open(path, "rb").read())
    def tensor(self): return torch.linspace(0, 1, self.size)
class Sample: pass
def make(rng, bank, split, scene, n):
    sample = Sample()
    sample.frames = [rng.random() for _ in range(n)]
    sample.qa = {"first": [(f"w{20 + i} w30", f"w{rng.randrange(40, 90)} w{i + 40}") for i in range(3)]}
    if n == 2:
        sample.qa["pair"] = [("w9", "w8")]
    return sample
def example(task, index, bank, split, n):
    rng = random.Random(f"{split}-{task}-{index}-{n}")
    sample = make(rng, bank, split, TASKS[task], n)
    question, answer = sample.qa[task][-1]
    return sample, question, answer
def specs(samples):
    return torch.tensor([s.frames for s in samples]), torch.zeros(len(samples), 1)
def render(sprites, spec, background):
    return spec.view(-1, 1, 1, 1).expand(-1, 3, 32, 32) * 2 - 1
"""
LOAD = """
import torch
from tests.zoo import ZOO
class Words:
    eos_token_id = 2
    def __call__(self, text, add_special_tokens=True): return {"input_ids": [int(word[1:]) for word in text.split()]}
def load(dtype):
    return ZOO["llava"]()[0].to(dtype), Words()
def inputs(tokenizer, images, question):
    ids = [1]
    for i in range(len(images)):
        ids += [10 + i] + [150] * 16
    ids = torch.tensor([ids + [5] + tokenizer(question)["input_ids"] + [6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}
"""


@pytest.fixture
def folder(tmp_path):
    for name, text in (("tasks.py", TASKS), ("load.py", LOAD), ("sprites.pkl", "12345")):
        (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path


@pytest.fixture(scope="module")
def llava(one_layer):
    model, inputs = ZOO["llava"](batch=1)
    return model, inputs


def split_inputs(inputs):
    prefix, rest = split(inputs, IMG)
    assert prefix["input_ids"][0, -1] == IMG and IMG not in rest
    assert prefix["attention_mask"].shape == prefix["input_ids"].shape
    assert torch.equal(torch.cat([prefix["input_ids"][0], rest]), inputs["input_ids"][0])
    return prefix, rest


def test_at_16_bits_rotary_frequencies_stay_float32(folder):
    model = trusted(folder, dtype=torch.float16).loaded[0]
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    frequencies = [buffer for name, buffer in model.named_buffers() if "inv_freq" in name]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)


@torch.no_grad()
def test_exact_match_is_greedy_decoding(llava):
    """An answer is right when, and only when, generate writes it and then the end token; its NLL is of one call."""
    model, inputs = llava
    prefix, rest = split_inputs(inputs)
    question = torch.cat([rest, torch.tensor([7, 8])])
    inputs = {**inputs, "input_ids": torch.cat([prefix["input_ids"], question[None]], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    length = inputs["input_ids"].shape[1]
    greedy = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, length:]
    assert len(greedy) == 4
    right = ask(model, prefix, [(question, greedy)])
    assert right["accuracy"] == 1 and right["bits"] == 32
    ids = torch.cat([inputs["input_ids"], greedy[None]], 1)
    logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, length - 1 : -1]
    due = -logits.double().log_softmax(-1).gather(1, greedy[:, None]).mean().item()
    assert right["nll"] == pytest.approx(due, abs=1e-5)
    for place in range(4):
        other = greedy.clone()
        other[place] = (other[place] + 1) % 100 + 3
        assert ask(model, prefix, [(question, other)])["accuracy"] == 0
    wrong = greedy.flip(0) if not torch.equal(greedy.flip(0), greedy) else (greedy + 1) % 100
    both = ask(model, prefix, [(question, greedy), (question, wrong)])
    assert both["accuracy"] == 0.5


def test_questions_do_not_see_each_other(llava):
    """The packed prefix is run once; each question reads its own copy."""
    model, inputs = llava
    prefix, rest = split_inputs(inputs)
    pairs = [(torch.cat([rest, torch.tensor([7 + i] * (i + 1))]), torch.tensor([20, 21 + i, 2])) for i in range(3)]
    with running(model, SMALL) as run:
        single = [ask(run, prefix, [pair])["nll"] for pair in pairs]
        together = ask(run, prefix, pairs)
    own = ask(model, prefix, pairs)
    assert together["nll"] == pytest.approx(sum(single) / 3, abs=1e-6) and len(set(single)) == 3
    assert together["bits"] < 32 and abs(together["nll"] - own["nll"]) > 1e-5, "the prefix really is packed"


def test_lossless_is_the_own_cache(folder):
    suite = trusted(folder, ["first"], images=2, samples=2, questions=2)
    none, lossless = fill(suite, {"none": None, "exact": {"body_bits": 16}}, Store())
    assert lossless["measures"]["nll"] == pytest.approx(none["measures"]["nll"], abs=1e-4)
    assert none["measures"]["bits"][0] == 32 and lossless["measures"]["bits"][0] != 32, "the backend did run"
    assert none["samples"] == 2 and none["model"] == folder.name


def test_the_prefix_is_run_once_a_sample(folder, monkeypatch):
    from akvq_fx.evaluate import vision_tasks

    calls = []
    counted = lambda name, f: lambda *args: calls.append(name) or f(*args)
    for name in ("prefill", "read"):
        monkeypatch.setattr(vision_tasks, name, counted(name, getattr(vision_tasks, name)))
    fill(trusted(folder, ["first"], images=3, samples=2, questions=2), {"none": None}, Store())
    assert calls == ["prefill", "read", "read"] * 2


def test_samples_depend_on_nothing_but_what_is_said(folder):
    rows = []
    for questions, images in ((1, 2), (1, 2), (2, 2), (1, 3)):
        suite, store = trusted(folder, ["first"], images=images, samples=2, questions=questions), Store()
        fill(suite, {"none": None}, store)
        rows.append(store.rows(cell_of(suite, "first", None)))
        rows.append(suite.what("first"))
    assert rows[0] == rows[2] and rows[1] == rows[3]
    assert rows[0] != rows[4] and rows[1] != rows[5] and rows[1] != rows[7]
    assert rows[0][0] != rows[0][1] and math.isfinite(rows[0][0]["nll"])


def test_says_what_it_accepts(folder, tmp_path_factory):
    assert trusted(folder, images=2).tasks == ("first", "pair")
    assert trusted(folder, images=3).tasks == ("first",)
    with pytest.raises(ValueError, match="'pair' does not occur with 3 images"):
        trusted(folder, ["pair"], images=3)
    with pytest.raises(ValueError, match="no task 'frist'.*first, pair, never"):
        trusted(folder, ["frist"])
    with pytest.raises(ValueError, match="images=1"):
        trusted(folder, images=1)
    with pytest.raises(FileNotFoundError, match="no tasks.py in"):
        trusted(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match="no image token 999"):
        split({"input_ids": torch.ones(1, 4, dtype=torch.long)}, 999)


def test_answers_end_with_the_end_token():
    class Tokenizer:
        eos_token_id = 2

        def __call__(self, text, add_special_tokens):
            assert add_special_tokens is False
            return {"input_ids": [len(word) for word in text.split()]}

    assert answer_ids(Tokenizer(), "red car").tolist() == [3, 3, 2]


def test_the_folders_code_is_run_only_where_told(tmp_path):
    """Nothing of the folder is opened: not its Python files, not its pickle."""
    for name in ("tasks.py", "load.py", "sprites.pkl"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(
        PermissionError, match=r"say --trust-remote-code \(ImageTasks\(\.\.\., trust_remote_code=True\)\)"
    ):
        ImageTasks(tmp_path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AttributeError):
        trusted(tmp_path)
    assert (tmp_path / "ran").exists()

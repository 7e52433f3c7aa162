"""MileBench: its layout, its prompt, its scoring (by hand from the released rules), a real processor."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from akvq_fx.evaluate import MileBench, Store, fill
from akvq_fx.evaluate.__main__ import main
from akvq_fx.evaluate.milebench import PAPER_TASKS, prompt_of, read_task, shorten, tasks_in
from akvq_fx.evaluate.milebench_score import kind_of, normal, rouge_l, score
from akvq_fx.evaluate.table import cell_of
from tests.zoo import ZOO

CHOICES = ("a cat", "the dog", "a red car", "nothing")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def entry(number, response="the dog", context="First {image#1} then {image#2}. What follows?", **instance):
    paths = [f"{number}_{i}.png" for i in range(2)]
    instance = {"context": context, "images_path": paths, "choice_list": list(CHOICES), **instance}
    return {
        "sample_id": number,
        "task_instruction_id": number % 2,
        "task_instance": instance,
        "response": response,
        "image_quantity_level": "Few",
    }


def write_task(root: Path, name: str, entries, question_type="multi-choice") -> None:
    images = root / name / "images"
    images.mkdir(parents=True)
    for i, sample in enumerate(entries):
        for j, path in enumerate(sample["task_instance"]["images_path"]):
            Image.new("RGB", (20 + 4 * i, 16 + 4 * j), (40 * i, 90 * j, 120)).save(images / path)
    about = {"task_instruction": ["Look.", "Watch."], "question_type": question_type, "num_sample": len(entries)}
    (root / name / f"{name}.json").write_text(json.dumps({"meta_data": about, "data": entries}))


@pytest.fixture
def root(tmp_path):
    write_task(tmp_path, "SceneTransition", [entry(i) for i in range(3)])
    opened = [entry(0, "a small dog runs", choice_list=None)]
    write_task(tmp_path, "CLEVR-Change", opened, "open-ended")
    return tmp_path


def test_a_task_is_read_and_prompted_as_released(root):
    assert tasks_in(root) == ["CLEVR-Change", "SceneTransition"]
    task = read_task(root, "scene_transition")
    assert (task.name, task.kind, len(task.samples)) == ("SceneTransition", "choice", 3)
    images = root / "SceneTransition" / "images"
    assert task.samples[1].segments == [
        "Watch.\n",
        "First ",
        images / "1_0.png",
        " then ",
        images / "1_1.png",
        ". What follows?\nChoice list: \nA. a cat\nB. the dog\nC. a red car\nD. nothing\nYour answer is: ",
    ]
    assert task.samples[1].reference == "the dog" and task.samples[1].choices == CHOICES
    opened = read_task(root, "CLEVR-Change")
    assert opened.kind == "rouge" and opened.samples[0].segments[-1] == ". What follows?"


def test_prompt_details():
    places = [Path("1.png"), Path("2.png")]
    result = prompt_of("See.", "{table#2}{image#1} and {image#3}", places, ["x", "y"], "GPR1200")
    assert result == ["See.\n", places[1], places[0], " and {image#3}\nChoice list: \nx\ny\nYour answer is: "]


def test_instructions_by_key(tmp_path):
    write_task(tmp_path, "TQA", [entry(0)])
    file = tmp_path / "TQA" / "TQA.json"
    content = json.loads(file.read_text())
    content["meta_data"]["task_instruction"] = {"0": "By key."}
    file.write_text(json.dumps(content))
    assert read_task(tmp_path, "TQA").samples[0].segments[0] == "By key.\n"


def test_says_what_is_not_there(root):
    with pytest.raises(FileNotFoundError, match="no MileBench task 'DocVQA'.*CLEVR-Change, SceneTransition"):
        read_task(root, "DocVQA")
    assert MileBench(root, "m", None).tasks == ("SceneTransition",)
    with pytest.raises(FileNotFoundError, match="'ObjectExistence'"):
        MileBench(root, "m", None, ["ObjectExistence"])
    with pytest.raises(
        FileNotFoundError, match="none of the paper's twelve .* tasks there: none; name some with --task"
    ):
        MileBench(root / "SceneTransition", "m", None)
    (root / "SceneTransition" / "SceneTransition.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="not in MileBench's layout: KeyError 'meta_data'"):
        read_task(root, "SceneTransition")
    assert len(set(PAPER_TASKS)) == 12


class Words:
    """A tokenizer of words."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": text.split()}

    def decode(self, ids):
        return " ".join(ids)


def test_long_prompts_lose_their_oldest_part():
    first, second = Path("1.png"), Path("2.png")
    segments = ["look\n", "one two", first, "three", second, "four five"]
    kept = lambda context: shorten(segments, Words(), context, 10)
    assert kept(100) == segments and kept(26) == segments, "1 + 2 + 10 + 1 + 10 + 2"
    assert kept(25) == kept(24) == segments[:1] + segments[2:]
    assert kept(23) == ["look\n", "three", second, "four five"]
    assert kept(13) == ["look\n", second, "four five"]
    assert kept(2) == ["look\n", "five"]


@pytest.mark.parametrize(
    "answer, found",
    [
        ("B. the dog", 1),
        ("It is b) the dog, I think", 1),
        ("the dog.", 1),
        ("I see TheDog there", 1),
        ("b", 1),
        ("B.", 1),
        ("option B", 1),
        ("C. a red car, not B. the dog", 0),
        ("the answer is b", None),  # an "a" too: two letters
        ("none of them", None),
        ("", None),
    ],
)
def test_choices_are_extracted(answer, found):
    result = score("choice", answer, "the dog", CHOICES)
    assert result == (float(found == 1), float(found == 1), float(found is None))


def test_released_quirks():
    assert score("choice", "", "a red car", CHOICES) == (0, 1, 1), "an empty answer counts as C, and is no answer"
    assert score("choice", "  \n", "a red car", CHOICES) == (0, 1, 1)
    assert score("choice", "3.5", "3.5", ["2.5", "3.5"]) == (0, 0, 1), (
        "a period in an option hides it without its letter"
    )
    assert score("choice", "b 3.5", "3.5", ["2.5", "3.5"]) == (1, 1, 0)
    with pytest.raises(ValueError, match="none of the choices"):
        score("choice", "x", "a bird", CHOICES)


def test_normal_text():
    assert normal("  The big, (2 of 3)!\n") == "the big 2 of 3" and normal("'Yes.'") == "yes"
    assert normal("left/right") == "left right" and normal("left/ right") == "left right"
    assert normal("1,000-5") == "10005", "a number with a comma makes marks vanish everywhere"
    assert normal("v1.5. Done.") == "v1.5 done"


@given(st.text(alphabet='abC 1,.-()"\n', max_size=20))
def test_normal_text_has_no_marks_or_capitals(text):
    found = normal(text)
    assert found == found.lower() and not set(found) & set(',()-"\n')
    assert not found.endswith((" ", ".")) or found.endswith("'")


def test_open_answers():
    assert rouge_l("a small dog runs", "a small dog runs") == pytest.approx(1, abs=1e-6)
    # common: a dog runs; recall 3/4, precision 3/5
    assert rouge_l("a dog that runs fast", "a small dog runs") == pytest.approx(2 * 0.45 / 1.35, abs=1e-6)
    assert rouge_l("dog dog dog", "a dog") == pytest.approx(2 * 0.5 / 1.5, abs=1e-6), "words count once"
    assert rouge_l("", "a dog") == 0
    assert score("rouge", "", "a dog") == (0, 0, 1)
    with pytest.raises(ValueError, match="has no words"):
        rouge_l("a", "")


def test_needles():
    assert score("needle", "It is Paris, sure.", "paris") == (1, 1, 0)
    assert score("needle", "parisian", "paris").score == 0
    assert score("contains", "parisian", "paris").score == 1
    pairs = (("TextNeedleInAHaystack", "?"), ("MMCoQA", "open-ended"), ("IEdit", "open-ended"))
    assert [kind_of(*pair) for pair in pairs] == ["needle", "contains", "rouge"]
    with pytest.raises(ValueError, match="question_type 'essay'"):
        kind_of("IEdit", "essay")


def tiny_processor():
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", *"abcdefghij"]
    words += [f"w{i}" for i in range(len(words), 150)] + ["<image>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<image>"], **special
    )
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(**size)
    extra = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE, **extra)


class Told:
    """A model and its processor in one: hands out the given answers one by one."""

    def __init__(self, answers):
        self.answers, self.config = list(answers), None
        self.prompts, self.tokenizer = [], Words()
        self.weight = torch.zeros(1)

    def parameters(self):
        return iter([self.weight])

    def apply_chat_template(self, messages, **_):
        self.prompts.append(messages[0]["content"])
        return {"input_ids": torch.zeros(1, 3, dtype=torch.long)}

    def generate(self, input_ids, **_):
        cache = [torch.zeros(1, 1, 4, 8, dtype=torch.float16)]
        out = torch.cat([input_ids, torch.ones(1, 1, dtype=torch.long)], 1)
        return type("Out", (), {"sequences": out, "past_key_values": cache})()

    def decode(self, ids, skip_special_tokens):
        assert ids.tolist() == [1], "only what was generated"
        return self.answers.pop(0)


def test_rows_of_a_fake_model(root):
    fake = Told(["B. the dog", "", "a cat"])
    suite = MileBench(root, "fake", lambda: (fake, fake), ["SceneTransition"], samples=200)
    store = Store()
    (row,) = fill(suite, {"none": None}, store)
    assert row["samples"] == 3
    assert row["measures"]["accuracy"] == [1 / 3, pytest.approx(1 / 3)]
    assert row["measures"]["unanswered"][0] == 1 / 3 and row["measures"]["bits"][0] == 16
    assert [r["answer"] for r in store.rows(cell_of(suite, "SceneTransition", None))] == ["B. the dog", "", "a cat"]
    assert [part["type"] for part in fake.prompts[0]] == ["text", "text", "image", "text", "image", "text"]
    assert fake.prompts[0][2]["image"].size == (20, 16)


def test_the_command_on_a_saved_model(one_layer, root, tmp_path, capsys):
    """A real processor with a chat template, a tiny random model, own cache and packed."""
    model, _ = ZOO["llava"]()
    model.save_pretrained(tmp_path / "tiny")
    tiny_processor().save_pretrained(tmp_path / "tiny")
    arguments = ["milebench", "--root", str(root), "--model", str(tmp_path / "tiny"), "--task", "SceneTransition"]
    arguments += ["--task", "CLEVR-Change", "--samples", "2", "--new-tokens", "4", "--json", str(tmp_path / "r.json")]
    arguments += ["--setting", "none", "--setting", "akvq:window=4,pivots=1", "--setting", "akvq:body_bits=16"]
    assert main(arguments) == 0
    cells = json.loads((tmp_path / "r.json").read_text())["cells"].values()
    bits = lambda options: options and (options["body_bits"], options["window"])
    found = {(cell["what"]["task"], bits(cell["what"]["options"])): cell["rows"] for cell in cells}
    assert sorted(len(rows) for rows in found.values()) == [1, 1, 1, 2, 2, 2]
    for task in ("SceneTransition", "CLEVR-Change"):
        own, packed, exact = found[task, None], found[task, (2, 4)], found[task, (16, 64)]
        assert [row["answer"] for row in exact] == [row["answer"] for row in own]
        assert all(row["bits"] < 32 for row in packed) and all(row["bits"] == 32 for row in own)
    shown = capsys.readouterr().out
    assert "| tiny | SceneTransition | akvq:window=4,pivots=1 | 2 |" in shown and "mean accuracy" in shown
    few = ["--model", str(tmp_path / "tiny"), "--samples", "1", "--new-tokens", "1", "--setting", "none"]
    assert main(["milebench", "--root", str(root), *few]) == 0
    shown = capsys.readouterr()
    assert "| tiny | SceneTransition | none | 1 |" in shown.out and "CLEVR-Change" not in shown.out
    assert f"not in {root}, and left out: ObjectExistence, ObjectInteraction" in shown.err

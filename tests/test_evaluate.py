"""evaluate: measures against their definitions, the product on a tiny model, and the command line."""

import copy
import json

import pytest
import torch
from PIL import Image

from akvq_fx.evaluate import Prompt, fidelity, prompt_fidelity, windows_of
from akvq_fx.evaluate.__main__ import main
from akvq_fx.evaluate.fidelity import MEASURES, compare
from akvq_fx.evaluate.settings import NothingPacked, options_of
from tests.test_evaluate_milebench import tiny_processor
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_layer")


@pytest.fixture(scope="module")
def llama(one_layer):
    model, inputs = ZOO["llama"]()
    ids = torch.randint(1, model.config.vocab_size, (400,), generator=torch.Generator().manual_seed(0))
    return model, windows_of(ids, 2, 60)


def test_measures_are_their_definitions():
    p, q = (
        torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).double(),
        torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]]).double(),
    )
    found = compare(p.log(), q.log(), torch.tensor([0, 2]))
    close = lambda name, due: torch.testing.assert_close(found[name], torch.tensor(due).double(), rtol=1e-6, atol=1e-9)
    close("nll", [0.3566749, 0.2231435])
    close("dnll", [0.3364722, 2.0794415])
    close("kl", [0.7 * 0.3364722 - 0.2 * 0.6931472, -0.1 * 1.6094379 - 0.1 * 1.3862944 + 0.8 * 2.0794415])
    close("agree", [1.0, 0.0])
    close("tv", [0.2, 0.7])


def test_lossless_changes_nothing_and_fewer_bits_change_more(llama):
    model, windows = llama
    kept = {name: p.clone() for name, p in model.named_parameters()}
    small = {"window": 4, "pivots": 1}
    lossless, eight, two = (
        fidelity(model, windows, 50, {**small, "body_bits": b} if b < 16 else {"body_bits": b}) for b in (16, 8, 2)
    )
    assert all(lossless.values[name].abs().max() < 1e-5 for name in ("dnll", "kl", "tv"))
    assert lossless.mean("agree") == 1 and lossless.values["nll"].shape == (2, 9)
    assert 1e-9 < eight.mean("kl") < 0.1 * two.mean("kl")
    assert two.bits < eight.bits < lossless.bits
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters()), "weights are left alone"
    assert two.to_dict().keys() >= {*MEASURES, "dnll_error", "bits", "windows"}
    torch.testing.assert_close(two.by_position("kl").mean().item(), two.mean("kl"))


def test_refuses_what_cannot_be_measured(llama):
    model, windows = llama
    with pytest.raises(ValueError, match="leave nothing to predict"):
        fidelity(model, windows, 59)
    with pytest.raises(ValueError, match="leave nothing to predict"):
        prompt_fidelity(model, [Prompt({"input_ids": windows[:1, :50]}, windows[0, 50:51])])
    with pytest.raises(ValueError, match="a row of 600 or more"):
        windows_of(torch.arange(599), 6, 100)


@pytest.fixture(scope="module")
def llava_prompts(one_layer):
    """Two prompts of images and text, of unequal length."""
    model, inputs = ZOO["llava"](batch=1)
    draw = lambda n: torch.randint(3, 140, (n,), generator=torch.Generator().manual_seed(n))
    return model, [Prompt(inputs, draw(9)), Prompt(inputs, draw(6))]


@torch.no_grad()
def test_a_vision_model_is_measured_on_prompts_with_images(llava_prompts):
    model, prompts = llava_prompts
    seen = []
    two = prompt_fidelity(model, prompts, "akvq:window=4,pivots=1", lambda: seen.append(1))
    assert len(seen) == 2 and two.mean("kl") > 1e-7 and two.bits < 32
    assert two.values["kl"].shape == (2, 8) and two.values["kl"][1].isnan().tolist() == [False] * 5 + [True] * 3
    # the mean counts each predicted token once, and nll is that of one call over prefix and continuation
    assert two.mean("kl") == pytest.approx(torch.cat([two.values["kl"][0], two.values["kl"][1, :5]]).mean().item())
    prompt = prompts[1]
    ids = torch.cat([prompt.inputs["input_ids"], prompt.following[None]], 1)
    logits = model(**{**prompt.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
    log_probs = logits[-6:-1].double().log_softmax(-1).gather(1, prompt.following[1:, None])[:, 0]
    torch.testing.assert_close(two.values["nll"][1, :5], -log_probs, atol=1e-5, rtol=1e-5)


def test_the_own_cache_against_itself(llava_prompts):
    found = prompt_fidelity(*llava_prompts, "none")
    assert found.mean("kl") == found.mean("dnll") == found.mean("tv") == 0 and found.mean("agree") == 1
    assert found.bits == 32


def test_a_model_that_nothing_packs_is_said(llama):
    model, windows = llama
    config = copy.deepcopy(model.config)
    config.head_dim = 12
    with pytest.raises(NothingPacked, match="nothing was packed"):
        fidelity(type(model)(config).eval(), windows, 50)


def test_settings():
    assert options_of("akvq") == {"recipe": "akvq"} and options_of("none") is None
    assert options_of("akvq-vl:body_clip=0.9,pivot_mode=massive,rotate=False") == {
        "recipe": "akvq-vl", "body_clip": 0.9, "pivot_mode": "massive", "rotate": False,
    }  # fmt: skip
    for wrong, message in (
        ("best", "recipe"),
        ("akvq:clip=1", "unknown option 'clip'"),
        ("akvq:window", "no option=value"),
    ):
        with pytest.raises(ValueError, match=message):
            options_of(wrong)


def test_the_command_resumes_and_writes_a_table(llama, tmp_path, monkeypatch, capsys):
    from akvq_fx.evaluate import __main__ as command

    model, _ = llama
    tokenizer = lambda text, return_tensors: {"input_ids": torch.tensor([[1 + ord(c) % 90 for c in text]])}
    loaded = []
    monkeypatch.setattr(command, "load_language", lambda args, name: loaded.append(name) or (model, tokenizer))
    (tmp_path / "text.txt").write_text("some words to read " * 20)
    arguments = f"fidelity --model org/tiny --text {tmp_path}/text.txt --prefix 40 --count 8 --windows 2".split()
    arguments += f"--json {tmp_path}/r.json --markdown {tmp_path}/r.md --setting".split()
    changed = [*arguments, "none", "--model", "second"]
    arguments.append("akvq:window=4,pivots=1")
    assert main(arguments) == 0 and loaded == ["org/tiny"]
    stored = json.loads((tmp_path / "r.json").read_text())
    (cell,) = stored["cells"].values()
    assert len(cell["rows"]) == 2 and cell["what"]["prefix"] == 40 and stored["table"][0]["samples"] == 2
    assert main(arguments) == 0 and loaded == ["org/tiny"], "nothing is loaded where nothing is missing"
    assert json.loads((tmp_path / "r.json").read_text()) == stored
    table = (tmp_path / "r.md").read_text()
    assert table.count("| tiny | text | akvq:window=4,pivots=1 | 2 |") == 1 and table in capsys.readouterr().out
    due = fidelity(
        model,
        windows_of(tokenizer("some words to read " * 20, None)["input_ids"][0], 2, 48),
        40,
        cell["what"]["options"],
    )
    assert stored["table"][0]["measures"]["kl"] == pytest.approx([due.mean("kl"), due.standard_error("kl")])
    (tmp_path / "text.txt").write_text("other words to read " * 20)
    assert main(changed) == 0 and loaded == ["org/tiny", "org/tiny", "second"]
    assert "| second | text |" in (tmp_path / "r.md").read_text()


def test_the_command_reads_prompts_with_images(tmp_path, capsys):
    model, _ = ZOO["llava"]()
    model.save_pretrained(tmp_path / "tiny")
    tiny_processor().save_pretrained(tmp_path / "tiny")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "1.png")
    lines = [
        {"prompt": "a b", "following": "c d e f", "images": ["1.png", "1.png"]},
        {"prompt": "a", "following": "g h i"},
    ]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    arguments = ["fidelity", "--model", str(tmp_path / "tiny"), "--prompts", str(tmp_path / "p.jsonl")]
    assert main([*arguments, "--setting", "none"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.startswith("| tiny | p | none | 2 | 32.00 |") and "| 0.0000 ± 0.0000 |" in row
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    assert main(arguments) == 1
    assert "line 1: accepted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            "fidelity --model nowhere/model --text {text}",
            "cannot load 'nowhere/model': there is no such folder, and the hub",
        ),
        ("fidelity --model nowhere/model --prompts {prompts}", "cannot load 'nowhere/model'"),
        ("fidelity --model m --text nowhere.txt", "nowhere.txt"),
        ("fidelity --model m --text {text} --setting best", "recipe"),
        ("fidelity --model m --text {text} --json {text}", "name another file"),
        ("images --folder nowhere --trust-remote-code", "no tasks.py in nowhere"),
        ("images --folder nowhere", "if you trust them, say --trust-remote-code"),
        ("milebench --root nowhere --model m", "nowhere"),
    ],
)
def test_the_command_says_what_is_missing(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment was read at its import
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "following": "b c"}')
    assert main(arguments.format(text=tmp_path / "text.txt", prompts=tmp_path / "p.jsonl").split()) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("akvq_fx.evaluate: ") and message in said


def test_help_explains_itself(capsys):
    for command in ([], ["fidelity"], ["images"], ["milebench"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("fidelity", "images", "milebench", "--setting", "none", "continues where it stopped")
    )


def test_a_stopped_command_says_that_it_goes_on(monkeypatch, capsys, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("akvq_fx.evaluate.table.fill", stop)
    (tmp_path / "text.txt").write_text("words")
    arguments = ["fidelity", "--model", "m", "--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "r.json")]
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err

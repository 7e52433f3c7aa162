"""evaluate: measures against their definitions, the product on a tiny model, and the command line."""

import json

import pytest
import torch

from akvq_fx.evaluate import fidelity, windows_of
from akvq_fx.evaluate.__main__ import main, options_of
from akvq_fx.evaluate.fidelity import MEASURES, compare
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def llama():
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
    with pytest.raises(ValueError, match="a row of 600 or more"):
        windows_of(torch.arange(599), 6, 100)


def test_settings():
    assert options_of("akvq") == {"recipe": "akvq"}
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
    monkeypatch.setattr(command, "load", lambda args: (model, tokenizer))
    (tmp_path / "text.txt").write_text("some words to read " * 20)
    arguments = [
        "--model",
        "tiny",
        "--text",
        str(tmp_path / "text.txt"),
        "--prefix",
        "40",
        "--count",
        "8",
        "--windows",
        "2",
    ]
    arguments += [
        "--json",
        str(tmp_path / "r.json"),
        "--markdown",
        str(tmp_path / "r.md"),
        "--setting",
        "akvq:window=4,pivots=1",
    ]
    assert main(arguments) == 0
    stored = json.loads((tmp_path / "r.json").read_text())
    monkeypatch.setattr("akvq_fx.evaluate.fidelity", lambda *_: pytest.fail("measured again"))
    assert main(arguments) == 0 and json.loads((tmp_path / "r.json").read_text()) == stored
    table = (tmp_path / "r.md").read_text()
    assert table.count("| akvq:window=4,pivots=1 |") == 1 and table in capsys.readouterr().out


def test_the_command_says_what_is_missing(capsys):
    assert main(["--model", "/nowhere/model", "--text", "x.txt"]) == 1
    assert "akvq_fx.evaluate: " in capsys.readouterr().err

"""akvq_fx.analysis: ablations, pictures, and the command."""

import importlib.util
import sys

import pytest
import torch

import akvq_fx
from akvq_fx import analysis
from akvq_fx.analysis import __main__ as command
from akvq_fx.evaluate.fidelity import prompts_of, windows_of
from tests.attention_models import Decoder, VisionDecoder, token_ids
from tests.test_calibrate import SMALL, images
from tests.zoo import ZOO

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@pytest.fixture(scope="module")
def llama(one_layer):
    model, _ = ZOO["llama"]()
    ids = torch.randint(1, model.config.vocab_size, (400,), generator=torch.Generator().manual_seed(0))
    return model, ids


@pytest.fixture(scope="module")
def ablation(llama) -> analysis.Ablation:
    model, ids = llama
    return analysis.ablation(
        model, prompts_of(windows_of(ids, 2, 60), 50), "body_bits", [2, 8], {"window": 0, "pivots": 1}
    )


def test_an_ablation_is_fidelity_along_an_option(ablation):
    two, eight = ablation.mean("kl")
    assert eight < 0.1 * two and str(ablation).splitlines()[0].split()[:2] == ["body_bits", "bits"]
    assert [line.split()[0] for line in str(ablation).splitlines()[2:]] == ["2", "8"]


def test_tokens_leave_the_window_where_they_are_read_in_steps(llama):
    model, ids = llama
    prompts = prompts_of(windows_of(ids, 1, 60), 10)
    measured = lambda step: analysis.ablation(model, prompts, "window", [0], {"pivots": 0}, step=step).mean("kl")[0]
    together, stepped = measured(50), measured(None)
    assert stepped > 1.2 * together, "later tokens read earlier ones at 2 bits"
    with pytest.raises(ValueError, match="no values"):
        analysis.ablation(model, prompts, "pivots", [])


@needs_matplotlib
def test_every_picture_is_written(ablation, tmp_path):
    found = akvq_fx.calibrate(VisionDecoder("masked_scatter", layers=3), images(2, 14, 3, 9), options=SMALL)
    paths = analysis.save_figures(found, tmp_path, [ablation])
    names = {"attention_mass", "attention_heads", "channels", "outliers", "massive_activations", "ablations"}
    assert {path.stem for path in paths} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    heights = lambda ax: torch.tensor([[bar.get_height() for bar in bars] for bars in ax.containers]).sum(0)
    for ax in analysis.figures.attention_mass(found).axes:
        torch.testing.assert_close(heights(ax), torch.ones(3).double())  # shares stack up to one
    with pytest.raises(ValueError, match="layer 9 was not measured; accepted: 0, 1, 2"):
        analysis.figures.channels(found, 9)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = akvq_fx.calibrate(Decoder(), token_ids(1, 12), options=SMALL)
    with pytest.raises(ImportError, match=r"akvq_fx\[figures\]"):
        analysis.figures.attention_mass(found)


def test_the_command_writes_a_policy_and_a_report(llama, tmp_path, monkeypatch, capsys):
    model, ids = llama
    following = prompts_of(windows_of(ids, 2, 60), 50)
    monkeypatch.setattr(command, "load_text", lambda args: (model, [p.inputs for p in following], following))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "found"
    arguments = ["--model", "tiny", "--text", "book.txt", "--out", str(out), "--ablate", "pivots=1,2"]
    assert command.main(arguments) == 0
    assert akvq_fx.load_policy(out / "policy.json") == {"tsa_layers": []}
    report, printed = (out / "report.md").read_text(), capsys.readouterr()
    assert "## pivots" in report and "LlamaForCausalLM: tsa_layers=()" in report and printed.out.strip() in report
    assert "no pictures" in printed.err


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    base = ["--model", "/nowhere/model", "--out", str(tmp_path)]
    for rest, message in (
        (["--text", "x.txt", "--ablate", "pivots"], "accepted: option=value"),
        (["--text", "x.txt", "--ablate", "pivts=1"], "unknown option 'pivts'"),
        (["--images", "x", "--ablate", "pivots=1"], "give --text"),
        (["--text", str(tmp_path / "none.txt")], "akvq_fx.analysis: "),
        (["--text", __file__], "there is no such folder, and the hub did not give it"),
    ):
        assert command.main([*base, *rest]) == 1
        assert message in capsys.readouterr().err


def test_the_command_stops_with_a_word(capsys, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "analyse", interrupted)
    assert command.main(["--model", "tiny", "--text", "book.txt", "--out", str(tmp_path)]) == 130
    assert f"stopped; {tmp_path} keeps" in capsys.readouterr().err

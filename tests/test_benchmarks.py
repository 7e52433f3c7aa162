"""benchmarks/: README names what is there, neighbours find each other, a missing Python is reported."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py")) + sorted((ROOT / "tests" / "sanitize").glob("*.py"))
where = lambda path: str(path.relative_to(ROOT))


def test_readme_names_every_script():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    commands = {ROOT / path for path in re.findall(r"`python (\S+\.py)", text)}
    assert commands and commands <= set(SCRIPTS)
    named = {name.split("/")[-1] for name in re.findall(r"[\w/]+\.py", text)}
    assert {path.name for path in SCRIPTS if path.stem != "sanitize_cases"} <= named


@pytest.mark.parametrize("path", [*SCRIPTS, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")], ids=where)
def test_paths_of_scripts_are_right(path):
    for name in re.findall(r"(?:benchmarks|tests/sanitize)/[\w/]+\.py", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", SCRIPTS, ids=where)
def test_neighbours_stand_in_one_folder(path):
    """A script that is run as a file finds only modules in its own folder by a bare name."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used.add(node.module)
    apart = [other for other in SCRIPTS if other.stem in used and other.parent != path.parent]
    assert apart == []


def test_a_python_that_is_missing_is_told(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("versions", ROOT / "benchmarks" / "conformance" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    assert versions.TABLE.exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["versions.py"])
    with pytest.raises(SystemExit, match="python3.10 is not on PATH.*--env"):
        versions.main()


@pytest.fixture
def speed(monkeypatch):
    """import_module that finds the scripts of benchmarks/speed by their bare names, as they find each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "speed"))
    return importlib.import_module


# parameters in 1e9, as published
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llava-1.5-7b", 7.06),
        ("qwen2.5-vl-7b", 8.29),
        ("qwen3-vl-8b", 8.77),
        ("gemma-3-4b", 4.30),
        ("internvl3-8b", 7.94),
    ],
)
def test_vision_models_are_the_published_ones(speed, name, published):
    """Full size without memory; tiny ones generate, every row its own images."""
    models = speed("vision_models")
    whole, _ = models.build(name, None, False, torch.device("meta"))
    assert sum(p.numel() for p in whole.parameters()) / 1e9 == pytest.approx(published, abs=0.005)
    cpu = torch.device("cpu")
    model, image = models.build(name, None, True, cpu)
    given = models.prompt(image, 2, 2, 5, model.config.get_text_config().vocab_size, cpu, model.dtype)
    out = model.generate(**given, max_new_tokens=3)
    assert out.shape == (2, given["input_ids"].shape[1] + 3)


def test_generate_measures_a_tiny_model(speed, tmp_path):
    """A process of its own writes what it saw after each call; the table has a row of it."""
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    how = "--tiny --device cpu --peer akvq --inner eager --text 100 --tokens-out 4 --second-batch 2"
    speed("generate").main([*how.split(), "--rows", str(rows), "--markdown", str(table)])
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(lines) == 5 and "error" not in lines[-1]
    seen = lines[-1]
    assert seen["packed"] == 4 and seen["plain"] == 0 and seen["refused"] == []
    assert seen["first_token_s"] > seen["next_token_s"] > 0 and seen["worst_step_ms"] >= seen["step_ms"] > 0
    assert seen["tokens_per_s"] == pytest.approx(4 / seen["generate_s"])
    assert seen["second_batch_generate_s"] > seen["second_batch_first_token_s"] > 0
    *_, row = table.read_text().strip().splitlines()
    assert row.startswith('| LLaVA-1.5-7B, tiny | model.compile(backend="akvq") | 1 | 117 tokens, 1 images; 4 out |')
    assert "4 of 4 tensors packed" in row


def test_static_rows_are_right(speed):
    """The peer of Slots: requests of unequal length that come and go get the tokens of generate."""
    models, peers, cpu = speed("vision_models"), speed("slot_peers"), torch.device("cpu")
    model, image = models.build("llava-1.5-7b", None, True, cpu)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    inputs = [models.prompt(image, 1, n, 5 + n, 32064, cpu, model.dtype) for n in (1, 3, 2, 4)]
    asked = list(zip(inputs, (9, 6, 7, 5), strict=True))
    due = [model.generate(**x, max_new_tokens=n)[0, x["input_ids"].shape[1] :].tolist() for x, n in asked]
    rows, handles = peers.Static(model, 2, 160, "eager", {}), []
    while asked or rows.held:
        if asked and len(rows.held) < rows.rows:
            handles.append(rows.insert(*asked.pop(0)))
        rows.step()
    assert [handle.tokens for handle in handles] == due


def test_slots_measures_a_tiny_model(speed, tmp_path):
    """A process of its own serves requests until some were counted; the table has a row of it."""
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    how = "--tiny --device cpu --peer akvq --inner eager --images 2 --requests 4 --seconds 300"
    speed("slots").main([*how.split(), "--rows", str(rows), "--markdown", str(table)])
    seen = json.loads(rows.read_text().splitlines()[-1])
    assert "error" not in seen and seen["ended"] >= 4 and seen["slots"] == 3
    assert seen["requests_per_minute"] == pytest.approx(60 * seen["ended"] / seen["counted_s"])
    assert (
        seen["first_from_arrival_s_p95"] >= seen["first_from_arrival_s_p50"] >= seen["first_from_admission_s_p50"] > 0
    )
    assert seen["between_ms_p95"] >= seen["between_ms_p50"] > 0
    *_, row = table.read_text().strip().splitlines()
    assert row.startswith("| 24 | akvq_fx.Slots | 3 |") and "at the end" in row


def test_tensor_parallel_measures_a_tiny_model(speed, tmp_path, capsys):
    """In one process, which shares nothing out; tests/test_tensor_parallel.py has two."""
    rows = tmp_path / "rows.jsonl"
    how = "--tiny --peer dynamic --images 1 --text 5 --tokens-out 3"
    speed("tensor_parallel").main([*how.split(), "--rows", str(rows)])
    (seen,) = map(json.loads, rows.read_text().splitlines())
    assert "error" not in seen and seen["ranks"] == 1 and len(seen["tokens"]) == 3
    speed("tensor_parallel").main(["--table", str(rows)])
    assert "| LLaVA-1.5-7B | all | 1 | DynamicCache, uncompiled | 1 |" in capsys.readouterr().out

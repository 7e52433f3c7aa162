"""benchmarks/: README names what is there, neighbours find each other, a missing Python is reported."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

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

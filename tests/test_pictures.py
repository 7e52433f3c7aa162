"""docs/pictures: the stored files are what draw.py draws, and its numbers stand where they are said to be from."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
NUMBERS = json.loads((PICTURES / "numbers.json").read_text(encoding="utf-8"))["numbers"]
matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is the extra figures")


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", PICTURES / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stored_pictures_are_what_the_script_draws(draw, tmp_path):
    stored = {path.name: path.read_bytes() for path in PICTURES.glob("*.svg")}
    assert set(stored) == {f"{name}.svg" for name in draw.PICTURES}
    versions = {re.search(rb"Matplotlib v([\w.]+)", content)[1].decode() for content in stored.values()}
    if versions != {matplotlib.__version__}:
        pytest.skip(f"drawn with matplotlib {versions}, this is {matplotlib.__version__}, which may draw other bytes")
    draw.draw(tmp_path)
    for name, content in stored.items():
        assert (tmp_path / name).read_bytes() == content, f"{name} is out of date: run docs/pictures/draw.py"


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_stands_in_its_file(name):
    number = NUMBERS[name]
    lines = (ROOT / number["file"]).read_text(encoding="utf-8").splitlines()
    for heading in number["under"]:
        lines = lines[next(i for i, line in enumerate(lines) if line.startswith(heading)) + 1 :]
    line = next(line for line in lines if line.strip().startswith(number["row"]))
    found = re.findall(r"\d+(?:\.\d+)?", line)
    assert number["value"] in found and number.get("error", number["value"]) in found, line


def test_every_number_is_drawn(draw):
    """A number that no picture shows is out of numbers.json."""
    asked = set()

    class Watched(draw.Numbers):
        def value(self, name):
            asked.add(name)
            return super().value(name)

        def shown(self, name):
            asked.add(name)
            return super().shown(name)

    for picture in draw.PICTURES.values():
        picture(Watched())
    assert asked == set(NUMBERS)

"""README.md and docs/ are true: links lead somewhere, tables and outputs are what the code gives, the program runs."""

import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
import transformers

import akvq_fx
from akvq_fx import kernels, torch_internals
from akvq_fx.recipes import SIMULATORS, Context, Simulation
from tests.kernel_cases import assert_close, randn
from tests.zoo import ZOO

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\(([^)\s]+)\)")
WORDS, LINES, WIDTH = 950, 15, 120


def block(marker: str) -> str:
    """The fenced block after a marker comment of README."""
    return re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)```", README, re.DOTALL)[1]


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_tables_are_the_codes():
    script = [sys.executable, str(ROOT / "docs" / "tables.py"), "--check"]
    done = subprocess.run(script, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("fidelity.md", "versions.md")], ids=lambda page: page.name
)
def test_prose_ends_at_120(page):
    inside = False
    for line in page.read_text().splitlines():
        inside ^= line.startswith("```")
        free = inside or line.startswith(("|", "!", "[!")) or "](" in line
        assert free or len(line) <= WIDTH, line


def test_prompt_graph_is_as_shown():
    shown = re.search(r"<!-- prompt -->\n```\n(.*?)```", (ROOT / "docs" / "how-it-works.md").read_text(), re.DOTALL)[1]
    graph = (ROOT / "tests" / "golden" / "prompt_graph.txt").read_text()
    assert re.findall(r"akvq::(\w+)", shown) == re.findall(r"target=torch\.ops\.akvq\.(\w+)", graph)
    for op, arguments in re.findall(r"akvq::(\w+)\((.*)\)", shown):
        known = {argument.name for argument in getattr(torch.ops.akvq, op).default._schema.arguments}
        assert set(re.findall(r"(\w+)=", arguments)) <= known, op


def blocks_of_walk(title: str) -> list[str]:
    """The indented Python blocks of a walk of docs/extending.md."""
    walk = (ROOT / "docs" / "extending.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return [textwrap.dedent(code) for code in re.findall(r"   ```python\n(.*?)   ```", walk, re.DOTALL)]


def test_the_recipe_of_extending_is_right(monkeypatch):
    """The last two Python blocks of its second walk are a simulated recipe and the loop that it must equal."""
    simulator, loop = blocks_of_walk("A recipe")[-2:]
    monkeypatch.setattr("akvq_fx.recipes.recipe.SIMULATORS", dict(SIMULATORS))
    namespace: dict = {}
    exec(compile(simulator, "extending.md", "exec"), namespace)
    exec(compile(loop, "extending.md", "exec"), namespace)
    x, context = randn(1, 2, 7, 16), Context(4, torch.ones(1, 7, dtype=torch.bool), None)
    read = Simulation.parse(namespace["TERNARY"].keys).read(x, context)
    assert_close("read", namespace["ternary_loop"](x, context, None), read)
    assert len(read[0, 0, 0].unique()) == 3 and torch.equal(read[:, :, 4:], x[:, :, 4:])


def test_the_kernel_of_extending_is_right(monkeypatch):
    """The two Python blocks of its third walk are a kernel and its test."""
    kernel, test = blocks_of_walk("A kernel")
    module, namespace = types.ModuleType("akvq_fx.kernels.rotate_butterfly"), {}
    exec(compile(kernel, "extending.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(kernels, "rotate_butterfly", module, raising=False)
    exec(compile(test, "extending.md", "exec"), namespace)
    for dtype in module.DTYPES:
        namespace["test_equals_the_matrix_product"](24, dtype)
    assert "accepted: float32" in module.refusal(torch.ones(8).double())


def test_readme_is_short():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    words = [word for word in re.sub(r"\]\([^)]*\)|!\[[^\]]*|<!--.*?-->", "", prose).split() if re.search(r"\w", word)]
    assert len(words) <= WORDS


def test_badges_are_true():
    (oldest, newest), setup = (torch_internals.OLDEST, torch_internals.NEWEST), (ROOT / "setup.cfg").read_text()
    assert f"PyTorch-{oldest[0]}.{oldest[1]}_to_{newest[0]}.{newest[1]}-" in README
    assert f"torch >={oldest[0]}.{oldest[1]}\n" in setup and "python_requires = >=3.10" in setup
    assert "license = Apache-2.0" in setup and "Apache License" in (ROOT / "LICENSE").read_text()


def test_explain_prints_that(monkeypatch):
    monkeypatch.setattr("tests.zoo.LAYERS", 3)  # the first two have the policy of TSA, the third that of PSA
    model, inputs = ZOO["llava"]()
    lines = [line.rstrip() for line in str(akvq_fx.explain(model, **inputs)).splitlines()]
    assert block("explain").splitlines() == [
        line for line in lines if line[:1].isdigit() or line[:5] in ("layer", "-----")
    ]


def test_the_program_runs(monkeypatch, capsys):
    """As it stands, but for the hub: a tiny model of the same family, and a processor that has its inputs ready."""
    model, inputs = ZOO["smolvlm"](batch=1)

    class Processor:
        def apply_chat_template(self, messages, **options):
            assert messages[0]["role"] == "user" and options["return_dict"]
            return inputs

        def decode(self, tokens):
            return f"{len(tokens)} tokens"

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: Processor())
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda name: model)
    program = block("program")
    assert len(program.splitlines()) <= LINES
    exec(compile(program, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "tokens" in printed and re.search(r"packed tensors [1-9].*\nplain tensors 0,", printed)


def test_options_of_readme_are_the_defaults():
    config = akvq_fx.AKVQConfig()
    for name, default in re.findall(r"^\| `(\w+)` \| (\S+) \| ", README, re.MULTILINE):
        value = getattr(config, name)
        assert default == ("none" if value is None else f'`"{value}"`' if isinstance(value, str) else f"`{value}`"), (
            name
        )

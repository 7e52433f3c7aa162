"""The house holds: imports point one way, nothing prints or knows a model's name, passes stand in order."""

import ast
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from akvq_fx.passes import PIPELINE, check_order
from akvq_fx.passes.patterns.arguments import argument_of, place_of
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport
from tests.attention_models import Decoder, captured, token_ids

ROOT = Path(__file__).parent.parent
# each may import itself and what stands before it
LAYERS = ("recipes", "config", "kernels", "program", "passes.patterns", "passes", "akvq_fx")
# modules of akvq_fx that import only PyTorch and config
BASE = ("config", "exchange", "report", "torch_internals", "transformers_names")
FAMILIES = (
    *(
        "llava",
        "qwen",
        "gemma",
        "mistral",
        "mllama",
        "paligemma",
        "internvl",
        "idefics",
        "falcon",
        "cohere",
        "deepseek",
    ),
    *("llama", "phi3", "smolvlm", "florence", "kosmos", "glm4v"),
)


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def place(path: Path) -> int:
    """Index into LAYERS of a file of the library."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "passes":
        return LAYERS.index("passes.patterns" if parts[1] == "patterns" else "passes")
    if parts[:2] == ("akvq_fx", "recipes"):
        return 0
    if parts[0] == "akvq_fx":
        return LAYERS.index("config" if path.stem in BASE else "program" if path.stem == "program" else "akvq_fx")
    return LAYERS.index("kernels")


def target(module: str) -> int | None:
    """Index into LAYERS of an imported module; None for one that is not ours."""
    if module.split(".")[0] != "akvq_fx":
        return None
    if module in {f"akvq_fx.{name}" for name in BASE}:
        return 1
    for name in ("recipes", "kernels", "program", "passes.patterns", "passes"):
        if f"{module}.".startswith(f"akvq_fx.{name}."):
            return LAYERS.index(name)
    return LAYERS.index("akvq_fx")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names if node.module == "akvq_fx" else [node.module]
    return found


def upward(path: Path, tree: ast.AST) -> list[str]:
    return [module for module in imports(tree) if (t := target(module)) is not None and t > place(path)]


LIBRARY = files("akvq_fx", "passes", "kernels")
where = lambda path: str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LIBRARY, ids=where)
def test_imports_point_one_way(path):
    assert upward(path, ast.parse(path.read_text())) == []


def test_an_upward_import_would_be_seen():
    inside = ROOT / "passes" / "patterns" / "nodes.py"
    assert upward(inside, ast.parse("from akvq_fx.passes.state import GraphState")) == ["akvq_fx.passes.state"]
    assert upward(ROOT / "kernels" / "cache.py", ast.parse("from akvq_fx import packed_kv")) == ["akvq_fx.packed_kv"]
    assert upward(ROOT / "akvq_fx" / "report.py", ast.parse("import akvq_fx.kernels.layout")) == [
        "akvq_fx.kernels.layout"
    ]
    program = ROOT / "akvq_fx" / "program.py"
    assert upward(program, ast.parse("import akvq_fx.passes.state")) == ["akvq_fx.passes.state"]
    recipe = ROOT / "akvq_fx" / "recipes" / "kivi.py"
    assert upward(recipe, ast.parse("from akvq_fx.config import AKVQConfig")) == ["akvq_fx.config"]
    assert upward(ROOT / "kernels" / "simulate.py", ast.parse("from akvq_fx.recipes import Context")) == []


@pytest.mark.parametrize("path", files("akvq_fx/recipes"), ids=where)
def test_recipes_need_only_torch(path):
    used = {module.split(".")[0] for module in imports(ast.parse(path.read_text()))}
    assert used <= {"torch", "akvq_fx", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.name != "__main__.py"], ids=where)
def test_needs_no_transformers_and_prints_nothing(path):
    tree = ast.parse(path.read_text())
    assert [m for m in imports(tree) if m.split(".")[0] == "transformers"] == []
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls


@pytest.mark.parametrize("path", files("passes", "kernels"), ids=where)
def test_knows_no_model_family(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    documented = [n for n in nodes if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef))]
    docstrings = {ast.get_docstring(n, clean=False) for n in documented}
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str} - docstrings
    names = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    assert [(f, text) for text in strings | names for f in FAMILIES if f in text.lower()] == []


def test_passes_stand_in_order():
    check_order(PIPELINE)
    for i, step in enumerate(PIPELINE):
        for earlier in step.follows:
            with pytest.raises(AssertionError, match=f"{step.__name__} follows .*{earlier}"):
                check_order([step, *(other for j, other in enumerate(PIPELINE) if j != i)])
        for fact in step.needs:
            givers = [other for other in PIPELINE if fact in other.gives]
            moved = [other for other in PIPELINE if other not in givers]
            with pytest.raises(AssertionError, match="follows|needs"):
                check_order([*moved, *givers])


def test_a_fact_that_nobody_gave_is_missed():
    def reader(state): ...

    reader.follows, reader.needs, reader.gives = (), ("query_uses",), ()
    with pytest.raises(AssertionError, match="reader needs .'query_uses'., which no pass before it gives"):
        check_order([PIPELINE[0], reader, *PIPELINE[1:]])


def facts_used(text: str) -> set[str]:
    """Facts of GraphState that a pass's source names, also through GraphState's own methods."""
    through = {name: facts_of(function, "self") for name, function in vars(GraphState).items() if callable(function)}
    named = facts_of(text, "state")
    return (named | set().union(*(through[name] for name in named & through.keys()))) & FACTS


def facts_of(source, owner: str) -> set[str]:
    """Names x of every `owner.x` and `anything.owner.x`."""
    tree = ast.parse(source if isinstance(source, str) else textwrap.dedent(inspect.getsource(source)))
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    return {n.attr for n in attributes if owner in (getattr(n.value, "id", ""), getattr(n.value, "attr", ""))}


FACTS = {fact for step in PIPELINE for fact in step.gives}


@pytest.mark.parametrize("step", PIPELINE, ids=lambda step: step.__name__)
def test_a_pass_names_the_facts_that_it_uses(step):
    path = ROOT / "passes" / f"{step.__name__}.py"
    assert facts_used(path.read_text()) == set(step.needs) | set(step.gives)
    header = ast.get_docstring(ast.parse(path.read_text()))
    lines = dict(re.findall(r"\b(Needs|Gives|Follows) {2,4}(\w+(?:, \w+)*)", header))
    wanted = {"Needs": step.needs, "Gives": step.gives, "Follows": step.follows}
    assert lines == {name: ", ".join(given) or "none" for name, given in wanted.items()}


def test_facts_are_fields_of_the_state():
    (capture,) = captured(Decoder(), token_ids(2, 6))
    assert vars(capture.state).keys() >= FACTS
    assert facts_used("state.bind(x), self.state.made, state.graph") == {"buffers", "made"}  # bind fills buffers


def test_each_pass_reports_under_its_name():
    (capture,) = captured(Decoder(), token_ids(2, 6))
    assert all(type(report) is PassReport for report in capture.state.reports)
    assert [report.name for report in capture.state.reports] == [step.__name__ for step in PIPELINE]


def test_one_pass_a_file():
    for step in PIPELINE:
        assert step.__module__ == f"akvq_fx.passes.{step.__name__}"
        assert step.__code__.co_filename.endswith(f"{step.__name__}.py")
    stems = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__", "state"}
    stems -= {"parts_of_buffers"}  # a part of exchange_axes
    assert stems == {step.__name__ for step in PIPELINE}


def test_an_error_names_its_pass(monkeypatch):
    def explode(state):
        raise ValueError("boom")

    monkeypatch.setattr("akvq_fx.backend.PIPELINE", (*PIPELINE[:3], explode))
    with pytest.raises(Exception, match=r"boom \(akvq pass explode, after canonicalize, batch_axes, exchange_axes\)"):
        captured(Decoder(), token_ids(2, 6))


def test_bare_imports_register_no_op_twice():
    with pytest.raises(ImportError, match="import akvq_fx.passes, not passes"):
        exec(compile((ROOT / "passes" / "__init__.py").read_text(), "passes", "exec"), {"__name__": "passes"})
    bare = {"__name__": "kernels", "__path__": [str(ROOT / "kernels")]}
    exec(compile((ROOT / "kernels" / "__init__.py").read_text(), "kernels", "exec"), bare)
    assert bare["__path__"] == [], "nothing below a bare kernels package can be imported"


IMPORTING = """
import json, logging, os, sys, types, warnings
import torch, torch._dynamo, torch._inductor.config, torch._functorch.config, torchao.utils, safetensors
from torch._dynamo.eval_frame import OptimizedModule
import torch.nn.functional as F

def plain(config):
    if not hasattr(config, "get_config_copy"):
        return dict(vars(config))
    return {k: repr(v) for k, v in config.get_config_copy().items()}

def names(*owners):
    return {f"{o.__module__ if isinstance(o, type) else ''}.{o.__name__}.{k}": id(v)
            for o in owners for k, v in vars(o).items() if not isinstance(v, types.ModuleType)}

def state():
    found = {"filters": repr(warnings.filters), "environment": dict(os.environ), "hook": repr(sys.excepthook)}
    loggers = {n: logging.getLogger(n) for n in before}
    found["levels"] = {n: (x.level, len(x.handlers), x.propagate) for n, x in loggers.items()}
    found["levels"][""] = (logging.root.level, len(logging.root.handlers))
    for config in (torch._dynamo.config, torch._inductor.config, torch._functorch.config, torch.compiler.config):
        found[config.__name__] = plain(config)
    found["torch"] = [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
                      torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
                      torch.backends.cuda.matmul.allow_tf32, torch.initial_seed()]
    found["functions"] = names(F, torch, torch._dynamo, torch.nn.Module, torch.Tensor, OptimizedModule)
    hooks = torch._dynamo.utils.get_hook_for_recompile_user_context() or ()
    found["dynamo_listeners"] = [f"{hook.__module__}.{hook.__name__}" for hook in hooks]
    callbacks = torch._dynamo.callback_handler
    found["dynamo_callbacks"] = [len(callbacks.start_callbacks), len(callbacks.end_callbacks)]
    return json.loads(json.dumps(found, default=repr))

before = [n for n in logging.root.manager.loggerDict]
first = state()
import akvq_fx, akvq_fx.backend
second = state()
changed = {}
for key in first:
    if first[key] != second[key]:
        if isinstance(first[key], dict):
            keys = {k for k in first[key].keys() | second[key].keys() if first[key].get(k) != second[key].get(k)}
            changed[key] = sorted(keys)
        else:
            changed[key] = second[key]
print(json.dumps(changed))
"""


def test_importing_changes_nothing_global():
    """But what README says: OptimizedModule gets a generate, and dynamo has one listener more."""
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "functions": ["torch._dynamo.eval_frame.OptimizedModule.generate"],
        "dynamo_listeners": ["akvq_fx.gave_up._before_compiling"],
    }


def modules() -> dict[str, Path]:
    """Every module of the library by its name."""
    found = {}
    for path in LIBRARY:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "akvq_fx" else ("akvq_fx", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, known) -> set[str]:
    """Modules of ours that a file imports anywhere, in functions too: not the packages around them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = names & set(known)
            found |= inside | ({node.module} if names - inside else set())
    return found & set(known)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach each other by imports, one list for each group."""
    reach = {name: set(targets) for name, targets in edges.items()}
    for middle in edges:
        for name in edges:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {
        tuple(sorted(other for other in edges if other in reach[name] and name in reach[other])) for name in edges
    }
    return sorted(list(group) for group in groups if group)


def test_no_import_leads_back():
    known = modules()
    edges = {name: imported(ast.parse(path.read_text()), known) for name, path in known.items()}
    assert circles(edges) == []


def test_a_circle_would_be_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    inside_a_function = ast.parse(
        "def f():\n    from akvq_fx import cache_file\n    from akvq_fx.config import AKVQConfig\n"
    )
    assert imported(inside_a_function, modules()) == {"akvq_fx.cache_file", "akvq_fx.config"}


def test_arguments_stand_where_the_schema_says():
    node = torch.fx.Graph().call_function(torch.ops.akvq.append.default, ("cache", "x", "at", None, None, "layout"))
    names = [argument.name for argument in node.target._schema.arguments]
    assert [place_of(node.target, name) for name in names] == list(range(len(names)))
    assert (argument_of(node, "x"), argument_of(node, "layout"), argument_of(node, "rotate")) == ("x", "layout", False)
    with pytest.raises(KeyError, match="restore"):
        place_of(node.target, "restore")

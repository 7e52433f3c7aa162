"""What `import akvq_fx` brings at once, and what later."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.fx import symbolic_trace

import akvq_fx
from akvq_fx.packed_kv import PackedKV
from akvq_fx.storage import Storage
from tests.kernel_cases import LAYOUTS, case_of

ROOT = Path(__file__).parent.parent


def run(code: str, *arguments, path: Path | None = None) -> None:
    """The code in a Python of its own, which imports this checkout; `path` is searched for installed packages too."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in (ROOT, path) if folder)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


def installed(folder: Path) -> Path:
    """A folder in which importlib.metadata finds the entry point that an installed akvq_fx has."""
    info = folder / "akvq_fx-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: akvq-fx\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\nakvq = akvq_fx.backend:akvq\n")
    return folder


LIGHT = """
import sys, torch
LATE = ("torch._dynamo", "torch._inductor", "torchao", "sympy", "akvq_fx.backend", "akvq_fx.packed_kv")
ops = lambda: sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("akvq::"))
kernels = lambda: {key: torch._C._dispatch_dump(key) for key in ops()}
late = [name for name in LATE if name in sys.modules]
assert not late, f"torch itself brings {late}"
import akvq_fx
late = [name for name in LATE if name in sys.modules]
assert not late, late
assert set(akvq_fx.__all__) <= set(dir(akvq_fx))
assert "akvq" in torch.compiler.list_backends()
first = kernels()
assert "akvq::append" in first and torch.ops.akvq.append
import akvq_fx.explain, akvq_fx.report, akvq_fx.analysis.calibrate
for name in akvq_fx.__all__:
    assert getattr(akvq_fx, name).__name__ == name, name
assert kernels() == first, "an op is registered later"
try:
    akvq_fx.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError
"""


def test_what_is_not_needed_at_once_is_loaded_later(tmp_path):
    run(LIGHT, path=installed(tmp_path))


UNPICKLE = """
import sys, torch
import akvq_fx
graph, packed, plain = torch.load(sys.argv[1], weights_only=False)
assert "akvq_fx.packed_kv" in sys.modules and "akvq_fx.backend" not in sys.modules
assert type(packed) is akvq_fx.PackedKV and torch.equal(packed.dequantize(), plain)
x = torch.arange(8.0).reshape(1, 8)
assert torch.equal(graph(x), torch.ops.akvq.rotate(x))
"""


def test_graphs_and_caches_are_unpickled(tmp_path):
    case = case_of(LAYOUTS["2bit"])
    storage = Storage(case.layout, case.pack(), case.length, case.length, None)
    packed = PackedKV.view_of(storage, case.length)
    graph = symbolic_trace(lambda x: torch.ops.akvq.rotate(x))
    torch.save((graph, packed, packed.dequantize()), tmp_path / "file")
    run(UNPICKLE, tmp_path / "file", path=installed(tmp_path))


CHECKOUT = """
import importlib.metadata
importlib.metadata.entry_points = lambda **_: importlib.metadata.EntryPoints()
import torch
import akvq_fx
model = torch.compile(torch.nn.Linear(2, 2), backend="akvq", options={"inner": "eager"})
assert model(torch.ones(1, 2)).shape == (1, 2) and akvq_fx.report(model)
"""


def test_a_checkout_that_is_not_installed_tells_dynamo():
    run(CHECKOUT)


LATE_IN_FAKE_MODE = """
import torch
from torch._subclasses import FakeTensorMode
import akvq_fx
with FakeTensorMode():
    akvq_fx.PackedKV
    from akvq_fx.kernels.cache_axes import STANDARD
    from akvq_fx.storage import marks_of
    growing, static = (marks_of(STANDARD, static) for static in (False, True))
assert all(name.startswith("_") and "dyna" in name for name in {*growing, *static}), growing
"""


def test_what_is_loaded_later_may_be_loaded_under_a_fake_mode(tmp_path):
    run(LATE_IN_FAKE_MODE, path=installed(tmp_path))


def test_type_checkers_are_told_the_same():
    tree = ast.parse(Path(akvq_fx.__file__).read_text())
    (told,) = (
        node.body for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    assert {alias.name: line.module for line in told for alias in line.names} == akvq_fx._LATER
    for name, module in akvq_fx._LATER.items():
        assert getattr(akvq_fx, name).__module__ == module, name
        assert not (ROOT / "akvq_fx" / f"{name}.py").exists(), f"Python would put the module {name} in its place"

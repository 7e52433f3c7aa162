"""Sizes: every function in torch's symbolic sizes can be computed on the host and by nodes of a graph."""

import operator

import pytest
import sympy
import torch
from torch.utils._sympy import functions as f
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from akvq_fx.packed_kv import PackedKV
from akvq_fx.passes.state import NodeAnalysis
from akvq_fx.program import compiled
from tests.attention_models import Attention

a, b = sympy.symbols("s0 s77", integer=True, positive=True)
PIECEWISE = pytest.mark.skipif(
    not hasattr(PythonReferenceAnalysis, "expr_cond_pair"), reason="this torch has no nodes for a case distinction"
)
EXPRESSIONS = {
    "sum": (a + 2 * b - 1, lambda x, y: x + 2 * y - 1),
    "square": (a**2, lambda x, y: x * x),
    "power": (f.PowByNatural(a, b), pow),
    "floor-divided": (f.FloorDiv(a, b), operator.floordiv),
    "twice": (f.FloorDiv(f.FloorDiv(a + 1, 2) + b, 3), lambda x, y: ((x + 1) // 2 + y) // 3),
    "ceiling-divided": (f.CeilDiv(a, 4), lambda x, y: -(-x // 4)),
    "clean-divided": (f.CleanDiv(6 * a, 3), lambda x, y: 2 * x),
    "mod": (f.Mod(a, b), operator.mod),
    "python-mod": (f.PythonMod(a - 2 * b, 7), lambda x, y: (x - 2 * y) % 7),
    "modular-indexing": (f.ModularIndexing(a, 2, 3), lambda x, y: x // 2 % 3),
    "max": (f.Max(a, b, 5), lambda x, y: max(x, y, 5)),
    "min": (f.Min(a, b), min),
    "where": (f.Where(a > b, a, 2 * b), lambda x, y: x if x > y else 2 * y),
    "piecewise": (sympy.Piecewise((a, a > b), (b, True)), max),
    "truncated": (f.TruncToInt(f.IntTrueDiv(a, b)), lambda x, y: int(x / y)),
    "floor": (f.FloorToInt(f.IntTrueDiv(a, b)), lambda x, y: x // y),
    "ceiling": (f.CeilToInt(f.IntTrueDiv(a, b)), lambda x, y: -(-x // y)),
    "rounded": (f.RoundToInt(f.IntTrueDiv(a, b)), lambda x, y: round(x / y)),
    "shifted": (f.LShift(a, b), operator.lshift),
    "half": (sympy.Rational(1, 2) * (2 * a + 2 * b), operator.add),
}


@pytest.mark.parametrize("expr, meaning", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_the_host_computes_every_size(expr, meaning):
    symbols = sorted(expr.free_symbols, key=str)
    function = compiled(expr, symbols)
    for x, y in ((1, 1), (7, 3), (12, 4), (3, 9)):
        given = [x if s is a else y for s in symbols]
        assert int(function(*given)) == meaning(x, y)


@pytest.mark.parametrize(
    "expr, meaning",
    [pytest.param(*given, marks=() if name != "piecewise" else PIECEWISE) for name, given in EXPRESSIONS.items()],
    ids=EXPRESSIONS,
)
def test_nodes_compute_every_size(expr, meaning):
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    symbols = {s: torch.fx.Proxy(graph.placeholder(str(s)), tracer) for s in (a, b)}
    graph.output(sympy_interp(NodeAnalysis, symbols, expr).node)
    run = torch.fx.GraphModule({}, graph)
    for x, y in ((1, 1), (7, 3), (12, 4), (3, 9)):
        assert int(run(x, y)) == meaning(x, y)


class Halved(Attention):
    """Keeps every second token of the prompt, and one of three of what is left."""

    def project(self, x):
        if x.shape[1] > 1:
            x = x[:, : x.shape[1] // 2] + x[:, -(x.shape[1] // 2) :]
        return super().project(x)

    def forward(self, x, past, at, total, padding):
        if past is None:
            return super().forward(x, past, at[: at.shape[0] // 2], total // 2, padding)
        return super().forward(x, past, at, total, padding)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_prompt_of_half_the_tokens(inner):
    attention = Halved()
    x = torch.randn(2, 23, 32)

    def model(x, past=None):
        tokens = x.shape[1]
        total = tokens if past is None else past[0].shape[2] + tokens
        at = torch.arange(total - tokens, total)
        return attention(x, past, at, total, None)

    options = {"inner": inner, "body_bits": 16}
    run = torch.compile(model, backend="akvq", options=options, dynamic=None)
    with torch.no_grad():
        for length in (23, 14, 19):
            got, past = run(x[:, :length])
            want, plain = model(x[:, :length])
            torch.testing.assert_close(got, want)
            assert type(past[0]) is PackedKV and past[0].shape == plain[0].shape
            got, past = run(x[:, -1:], past)
            want, plain = model(x[:, -1:], plain)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(past[0].dequantize(), plain[0])

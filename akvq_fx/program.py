"""Program: how to call a rewritten graph. Written by the passes for runtime.py and cuda_graph.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import GraphModule
from torch.utils._sympy.printers import PythonPrinter

from akvq_fx.kernels.cache_axes import STANDARD, CacheAxes
from akvq_fx.kernels.layout import Layout


@dataclass
class Packed:
    """Graph output: consecutive buffers that become a new PackedKV of `length` tokens.

    classes    name of the node that gave the tokens' classes: outputs that share it hold the same tokens as text
    axes       in which the caller keeps the tensor
    slides     it is a sliding window: tokens before its last ones will be dropped
    """

    layout: Layout
    length: Size
    prompt: Size
    static: bool
    owner: tuple[int, ...]
    classes: str
    axes: CacheAxes = STANDARD
    slides: bool = False


@dataclass
class Appended:
    """Graph output: the PackedKV of input `arg`, longer by the tokens appended; its last `kept` ones, None for all."""

    arg: int
    kept: Size | None = None


@dataclass
class Exchange:
    """Two plain static buffers of the caller's that are packed in place after the graph has run (akvq_fx/exchange.py).

    key, value       positions of the arguments
    at, query, mask  this step's positions, queries and attention mask, by their place among the graph's last results;
                     no mask: None
    length           tokens that attention sees
    affine           arguments of akvq::key_affine behind its tensors, None where keys have no affine map
    pivots           arguments of akvq::find_pivots behind its tensors, which choose the first real token
    owner            positions of the weights that make keys and values
    axes             in which the caller keeps keys and values
    """

    key: int
    value: int
    key_layout: Layout
    value_layout: Layout
    at: int
    query: int
    mask: int | None
    length: Size
    affine: tuple | None
    pivots: tuple
    owner: tuple[int, ...]
    axes: tuple[CacheAxes, CacheAxes] = (STANDARD, STANDARD)


@dataclass
class Fold:
    """Weights, by position, that the graph takes as folded copies (akvq_fx/folding.py).

    rows, columns    [H, D] and [Hq, D]: rows of the value weight and columns of the output weight by head and channel
    """

    value_weight: int
    value_bias: int | None
    output_weight: int
    rows: Any
    columns: Any


@dataclass
class Program:
    """How to call the rewritten graph with the arguments of the original one.

    inputs    per placeholder: an argument's position, or (position, number) of a PackedKV's buffer
    outputs   per original output: None for "as it comes", Packed or Appended
    appends   per PackedKV argument that grows: (position, tokens)
    firsts    positions of PackedKV arguments whose first slot the last inputs tell, by their size
    packed    positions of all PackedKV arguments that the graph takes as buffers
    unpacked  positions of PackedKV arguments that the graph takes as plain tensors
    rows      per PackedKV argument of which the graph takes the first rows: how many
    owners    per PackedKV argument: positions of the weights that make its layer's keys and values
    folds     weights that the graph takes as folded copies
    exchanges plain buffers that are packed behind the graph, which returns `extra` results more for them
    vision    "make": the last output is the vision mask of this call; "take": the last input is that mask, [batch,
              tokens] of vision_size
    embeddings  with "take": position of the argument [batch, tokens, E] that the first layer gets, None if unknown
    step      a decode step: every cache takes one new token
    """

    inputs: list[int | tuple[int, int]] = field(default_factory=list)
    outputs: list[None | Packed | Appended] = field(default_factory=list)
    appends: list[tuple[int, Size]] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    packed: list[int] = field(default_factory=list)
    unpacked: list[int] = field(default_factory=list)
    rows: dict[int, Size] = field(default_factory=dict)
    owners: dict[int, tuple[int, ...]] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    extra: int = 0
    vision: str | None = None
    vision_size: tuple[Size, Size] | None = None
    embeddings: int | None = None
    step: bool = False

    @property
    def inference(self) -> bool:
        """Nothing that the graph gives has a gradient: it writes codes or reads them."""
        return bool(
            self.packed or self.unpacked or self.exchanges or any(output is not None for output in self.outputs)
        )


@dataclass
class Split:
    """A decode graph in two: a prologue that knows how many tokens the caches hold, and a body that does not.

    Numbers below are positions among the rewritten graph's inputs unless they say otherwise.

    prologue   None where nothing is left for it to compute; its inputs are at `feeds`, its first results are `pads`'
               tensors
    body       takes the inputs at `held`, at `numbers`, at `moved`, then the prologue's tensors, then positions, all
               contiguous but the held ones
    held       tensors read and written in place: cache buffers, weights, buffers of modules, whatever the body writes
    states     those of `held` that are small, written, and no cache buffers: a replay runs over copies of them
    numbers    sizes that do not change from step to step, and process groups
    moved      tensors that lie elsewhere in every step
    pads       per tensor that the prologue makes for the body: None, or an input's position; the tensor's last axis is
               padded to that input's size 2, with False or -inf
    starts     per row of positions [n, q]: the position of the first of the q new tokens
    count      q
    sizes      (input, dimension) of every size of the body's inputs that is not a constant of the graph
    results    per result of the graph: ("body" or "prologue", which of its results), ("input", position) or
               ("constant", value)
    """

    prologue: GraphModule | None
    body: GraphModule
    feeds: list[int]
    held: list[int]
    numbers: list[int]
    moved: list[int]
    pads: list[int | None]
    starts: list[Size]
    count: int
    sizes: list[tuple[int, int]]
    results: list[tuple[str, Any]]
    states: list[int] = field(default_factory=list)


class Size:
    """A number known when the graph runs: a constant, or an expression over integer arguments and tensor sizes."""

    def __init__(self, number, sources: dict[sympy.Symbol, tuple[int, int | None]]):
        self.constant = number if isinstance(number, int) else None
        self.argument = None  # position of the integer argument that it is, if it is one
        if self.constant is None:
            expr = number.node.expr
            if expr.is_Integer:
                self.constant = int(expr)
            else:
                self.symbols = sorted(expr.free_symbols, key=str)
                self.sources = [sources[s] for s in self.symbols]
                self.function = compiled(expr, self.symbols)
                self.argument = self.sources[0][0] if expr.is_Symbol and self.sources[0][1] is None else None

    def __call__(self, args) -> int:
        if self.constant is not None:
            return self.constant
        values = [args[i] if dim is None else args[i].shape[dim] for i, dim in self.sources]
        return int(self.function(*values))


def compiled(expr: sympy.Expr, symbols: list[sympy.Symbol]) -> Callable[..., int | float]:
    """A size expression as a Python function of its symbols, in the syntax of dynamo's guards, which has them all."""
    names = [f"n{i}" for i in range(len(symbols))]
    renamed = expr.xreplace({s: sympy.Symbol(n, **s.assumptions0) for s, n in zip(symbols, names, strict=True)})
    namespace = {"math": math, "torch": torch, "Where": lambda condition, yes, no: yes if condition else no}
    return eval(f"lambda {', '.join(names)}: {SizePrinter().doprint(renamed)}", namespace)


class SizePrinter(PythonPrinter):
    """dynamo's printer of guards; that of torch 2.11 assumes that every exponent is a number."""

    def _print_Pow(self, expr: sympy.Pow) -> str:
        if expr.exp.is_number:
            return super()._print_Pow(expr)
        return f"(({self._print(expr.base)}) ** ({self._print(expr.exp)}))"

"""What nodes compute and write: their values on fake tensors, size symbols in these, and the storages involved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._pytree import tree_leaves

from akvq_fx.passes.patterns.nodes import op, value

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
NUMBERS = (int, float, bool, *SYMBOLIC)
IN_PLACE_OPERATORS = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior", "ixor")
PLAIN = (
    torch.arange,
    torch.index_select,
    torch.cat,
    torch.select,
    torch.narrow,
)  # functions that passes add beside ops


def values_of(graph: Graph, fake_mode, given: Mapping[Node, object] | None = None) -> dict[Node, object]:
    """The value of every node: as given, else as dynamo saw it; nodes that passes added are run on fake tensors."""
    values: dict[Node, object] = {}
    for node in graph.nodes:
        values[node] = (given or {}).get(node, value(node))
        if values[node] is None and is_safe(node, values):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.get)
            with fake_mode:
                values[node] = node.target(*args, **kwargs)
    return values


def is_safe(node: Node, values: dict) -> bool:
    """A call that can be run on fakes: an op or arithmetic on numbers, nothing that enters a mode or leaves one."""
    inputs = [values[i] for i in node.all_input_nodes]
    if node.op != "call_function" or any(i is None for i in inputs):
        return False
    if not inputs:  # positions where dynamo knows the length as a number
        return node.target is torch.arange
    if isinstance(node.target, torch._ops.OpOverload) or node.target in PLAIN:
        return True
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math", "torch")
    return arithmetic and all(isinstance(i, NUMBERS) for i in inputs)


def symbols(seen) -> set:
    """Size symbols in a number, in a tensor's shape, or in a structure of them."""
    found: set = set()
    for leaf in tree_leaves(list(seen) if isinstance(seen, torch.Size) else seen):
        for number in leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,):
            if isinstance(number, SYMBOLIC):
                found |= set(free_symbols(number))
    return found


def expression(number):
    """The expression behind a symbolic size; sizes are equal if their expressions are."""
    return number.node.expr if isinstance(number, SYMBOLIC) else number


def shape_of(seen) -> tuple:
    return tuple(seen.shape) if isinstance(seen, torch.Tensor) else ()


def tensors_in(seen) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(seen) if isinstance(leaf, torch.Tensor)]


def is_number(seen) -> bool:
    """A number, or a structure of nothing else."""
    leaves = tree_leaves(list(seen) if isinstance(seen, torch.Size) else seen)
    return bool(leaves) and all(isinstance(leaf, NUMBERS) for leaf in leaves)


def memory(seen) -> set[int]:
    """The storages of a value; a tensor and its views share one."""
    return {leaf.untyped_storage()._cdata for leaf in tensors_in(seen)}


def written(node: Node) -> list[Node]:
    """Tensors that a node writes in place."""
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
        names = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return [n for name in names for n in tree_leaves(given.get(name)) if isinstance(n, Node)]
    name = op(node)
    in_place = name in IN_PLACE_OPERATORS or name.endswith("_") and not name.endswith("__")
    targets = [node.args[0]] if in_place and node.args else []
    return [n for n in (*targets, *tree_leaves(node.kwargs.get("out"))) if isinstance(n, Node)]

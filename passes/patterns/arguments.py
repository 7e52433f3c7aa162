"""Arguments of akvq's ops by name. Positions come from the op's schema, so that no pass copies one by hand."""

from __future__ import annotations

import functools

from torch.fx import Node


@functools.cache
def arguments_of(target) -> dict[str, tuple[int, object]]:
    """Position and default (None where there is none) of every argument of an op."""
    return {a.name: (i, a.default_value) for i, a in enumerate(target._schema.arguments)}


def place_of(target, name: str) -> int:
    """Position of an op's argument. Raises KeyError for a name that the op does not have."""
    return arguments_of(target)[name][0]


def argument_of(node: Node, name: str):
    """What a call of an op passes for an argument; the default where it is left out."""
    place, default = arguments_of(node.target)[name]
    return node.args[place] if place < len(node.args) else default

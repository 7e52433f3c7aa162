"""Move rotations into the ops beside them: pack and append rotate what they quantize, attend queries and output.

Before   append(buffers, rotate_keys(k, affine))        After   append(buffers, k, rotate=True)
         pack(rotate(v))                                        pack(v, rotate=True)
         attend(rotate_queries(q, affine), buffers)             attend(q, buffers, rotate=True)
         rotate(attend(q, buffers))                             attend(q, buffers, restore=True)
Needs    none                                           Gives    none
Follows  rotate_queries_keys, rotate_values             Leaves   every rotation that anything else reads

This saves launches and copies. The ops rotate by their own layout and affine map, so only a rotation by the very same
map may go.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.kernels import attend, cache, rotate  # noqa: F401 - registers the ops
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.patterns.arguments import argument_of, place_of
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport

akvq = torch.ops.akvq
PACK, APPEND, ATTEND = akvq.pack.default, akvq.append.default, akvq.attend.default
TOKENS = {PACK: "x", APPEND: "x", ATTEND: "q"}  # what each op can rotate, and the layout that says how
LAYOUTS = {PACK: "layout", APPEND: "layout", ATTEND: "key_layout"}


def fuse_rotations(state: GraphState) -> PassReport:
    report = PassReport("fuse_rotations")
    for node in list(state.graph.nodes):
        if node.target in TOKENS:
            rotated = argument_of(node, TOKENS[node.target])
            reason = rotation_refusal(node, rotated)
            if not reason:
                node.update_arg(place_of(node.target, TOKENS[node.target]), rotated.args[0])
                switch_on(node, "rotate")
                state.graph.erase_node(rotated)
        elif restores(node):
            reason = restore_refusal(node.args[0])
            if not reason:
                switch_on(node.args[0], "restore")
                node.replace_all_uses_with(node.args[0])
                state.graph.erase_node(node)
        else:
            continue
        if reason:
            report.miss(node.name, reason, node)
        else:
            report.match(node.name)
    return report


def switch_on(node: Node, flag: str) -> None:
    """Set a flag among an op's last arguments, all of which are False where they are left out."""
    place = place_of(node.target, flag)
    args = [*node.args, *[False] * (place + 1 - len(node.args))]
    args[place] = True
    node.args = tuple(args)


def rotation_refusal(node: Node, rotated: Node) -> str:
    """Why the rotation of what an op takes stays a node of its own; "" where it can go."""
    mapped = akvq.rotate_queries.default if node.target is ATTEND else akvq.rotate_keys.default
    if not isinstance(rotated, Node) or rotated.target not in (mapped, akvq.rotate.default):
        return "taken as it comes"
    if len(rotated.users) > 1:
        return "something else reads the rotated tokens"
    layout = Layout.parse(argument_of(node, LAYOUTS[node.target]))
    if rotated.target is akvq.rotate.default:
        return "" if layout.rotated and not layout.affine else "not the rotation of its layout"
    if not layout.affine:
        return "not the rotation of its layout"
    own = argument_of(rotated, "affine") is own_map(node, layout)
    return "" if own else "rotated by another affine map than the one that is stored"


def own_map(node: Node, layout: Layout) -> Node:
    if node.target is PACK:
        return argument_of(node, "affine")
    return argument_of(node, "key" if node.target is ATTEND else "cache")[layout.fields.index("affine")]


def restores(node: Node) -> bool:
    """It rotates what an attend returns."""
    x = node.args[0] if node.target is akvq.rotate.default else None
    return isinstance(x, Node) and x.target is ATTEND


def restore_refusal(attention: Node) -> str:
    """Why the rotation of an attend's output stays a node of its own; "" where it can go."""
    if len(attention.users) > 1:
        return "something else reads the output in the stored space"
    if argument_of(attention, "restore"):
        return "the output is rotated back already"
    return "" if Layout.parse(argument_of(attention, "value_layout")).rotated else "not the rotation of its layout"


fuse_rotations.needs = ()
fuse_rotations.gives = ()
fuse_rotations.follows = ("rotate_queries_keys", "rotate_values")

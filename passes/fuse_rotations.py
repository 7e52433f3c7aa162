"""Let pack and append turn the tokens that they quantize, and attend its queries and its output: fewer launches, no turned copy.

Before   append(buffers, rotate_keys(k, affine))        After   append(buffers, k, turn=True)
         pack(hadamard(v))                                      pack(v, turn=True)
         attend(rotate_queries(q, affine), buffers)             attend(q, buffers, turn=True)
         hadamard(attend(q, buffers))                           attend(q, buffers, restore=True)
Needs    rotate_queries_keys, rotate_values             Leaves  every rotation that anything else reads

The ops turn by their own layout and affine map, so only a rotation by the very same map may go.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport

akvq = torch.ops.akvq
PLACES = {akvq.pack.default: 0, akvq.append.default: 1, akvq.attend.default: 0}  # of the tokens among an op's arguments
LAYOUTS = {akvq.pack.default: 6, akvq.append.default: 5, akvq.attend.default: 10}
TURN = {akvq.pack.default: 7, akvq.append.default: 6, akvq.attend.default: 12}
PACK_AFFINE, APPEND_CACHE, ATTEND_KEY, ATTEND_VALUE_LAYOUT, ATTEND_RESTORE = 4, 0, 1, 11, 13


def fuse_rotations(state: GraphState) -> PassReport:
    report = PassReport("fuse_rotations")
    for node in list(state.graph.nodes):
        if node.target in PLACES:
            turned = node.args[PLACES[node.target]]
            reason = turn_refusal(node, turned)
            if not reason:
                node.update_arg(PLACES[node.target], turned.args[0])
                switch_on(node, TURN[node.target])
                state.graph.erase_node(turned)
        elif restores(node):
            reason = restore_refusal(node.args[0])
            if not reason:
                switch_on(node.args[0], ATTEND_RESTORE)
                node.replace_all_uses_with(node.args[0])
                state.graph.erase_node(node)
        else:
            continue
        if reason:
            report.miss(node.name, reason, node)
        else:
            report.match(node.name)
    return report


def switch_on(node: Node, place: int) -> None:
    """Set a flag among an op's last arguments, all of which are False where they are left out."""
    given = [*node.args, *[False] * (place + 1 - len(node.args))]
    given[place] = True
    node.args = tuple(given)


def turn_refusal(node: Node, turned: Node) -> str:
    """Why the rotation of what an op takes stays a node of its own; "" where it can go."""
    mapped = akvq.rotate_queries.default if node.target is akvq.attend.default else akvq.rotate_keys.default
    if not isinstance(turned, Node) or turned.target not in (mapped, akvq.hadamard.default):
        return "taken as it comes"
    if len(turned.users) > 1:
        return "something else reads the turned tokens"
    layout = Layout.parse(node.args[LAYOUTS[node.target]])
    if turned.target is akvq.hadamard.default:
        return "" if layout.rotated and not layout.affine else "not the rotation of its layout"
    if not layout.affine:
        return "not the rotation of its layout"
    return "" if turned.args[1] is own_map(node, layout) else "turned by another affine map than the one that is stored"


def own_map(node: Node, layout: Layout) -> Node:
    if node.target is akvq.pack.default:
        return node.args[PACK_AFFINE]
    buffers = node.args[ATTEND_KEY if node.target is akvq.attend.default else APPEND_CACHE]
    return buffers[layout.fields.index("affine")]


def restores(node: Node) -> bool:
    """It turns what an attend returns."""
    x = node.args[0] if node.target is akvq.hadamard.default else None
    return isinstance(x, Node) and x.target is akvq.attend.default


def restore_refusal(attend: Node) -> str:
    """Why the rotation of an attend's output stays a node of its own; "" where it can go."""
    if len(attend.users) > 1:
        return "something else reads the output in the stored space"
    if len(attend.args) > ATTEND_RESTORE and attend.args[ATTEND_RESTORE]:
        return "the output is turned back already"
    return "" if Layout.parse(attend.args[ATTEND_VALUE_LAYOUT]).rotated else "not the rotation of its layout"


fuse_rotations.needs = ("rotate_queries_keys", "rotate_values")

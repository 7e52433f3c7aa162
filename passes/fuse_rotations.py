"""Let pack and append turn the tokens that they quantize, and attend its queries: fewer launches, no turned copy of the keys.

Before   append(buffers, rotate_keys(k, affine))        After   append(buffers, k, turn=True)
         pack(hadamard(v))                                      pack(v, turn=True)
         attend(rotate_queries(q, affine), buffers)             attend(q, buffers, turn=True)
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
PACK_AFFINE, APPEND_CACHE, ATTEND_KEY = 4, 0, 1


def fuse_rotations(state: GraphState) -> PassReport:
    report = PassReport("fuse_rotations")
    for node in list(state.graph.nodes):
        if node.target not in PLACES:
            continue
        place = PLACES[node.target]
        turned = node.args[place]
        reason = keeps(node, turned)
        if reason:
            report.miss(node.name, reason, node)
            continue
        node.args = (*node.args[:place], turned.args[0], *node.args[place + 1 :], True)
        state.graph.erase_node(turned)
        report.match(node.name)
    return report


def keeps(node: Node, turned: Node) -> str:
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


fuse_rotations.needs = ("rotate_queries_keys", "rotate_values")

"""Let pack and append turn the tokens that they quantize: one launch, and no turned 16-bit copy of the keys.

Before   append(buffers, rotate_keys(k, affine))        After   append(buffers, k, turn=True)
         pack(hadamard(v))                                      pack(v, turn=True)
Needs    rotate_queries_keys, rotate_values             Leaves  every rotation that anything else reads

Both ops turn by their own layout and affine map, so only a rotation by the very same map may go.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport

akvq = torch.ops.akvq
PACK_AFFINE = 4  # where pack takes the map


def fuse_rotations(state: GraphState) -> PassReport:
    report = PassReport("fuse_rotations")
    for node in list(state.graph.nodes):
        if node.target not in (akvq.pack.default, akvq.append.default):
            continue
        place = 0 if node.target is akvq.pack.default else 1
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
    """Why the rotation of what a pack or append stores stays a node of its own; "" where it can go."""
    if not isinstance(turned, Node) or turned.target not in (akvq.rotate_keys.default, akvq.hadamard.default):
        return "stored as it comes"
    if len(turned.users) > 1:
        return "something else reads the turned tokens"
    layout = Layout.parse(node.args[-1])
    if turned.target is akvq.hadamard.default:
        return "" if layout.rotated and not layout.affine else "not the rotation of its layout"
    own = node.args[PACK_AFFINE] if node.target is akvq.pack.default else node.args[0][layout.fields.index("affine")]
    return "" if layout.affine and turned.args[1] is own else "turned by another affine map than the one that is stored"


fuse_rotations.needs = ("rotate_queries_keys", "rotate_values")

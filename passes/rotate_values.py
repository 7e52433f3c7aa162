"""Rotate values online where their rotation could not be folded into the weights.

Before   pack(v), o = attend(...)       After   pack(rotate(v)), o = rotate(attend(...))
Needs    sites, stored_uses, query_uses   Gives    none
Follows  attend_packed                    Leaves   the attention output as it was: p (vH) H = p v

H is the same for every head, so grouped queries need no care. Values that were folded for another layer's output
projection (layers that share a cache across graphs) arrive rotated; only the output is rotated back.
"""

from __future__ import annotations

import torch

from akvq_fx.passes.patterns.nodes import value
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport

rotate = torch.ops.akvq.rotate.default


def rotate_values(state: GraphState) -> PassReport:
    report = PassReport("rotate_values")
    done = set()
    for site in state.sites:
        if site.value_rotation != "online":
            report.miss(site, f"values are {site.value_rotation}", site.attention.node)
            continue
        if site.value.whole not in done:
            done.add(site.value.whole)
            rotated: dict = {}
            for node, position in state.stored_uses[site.value.whole]:
                x = node.args[position]
                if x not in rotated:
                    with state.before(node):
                        rotated[x] = state.call(rotate, x)
                node.update_arg(position, rotated[x])
        for owner, node in state.query_uses:
            if owner is site:
                with state.graph.inserting_after(node):
                    back = state.call(rotate, node)
                back.meta["example_value"] = value(node)
                node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        report.match(site)
    return report


rotate_values.needs = ("sites", "stored_uses", "query_uses")
rotate_values.gives = ()
rotate_values.follows = ("attend_packed",)
rotate_values.required = (
    'the layout says that the cache holds rotated values; value_rotation="off" leaves them as they are'
)

"""Turn values online where their rotation could not be folded into the weights.

Before   pack(v), o = attend(...)       After   pack(hadamard(v)), o = hadamard(attend(...))
Needs    sites, stored_uses, query_uses   Gives    none
Follows  attend_packed                    Leaves   the attention output as it was: p (vH) H = p v

H is the same for every head, so grouped queries need no care. Values that were folded for another layer's output projection (layers
that share a cache across graphs) arrive turned; only the output is turned back.
"""

from __future__ import annotations

import torch

from akvq_fx.passes.patterns.nodes import value
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport

hadamard = torch.ops.akvq.hadamard.default


def rotate_values(state: GraphState) -> PassReport:
    report = PassReport("rotate_values")
    done = set()
    for site in state.sites:
        if site.value_rotation != "online":
            report.miss(site, f"values are {site.value_rotation}", site.attention.node)
            continue
        if site.value.whole not in done:
            done.add(site.value.whole)
            turned: dict = {}
            for node, position in state.stored_uses[site.value.whole]:
                x = node.args[position]
                if x not in turned:
                    with state.before(node):
                        turned[x] = state.call(hadamard, x)
                node.update_arg(position, turned[x])
        for owner, node in state.query_uses:
            if owner is site:
                with state.graph.inserting_after(node):
                    back = state.call(hadamard, node)
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

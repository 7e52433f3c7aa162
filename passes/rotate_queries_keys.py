"""Rotate keys before they are packed, and the queries that meet packed keys.

Before   pack(k), append(.., k), attend(q, ..)    After    pack(rotate(k)), append(.., rotate(k)), attend(rotate(q), ..)
Needs    sites, affine, stored_uses, query_uses   Gives    none
Follows  attend_packed                            Leaves   scores as they were: (qH)(kH)^T = q k^T because H H^T = I

H is the Walsh-Hadamard matrix (kernels/rotate.py). Outlier channels make 2-bit keys useless; H spreads them over the
head. Where keys are centred and balanced, the same node does that too: H((k - c)/s) and H(q s), which leaves scores
equal up to a constant per query that softmax does not see.
"""

from __future__ import annotations

import torch

from akvq_fx.kernels import rotate  # noqa: F401 - registers the ops
from akvq_fx.passes.patterns.arguments import argument_of, place_of
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport

akvq = torch.ops.akvq


def rotate_queries_keys(state: GraphState) -> PassReport:
    report = PassReport("rotate_queries_keys")
    done = set()
    for site in state.sites:
        layout = site.key_layout
        if not layout.rotated:
            report.miss(site, "rotation is off", site.attention.node)
            continue
        whole = site.key.whole
        if whole not in done:
            done.add(whole)
            rotate_keys(state, whole)
        for owner, node in state.query_uses:
            if owner is site:
                rotate_query(state, site, node)
        report.match(site)
    return report


def rotate_keys(state: GraphState, whole) -> None:
    affine, rotated = state.affine[whole], {}
    for node, position in state.stored_uses[whole]:
        x = node.args[position]
        if x not in rotated:
            with state.before(node):
                call = (akvq.rotate_keys.default, x, affine) if affine is not None else (akvq.rotate.default, x)
                rotated[x] = state.call(*call)
        node.update_arg(position, rotated[x])


def rotate_query(state: GraphState, site, node) -> None:
    affine, q = state.affine[site.key.whole], argument_of(node, "q")
    with state.before(node):
        call = (akvq.rotate_queries.default, q, affine) if affine is not None else (akvq.rotate.default, q)
        node.update_arg(place_of(node.target, "q"), state.call(*call))


rotate_queries_keys.needs = ("sites", "affine", "stored_uses", "query_uses")
rotate_queries_keys.gives = ()
rotate_queries_keys.follows = ("attend_packed",)
rotate_queries_keys.required = "the layout says that the cache holds rotated keys; rotate=False leaves them as they are"

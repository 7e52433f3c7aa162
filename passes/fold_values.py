"""Decide where the values' rotation is done: folded into copies of W_V and W_O, or online inside the graph.

Before   v = W_V x + b_V,  o = W_O concat_h(p v_h)      After   v' = H v,  o = (W_O H) concat_h(p v'_h)
Needs    sites                                          Gives    program
Follows  plan_layers                                    Leaves   the graph as it was; state.program.folds

H H = I, so W_O W_V is unchanged: the graph computes the same function, and its cache holds rotated values either way.
Legal only where the values reach the cache from a linear and the attention output reaches a linear through layout-only
ops, nothing else reads the values, and both weights are dense parameters that nothing else uses. Each graph is proved
for itself. Which weight row is which (head, channel) is read off by pushing row numbers through the graph's own views.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from akvq_fx.passes.patterns.attention import layout_only
from akvq_fx.passes.patterns.nodes import NoMatch, is_shared, is_tensor, op, shape, value
from akvq_fx.passes.patterns.projection import Chain, chain_from_linear, chain_to_linear
from akvq_fx.passes.patterns.site import Site
from akvq_fx.passes.state import GraphState
from akvq_fx.program import Fold
from akvq_fx.report import PassReport


def fold_values(state: GraphState) -> PassReport:
    report = PassReport("fold_values")
    for site in state.sites:
        if not site.value.packed:
            rotated = site.value_layout.rotated and state.config.value_rotation != "off"
            site.value_layout = dataclasses.replace(site.value_layout, rotated=rotated)
        if not site.value_layout.rotated:
            site.value_rotation = "off"
        elif state.config.value_rotation == "fold":
            try:
                state.program.folds.append(fold_of(state, site))
                site.value_rotation = "folded"
                report.match(site)
            except NoMatch as miss:
                site.value_rotation, site.value_reason = "online", miss.reason
                report.miss(site, miss.reason, miss.node)
        else:
            site.value_rotation = "online"
    return report


def fold_of(state: GraphState, site: Site) -> Fold:
    """Raises NoMatch where folding is not provably legal."""
    weights = state.weights
    if site.value.new is None:
        raise NoMatch("the values were cached by another layer", site.value.whole)
    if site.value.kind == "grow" and not site.value.packed:
        raise NoMatch("the cache so far holds values as the model made them", site.value.past)
    readers = [s for s in state.sites if s.value.whole is site.value.whole]
    if len(readers) > 1:
        raise NoMatch(f"{len(readers)} attention calls read these values", site.value.whole)
    source, target = chain_from_linear(site.value.new), chain_to_linear(site.attention.node)
    parameters = [source.weight, target.weight, *([source.bias] if source.bias is not None else [])]
    for leaf in parameters:
        tensor = weights.get(state.position[leaf])
        dense = type(tensor) in (Tensor, torch.nn.Parameter) or is_shared(tensor)
        if not dense or not tensor.is_floating_point() or not tensor.is_leaf:
            raise NoMatch("a projection's weight is no dense floating-point parameter", leaf)
        same = [p for p, other in weights.items() if storage_of(other) == storage_of(tensor)]
        if len(same) > 1:
            raise NoMatch("a projection's weight is shared with another parameter", leaf)
    rows, columns = row_map(source, site), column_map(target, site)
    only_attended(source, site, rows)
    at = state.position
    bias = at[source.bias] if source.bias is not None else None
    return Fold(at[source.weight], bias, at[target.weight], rows, columns)


def storage_of(weight: Tensor) -> int:
    """Identifies its memory, of a weight that processes share the memory of this process's part."""
    return (weight.to_local() if is_shared(weight) else weight).untyped_storage()._cdata


def only_attended(source: Chain, site: Site, rows: Tensor) -> None:
    """Raises NoMatch where anything but this attention and its cache reads the values: it would get them rotated."""
    size = concrete_sizes(shape(source.linear))
    numbers, wanted = torch.arange(size[-1]).expand(size), rows.flatten()
    queue: list[tuple[Node, object]] = [(source.linear, numbers)]
    while queue:
        node, content = queue.pop()
        if node is site.value.new:
            outside = [user for user in node.users if not is_cached_or_attended(user, site)]
            if outside:
                raise NoMatch(f"the values are read by {op(outside[0])} too", outside[0])
            continue
        leaves = content if isinstance(content, (tuple, list)) else (content,)
        if not any(torch.isin(leaf, wanted).any() for leaf in leaves):
            continue  # another part of a fused projection
        for user in node.users:
            if layout_only(user):
                queue.append((user, push(content, node, [user])))
            elif op(user) not in ("size", "getattr", "dim"):
                raise NoMatch(f"the values are read by {op(user)} too", user)


def is_cached_or_attended(user: Node, site: Site) -> bool:
    """The write of these values, the graph's results, a size, or ops that lead to this attention and nowhere else."""
    if user in (site.value.whole, site.attention.node) or op(user) in ("output", "index_copy_") or not is_tensor(user):
        return True
    grouping = layout_only(user) or op(user) in ("expand", "repeat_interleave")
    return grouping and all(is_cached_or_attended(u, site) for u in user.users)


def row_map(chain, site: Site) -> Tensor:
    """[H, D] int64: the output feature of the linear that becomes channel d of head h of the cached values."""
    if len(shape(chain.linear)) != 3:
        raise NoMatch(
            f"the value projection gives {len(shape(chain.linear))} axes, accepted: [B, T, features]", chain.linear
        )
    B, q, features = concrete_sizes(shape(chain.linear))
    heads, dim = shape(site.value.whole)[1], shape(site.value.whole)[3]
    numbers = torch.arange(features).expand(B, q, features)
    tokens = torch.arange(q)[None, :, None].expand(B, q, features)
    moved, order = push(numbers, chain.linear, chain.moves), push(tokens, chain.linear, chain.moves)
    wanted = torch.arange(q).expand(heads, q)
    if tuple(moved.shape) != (B, heads, q, dim) or not torch.equal(order[0, :, :, 0], wanted):
        raise NoMatch("tokens and channels mix between the value projection and the cache", site.value.new)
    return distinct(moved[0, :, 0], site.value.new)


def column_map(chain, site: Site) -> Tensor:
    """[Hq, D] int64: the input feature of the output projection that takes channel d of query head h."""
    B, heads, q, dim = concrete_sizes(shape(site.attention.node))
    numbers = torch.arange(heads * dim).view(1, heads, 1, dim).expand(B, heads, q, dim)
    tokens = torch.arange(q)[None, None, :, None].expand(B, heads, q, dim)
    moved, order = (push(x, site.attention.node, chain.moves) for x in (numbers, tokens))
    if tuple(moved.shape) != (B, q, heads * dim) or not torch.equal(order[0, :, 0], torch.arange(q)):
        raise NoMatch("tokens and channels mix between attention and the output projection", chain.linear)
    return torch.argsort(distinct(moved[0, 0], chain.linear)).view(heads, dim)


def distinct(index: Tensor, node: Node) -> Tensor:
    if index.unique().numel() != index.numel():
        raise NoMatch("a channel is used twice", node)
    return index.clone()


def push(x: Tensor, start: Node, moves: list[Node]) -> Tensor:
    """Run layout-only nodes on x in place of start's value; sizes take the values that dynamo traced with."""
    done = {start: x}
    for node in moves:
        take = lambda n: done[n] if n in done else concrete(n)
        args, kwargs = map_arg(node.args, take), map_arg(node.kwargs, take)
        args, kwargs = concrete_sizes(args), concrete_sizes(kwargs)
        if node.op == "call_method":  # index numbers are expanded, so a view of them may need a copy
            name = "reshape" if node.target == "view" else node.target
            done[node] = getattr(args[0], name)(*args[1:], **kwargs)
        else:
            done[node] = node.target(*args, **kwargs)
    return done[moves[-1]] if moves else x


def concrete(node: Node):
    seen = value(node)
    if isinstance(seen, torch.SymInt):
        return seen.node.hint
    if isinstance(seen, (int, torch.Size)):
        return seen
    raise NoMatch(f"a view depends on {node.name}", node)


def concrete_sizes(args):
    """Sizes as numbers; int() of a symbol would make dynamo compile for that number alone."""
    hint = lambda x: x.node.hint if isinstance(x, torch.SymInt) else x
    args = torch.utils._pytree.tree_map(hint, args)
    # the numbers that are pushed are indices: a cast must leave them int64
    return torch.utils._pytree.tree_map(lambda x: torch.int64 if isinstance(x, torch.dtype) else x, args)


fold_values.needs = ("sites",)
fold_values.gives = ("program",)
fold_values.follows = ("plan_layers",)
fold_values.required = 'it also says which values are rotated in the graph; value_rotation="online" folds none'

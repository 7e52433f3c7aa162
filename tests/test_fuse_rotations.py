"""fuse_rotations: pack and append rotate what they store, where nothing else reads the rotated tokens and the map is
their own; attend rotates its queries and, back, its output."""

import dataclasses
import operator

import pytest
import torch

from akvq_fx.config import AKVQConfig
from akvq_fx.kernels import cache, rotate  # noqa: F401 - registers the ops
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.fuse_rotations import fuse_rotations
from akvq_fx.passes.state import GraphState
from tests import attention_models as models
from tests.attention_models import Decoder, evidence

akvq = torch.ops.akvq
KEYS = Layout(16, torch.float32, body_bits=2, window=4, rotated=True, affine=True)
VALUES = Layout(16, torch.float32, body_bits=2, window=4, rotated=True)


def targets(state) -> list:
    return [node.target for node in state.graph.nodes if node.op == "call_function"]


def rotated(state) -> list[bool]:
    """Of every pack, append and attend, whether it rotates its tokens."""
    places = {akvq.pack.default: 7, akvq.append.default: 6, akvq.attend.default: 12}
    return [flag(n, places[n.target]) for n in state.graph.nodes if n.target in places]


def restored(state) -> list[bool]:
    """Of every attend, whether it rotates its output back."""
    return [flag(n, 13) for n in state.graph.nodes if n.target is akvq.attend.default]


def flag(node, place: int) -> bool:
    return len(node.args) > place and node.args[place]


@pytest.mark.parametrize("value_rotation, values", [("fold", False), ("online", True)])
def test_prompt_and_step_rotate_while_they_store(value_rotation, values):
    graphs = evidence(Decoder(models.Direct), {"value_rotation": value_rotation}).captures
    assert len(graphs) == 2
    for graph, reads in zip(graphs, ([], [True]), strict=True):
        assert rotated(graph.state) == [True, values, *reads]
        assert akvq.rotate_keys.default not in targets(graph.state)
        assert akvq.rotate.default not in targets(graph.state)
        assert restored(graph.state) == [values] * len(reads)


def test_a_chunk_that_attention_also_reads_is_rotated_once_by_a_node():
    chunk = evidence(Decoder(models.Direct), steps=1, chunk=3).captures[-1]
    assert rotated(chunk.state) == [True, False, False]  # attended, then appended
    assert targets(chunk.state).count(akvq.rotate_keys.default) == 1
    assert targets(chunk.state).count(akvq.rotate.default) == 1
    reasons = [miss.reason for miss in chunk.report("fuse_rotations").missed]
    assert reasons == ["something else reads the rotated tokens"] * 2


def attended(layout: Layout, others: int = 0, flags: tuple = (), times: int = 1) -> GraphState:
    """A graph that attends to values of a layout and rotates what comes out, which `others` read too."""
    graph = torch.fx.Graph()
    q = graph.placeholder("q")
    buffers = [
        [graph.placeholder(f"{which}_{name}") for name in kind.fields] for which, kind in (("k", KEYS), ("v", layout))
    ]
    args = (q, *buffers, 5, None, None, False, None, None, None, str(KEYS), str(layout), *flags)
    out = stored = graph.call_function(akvq.attend.default, args)
    for _ in range(times):
        out = graph.call_function(akvq.rotate.default, (out,))
    graph.output((out, *[stored] * others))
    return GraphState(torch.fx.GraphModule(torch.nn.Module(), graph), AKVQConfig(), {})


@pytest.mark.parametrize(
    "layout, given, reason",
    [
        (VALUES, {}, ""),
        (VALUES, {"flags": (True,)}, ""),
        (dataclasses.replace(VALUES, rotated=False), {}, "not the rotation of its layout"),
        (VALUES, {"others": 1}, "something else reads the output in the stored space"),
        (VALUES, {"flags": (False, True)}, "the output is rotated back already"),
        (VALUES, {"times": 2}, "the output is rotated back already"),
    ],
    ids=str,
)
def test_attend_rotates_back_what_only_a_rotation_reads(layout, given, reason):
    state = attended(layout, **given)
    missed = {miss.node: miss.reason for miss in fuse_rotations(state).missed}
    left = [n for n in state.graph.nodes if n.target is akvq.rotate.default]
    assert [missed.get(n.name) or missed.get(n) for n in left] == ([reason] if reason else [])
    assert restored(state) == [not reason or "already" in reason]
    assert rotated(state) == [given.get("flags") == (True,)]
    state.graph.lint()


def appended(layout: Layout, rotation, own_map: bool = True) -> GraphState:
    """A graph that rotates x and appends it to one cache."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in (*layout.fields, "x", "at", "other")]
    buffers, (x, at, other) = nodes[:-3], nodes[-3:]
    affine = buffers[layout.fields.index("affine")] if own_map and layout.affine else other
    x = graph.call_function(rotation, (x, affine) if rotation is akvq.rotate_keys.default else (x,))
    graph.call_function(akvq.append.default, (buffers, x, at, None, None, str(layout)))
    graph.output((graph.call_function(operator.add, (at, 1)),))
    return GraphState(torch.fx.GraphModule(torch.nn.Module(), graph), AKVQConfig(), {})


@pytest.mark.parametrize(
    "layout, rotation, own_map, reason",
    [
        (KEYS, akvq.rotate_keys.default, True, ""),
        (VALUES, akvq.rotate.default, True, ""),
        (KEYS, akvq.rotate_keys.default, False, "rotated by another affine map than the one that is stored"),
        (KEYS, akvq.rotate.default, True, "not the rotation of its layout"),
        (VALUES, akvq.rotate_queries.default, True, "taken as it comes"),
    ],
)
def test_only_the_rotation_of_the_layout_goes(layout, rotation, own_map, reason):
    state = appended(layout, rotation, own_map)
    report = fuse_rotations(state)
    assert [miss.reason for miss in report.missed] == ([reason] if reason else [])
    assert rotated(state) == [not reason] and (rotation in targets(state)) == bool(reason)
    state.graph.lint()

"""rewrite_attention: written-out attention over a cache becomes one call that gives the same numbers, or says why not.

Graphs of one attention, traced by dynamo and run before and after the pass. Whole models: tests/test_find_sites.py.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from akvq_fx.config import AKVQConfig
from akvq_fx.passes.canonicalize import canonicalize
from akvq_fx.passes.patterns.nodes import op
from akvq_fx.passes.rewrite_attention import rewrite_attention
from akvq_fx.passes.state import GraphState
from tests.written_spellings import (
    DIM,
    DROPOUT,
    EXPANDED,
    GROUPED,
    GROUPS,
    HEADS,
    KV,
    LIMITED,
    MASKS,
    PRODUCTS,
    SCALES,
    SHAPES,
    SINKS,
    SOFTCAPS,
    SOFTMAX,
    additive,
)

B = 2


@dataclasses.dataclass
class Rewritten:
    state: GraphState
    matched: list
    missed: list
    error: float = 0.0

    @property
    def ops(self) -> list[str]:
        return [op(node) for node in self.state.graph.nodes]


def rewritten(function, *tensors, dynamic: bool = False, atol: float = 1e-5) -> Rewritten:
    """The pass over the graph of a function, and the largest difference that it makes to what the graph returns.

    dynamic: the numbers of rows and of past tokens are symbols.
    """
    found = []

    def backend(gm, example_inputs):
        state = GraphState(gm, AKVQConfig(), {})
        canonicalize(state)
        report = rewrite_attention(state)
        state.graph.lint()
        state.gm.recompile()
        found.append(Rewritten(state, report.matched, report.missed))

        def run(*args):
            want, got = gm(*args), state.gm(*args)
            for a, b in zip(want, got, strict=True):
                torch.testing.assert_close(b, a, rtol=0, atol=atol, equal_nan=True)
                found[-1].error = max(found[-1].error, (a - b).abs().nan_to_num().max().item())
            return want

        return run

    torch._dynamo.reset()
    past_k, past_v, *_, counts = tensors
    for tensor, dim in ((past_k, 2), (past_v, 2), (counts, 3)) if dynamic else ():
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    for tensor in tensors if dynamic else ():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*tensors)
    (only,) = found
    return only


def step_inputs(tokens: int = 3, past: int = 4, heads: int = KV, dtype=torch.float32):
    """Past keys and values, this step's queries, keys and values, and which scores count [B, 1, q, T]."""
    make = torch.Generator().manual_seed(0)
    randn = lambda *sizes: torch.randn(*sizes, generator=make).to(dtype)
    total = past + tokens
    counts = torch.arange(total)[None] <= torch.arange(past, total)[:, None]
    counts = counts.expand(B, 1, tokens, total).clone()
    counts[0, ..., 0] = False
    return (
        randn(B, heads, past, DIM), randn(B, heads, past, DIM),
        randn(B, HEADS, tokens, DIM), randn(B, heads, tokens, DIM), randn(B, heads, tokens, DIM), counts,
    )  # fmt: skip


def over_a_cache(attend):
    """attend(q, k, v, counts) over a cache that grows by this step."""

    def step(past_k, past_v, q, k, v, counts):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attend(q, k, v, counts), k, v

    return step


@st.composite
def written(draw):
    """(names of the spellings, attend)"""
    pick = lambda table, label: draw(st.sampled_from(sorted(table)), label=label)
    grouped = draw(st.booleans(), label="grouped")
    product, weigh = (pick(GROUPED if grouped else PRODUCTS, label) for label in ("scores", "output"))
    names = [
        product,
        weigh,
        pick(SCALES, "scale"),
        pick(MASKS, "mask"),
        pick(SOFTMAX, "softmax"),
        pick(DROPOUT, "drop"),
    ]
    allowed = LIMITED.get(names[3], SHAPES)
    shape = draw(st.sampled_from(sorted(allowed)), label="shape of the mask")
    group = (lambda x: x) if grouped else GROUPS[pick(GROUPS, "heads")]
    table = GROUPED if grouped else PRODUCTS
    before, after = SCALES[names[2]]
    names += [draw(st.sampled_from(("", "", *SOFTCAPS)), label="softcap")]
    names += [draw(st.sampled_from(("", "", *SINKS)), label="sinks")]

    def attend(q, k, v, counts):
        s = after(table[product][0](before(q), group(k)))
        s = SOFTCAPS[names[6]][1](s) if names[6] else s
        s = MASKS[names[3]](s, SHAPES[shape](counts))
        s = torch.cat([s, SINKS[names[7]](s)], -1) if names[7] else s
        w = SOFTMAX[names[4]](s)
        w = w[..., :-1] if names[7] else w
        return table[weigh][1](DROPOUT[names[5]](w), group(v))

    return names, attend


phases = (Phase.explicit, Phase.reuse, Phase.generate)  # an example is traced: shrinking a failing one takes minutes


@settings(max_examples=20, deadline=None, phases=phases, suppress_health_check=[HealthCheck.too_slow])
@given(written(), st.sampled_from([1, 3]), st.booleans())
def test_any_mixture_of_spellings_becomes_one_call(drawn, tokens, dynamic):
    names, attend = drawn
    seen = rewritten(over_a_cache(attend), *step_inputs(tokens), dynamic=dynamic)
    event(names[3])
    if names[6] or names[7]:
        assert len(seen.matched) == 1 and not seen.missed, seen.missed
        assert seen.ops.count("extended_attention") == 1
    else:
        assert_one_call(seen)


def assert_one_call(seen: Rewritten) -> None:
    assert len(seen.matched) == 1 and not seen.missed, seen.missed
    assert seen.ops.count("scaled_dot_product_attention") == 1
    assert not {"softmax", "bmm", "baddbmm", "einsum", "matmul", "dropout"} & set(seen.ops)


SCALE = DIM**-0.5
scores = lambda q, k: q @ EXPANDED(k).mT * SCALE
usual = lambda q, k, v, counts: scores(q, k).masked_fill(~counts, -torch.inf).softmax(-1) @ EXPANDED(v)


def test_the_graph_before_and_after(golden):
    def attend(q, k, v, counts):
        s = torch.matmul(q, EXPANDED(k).transpose(2, 3)) * 0.25
        weights = F.softmax(s + additive(s, counts), dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, p=0.0, training=False), EXPANDED(v)).transpose(1, 2).contiguous()

    seen = rewritten(over_a_cache(attend), *step_inputs(1))
    assert_one_call(seen)
    golden("written_attention", str(seen.state.graph))


@pytest.mark.parametrize("mask", ["none", "add", "masked_fill -inf", "grouped"])
@pytest.mark.parametrize("how", SOFTCAPS)
def test_softcap(how, mask):
    """A call stands beside what the model wrote, which nothing reads any more."""
    softcap, cap = SOFTCAPS[how]
    attend = lambda q, k, v, counts: MASKS[mask](cap(5 * scores(q, k)), counts).softmax(-1) @ EXPANDED(v)
    seen = rewritten(over_a_cache(attend), *step_inputs())
    assert len(seen.matched) == 1 and not seen.missed, seen.missed
    (call,) = (n for n in seen.state.graph.nodes if op(n) == "extended_attention")
    assert call.kwargs["softcap"] == pytest.approx(softcap)
    original = seen.state.originals[call]
    assert not original.nodes[-1].users and "softmax" in map(op, original.nodes)


@pytest.mark.parametrize("how", SINKS)
@pytest.mark.parametrize("tokens, dynamic", [(1, False), (3, True)], ids=str)
def test_sinks(how, tokens, dynamic):
    def attend(q, k, v, counts):
        s = scores(q, k).masked_fill(~counts, -torch.inf)
        return torch.cat([s, SINKS[how](s)], -1).softmax(-1)[..., :-1] @ EXPANDED(v)

    seen = rewritten(over_a_cache(attend), *step_inputs(tokens), dynamic=dynamic)
    assert len(seen.matched) == 1 and not seen.missed, seen.missed
    (call,) = (n for n in seen.state.graph.nodes if op(n) == "extended_attention")
    assert tuple(call.kwargs["sinks"].meta["example_value"].shape) == (HEADS,)


def test_softcap_of_queries_that_are_scaled_by_a_tensor():
    attend = lambda q, k, v, counts: torch.tanh((q @ EXPANDED(k).mT) * q[:1, :1, :1, :1]).softmax(-1) @ EXPANDED(v)
    assert "extended_attention" in rewritten(over_a_cache(attend), *step_inputs()).ops


FINITE = ("masked_fill lowest", "masked_fill -1e9", "where reversed", "add", "sub", "iadd")
ATOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NO_NUMBERS = [(torch.float16, mask) for mask in ("masked_fill -1e9", "sub")]  # -1e9 is none of float16
ROWS = [(d, m) for d in (torch.float32, torch.bfloat16, torch.float16) for m in FINITE if (d, m) not in NO_NUMBERS]


@pytest.mark.parametrize("dtype, mask", ROWS, ids=str)
def test_a_row_that_sees_nothing_sees_all_alike(dtype, mask):
    """As the model has it: each token has the same weight where a finite number takes the place of every score."""
    *tensors, counts = step_inputs(3, dtype=dtype)
    counts[1, :, 0] = False
    attend = lambda q, k, v, counts: MASKS[mask](scores(q, k), counts).softmax(-1) @ EXPANDED(v)
    assert_one_call(rewritten(over_a_cache(attend), *tensors, counts, atol=ATOL[dtype]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    def attend(q, k, v, counts):
        s = scores(q.float(), k.float()) if dtype != torch.float64 else scores(q, k)
        weights = s.masked_fill(~counts, torch.finfo(s.dtype).min).softmax(-1)
        return weights.to(v.dtype) @ EXPANDED(v)

    assert_one_call(rewritten(over_a_cache(attend), *step_inputs(3, dtype=dtype), atol=ATOL[dtype]))


def test_outputs_in_another_order_than_their_softmaxes():
    """Both hide the same scores, so they share what is made for that."""

    def attend(q, k, v, counts):
        hidden = ~counts
        first, second = ((x @ EXPANDED(k).mT).masked_fill(hidden, -torch.inf).softmax(-1) for x in (q, -q))
        late = second @ EXPANDED(v)
        return late - first @ EXPANDED(v)

    seen = rewritten(over_a_cache(attend), *step_inputs())
    assert len(seen.matched) == 2 and "softmax" not in seen.ops


def test_one_kv_head_is_broadcast():
    attend = lambda q, k, v, counts: (q @ k.mT * SCALE).masked_fill(~counts, -torch.inf).softmax(-1) @ v
    seen = rewritten(over_a_cache(attend), *step_inputs(heads=1))
    assert_one_call(seen)


def test_one_row_and_one_token():
    for past in (4, 0):
        *tensors, counts = (x[1:] for x in step_inputs(1, past))
        assert_one_call(rewritten(over_a_cache(usual), *tensors, counts))


def test_queries_that_are_folded_with_their_heads():
    """[B, H * q, D] against the tokens of one head, as multi-query models have it."""

    def attend(q, k, v, counts):
        s = torch.bmm(q.flatten(1, 2), k[:, 0].mT).view(B, HEADS, q.shape[2], -1) * SCALE
        weights = s.masked_fill(~counts, -1e9).softmax(-1).flatten(1, 2)
        return torch.bmm(weights, v[:, 0]).view(q.shape)

    assert_one_call(rewritten(over_a_cache(attend), *step_inputs(heads=1)))


REFUSED = {
    "its scores go through tanh (softcap) after a mask, or twice": lambda q, k, v, counts: (
        torch.tanh(scores(q, k) + additive(q, counts)).softmax(-1) @ EXPANDED(v)
    ),
    "multiplied by after tanh (softcap) is no plain number": lambda q, k, v, counts: (
        (torch.tanh(scores(q, k)) * q[:1, :1, :1, :1]).softmax(-1) @ EXPANDED(v)
    ),
    "its scores are multiplied by 0 after tanh": lambda q, k, v, counts: (
        (torch.tanh(scores(q, k)) * 0).softmax(-1) @ EXPANDED(v)
    ),
    "the sinks beside its scores are not one for each head": lambda q, k, v, counts: (
        torch.cat([scores(q, k), q[..., :1]], -1).softmax(-1)[..., :-1] @ EXPANDED(v)
    ),
    "2 scores stand beside its own in its softmax": lambda q, k, v, counts: (
        torch.cat([scores(q, k), q[..., :2]], -1).softmax(-1)[..., :-2] @ EXPANDED(v)
    ),
    "what a sink takes of its attention weights meets the values": lambda q, k, v, counts: (
        torch.cat([scores(q, k), q[..., :1]], -1).softmax(-1) @ F.pad(EXPANDED(v), (0, 0, 0, 1))
    ),
    "its scores go through mul after a sink was put beside them": lambda q, k, v, counts: (
        (torch.cat([scores(q, k), q[..., :1]], -1) * 2).softmax(-1)[..., :-1] @ EXPANDED(v)
    ),
    "its attention weights are used by getitem before they meet the values": lambda q, k, v, counts: (
        scores(q, k).softmax(-1)[..., :3] @ EXPANDED(v)[:, :, :3]
    ),
    "its attention weights are used by mul before they meet the values": lambda q, k, v, counts: (
        scores(q, k).softmax(-1) * counts
    )
    @ EXPANDED(v),
    "its scores are multiplied by a tensor of [2, 1, 3, 7], which is no scale": lambda q, k, v, counts: (
        (scores(q, k) * counts).softmax(-1) @ EXPANDED(v)
    ),
    "masked scores are set to -100.0": lambda q, k, v, counts: scores(q, k).masked_fill(~counts, -100.0).softmax(-1)
    @ EXPANDED(v),
    "its scores are added to with a factor": lambda q, k, v, counts: torch.add(
        scores(q, k), additive(q, counts), alpha=2
    ).softmax(-1)
    @ EXPANDED(v),
    "attention dropout is on (p=0.1)": lambda q, k, v, counts: F.dropout(scores(q, k).softmax(-1), 0.1) @ EXPANDED(v),
    "its values are not summed over the axis of softmax": lambda q, k, v, counts: (
        scores(q, k).softmax(2) @ EXPANDED(v)
    ),
    "its scores are used by mean too": lambda q, k, v, counts: twice(scores(q, k), EXPANDED(v)),
}  # fmt: skip
twice = lambda s, v: s.softmax(-1) @ v + s.mean()


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_call_says_why(reason):
    other_numbers = 10 if "dropout" in reason else 0  # each run drops others
    seen = rewritten(over_a_cache(REFUSED[reason]), *step_inputs(), atol=other_numbers)
    (miss,) = seen.missed
    assert reason in miss.reason and miss.node and not seen.matched
    assert "softmax" in seen.ops and "scaled_dot_product_attention" not in seen.ops


def test_weights_that_are_returned_stay():
    def step(past_k, past_v, q, k, v, counts):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        weights = scores(q, k).softmax(-1)
        return weights @ EXPANDED(v), weights, k, v

    (miss,) = rewritten(step, *step_inputs()).missed
    assert miss.reason == "its attention weights are returned too, so they are computed"


def test_attention_without_a_cache_stays_in_silence():
    def tower(past_k, past_v, q, k, v, counts):
        return scores(q, k).softmax(-1) @ EXPANDED(v), k * 2

    seen = rewritten(tower, *step_inputs())
    assert not seen.matched and not seen.missed and "softmax" in seen.ops


def test_a_cache_that_cannot_be_packed_keeps_its_attention():
    def middle(past_k, past_v, q, k, v, counts):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return usual(q, k, v, counts), k[:, :, -4:-1], v[:, :, -4:-1]

    seen = rewritten(middle, *step_inputs())
    (miss,) = seen.missed
    assert "keeps a slice" in miss.reason and "softmax" in seen.ops
    assert "scaled_dot_product_attention" not in seen.ops and seen.error == 0

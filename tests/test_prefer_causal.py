"""prefer_causal: a mask that says "causal" is found to be that, and only that; answers stay those of the mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from akvq_fx import backend
from akvq_fx.passes.prefer_causal import ROWS, is_causal, unless

T = 9


def causal(dtype, *lead):
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(*lead, T, T).clone()
    return seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("lead", [(), (1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_a_causal_mask_is_found(dtype, lead):
    mask = causal(dtype, *lead)
    assert is_causal(mask)
    if dtype != torch.bool:
        assert is_causal(mask.clamp_min(torch.finfo(dtype).min))


@given(st.booleans(), st.integers(0, 1), st.integers(0, T - 1), st.integers(0, T - 1))
def test_one_number_that_differs_is_seen(additive, row, query, token):
    mask = causal(torch.float32 if additive else torch.bool, 2, 1)
    was = mask[row, 0, query, token].item()
    mask[row, 0, query, token] = (-1.0 if token <= query else 0.0) if additive else not was
    assert not is_causal(mask)


def test_every_stretch_of_rows_is_compared():
    mask = torch.ones(2 * ROWS + 5, 2 * ROWS + 5, dtype=torch.bool).tril()
    assert is_causal(mask)
    for query in (0, ROWS, 2 * ROWS + 3):
        mask[query, query + 1] = True
        assert not is_causal(mask)
        mask[query, query + 1] = False


def test_a_mask_is_left_out_where_the_flag_speaks_for_it():
    mask = causal(torch.bool)
    assert unless(True, mask) is None and unless(False, mask) is mask


class Model(torch.nn.Module):
    """One layer over a growing cache; grouped queries, a mask [.., q, T] where one is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = torch.nn.Linear(16, 16), torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)

    def forward(self, x, mask=None, cache=None):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True), (k, v)


@pytest.fixture
def graphs(monkeypatch):
    """States of the graphs that are rewritten from here on."""
    found, rewrite = [], backend.rewrite
    monkeypatch.setattr(backend, "rewrite", lambda *args: found.append(rewrite(*args)) or found[-1])
    return found


def asks(state) -> bool:
    return any(node.target is is_causal for node in state.graph.nodes)


def compiled(**options):
    model = Model().eval()
    return model, torch.compile(model, backend="akvq", options={"inner": "eager", "body_bits": 16, **options})


@torch.no_grad()
def test_a_prompt_asks_and_answers_as_under_its_mask(graphs):
    model, fast = compiled()
    x = torch.randn(2, T, 16)
    masks = [causal(torch.bool, 2, 1), causal(torch.bool, 2, 1)]
    masks[1][1, :, :, :3] = torch.eye(T, dtype=torch.bool)[:, :3]  # the second row is padded on the left
    for mask in masks:
        torch.testing.assert_close(fast(x, mask)[0], model(x, mask)[0])
    assert len(graphs) == 1 and asks(graphs[0])
    step = torch.randn(2, 1, 16)
    cache, mask = fast(x, masks[0])[1], torch.ones(2, 1, 1, T + 1, dtype=torch.bool)
    torch.testing.assert_close(fast(step, mask, cache)[0], model(step, mask, model(x, masks[0])[1])[0])
    assert len(graphs) == 2 and not asks(graphs[1])


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 1, T, dtype=torch.bool), torch.ones(T, 1, dtype=torch.bool)])
def test_other_masks_are_not_asked_about(mask, graphs):
    model, fast = compiled()
    x = torch.randn(1, T, 16)
    torch.testing.assert_close(fast(x, mask)[0], model(x, mask)[0])
    assert graphs[0].sites and not asks(graphs[0])


@torch.no_grad()
def test_a_prompt_that_is_compiled_keeps_its_mask(graphs):
    model, fast = compiled(inner="aot_eager", compile_prompts=True)
    x, mask = torch.randn(1, T, 16), causal(torch.bool, 1, 1)
    torch.testing.assert_close(fast(x, mask)[0], model(x, mask)[0])
    assert graphs[0].sites and not asks(graphs[0])

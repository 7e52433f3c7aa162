"""Like layers are compiled once: what is shared, what is not, and that the numbers stay what they were."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import akvq_fx
from akvq_fx import backend, torch_internals
from akvq_fx.config import CAPTURED_MODE, AKVQConfig
from akvq_fx.regions import Chain, called, compile_in_regions
from akvq_fx.report import Regions
from tests.attention_models import WIDTH, Attention, Decoder, StaticIndexCopy, VisionDecoder, roll, token_ids
from tests.test_calibrate import images
from tests.test_cuda_graph import Rerun

SMALL = {"window": 4, "pivots": 2, "tsa_layers": (), "capacity_step": 4, "compile_prompts": True}
LOSSLESS = {**SMALL, "body_bits": 16}


class Counting:
    """Stands for the inner compiler: keeps the graphs that it gets, and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, examples, config=None):
        assert len(examples) == sum(node.op == "placeholder" for node in gm.graph.nodes)
        self.graphs.append(gm)
        self.look(examples)
        return gm

    def look(self, examples):
        """Nothing is asked about sizes."""


@pytest.fixture
def inner(monkeypatch):
    counting = Counting()
    monkeypatch.setattr(backend, "compile_inner", counting)
    return counting


def rolled(model: nn.Module, options: dict, **schedule) -> list[torch.Tensor]:
    """Logits of a prompt and of steps after it, compiled anew."""
    torch._dynamo.reset()
    return roll(torch.compile(model, backend="akvq", options=options), **schedule)[0]


def regions_of(model: nn.Module) -> list[Regions]:
    return [graph.regions for graph in akvq_fx.report(model).graphs]


def assert_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    assert len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.mark.parametrize("layers", [4, 7])
def test_compilations_do_not_grow_with_layers(inner, layers):
    model = Decoder(layers=layers)
    rolled(model, SMALL)
    assert len(inner.graphs) == 6, "of the prompt and of a step: first layer, one of the others, head"
    assert regions_of(model) == 2 * [Regions(layers, count=layers + 1, kinds=3)]
    assert f"decode: {layers} layers in {layers + 1} regions of 3 kinds, each kind compiled once" in str(
        akvq_fx.report(model)
    )


@pytest.mark.parametrize("spelling", [Attention, StaticIndexCopy])
def test_shared_layers_give_what_whole_graphs_give(inner, spelling):
    """To the bit, with a growing and with a static cache."""
    build = functools.partial(Decoder, spelling, layers=3)
    whole = rolled(build(), {**SMALL, "share_layers": False})
    assert len(inner.graphs) == 2
    model = build()
    assert_equal(rolled(model, SMALL), whole)
    assert [regions.count for regions in regions_of(model)] == [4, 4] and len(inner.graphs) == 2 + 6


def test_text_salient_and_pivot_salient_layers_are_two_kinds(inner):
    options, tokens = {**SMALL, "tsa_layers": (0, 1, 2)}, token_ids(2, 14)
    arguments = images(2, 14, 3, 9)
    found = []
    for share in (False, True):
        torch._dynamo.reset()
        model = VisionDecoder("masked_scatter", layers=6)
        run = torch.compile(model, backend="akvq", options={**options, "share_layers": share})
        with torch.no_grad():
            logits, cache = run(**arguments)
            step, _ = run(tokens[:, :1], cache)
        found.append([logits, step])
    assert_equal(*found)
    prompt, step = regions_of(model)
    assert (step.count, step.kinds) == (7, 4), "first layer, two text-salient, three pivot-salient ones, head"
    assert prompt.kinds <= 5 and prompt.count >= 6, prompt


def test_every_layer_uses_its_own_weights(inner):
    """Also those that it gets after it was compiled."""
    model, other = Decoder(layers=4), Decoder(layers=4, seed=1)
    run = torch.compile(model, backend="akvq", options=LOSSLESS)
    torch.testing.assert_close(roll(run)[0], roll(model)[0])
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(roll(run)[0], roll(other)[0])
    model.load_state_dict({name: x.clone() for name, x in other.state_dict().items()}, assign=True)
    model.layers[1].up, model.layers[2].up = model.layers[2].up, model.layers[1].up
    found = roll(run)[0]
    torch.testing.assert_close(found, roll(model)[0])
    assert not torch.allclose(found[0], roll(other)[0][0])
    assert len(inner.graphs) == 6


def test_batch_sizes_in_a_row_compile_nothing_anew(inner):
    torch._dynamo.reset()
    model = Decoder(layers=3)
    run = torch.compile(model, backend="akvq", options=LOSSLESS, dynamic=True)
    compare = lambda batch: torch.testing.assert_close(
        roll(run, batch=batch, steps=2)[0], roll(model, batch=batch, steps=2)[0]
    )
    compare(2), compare(3)  # dynamo takes the first cache's batch for a number
    known = len(inner.graphs)
    compare(5), compare(2), compare(4)
    assert len(inner.graphs) == known == 3 * len(regions_of(model))
    assert all(regions.kinds == 3 for regions in regions_of(model))


def wide(layer: nn.Module, width: int) -> nn.Module:
    """The layer with an MLP of another width."""
    layer.up, layer.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)
    return layer


@pytest.mark.parametrize(
    "widths, kinds", [((8, 16, 8, 16, 8, 16), 4), ((8, 8, 8, 16, 16, 16), 4), ((8, 24, 16, 32), 0)], ids=str
)
def test_layers_that_differ_have_kinds_of_their_own(inner, widths, kinds):
    model = Decoder(layers=len(widths))
    for layer, width in zip(model.layers, widths, strict=True):
        wide(layer, width)
    torch.testing.assert_close(rolled(model, LOSSLESS), roll(model)[0])
    for regions in regions_of(model):
        assert regions.kinds == kinds and regions.layers == len(widths)
        assert regions.reason == ("" if kinds else "no two of its layers are alike")
    assert len(inner.graphs) == 2 * max(kinds, 1)


class OtherNorm(Attention):
    """A constant is another one: as many nodes, which are no longer alike."""

    def norm_after(self, x):
        return x * 1.5


class ThisNorm(Attention):
    def norm_after(self, x):
        return x * 1.25


def test_constants_are_compared(inner):
    model = Decoder(ThisNorm, layers=5)
    for i in (1, 3):
        model.layers[i].attention.__class__ = OtherNorm
    torch.testing.assert_close(rolled(model, LOSSLESS), roll(model)[0])
    assert [regions.kinds for regions in regions_of(model)] == [4, 4]


def test_few_layers_and_the_option(inner):
    model = Decoder(layers=2)
    rolled(model, SMALL)
    assert {regions.reason for regions in regions_of(model)} == {"it has fewer than 3 attention calls"}
    assert "prefill: compiled whole: it has fewer than 3 attention calls" in str(akvq_fx.report(model))
    for options in ({**SMALL, "share_layers": False}, {**SMALL, "inner": "eager"}):
        model = Decoder(layers=3)
        rolled(model, options)
        assert regions_of(model) == [None, None] and "compiled whole" not in str(akvq_fx.report(model))
    with pytest.raises(ValueError, match="share_layers='yes' is not accepted"):
        AKVQConfig(share_layers="yes")


def test_a_guard_on_one_layers_sizes_becomes_one_of_the_others(inner):
    """In a growing cache each layer's number of tokens is a symbol of its own."""
    envs = []

    def look(examples):
        sizes = [x for x in examples if isinstance(x, torch.SymInt)]
        envs.extend(x.node.shape_env for x in sizes if x < 4096)

    inner.look = look
    model = Decoder(layers=4)
    torch.testing.assert_close(rolled(model, LOSSLESS), roll(model)[0])
    assert [regions.kinds for regions in regions_of(model)] == [3, 3]
    bound = {s for guard in torch_internals.guards(envs[-1]) if "4096" in str(guard) for s in guard.free_symbols}
    assert len(bound) >= 4, "one of each layer"


def test_a_guard_that_others_do_not_keep(inner, monkeypatch):
    inner.look = lambda examples: [x < 4096 for x in examples if isinstance(x, torch.SymInt) and x < 4096]
    monkeypatch.setattr(torch_internals, "holds", lambda env, condition: False)
    model = Decoder(layers=4)
    torch.testing.assert_close(rolled(model, LOSSLESS), roll(model)[0])
    prompt, step = regions_of(model)
    assert prompt.kinds == 3, "its sizes are numbers"
    assert step.kinds == 0 and step.reason.startswith("the inner compiler needs") and "is not so" in step.reason
    assert f"decode: compiled whole: {step.reason}" in str(akvq_fx.report(model))


def test_a_guard_on_sizes_that_all_layers_have(inner):
    """Batch and length are one symbol for all layers of a prompt: the guard holds for every one of them."""
    inner.look = lambda examples: [x < 4096 for x in examples if isinstance(x, torch.SymInt) and x < 4096]
    model = Decoder(layers=4)
    torch._dynamo.reset()
    run = torch.compile(model, backend="akvq", options=LOSSLESS, dynamic=True)
    torch.testing.assert_close(roll(run, steps=0)[0], roll(model, steps=0)[0])
    assert [regions.kinds for regions in regions_of(model)] == [3]


# functions without a cache, cut directly: attention is any scaled_dot_product_attention


def attended(x: torch.Tensor) -> torch.Tensor:
    return x + F.scaled_dot_product_attention(x, x.cos(), x.sin())


def cut(function, *args, inner=None, compile_one=None, **options):
    """(results of the function compiled in regions, the report)."""
    torch._dynamo.reset()
    reports, compile_one = [], compile_one or Counting()

    def through_regions(gm, examples):
        compiled, report = compile_in_regions(gm, examples, compile_one)
        reports.append(report)
        return compiled

    with torch.no_grad():
        results = torch.compile(function, backend=through_regions, fullgraph=True, **options)(*args)
    (report,) = reports
    return results, report


def ones(*size: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(size).numel()).view(size)


COMPILERS = [None, torch_internals.aot_eager]


@pytest.mark.parametrize("compile_one", COMPILERS, ids=["as it is", "aot_eager"])
def test_plain_layers(compile_one):
    def layers(x):
        for _ in range(5):
            x = attended(x)
        return x, 7, x.shape[1] + 1

    x = ones(1, 2, 4, 8)
    (found, *numbers), report = cut(layers, x, compile_one=compile_one)
    torch.testing.assert_close(found, layers(x)[0])
    assert numbers == [7, 3]
    assert report == Regions(5, count=6, kinds=3), "each layer's add is in the region of the next"


def test_a_residual_written_in_place_is_not_cut():
    def layers(x):
        x = x.clone()
        for _ in range(4):
            x += F.scaled_dot_product_attention(x, x.cos(), x)
        return x

    x = ones(1, 2, 4, 8)
    found, report = cut(layers, x, compile_one=torch_internals.aot_eager)
    torch.testing.assert_close(found, layers(x))
    assert report.reason.startswith("there is no place to cut it") and report.reason.endswith("[x]")


def test_views_of_what_is_written_cross_no_cut():
    """A view is taken in one layer and read in the next, after its memory was written: the cut is before both."""

    def layers(x, notes):
        view = notes[:1]
        for _ in range(4):
            x = attended(x) * view.sum()
            notes.add_(1)
            view = notes[1:]
        return x

    x, notes = ones(1, 2, 4, 8), torch.ones(2)
    expected, left = layers(x, other := notes.clone()), other
    found, report = cut(layers, x, notes, compile_one=torch_internals.aot_eager)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(notes, left)
    assert report.count


def test_each_layer_writes_its_own_buffer_in_order():
    def layers(x, *buffers):
        for i, buffer in enumerate(buffers):
            buffer.add_(x.mean())
            x = attended(x) + buffers[i - 1].sum()
        return x

    x = ones(1, 2, 4, 8)
    buffers, others = ([torch.full((3,), float(i)) for i in range(5)] for _ in range(2))
    expected = layers(x, *others)
    found, report = cut(layers, x, *buffers, compile_one=torch_internals.aot_eager)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(buffers, others)
    assert report.count


@pytest.mark.parametrize("apart", [False, True])
def test_inputs_that_share_memory(apart):
    """A layer that writes memory which another of its inputs shares is not like one that does not."""

    def layers(x, *pairs):
        for one, other in zip(pairs[::2], pairs[1::2], strict=True):
            one.add_(1)
            x = attended(x) + other.sum()
        return x

    def pairs():
        whole = [torch.zeros(8) for _ in range(5)]
        found = [(w[:4], w[4:] if apart else torch.zeros(4)) for w in whole]
        found[2] = whole[2][:6], whole[2][2:]  # these overlap
        found[2] = (found[2][0][:4], found[2][1][:4])
        return [x for pair in found for x in pair]

    x = ones(1, 2, 4, 8)
    expected = layers(x, *pairs())
    found, _ = cut(layers, x, *pairs(), compile_one=torch_internals.aot_eager)
    torch.testing.assert_close(found, expected)


def test_results_that_are_views_of_inputs():
    """Where a view begins is compiled in, where it is given back."""

    def layers(x, *rows):
        kept = []
        for row in rows:
            kept.append(row.view(2, 2))
            x = attended(x) + row.sum()
        return x, kept

    whole = torch.arange(40.0)
    x, rows = ones(1, 2, 4, 8), [whole[8 * i : 8 * i + 4] for i in range(5)]
    expected, _ = layers(x, *rows)
    (found, kept), _ = cut(layers, x, *rows, compile_one=torch_internals.aot_eager)
    torch.testing.assert_close(found, expected)
    for row, view in zip(rows, kept, strict=True):
        assert view.data_ptr() == row.data_ptr() and torch.equal(view.flatten(), row)


def test_the_same_tensor_crosses_under_two_names():
    """A cast to the dtype that a tensor has gives the tensor itself."""

    def layers(x):
        for _ in range(4):
            same = x.to(torch.float32)
            x = same + F.scaled_dot_product_attention(x, x.cos(), same)
        return x, same

    x = ones(1, 2, 4, 8)
    found, report = cut(layers, x, compile_one=torch_internals.aot_eager)
    torch.testing.assert_close(found, layers(x))
    assert report.count


@pytest.mark.parametrize("mode", ["autocast", "no_grad", "across layers"])
def test_modes_are_not_cut_in_two(mode):
    """Grad mode and autocast are within one region: every region leaves them as it found them."""

    def layers(x):
        for i in range(5):
            if mode == "across layers" and i in (1, 2):
                with torch.autocast("cpu", torch.bfloat16):
                    x = attended(attended(x.mT @ x).mT @ x.mT).mT.float()
            elif mode == "no_grad":
                with torch.no_grad():
                    x = attended(x)
            else:
                with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                    x = attended(x @ (x.mT @ x)).float()
            x = x.tanh()
        return x

    x, counting = ones(1, 2, 4, 8), Counting()
    found, _ = cut(layers, x, compile_one=counting)
    torch.testing.assert_close(found, layers(x))
    for gm in counting.graphs:
        names = [getattr(n.target, "__name__", "") for n in gm.graph.nodes]
        assert names.count("_enter_autocast") == names.count("_exit_autocast")


def test_numbers_of_the_device_do_not_cross():
    """A size that only the device knows is read where it was made."""

    def layers(x):
        for i in range(4):
            count = (x > 0).sum().item()
            x = attended(x) * (count + i)
        return x

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        x = ones(1, 2, 4, 8)
        found, _ = cut(layers, x)
    torch.testing.assert_close(found, layers(x))


def test_where_gradients_may_be_asked_for_nothing_is_cut():
    x, counting = ones(1, 2, 4, 8).requires_grad_(), Counting()
    layers = lambda x: attended(attended(attended(attended(x))))
    backend_of = lambda gm, examples: compile_in_regions(gm, examples, counting, inference=False)[0]
    torch.compile(layers, backend=backend_of)(x).sum().backward()
    found, x.grad = x.grad, None
    layers(x).sum().backward()
    torch.testing.assert_close(found, x.grad)
    assert len(counting.graphs) == 1


def test_values_are_dropped_after_their_last_use():
    seen = []
    steps = [
        (lambda x: (x + 1, x + 2), lambda values: values[:1], [1]),
        (lambda *values: seen.append(values) or (values[1] + 1,), lambda values: values[1:3], []),
    ]
    assert Chain(steps, [(3, None), (None, "constant"), (0, None)])(1) == (4, "constant", 1)
    assert seen == [(None, 3)]


# through real compilers, and with a recorder in place of CUDA graphs


def test_functions_made_for_each_use_are_the_same_where_code_and_arguments_are():
    def made(*arguments):
        return lambda x: x.view(*arguments)

    one, same, other = (called(made(*sizes)) for sizes in ((2, [3]), (2, [3]), (2, [4])))
    assert one == same and hash(one) == hash(same)
    assert one != other
    assert called(torch.relu) is torch.relu


def test_aot_eager():
    options = {**SMALL, "inner": "aot_eager"}
    model = Decoder(layers=3)
    torch.testing.assert_close(rolled(model, options), rolled(Decoder(layers=3), {**options, "share_layers": False}))
    assert all(regions.kinds == 3 for regions in regions_of(model))


def test_inductor():
    """The default inner compiler; lossless, so against the uncompiled model."""
    model = Decoder(layers=3)
    found = rolled(model, LOSSLESS)
    torch.testing.assert_close(found, roll(model)[0], rtol=0, atol=1e-5)
    assert regions_of(model) == 2 * [Regions(3, count=4, kinds=3)]


def test_captured_steps_are_replayed(inner, monkeypatch):
    """The body that a CUDA graph holds is cut like any other graph."""
    record = Rerun()
    monkeypatch.setattr(backend, "recorder_for", lambda device, counts: record)
    model = Decoder(layers=3)
    found = rolled(model, {**LOSSLESS, "capacity_step": 16, "mode": CAPTURED_MODE}, steps=8)
    torch.testing.assert_close(found, roll(model, steps=8)[0])
    assert [regions.count for regions in regions_of(model)] == [4, 4]
    capture = akvq_fx.report(model).graphs[-1].capture
    assert (capture.captured, capture.replayed) == (1, 7), capture


# graphs that run once a prompt


@pytest.mark.parametrize("spelling", [Attention, StaticIndexCopy])
def test_prompts_run_as_they_are_and_steps_are_compiled(inner, spelling):
    build = functools.partial(Decoder, spelling, layers=3)
    whole = rolled(build(), {**SMALL, "share_layers": False})
    seen, model = len(inner.graphs), build()
    assert_equal(rolled(model, {**SMALL, "compile_prompts": False}), whole)
    assert len(inner.graphs) - seen == 3, "of a step: first layer, one of the others, head"
    assert [graph.kind for graph in akvq_fx.report(model).graphs] == ["prefill", "decode"]
    assert regions_of(model)[0] is None and regions_of(model)[1].count == 4


def test_a_plain_cache_that_is_packed_later_is_compiled(inner):
    """Its graph reads tokens that the prompt did not pack: it may be a step like any other."""
    model = Decoder(layers=3)
    with torch.no_grad():
        logits, cache = model(token_ids(2, 9))
        torch.compile(model, backend="akvq", options={**SMALL, "compile_prompts": False})(token_ids(2, 1), cache)
    assert [graph.kind for graph in akvq_fx.report(model).graphs] == ["decode"]
    assert len(inner.graphs) == 3


@pytest.mark.parametrize("asked", [False, True])
def test_a_graph_without_a_cache_runs_as_it_is(inner, asked):
    module = nn.Sequential(nn.Linear(2, 3), nn.GELU())
    run = torch.compile(module, backend="akvq", options={"compile_uncached": True} if asked else {})
    x = torch.ones(1, 2)
    run(x).sum().backward()
    assert len(inner.graphs) == asked
    assert module[0].weight.grad is not None
    assert [graph.kind for graph in akvq_fx.report(module).graphs] == ["no cache"]


def test_images_are_placed_without_the_inner_compiler(inner):
    """Before a graph break: only the mask of vision tokens comes from that graph, and no cache."""
    run = torch.compile(VisionDecoder("masked_scatter", layers=1, broken=True), backend="akvq", options=SMALL)
    with torch.no_grad():
        run(**images(2, 14, 3, 9))
    assert [graph.kind for graph in akvq_fx.report(run).graphs] == ["no cache", "prefill"]
    assert len(inner.graphs) == 1


def test_a_cache_that_stays_as_it_is_is_compiled(inner):
    """Refused layers have a cache: a step of theirs runs as often as any other."""

    class Refused(Attention):
        dim = 12

    model = Decoder(Refused, layers=1)
    torch.testing.assert_close(rolled(model, SMALL, steps=1), roll(model, steps=1)[0])
    assert len(inner.graphs) == 2 and len(akvq_fx.report(model).refused) == 2


def test_token_ids_are_symbols_in_these_tests():
    """Tests of guards above rely on it that sizes of a growing cache are symbols, one for each layer."""
    torch._dynamo.reset()
    found = []

    def look(gm, examples):
        found.append([x for x in examples if isinstance(x, torch.SymInt)])
        return backend.akvq(gm, examples, options={**LOSSLESS, "inner": "eager"})

    ids = token_ids(2, 7)
    run = torch.compile(Decoder(layers=2), backend=look)
    with torch.no_grad():
        _, cache = run(ids[:, :6])
        run(ids[:, 6:], cache)
    assert len({str(x.node.expr) for x in found[1]}) >= 4

"""DecodeStep: what is captured when, over which memory, and what the caller gets; a fake recorder stands for CUDA's."""

import gc
import threading
import types
import weakref

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import akvq_fx
from akvq_fx import PackedKV, cuda_graph
from akvq_fx.config import CAPTURED_MODE
from akvq_fx.cuda_graph import KEPT, DecodeStep
from akvq_fx.cuda_recorder import NO_CUDA, CudaRecorder
from akvq_fx.passes.state import Split
from akvq_fx.report import Capture
from akvq_fx.transformers_names import cache_of
from tests.attention_models import Decoder, Spy, token_ids
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_layer")
SMALL = {"mode": CAPTURED_MODE, "window": 8, "pivots": 3, "capacity_step": 16}
PLAIN = {**SMALL, "mode": None, "inner": "eager"}


class Rerun:
    """A recorder that runs the recorded call again, on the memory that it was recorded over, into the same results."""

    def __init__(self):
        self.stream, self.error, self.records = 0, None, 0

    def place(self, device):
        return self.stream

    def memory(self, device):
        return 2**30

    def __call__(self, function, arguments, device):
        if self.error is not None:
            raise self.error
        self.records += 1
        known = [weakref.ref(a) if isinstance(a, Tensor) else lambda a=a: a for a in arguments]
        results: list = []

        def replay():
            new = function(*[ref() for ref in known])
            if not results:
                with torch.inference_mode(False):  # CUDA writes to its results whatever mode they were made in
                    results.extend(x.clone() if isinstance(x, Tensor) and x is not known[0]() else x for x in new)
            for place, x in zip(results, new, strict=True):
                if isinstance(x, Tensor) and place is not x:
                    place.copy_(x)
            return results

        return replay


@pytest.fixture
def recorder(monkeypatch):
    """Every decode graph is captured by a Rerun, and runs without Inductor."""
    made = Rerun()
    monkeypatch.setattr("akvq_fx.backend.compile_inner", lambda gm, examples, config: gm)
    monkeypatch.setattr("akvq_fx.backend.recorder_for", lambda device, counts: made)
    return made


def start(position: int, offset: int = 0):
    """A Size that reads an integer input."""

    def size(inputs):
        return inputs[position] + offset

    size.argument = position if not offset else None
    return size


def body(buffer, x, *rest):
    """Adds the moved input to the held buffer; gives the sum, and what else came in."""
    buffer += x
    return (buffer * 2, *[r.clone() for r in rest], buffer)


def step_over(record, prologue=None, pads=(), starts=(), count=1, moved=(1,), numbers=()):
    """Inputs: buffer [2, 3, C], x [2, 3, 1], then integers."""
    rest = len(pads) + bool(starts)
    results = [
        ("body", 0),
        *[("body", 1 + i) for i in range(rest)],
        ("body", 1 + rest),
        ("input", 1),
        ("constant", None),
    ]
    places = [[1, 2] if prologue else [], [0], *map(list, (numbers, moved, pads, starts))]
    split = Split(prologue, None, *places, count, [(0, 2)], results)
    counts = Capture()
    return DecodeStep(split, prologue, body, counts, record), counts


def buffer(capacity: int = 4) -> Tensor:
    return torch.zeros(2, 3, capacity)


def x_of(number: float) -> Tensor:
    return torch.full((2, 3, 1), float(number))


def test_first_runs_second_is_captured_third_is_replayed():
    record, kept = Rerun(), buffer()
    step, counts = step_over(record)
    seen = []
    for i in range(1, 6):
        seen.append(step(kept, x_of(i)))
        assert torch.equal(kept, torch.full_like(kept, sum(range(i + 1)))), "every step runs exactly once"
    assert counts == Capture(captured=1, replayed=4, ran=1) and record.records == 1
    told = "1 CUDA graphs captured, 0 of them dropped since; 4 steps replayed, 1 ran without one; "
    assert str(counts) == told + "0 bytes kept, into which caches moved 0 times"
    for i, (twice, _, given, nothing) in enumerate(seen, 1):
        assert torch.equal(twice, torch.full_like(kept, 2.0 * sum(range(i + 1)))), "a later step overwrites no result"
        assert torch.equal(given, x_of(i)) and nothing is None


def test_a_result_that_is_held_memory_comes_as_it_is():
    kept = buffer()
    step, _ = step_over(Rerun())
    assert all(step(kept, x_of(1))[1] is kept for _ in range(4))


def test_inputs_may_lie_anywhere_and_in_any_order():
    kept = buffer()
    step, counts = step_over(Rerun())
    for _ in range(4):
        step(kept, torch.ones(1, 3, 2).transpose(0, 2)[:, :, :1])
        step(kept, torch.ones(2, 1, 1).expand(2, 3, 1))
    assert counts.captured == 1 and torch.equal(kept, torch.full_like(kept, 8.0))


def test_each_set_of_buffers_has_its_own_and_keeps_it():
    record, buffers = Rerun(), [buffer(), buffer(), buffer(8)]
    step, counts = step_over(record)
    for _ in range(3):
        for kept in buffers:
            step(kept, x_of(1))
    assert counts == Capture(captured=3, replayed=6, ran=3)
    assert all(torch.equal(kept, torch.full_like(kept, 3.0)) for kept in buffers)


@pytest.mark.parametrize("change", ["stream", "number", "size"])
def test_what_a_recording_is_bound_to(change):
    record, kept = Rerun(), buffer(8)
    step, counts = step_over(record, numbers=(2,))
    step.body = lambda buffer, number, x: body(buffer, x)
    step(kept, x_of(1), 5), step(kept, x_of(1), 5)
    if change == "stream":
        record.stream = 7
    step(kept[:, :, :4] if change == "size" else kept, x_of(1), 6 if change == "number" else 5)
    assert (counts.captured, counts.ran) == (1, 2)


def test_few_are_kept_and_the_longest_unused_goes_first():
    buffers = [buffer() for _ in range(KEPT + 1)]
    step, counts = step_over(Rerun())
    for kept in buffers[:KEPT]:
        step(kept, x_of(1)), step(kept, x_of(1))
    step(buffers[0], x_of(1))
    step(buffers[KEPT], x_of(1))
    assert counts.dropped == 1 and len(step.known) == KEPT
    before = counts.replayed
    step(buffers[0], x_of(1))
    assert counts.replayed == before + 1, "it was used last but one"
    step(buffers[1], x_of(1))
    assert counts.replayed == before + 1, "it was dropped"


def without_buffer(kept, x):
    """The body, but the held buffer is none of its results: a recording keeps those."""
    return (*body(kept, x)[:1], None)


def test_dead_buffers_take_their_graph_along():
    step, counts = step_over(Rerun())
    step.body = without_buffer
    kept = buffer()
    step(kept, x_of(1)), step(kept, x_of(1))
    recording = weakref.ref(step.known[0])
    del kept
    gc.collect()
    assert counts.dropped == 1 and not step.known and recording() is None


def test_buffers_that_die_in_a_step_are_dropped_in_the_next():
    step, counts = step_over(Rerun())
    step.body = without_buffer
    kept, other = buffer(), buffer()
    step(kept, x_of(1)), step(kept, x_of(1))
    with step.lock:
        del kept
    assert counts.dropped == 0 and len(step.dead) == 1
    step(other, x_of(1))
    assert counts.dropped == 1 and len(step.known) == 1


def test_a_step_that_goes_away_leaves_nothing():
    step, _ = step_over(Rerun())
    kept = buffer()
    step(kept, x_of(1)), step(kept, x_of(1))
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None, "held by a cycle"
    finally:
        gc.enable()


def masks(x, length):
    """A prologue: one bool mask and one float mask of `length` columns."""
    return torch.ones(2, 1, length, dtype=torch.bool), torch.zeros(1, length), x + 1


def test_masks_are_filled_up_to_the_capacity():
    kept = buffer(6)
    step, counts = step_over(Rerun(), prologue=masks, pads=[0, 0, None])
    for length in (3, 4, 6, 2):
        _, seen, scores, plus, *_ = step(kept, x_of(1), length)
        assert seen.shape == (2, 1, 6) and scores.shape == (1, 6) and torch.equal(plus, x_of(2))
        assert seen[..., :length].all() and torch.equal(scores[..., :length], torch.zeros(1, length))
        if length != 2:  # columns that a longer sequence left are past the end, which nothing reads
            assert not seen[..., length:].any() and (scores[..., length:] == -torch.inf).all()
    assert counts == Capture(captured=1, replayed=3, ran=1)


@pytest.mark.parametrize("starts", [[start(2)], [start(2), start(3)], [start(2), start(2, 1)]], ids=len)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_positions_of_each_cache(starts, count):
    kept = buffer(6)
    step, counts = step_over(Rerun(), starts=starts, count=count)
    for first, second in ((5, 5), (6, 6), (9, 7), (2**40, 1)):
        _, rows, *_ = step(kept, x_of(1), first, second)
        expected = [[size([None, None, first, second]) + i for i in range(count)] for size in starts]
        assert rows[:, :count].tolist() == expected and rows.dtype == torch.int64 and rows.shape[1] % 2 == 0
    assert counts.replayed == 3


def test_a_capture_that_fails_is_told_and_not_tried_again():
    record, kept = Rerun(), buffer()
    step, counts = step_over(record)
    record.error = RuntimeError("operation not permitted when stream is capturing")
    step(kept, x_of(1))
    with pytest.warns(
        UserWarning, match="no CUDA graph is used for decoding; capturing it failed: operation not permitted"
    ):
        twice, *_ = step(kept, x_of(2))
    assert torch.equal(twice, torch.full_like(kept, 6.0))
    record.error = None
    step(kept, x_of(3))
    assert counts.ran == 3 and counts.captured == 0 and "capturing it failed" in str(counts)
    assert torch.equal(kept, torch.full_like(kept, 6.0))


def test_inference_mode_and_no_grad_take_turns():
    kept = buffer()
    step, counts = step_over(Rerun(), starts=[start(2)])
    for i in range(6):
        with torch.inference_mode() if i % 2 else torch.no_grad():
            step(kept, x_of(1), i)
    assert counts.captured == 1 and torch.equal(kept, torch.full_like(kept, 6.0))


def test_threads_take_turns():
    kept = [buffer() for _ in range(4)]
    step, counts = step_over(Rerun())
    work = lambda mine: [step(mine, x_of(1)) for _ in range(50)]
    threads = [threading.Thread(target=work, args=(mine,)) for mine in kept]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(mine, torch.full_like(mine, 50.0)) for mine in kept)
    assert counts == Capture(captured=4, replayed=196, ran=4)


@pytest.mark.parametrize("same", [cuda_graph.compared_one_by_one, cuda_graph.same_addresses])
def test_addresses_are_compared(same):
    tensors = [torch.ones(2) for _ in range(5)]
    addresses, every = [t.data_ptr() for t in tensors], list(range(5))
    assert same(tensors, addresses, every)
    assert not same([*tensors[:4], torch.ones(2)], addresses, every)


def run(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 24, "return_dict_in_generate": True, **kwargs})


def captures(model) -> list[Capture]:
    """Of the model's decode graphs."""
    return [g.capture for g in akvq_fx.report(model).graphs if g.kind == "decode"]


@pytest.mark.parametrize("cache, bits", [("growing", 2), ("static", 16)])
def test_generate_replays_one_graph_a_capacity_step(recorder, cache, bits):
    """Two left-padded rows, two generations: one capture for each capacity, and the plain mode's tokens."""
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    model, inputs = ZOO["llama"]()
    plain, _ = ZOO["llama"]()
    plain.compile(backend="akvq", options={**PLAIN, "body_bits": bits})
    expected = run(plain, inputs, **extra).sequences
    model.compile(backend="akvq", options={**SMALL, "body_bits": bits})
    for generation in (1, 2):
        out = run(model, inputs, **extra)
        assert torch.equal(out.sequences, expected)
        assert all(isinstance(layer.keys, PackedKV) for layer in cache_of(out).layers)
        # 23 tokens, then 23 steps: capacities 32 and 48, or one static cache, or the first one's again
        (counts,) = captures(model)
        sets = generation * (2 if cache == "growing" else 1)
        assert counts.captured <= sets and counts.ran <= sets and counts.captured + counts.replayed >= 23
        assert counts.replayed + counts.ran == 23 * generation
    assert "CUDA graphs captured" in str(akvq_fx.report(model))


MASKS = {
    "padding": lambda seen: seen[:, 0, 0].long(),
    "bool": lambda seen: seen,
    "float": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
    "one row": lambda seen: seen[:1],
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_prompt_without_a_mask_and_steps_with_one(recorder, kind):
    """The first step's mask tells dynamo the cache's length as a number: its graph has that length, the next any."""
    (plain, inputs), (model, _) = ZOO["llama"](), ZOO["llama"]()
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16})

    @torch.no_grad()
    def steps(model):
        cache, token = DynamicCache(), inputs["input_ids"][:, :1]
        found = [model(inputs["input_ids"], past_key_values=cache, use_cache=True).logits]
        for _ in range(5):
            seen = torch.ones(token.shape[0], 1, 1, cache.get_seq_length() + 1, dtype=torch.bool)
            seen[..., 2] = False
            out = model(token, past_key_values=cache, use_cache=True, attention_mask=MASKS[kind](seen))
            found.append(out.logits)
        return found

    for expected, got in zip(steps(plain), steps(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not any(c.reason for c in captures(model))
    assert captures(model)[-1].captured and captures(model)[-1].replayed


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_text_overlays_of_a_vision_prompt_are_replayed(recorder, cache):
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    (plain, inputs), (model, _) = ZOO["llava"](), ZOO["llava"]()
    plain.compile(backend="akvq", options={**PLAIN, "tsa_layers": (0,)})
    expected = run(plain, inputs, **extra)
    assert all(layer.keys.layout_of.text_bits for layer in cache_of(expected).layers)
    model.compile(backend="akvq", options={**SMALL, "tsa_layers": (0,)})
    assert torch.equal(run(model, inputs, **extra).sequences, expected.sequences)
    (counts,) = captures(model)
    assert not counts.reason and counts.captured == (2 if cache == "growing" else 1) and counts.replayed >= 21


def test_tokens_that_left_their_block_are_replayed(recorder):
    """Across the beginning of blocks and a growth of the cache, and again after another eviction."""
    (plain, inputs), (model, _) = ZOO["llama"](), ZOO["llama"]()
    plain.compile(backend="akvq", options={**PLAIN, "recipe": "akvq"})
    model.compile(backend="akvq", options={**SMALL, "recipe": "akvq"})
    ids = inputs["input_ids"][:, :20].repeat(1, 5)

    @torch.no_grad()
    def steps(model):
        cache, found = DynamicCache(), []
        model(ids, past_key_values=cache, use_cache=True)
        for count in (40, 5):
            cut = lambda x: torch.cat([x[:, :, :4], x[:, :, -70:]], 2)
            cache = DynamicCache([(cut(layer.keys), cut(layer.values)) for layer in cache.layers])
            for i in range(count):
                found.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
        return found, cache

    (expected, _), (got, cache) = steps(plain), steps(model)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    assert cache.layers[0].keys.layout_of.moved
    (counts,) = captures(model)
    assert not counts.reason and counts.captured >= 2 and counts.replayed >= 38


def test_a_static_cache_whose_capacity_became_a_symbol_is_replayed(recorder):
    """Dynamo takes a second capacity for a length that changes; it does not change from step to step."""
    torch._dynamo.reset()
    static = {"cache_implementation": "static"}
    (plain, inputs), (model, _) = ZOO["llama"](), ZOO["llama"]()
    expected = run(plain, inputs, **static).sequences
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16})
    run(model, inputs, max_new_tokens=4, **static)
    assert torch.equal(run(model, inputs, **static).sequences, expected)
    assert not any(c.reason for c in captures(model)), akvq_fx.report(model)
    assert captures(model)[-1].replayed >= 21


def test_beams_are_right_and_capture_nothing_that_lasts(recorder):
    """Beam search moves the cache to other buffers in every step: nothing is replayed, and nothing is wrong."""
    model, inputs = ZOO["llama"]()
    expected = run(model, inputs, num_beams=3, max_new_tokens=6).sequences
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16})
    assert torch.equal(run(model, inputs, num_beams=3, max_new_tokens=6).sequences, expected)
    counts = captures(model)
    assert sum(c.replayed + c.ran for c in counts) == 5


def test_the_same_step_twice_is_one_step(recorder, monkeypatch):
    """append writes by position: a growing cache that takes a step again holds what it held."""
    seen = []
    call = DecodeStep.__call__
    monkeypatch.setattr(
        DecodeStep, "__call__", lambda self, *inputs, **more: seen.append((self, inputs)) or call(self, *inputs, **more)
    )
    model, ids = Decoder(layers=2), token_ids(2, 20)
    compiled = torch.compile(model, backend=Spy(**{**SMALL, "inner": "inductor", "capacity_step": 32, "window": 4}))
    with torch.no_grad():
        _, cache = compiled(ids[:, :9])
        for i in range(9, 16):
            _, cache = compiled(ids[:, i : i + 1], cache)
    step, inputs = seen[-1]
    first = step(*inputs)
    before = [b.clone() for b in step.held(inputs)]
    again = step(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, step.held(inputs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if isinstance(a, Tensor))


def test_without_cuda_the_two_parts_run_through_inductor():
    model, ids = Decoder(), token_ids(2, 10)
    with torch.no_grad():
        expected = model(ids)[0]
        compiled = torch.compile(model, backend="akvq", options={**SMALL, "body_bits": 16})
        _, cache = compiled(ids[:, :6])
        for i in range(6, 10):
            out, cache = compiled(ids[:, i : i + 1], cache)
            torch.testing.assert_close(out, expected[:, i : i + 1], rtol=0, atol=1e-5)
    (counts,) = captures(model)
    assert counts == Capture(reason=NO_CUDA, ran=4)


def test_what_is_kept_is_a_share_of_what_this_process_may_take(monkeypatch):
    """In 24 of 140 GB, 5 % of the device would be half of what a 7B model leaves."""
    device = types.SimpleNamespace(total_memory=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: device)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert CudaRecorder().memory(device) == 25

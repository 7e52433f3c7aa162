"""Cache buffers outlive their cache for the CUDA graph that was recorded over them: who gets them, when, how many."""

import copy
import gc
import threading

import pytest
import torch

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.cuda_graph import DecodeStep
from akvq_fx.kept_buffers import POOL, with_room
from akvq_fx.kernels.layout import Layout
from akvq_fx.program import Split
from akvq_fx.report import Capture
from akvq_fx.storage import Storage
from akvq_fx.transformers_names import cache_of
from tests.test_cuda_graph import PLAIN, SMALL, Rerun, captures, recorder, run  # noqa: F401 - a fixture
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_layer")
LAYOUT = Layout(16, torch.float32, body_bits=2, window=4, pivots=2)
STEP = 16  # capacity_step of SMALL
# two caches of one layer each, and the number that each step adds
CACHES, FIRST = 2, 1


def cache(fill: float = 0.0, capacity: int = 8, rows: int = 2) -> list[Storage]:
    """Storages, their buffers filled with one number."""
    made = [Storage(LAYOUT, LAYOUT.allocate(rows, 2, capacity), capacity, 0, None) for _ in range(CACHES)]
    for storage in made:
        for b in storage.buffers:
            b.fill_(fill)
    return made


def add(number, *buffers):
    """A body: adds to every buffer in place; gives the sum of the last."""
    for b in buffers:
        b += number.to(b.dtype)
    return (buffers[-1].sum()[None],)


def step_of(share: float = 0.5, record=None) -> tuple[DecodeStep, Capture]:
    """A step over the caches: its inputs are a number and then the buffers."""
    count = CACHES * len(LAYOUT.fields)
    held = list(range(FIRST, FIRST + count))
    split = Split(None, None, [], held, [], [0], [], [], 1, [(FIRST + 1, 2), (FIRST + 1, 0)], [("body", 0)])
    counts = Capture()
    body = lambda *given: add(given[-1], *given[:-1])
    step = DecodeStep(split, None, body, counts, record or Rerun(), share=share)
    step.keep_from(FIRST, count)
    return step, counts


def call(step: DecodeStep, storages: list[Storage], number: float = 1.0) -> None:
    step(torch.tensor([number]), *(b for s in storages for b in s.buffers), storages=storages)


def all_are(storages: list[Storage], number: float) -> bool:
    return all((b == number).all() for s in storages for b in s.buffers)


def addresses(storages: list[Storage]) -> list[int]:
    return [b.data_ptr() for s in storages for b in s.buffers]


def poison() -> int:
    """Overwrite every kept buffer that is free by bytes that are NaN, or numbers that no cache holds."""
    free = [s for s in POOL.sets if s.is_free()]
    for kept in free:
        for x in kept.tensors:
            x.view(torch.uint8).fill_(0xFF) if x.numel() else None
    return len(free)


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    akvq_fx.free_kept_buffers()
    yield


def test_a_later_cache_moves_in_and_nothing_is_captured():
    step, counts = step_of()
    first = cache()
    for _ in range(3):
        call(step, first)
    lay = addresses(first)
    del first
    for _ in range(4):
        assert poison() == 1
        later = cache(5)
        for i in range(3):
            call(step, later)
            assert all_are(later, 6 + i) and addresses(later) == lay
        del later
    assert counts == Capture(captured=1, replayed=2 + 12, ran=1, reused=4)
    assert counts.kept == POOL.nbytes() > 0 and f"{counts.kept:,} bytes kept" in str(counts)


def test_sizes_in_turn_reach_a_steady_state():
    step, counts = step_of()
    for turn in range(3):
        for rows in (2, 3):
            for capacity in (8, 16, 24):
                storages = cache(turn, capacity, rows)
                for i in range(3):
                    call(step, storages)
                    assert all_are(storages, turn + i + 1)
    assert counts == Capture(captured=6, replayed=6 * 8, ran=6, reused=12)


def test_caches_that_are_alive_never_share_memory():
    step, counts = step_of()
    alive = []
    for turn in range(4):
        alive.append(cache(10 * turn))
        for storages in alive:
            call(step, storages), call(step, storages)
    for turn, storages in enumerate(alive):
        assert all_are(storages, 10 * turn + 2 * (4 - turn))
    every = [a for storages in alive for a in addresses(storages)]
    assert len(set(every)) == len(every) and counts.captured == 4 and counts.reused == 0


@pytest.mark.parametrize("holder", ["a buffer", "a view", "rows", "a tensor of the cache"])
def test_what_somebody_holds_is_not_given_to_another(holder):
    step, counts = step_of()
    storages = cache()
    call(step, storages), call(step, storages)
    held = {
        "a buffer": lambda s: s.buffers[1],
        "a view": lambda s: s.buffers[2][:, 1:],
        "rows": lambda s: s["codes"][:1].expand(4, -1, -1, -1),
        "a tensor of the cache": lambda s: PackedKV.view_of(s, 4),
    }[holder](storages[0])
    before = (held.storage["codes"] if isinstance(held, PackedKV) else held).clone()
    del storages
    other = cache(7)
    for _ in range(3):
        call(step, other)
    assert counts.captured == 2 and all_are(other, 10)
    assert torch.equal(before, held.storage["codes"] if isinstance(held, PackedKV) else held)


def test_views_follow_their_storage():
    step, _ = step_of()
    storages = cache()
    call(step, storages), call(step, storages)
    del storages
    later = cache(3)
    views = [PackedKV.view_of(s, n) for s in later for n in (4, 8)]
    call(step, later)
    assert all(view.codes is view.storage["codes"] for view in views)


def test_two_caches_with_common_memory_are_not_kept():
    step, counts = step_of()
    storages = cache()
    storages[1]["range"] = storages[0]["range"]
    call(step, storages), call(step, storages)
    assert counts.captured == 1 and counts.kept == 0 and POOL.nbytes() == 0


def test_a_cache_grows_into_kept_buffers():
    step, counts = step_of()
    for _ in range(2):
        storages = cache(1, 16)
        call(step, storages), call(step, storages)
    del storages
    small = cache(3, 8)
    call(step, small), call(step, small)
    poison()
    assert step.grow(small, [16, 16]) and small[0].capacity == 16
    for storage in small:
        fresh = dict(zip(LAYOUT.fields, LAYOUT.allocate(2, 2, 16), strict=True))
        for name in ("codes", "range", "classes"):
            axis = 1 if name == "classes" else 2
            assert (storage[name].narrow(axis, 0, 8) == 5).all()
            assert torch.equal(storage[name].narrow(axis, 8, 8), fresh[name].narrow(axis, 8, 8))
    before = counts.captured
    call(step, small)
    assert counts.captured == before and not step.grow(small, [32, 32])


def test_streams_do_not_share():
    record = Rerun()
    step, counts = step_of(record=record)
    storages = cache()
    call(step, storages), call(step, storages)
    lay = addresses(storages)
    del storages
    record.stream = 7
    for _ in range(2):
        other = cache()
        call(step, other), call(step, other)
        assert not set(addresses(other)) & set(lay)
        del other
    assert counts.captured == 2 and counts.reused == 1


def test_a_cache_that_changes_its_stream_is_kept_for_one():
    record = Rerun()
    step, counts = step_of(record=record)
    storages = cache()
    call(step, storages), call(step, storages)
    kept, record.stream = counts.kept, 7
    call(step, storages), call(step, storages)
    assert counts.captured == 2 and counts.kept == kept and all_are(storages, 4)


def test_two_graphs_of_one_cache_keep_it_once():
    (one, counts), (two, others) = step_of(), step_of()
    for turn in range(3):
        storages = cache(turn)
        for i in range(3):
            call(one, storages), call(two, storages)
            assert all_are(storages, turn + 2 * i + 2)
        del storages
    assert counts.captured == others.captured == 1
    assert POOL.nbytes() < counts.kept + others.kept, "their inputs are their own"


def bytes_of(storages: list[Storage]) -> int:
    return sum(s.nbytes for s in storages)


def test_no_more_is_kept_than_the_share():
    most = 3.5 * bytes_of(cache(0, 64))
    step, counts = step_of(most / 2**30)
    for _ in range(2):
        for capacity in (64, 63, 62, 61, 60):
            storages = cache(0, capacity)
            call(step, storages), call(step, storages)
            assert 0 < POOL.nbytes() <= most and counts.kept <= most
            del storages
    assert counts.dropped >= 6 and len([r for r in step.known if r.replay]) == 3


def test_a_cache_beyond_the_share_is_replayed_and_not_kept():
    for share in (0.0, 1e-9):
        step, counts = step_of(share)
        for _ in range(2):
            storages = cache()
            for _ in range(3):
                call(step, storages)
            del storages
        gc.collect()
        assert counts == Capture(captured=2, replayed=4, ran=2, dropped=counts.dropped) and counts.kept == 0


def test_caches_in_use_are_not_pushed_out():
    storages = [cache(), cache()]
    step, counts = step_of(1.5 * bytes_of(storages[0]) / 2**30)
    for _ in range(4):
        for one in storages:
            call(step, one)
    assert counts == Capture(captured=2, replayed=7, ran=1)


def test_all_is_given_back_when_asked():
    step, counts = step_of()
    storages, gone = cache(), cache(0, 16)
    for one in (storages, gone):
        call(step, one), call(step, one)
    due = bytes_of(gone)
    del gone, one
    assert akvq_fx.free_kept_buffers() >= due and akvq_fx.free_kept_buffers() == 0
    assert counts.dropped == 1 and counts.kept == POOL.nbytes() < due
    call(step, storages)
    assert all_are(storages, 3) and counts.captured == 2, "a cache that is alive keeps its graph"


def test_all_is_given_back_with_the_step():
    step, _ = step_of()
    storages = cache()
    call(step, storages), call(step, storages)
    del storages
    gc.disable()
    try:
        del step
        assert not POOL.nbytes() and not POOL.buffers, "held by a cycle"
    finally:
        gc.enable()


def test_all_is_given_back_when_memory_is_short():
    step, counts = step_of()
    storages = cache()
    call(step, storages), call(step, storages)
    del storages
    calls = []

    def allocate():
        calls.append(POOL.nbytes())
        if calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert with_room(allocate) == "done" and len(calls) == 2 and counts.dropped == 1

    def fail():
        calls.append(0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        with_room(fail)
    assert len(calls) == 3, "there was nothing to give back"


def test_a_capture_without_memory_is_tried_again():
    record = Rerun()
    step, counts = step_of(record=record)
    storages = cache()
    call(step, storages), call(step, storages)
    del storages
    record_now, record.error = type(record).__call__, torch.OutOfMemoryError("CUDA out of memory")
    tried = []

    class Short(Rerun):
        def __call__(self, *given):
            tried.append(POOL.nbytes())
            if len(tried) == 1:
                raise record.error
            return record_now(self, *given)

    step.record = Short()
    other = cache(0, 16)
    call(step, other), call(step, other)
    assert len(tried) == 2 and tried[1] < tried[0] and counts.captured == 2 and not counts.reason


def test_sizes_that_ran_before_are_captured_at_once():
    """Where buffers change from step to step, as in beam search."""
    step, counts = step_of()
    storages = cache(0)
    for i in range(5):
        call(step, storages)
        storages = [s.clone() for s in storages]
        assert all_are(storages, i + 1)
    assert counts == Capture(captured=1, replayed=4, ran=1, reused=3)


def test_a_thread_is_warmed_up_by_itself():
    """Libraries prepare each thread in its first call, which cannot be done in a capture."""
    step, counts = step_of()
    call(step, cache())
    thread = threading.Thread(target=lambda: call(step, cache()))
    thread.start(), thread.join()
    assert counts == Capture(ran=2)
    call(step, cache())
    assert counts == Capture(ran=2, captured=1, replayed=1)


def test_inference_tensors_stay_what_they_are():
    step, counts = step_of()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            storages = cache()
            call(step, storages), call(step, storages)
            assert all(b.is_inference() == (mode is torch.inference_mode) for s in storages for b in s.buffers)
            assert all_are(storages, 2)
        del storages
    assert counts == Capture(captured=2, replayed=6, ran=2, reused=2)


def test_threads_have_memory_of_their_own():
    step, counts = step_of()
    wrong: list[int] = []

    def work(number: int):
        for turn in range(30):
            storages = cache(number)
            for i in range(3):
                call(step, storages)
                if not all_are(storages, number + i + 1):
                    wrong.append(turn)

    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and counts.captured <= 4 and counts.replayed + counts.ran == 4 * 30 * 3


def contents(cache) -> list[torch.Tensor]:
    """Copies of all that a packed cache holds."""
    return [b.clone() for layer in cache.layers for x in (layer.keys, layer.values) for b in x.storage.buffers]


def continued(model, cache, ids) -> torch.Tensor:
    """Logits of one step more on a copy of the cache."""
    with torch.no_grad():
        return model(ids[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True).logits


def test_later_generations_capture_nothing(recorder, tmp_path):  # noqa: F811
    """Of the same sizes, of sizes in turn, beside a cache that the user keeps, and after what he does to it."""
    (plain, inputs), (model, _) = ZOO["llama"](), ZOO["llama"]()
    plain.compile(backend="akvq", options=PLAIN)
    shorter = {name: x[:, -9:] for name, x in inputs.items()}
    expected = {name: run(plain, given).sequences for name, given in (("long", inputs), ("short", shorter))}
    torch._dynamo.reset()  # the plain model's graphs would serve this one too
    model.compile(backend="akvq", options=SMALL)
    captured = lambda: sum(c.captured for c in captures(model))
    for _ in range(4):
        assert torch.equal(run(model, inputs).sequences, expected["long"])
        poison()
    assert captured() == 2, "23 and 24 tokens: capacities 32 and 48"
    for _ in range(3):
        for name, given in (("long", inputs), ("short", shorter)):
            assert torch.equal(run(model, given).sequences, expected[name])
            poison()
    # 9 and 24 tokens: capacities 16 and 32, of a prompt without padding, which has a graph of its own
    assert captured() == 4
    steady = captured()

    out = run(model, inputs)
    cache, ids = cache_of(out), out.sequences
    held, logits = contents(cache), continued(model, cache, ids)
    layers = {f"{i}.{n}": getattr(layer, n) for i, layer in enumerate(cache.layers) for n in ("keys", "values")}
    PackedKV.save(layers, tmp_path / "cache")
    before = captured()
    for _ in range(3):
        assert torch.equal(run(model, inputs).sequences, expected["long"])
        poison()
    assert captured() <= before + 1, "one set more, since that of 48 tokens is taken"
    assert all(torch.equal(a, b) for a, b in zip(held, contents(cache), strict=True))
    assert torch.equal(continued(model, cache, ids), logits)
    loaded = PackedKV.load(tmp_path / "cache")
    for i, layer in enumerate(cache.layers):
        layer.keys, layer.values = loaded[f"{i}.keys"], loaded[f"{i}.values"]
    assert torch.equal(continued(model, cache, ids), logits)

    del out, cache, layers, layer, loaded
    before = captured()
    assert before >= steady and torch.equal(run(model, inputs).sequences, expected["long"]) and captured() == before
    assert f"{captures(model)[0].kept:,} bytes kept" in str(akvq_fx.report(model)) and POOL.nbytes() > 0
    torch._dynamo.reset()
    gc.collect()
    assert POOL.nbytes() == 0, "compiled code that is gone keeps nothing"


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_beams_move_into_kept_buffers(recorder, cache):  # noqa: F811
    """Each step's cache is another one, gathered from the last: all move into the buffers of the first."""
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    model, inputs = ZOO["llama"]()
    expected = run(model, inputs, num_beams=3, max_new_tokens=8, **extra).sequences
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16})
    for _ in range(3):
        assert torch.equal(run(model, inputs, num_beams=3, max_new_tokens=8, **extra).sequences, expected)
        poison()
    counts = captures(model)
    assert sum(c.captured for c in counts) == 1 and sum(c.replayed for c in counts) >= 14


def test_static_caches_move_into_kept_buffers(recorder):  # noqa: F811
    """Each generation's cache also counts its tokens in a small tensor of its own, which the step writes."""
    (plain, inputs), (model, _) = ZOO["llama"](), ZOO["llama"]()
    static = {"cache_implementation": "static", "max_new_tokens": 8}
    plain.compile(backend="akvq", options=PLAIN)
    expected = run(plain, inputs, **static)
    torch._dynamo.reset()
    model.compile(backend="akvq", options=SMALL)
    for _ in range(3):
        out = run(model, inputs, **static)
        assert torch.equal(out.sequences, expected.sequences)
        assert cache_of(out).get_seq_length() == cache_of(expected).get_seq_length()
        del out
        poison()
    (counts,) = captures(model)
    assert (counts.captured, counts.ran, counts.replayed, counts.dropped) == (1, 1, 20, 0)


def test_the_models_end_gives_all_back(recorder):  # noqa: F811
    model, inputs = ZOO["llama"]()
    model.compile(backend="akvq", options=SMALL)
    run(model, inputs, max_new_tokens=5)
    assert POOL.nbytes() > 0
    del model
    gc.collect()
    assert POOL.nbytes() == 0


def test_small_states_are_copied_in_and_back():
    """A counter of each cache, which the body writes: a replay serves another one."""
    split = Split(None, None, [], [0, 1], [], [2], [], [], 1, [(0, 0)], [("body", 0), ("input", 1)], states=[1])

    def body(held, state, x):
        state += 1
        held += x * state
        return (state * 10,)

    counts, held = Capture(), torch.zeros(2)
    step = DecodeStep(split, None, body, counts, Rerun())
    for start in (0, 5, 7):
        state = torch.tensor(start)
        for i in range(3):
            ten, same = step(held, state, torch.ones(1))
            assert same is state and int(state) == start + i + 1 and int(ten) == 10 * int(state)
    assert torch.equal(held, torch.full((2,), 1.0 + 2 + 3 + 6 + 7 + 8 + 8 + 9 + 10))
    assert counts == Capture(captured=1, replayed=8, ran=1)

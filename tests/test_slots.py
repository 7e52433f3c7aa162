"""Requests come and go in the rows of one cache: each gets the tokens that it gets alone, whoever stands beside it."""

import random
import threading

import pytest
import torch
import torch.nn.functional as F

import akvq_fx
from akvq_fx import slot_rows
from tests import zoo

pytestmark = pytest.mark.usefixtures("one_layer", "short_cuts")
SMALL = {"inner": "eager", "window": 8, "pivots": 3, "capacity_step": 16}


@pytest.fixture
def short_cuts(monkeypatch):
    """What is padding in all rows is dropped already where it is little."""
    monkeypatch.setattr(slot_rows, "LEAST_CUT", 4)


def of_text(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def requests_of(inputs, count, seed):
    """[(inputs, options of generate, seed)] of one row's inputs: longer or shorter text, with its images or without,
    greedy or sampled, until a token or a length."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(10, 90, (1, n), generator=numbers)
    found = []
    for i in range(count):
        if draw.random() < 0.3:
            given = of_text(text(draw.randint(3, 30)))
        else:
            more = draw.randint(0, 12)
            given = inputs | of_text(torch.cat([inputs["input_ids"], text(more)], 1))
            given |= {name: F.pad(x, (0, more)) for name, x in inputs.items() if name.endswith("token_type_ids")}
        how = {"max_new_tokens": draw.randint(1, 20), "eos_token_id": draw.choice([-1, 18])}
        if draw.random() < 0.4:
            how |= {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2}
        found.append((given, how, i))
    return found


def alone(model, request):
    given, how, seed = request
    torch.manual_seed(seed)
    return model.generate(**given, **how)[0, given["input_ids"].shape[1] :].tolist()


def together(slots, requests, seed):
    """Tokens of each request, which come when chance and the slots let them."""
    draw, waiting, handles, news = random.Random(seed), list(requests), [], {}
    while waiting or len(slots):
        while waiting and len(slots) < slots.rows and draw.random() < 0.4:
            given, how, own = waiting.pop(0)
            handles.append(slots.insert(given, seed=own, **how))
        for handle, tokens in slots.step().items():
            news.setdefault(handle, []).extend(tokens)
    assert news == {handle: handle.tokens for handle in handles}
    assert {(handle.state, handle.error) for handle in handles} == {("ended", None)}
    return [handle.tokens for handle in handles]


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl", "gemma3", "gemma4", "falcon_mqa"])
def test_each_gets_what_it_gets_alone(name, chunk):
    """Any model that generates, not compiled: images' positions and masks, sliding windows, shared layers."""
    model, inputs = zoo.ZOO[name](batch=1)
    requests = requests_of(inputs, 16, seed=0)
    due = [alone(model, request) for request in requests]
    assert together(akvq_fx.Slots(model, 3, chunk), requests, seed=0) == due


# blocks of a padded row's keys begin elsewhere than alone, and with their means tokens become others
SIZES = {"lossless": {"body_bits": 16}, "2 bits": {"center_blocks": False}}


@pytest.mark.parametrize("bits", SIZES.values(), ids=SIZES)
def test_rows_of_codes(bits, monkeypatch):
    """Lossless, tokens are the uncompiled model's; else those of each request's own packed cache. Prompts with images
    and without stand in caches of their own, where they are packed in different ways."""
    model, inputs = zoo.ZOO["llava"](batch=1)
    requests = requests_of(inputs, 6, seed=1)
    compiled = lambda: model.compile(backend="akvq", options={**SMALL, **bits})
    if "body_bits" not in bits:
        compiled()
    due = [alone(model, request) for request in requests]
    if "body_bits" in bits:
        compiled()
    put, kinds = slot_rows.Rows.put, set()

    def watched(rows, *args):
        kinds.add(tuple(x.layout_of.as_written for layer in rows.cache.layers for x in (layer.keys, layer.values)))
        return put(rows, *args)

    monkeypatch.setattr(slot_rows.Rows, "put", watched)
    assert together(akvq_fx.Slots(model, 3), requests, seed=1) == due
    assert len(kinds) == (1 if "body_bits" in bits else 2)


def test_as_users_call_it():
    """All defaults, Inductor too, by torch.compile, in the fewest rows that are many. All tokens are recent ones, which
    keep 16 bits."""
    model, _ = zoo.ZOO["llama"](batch=1)
    requests = [(of_text(torch.arange(20, 20 + n)[None]), {"max_new_tokens": 6}, 0) for n in (9, 21, 5)]
    due = [alone(model, request) for request in requests]
    compiled = torch.compile(model, backend="akvq")
    assert together(akvq_fx.Slots(compiled, 2), requests, seed=0) == due
    assert akvq_fx.report(compiled).packed


class Refuses:
    """A logits processor that fails after some tokens."""

    def __init__(self, after):
        self.left = after

    def __call__(self, ids, scores):
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("this one is broken")
        return scores


@pytest.fixture
def others():
    """(model, slots, their handles, tokens that these are due): two requests under way in three rows."""
    model, inputs = zoo.ZOO["llava"](batch=1)
    requests = [(inputs, {"max_new_tokens": 12}, 0), (of_text(torch.arange(30, 40)[None]), {"max_new_tokens": 9}, 1)]
    due = [alone(model, request) for request in requests]
    slots = akvq_fx.Slots(model, 3)
    handles = [slots.insert(given, **how) for given, how, _ in requests]
    slots.step()
    return model, slots, handles, due


def finish(slots, handles, due):
    while len(slots):
        slots.step()
    assert [handle.tokens for handle in handles] == due
    assert not slots._pools and not slots._places and not slots._prompts


def test_a_prompt_that_fails_harms_nobody(others):
    model, slots, handles, due = others
    ids = torch.full((1, 4), zoo.IMG)
    with pytest.raises(Exception, match="[Ii]mage"):
        slots.insert({**of_text(ids), "pixel_values": zoo.px(1)}, max_new_tokens=3)
    with pytest.raises(IndexError):
        slots.insert(of_text(torch.full((1, 4), 5000)), max_new_tokens=3)
    with pytest.raises(ZeroDivisionError):
        slots.insert(of_text(ids - 60), logits_processor=[Refuses(0)], max_new_tokens=3)
    assert len(slots) == 2
    slots.chunk = 2
    late = slots.insert(of_text(torch.tensor([[5, 6, 7, 5000]])), max_new_tokens=3)
    found = [slots.step() for _ in range(2)]
    assert late in found[1] and found[1][late] == []
    assert (late.state, late.tokens, type(late.error)) == ("failed", [], IndexError)
    finish(slots, handles, due)


def test_a_request_that_fails_in_a_step_harms_nobody(others):
    model, slots, handles, due = others
    broken = slots.insert(of_text(torch.arange(40, 60)[None]), logits_processor=[Refuses(3)], max_new_tokens=9)
    for _ in range(4):
        slots.step()
    assert (broken.state, len(broken.tokens), type(broken.error)) == ("failed", 3, ZeroDivisionError)
    assert len(slots) == 2
    finish(slots, handles, due)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_fails_has_changed_nothing(compiled):
    model, _ = zoo.ZOO["llama"](batch=1)
    requests = [(of_text(torch.arange(20, 20 + n)[None]), {"max_new_tokens": 9}, 0) for n in (9, 21)]
    due = [alone(model, request) for request in requests]
    if compiled:
        model.compile(backend="akvq", options={**SMALL, "window": 64})
    broken = []

    def forward(**kwargs):
        output = model(**kwargs)
        if len(broken) == 1:
            broken.append("now")
            raise torch.OutOfMemoryError("no memory")
        return output

    slots = akvq_fx.Slots(model, 3)
    handles = [slots.insert(given, **how) for given, how, _ in requests]
    slots.step()
    slots.model = forward
    broken.append("next")
    with pytest.raises(torch.OutOfMemoryError):
        slots.step()
    finish(slots, handles, due)


def test_removing(others):
    model, slots, handles, due = others
    slots.remove(handles[0])
    assert handles[0].state == "removed" and handles[0].done and len(slots) == 1
    with pytest.raises(ValueError, match="was removed before"):
        slots.remove(handles[0])
    with pytest.raises(ValueError, match="is not of these slots"):
        akvq_fx.Slots(model, 2).remove(handles[1])
    new = slots.insert(of_text(torch.arange(30, 40)[None]), max_new_tokens=9)
    finish(slots, [handles[1], new], [due[1], due[1]])
    slots.remove(new)
    with pytest.raises(ValueError, match="was removed before"):
        slots.remove(new)


def test_what_a_row_cannot_be_is_refused(others):
    model, slots, handles, due = others
    text = of_text(torch.arange(30, 40)[None])
    two = {name: x.repeat(2, 1) for name, x in text.items()}
    for given, how, error, match in (
        (two, {}, ValueError, "inputs have 2 rows, and a request of Slots is one"),
        (text, {"num_beams": 2}, ValueError, "a row of Slots is one sequence, but these options are of beam_search"),
        (text, {"num_return_sequences": 2, "do_sample": True}, ValueError, "num_return_sequences=2; accepted"),
        (text, {"use_cache": False}, NotImplementedError, "rows cannot be replaced in this model's cache, NoneType"),
        (text, {"cache_implementation": "static"}, NotImplementedError, "StaticCache"),
        (text, {"streamer": object()}, ValueError, "leave streamer out: step"),
        (text, {"stop_strings": "a", "tokenizer": object()}, ValueError, "leave tokenizer out: .*StopStringCriteria"),
        (text, {"no_such_option": 1}, ValueError, "no_such_option"),
    ):
        with pytest.raises(error, match=match):
            slots.insert(given, **how)
    third = slots.insert(text, max_new_tokens=9)
    with pytest.raises(RuntimeError, match="all 3 rows are taken"):
        slots.insert(text, max_new_tokens=9)
    finish(slots, [*handles, third], [*due, due[1]])
    with pytest.raises(TypeError, match="Linear has no generate"):
        akvq_fx.Slots(torch.nn.Linear(2, 2), rows=2)
    for wrong in ({"rows": 0}, {"rows": 2.0}, {"rows": 2, "chunk": 0}):
        with pytest.raises(ValueError, match="accepted: a whole number"):
            akvq_fx.Slots(model, **wrong)


@pytest.mark.parametrize("name, shown", [("lfm2_vl", "LinearAttention"), ("florence2", "encoder"), ("mllama", "cross")])
def test_models_whose_rows_cannot_be_joined_are_refused(name, shown):
    model, inputs = zoo.ZOO[name](batch=1)
    slots = akvq_fx.Slots(model, rows=2)
    with pytest.raises(NotImplementedError, match=shown):
        slots.insert(inputs, max_new_tokens=3)
    assert len(slots) == 0


def test_neighbours_do_not_change_what_is_sampled():
    model, _ = zoo.ZOO["llama"](batch=1)
    text, how = of_text(torch.arange(30, 40)[None]), {"max_new_tokens": 9, "do_sample": True}
    found = set()
    for neighbours in range(3):
        slots = akvq_fx.Slots(model, 4)
        for _ in range(neighbours):
            slots.insert(text, **how)
        handle = slots.insert(text, seed=5, **how)
        while not handle.done:
            slots.step()
        found.add(tuple(handle.tokens))
    assert len(found) == 1


def test_threads_may_insert_while_another_one_steps():
    model, inputs = zoo.ZOO["llava"](batch=1)
    requests = requests_of(inputs, 12, seed=2)
    due = [alone(model, request) for request in requests]
    slots, handles, left = akvq_fx.Slots(model, 3), {}, threading.Semaphore(3)

    def insert(numbers):
        for i in numbers:
            given, how, seed = requests[i]
            left.acquire()
            handles[i] = slots.insert(given, seed=seed, **how)

    threads = [threading.Thread(target=insert, args=(range(first, 12, 2),)) for first in range(2)]
    for thread in threads:
        thread.start()
    ended = 0
    while ended < 12:
        for handle in slots.step():
            if handle.done:
                ended += 1
                left.release()
    for thread in threads:
        thread.join()
    assert [handles[i].tokens for i in range(12)] == due

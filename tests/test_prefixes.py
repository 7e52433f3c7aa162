"""Prefixes are encoded once: from the disk they continue to the bit as from memory, and no half-written, damaged or
foreign file is ever used."""

import dataclasses
import os
import resource
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import akvq_fx
from akvq_fx.prefixes import Prefix
from tests import zoo
from tests.kernel_cases import LAYOUTS, case_of
from tests.test_cache_file import assert_same_cache, packed_of

pytestmark = pytest.mark.usefixtures("one_layer")
SMALL = {"inner": "eager", "window": 8, "pivots": 3, "capacity_step": 16}
QUESTIONS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25], [31, 32, 33, 34, 35]])


def whole(inputs, ids):
    """The prompts that begin with the inputs of one row, all of their tokens."""
    given = {name: x.repeat(len(ids), *[1] * (x.dim() - 1)) for name, x in inputs.items()}
    given["input_ids"] = torch.cat([given["input_ids"], ids], 1)
    more = {name: ids.shape[1] for name in inputs if name.endswith("token_type_ids")}
    given |= {name: F.pad(given[name], (0, count)) for name, count in more.items()}
    return given | {"attention_mask": torch.ones_like(given["input_ids"])}


def generated(model, given):
    return model.generate(**given, max_new_tokens=8)


def test_lossless_is_the_whole_prompt_encoded_anew(tmp_path):
    """One row and several, then questions of unequal length."""
    model, inputs = zoo.ZOO["llava"](batch=1)
    one, shorter, three = (generated(model, whole(inputs, x)) for x in (QUESTIONS[:1], QUESTIONS[1:2, 3:], QUESTIONS))
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16})
    prefixes = akvq_fx.Prefixes(tmp_path)
    assert not prefixes.get(model, inputs).from_disk
    prefix = prefixes.get(model, inputs)
    assert prefix.from_disk
    assert torch.equal(generated(model, prefix.then(QUESTIONS[:1])), one)
    assert torch.equal(generated(model, prefix.then(QUESTIONS)), three)
    mask = torch.ones_like(QUESTIONS)
    mask[1, :3] = 0
    padded = generated(model, prefix.then(QUESTIONS, mask))
    assert torch.equal(padded[[0, 2]], three[[0, 2]]) and torch.equal(padded[1, -8:], shorter[0, -8:])
    assert akvq_fx.report(model).packed


def test_a_request_of_slots_may_begin_with_a_prefix(tmp_path):
    """In pieces, beside one that has no prefix; each gets what it gets alone."""
    model, inputs = zoo.ZOO["llava"](batch=1)
    due = [generated(model, whole(inputs, x[None]))[0, -8:].tolist() for x in QUESTIONS]
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16})
    prefixes = akvq_fx.Prefixes(tmp_path)
    prefixes.get(model, inputs)
    slots, prefix = akvq_fx.Slots(model, 3, chunk=3), prefixes.get(model, inputs)
    handles = [slots.insert(prefix.then(x[None]), max_new_tokens=8) for x in QUESTIONS[:2]]
    handles.append(slots.insert(whole(inputs, QUESTIONS[2:]), max_new_tokens=8))
    while len(slots):
        slots.step()
    assert [handle.tokens for handle in handles] == due
    with pytest.raises(
        ValueError, match="the inputs have 5 tokens, and their cache [0-9]+; accepted: all of the prompt"
    ):
        slots.insert({**prefix.then(QUESTIONS[:1]), "input_ids": QUESTIONS[:1]}, max_new_tokens=8)


def test_positions_are_the_prefix_s_own(tmp_path):
    """Of images' rows and columns; the model itself remembers those of the last prompt, which is another one here."""
    model, inputs = zoo.ZOO["qwen2_5_vl"](batch=1)
    due = generated(model, whole(inputs, QUESTIONS))
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16})
    prefixes = akvq_fx.Prefixes(tmp_path)
    prefixes.get(model, inputs)
    model.model.rope_deltas = torch.tensor([[-3]])
    assert torch.equal(generated(model, prefixes.get(model, inputs).then(QUESTIONS)), due)


def test_2_bits_are_those_of_the_process_that_made_them(tmp_path):
    """The prefix stays as it was, however often it is asked."""
    model, inputs = zoo.ZOO["llava"](batch=1)
    model.compile(backend="akvq", options=SMALL)
    prefixes = akvq_fx.Prefixes(tmp_path)
    made, loaded = prefixes.get(model, inputs), prefixes.get(model, inputs)
    assert (made.from_disk, loaded.from_disk) == (False, True) and made.nbytes == loaded.nbytes
    found = [[generated(model, x.then(QUESTIONS[:n])) for n in (1, 3)] for x in (made, loaded, loaded)]
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    for name, x in made.caches.items():
        assert_same_cache(x, loaded.caches[name])
        assert x.layout_of.body_bits == 2


def test_as_users_call_it(tmp_path):
    """All defaults, Inductor too, by torch.compile; all tokens are recent ones, which keep 16 bits."""
    model, inputs = zoo.ZOO["llama"](batch=1)
    due = generated(model, whole(inputs, QUESTIONS[:2]))
    compiled = torch.compile(model, backend="akvq")
    prefixes = akvq_fx.Prefixes(tmp_path)
    prefixes.get(compiled, inputs)
    assert torch.equal(generated(compiled, prefixes.get(compiled, inputs).then(QUESTIONS[:2])), due)


@pytest.fixture
def kept(tmp_path):
    """(folder, model, inputs of a number, the prefix of these inputs, made by hand) without running the model."""
    model, _ = zoo.ZOO["llama"](batch=1)
    model.compile(backend="akvq", options=SMALL)
    prefixes = akvq_fx.Prefixes(tmp_path / "kept")
    cache = packed_of(case_of(LAYOUTS["2bit"]))[:1]
    inputs_of = lambda n: {"input_ids": torch.arange(n, n + cache.shape[2])[None]}

    def prefix_of(n):
        caches = {"0 keys": cache, "0 values": cache}
        key = prefixes.key(model, inputs_of(n))
        return Prefix(key, inputs_of(n)["input_ids"], caches, torch.tensor([[7]]), "cache", DynamicCache, False)

    return prefixes, model, inputs_of, prefix_of


def names(prefixes):
    return sorted(path.name for path in prefixes.folder.iterdir() if path.name != "lock")


def test_a_prefix_comes_back_whole(kept):
    prefixes, model, inputs_of, prefix_of = kept
    assert prefixes.load(model, inputs_of(1)) is None and prefixes.nbytes == 0
    prefixes.save(prefix_of(1))
    found = prefixes.load(model, inputs_of(1))
    assert found.from_disk and torch.equal(found.ids, inputs_of(1)["input_ids"]) and int(found.position) == 7
    assert_same_cache(prefix_of(1).caches["0 keys"], found.caches["0 keys"])
    assert names(prefixes) == [f"{found.key}.prefix"]
    assert prefixes.nbytes == (prefixes.folder / names(prefixes)[0]).stat().st_size
    assert prefixes.load(model, inputs_of(2)) is None


def test_the_name_says_what_makes_the_tokens(kept):
    prefixes, model, inputs_of, _ = kept
    given = {**inputs_of(1), "pixel_values": torch.ones(1, 3, 4, 4), "size": 3}
    keys = [prefixes.key(model, given)]
    same = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    assert prefixes.key(model, same) == keys[0]
    brighter = {**given, "pixel_values": given["pixel_values"].clone()}
    brighter["pixel_values"][0, 2, 3, 3] += 1e-6
    keys += [prefixes.key(model, x) for x in (brighter, {**given, "size": 4}, inputs_of(2))]
    for options in ({"body_bits": 4}, {"window": 9}):
        model.compile(backend="akvq", options={**SMALL, **options})
        keys.append(prefixes.key(model, given))
    model.compile(backend="akvq", options={**SMALL, "inner": "aot_eager"})  # the same codes
    assert prefixes.key(model, given) == keys[0]
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    keys.append(prefixes.key(model, given))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    keys.append(prefixes.key(model, given))
    large = torch.zeros(3000)
    lists = [{**given, "sizes": [large, large.index_fill(0, torch.tensor([i]), 1)]} for i in (1500, 1501)]
    keys += [prefixes.key(model, x) for x in lists]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ValueError, match="an input of a prefix is a DynamicCache; accepted: tensors, numbers, texts"):
        prefixes.key(model, {**given, "past_key_values": DynamicCache()})
    with pytest.raises(ValueError, match="have no input_ids"):
        prefixes.key(model, {"inputs_embeds": torch.zeros(1, 3, 64)})


def test_positions_are_told_where_a_model_would_remember_others(kept):
    *_, prefix_of = kept
    count = prefix_of(1).ids.shape[1]
    with_position = lambda x: dataclasses.replace(prefix_of(1), position=x).then(QUESTIONS[:2]).get("position_ids")
    assert with_position(torch.tensor([[count]])) is None and with_position(None) is None
    for x in (torch.full((4, 1, 1), count), torch.tensor([[count + 3]])):
        assert torch.equal(with_position(x)[..., count:], (x + torch.arange(5)).expand(*x.shape[:-2], 2, -1))


def test_those_unused_longest_go(kept):
    prefixes, model, inputs_of, prefix_of = kept
    for n in (1, 2, 3):
        prefixes.save(prefix_of(n))
        time.sleep(0.02)
    prefixes.load(model, inputs_of(1))
    one = prefixes.nbytes // 3
    small = akvq_fx.Prefixes(prefixes.folder, max_bytes=3 * one + 10)
    small.save(prefix_of(4))
    assert small.nbytes == 3 * one
    assert [small.load(model, inputs_of(n)) is not None for n in (1, 2, 3, 4)] == [True, False, True, True]
    tiny = akvq_fx.Prefixes(prefixes.folder, max_bytes=100)
    with pytest.raises(ValueError, match="a prefix of .* bytes is not kept in .*accepted: up to max_bytes=100"):
        tiny.save(prefix_of(5))
    assert small.nbytes == 3 * one
    for wrong in (0, -1, "1 GB"):
        with pytest.raises(ValueError, match="accepted: a number above 0"):
            akvq_fx.Prefixes(prefixes.folder, max_bytes=wrong)


@pytest.fixture
def full_disk():
    """No file of this process may be larger than some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_harms_nothing(kept, request):
    prefixes, model, inputs_of, prefix_of = kept
    prefixes.save(prefix_of(1))
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="a prefix of .* bytes cannot be written to .* and is not kept; what is there"):
        prefixes.save(prefix_of(2))
    assert names(prefixes) == [prefixes.path(prefix_of(1).key).name]
    prefixes.make = lambda model, inputs: prefix_of(2)
    with pytest.warns(UserWarning, match="cannot be written to .* and is not kept"):
        assert prefixes.get(model, inputs_of(2)).caches  # it answers all the same
    assert prefixes.load(model, inputs_of(1)) is not None


DAMAGE = {
    "half": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "one bit of a code": lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
    "no prefix": lambda raw: raw.replace(b"akvq_prefix", b"else_prefix"),
    "other metadata": lambda raw: raw.replace(b'\\"digest\\"', b'\\"Digest\\"'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_encoded_anew(kept, damage):
    prefixes, model, inputs_of, prefix_of = kept
    prefixes.save(prefix_of(1))
    path = prefixes.path(prefix_of(1).key)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    with pytest.raises(ValueError, match="akvq (prefix|cache file) .*accepted: "):
        prefixes.load(model, inputs_of(1))
    prefixes.make = lambda model, inputs: prefix_of(1)
    with pytest.warns(UserWarning, match="accepted: .*; it is encoded anew"):
        assert not prefixes.get(model, inputs_of(1)).from_disk
    assert prefixes.load(model, inputs_of(1)) is not None


def test_a_prefix_of_another_model_is_refused(kept, tmp_path):
    prefixes, model, inputs_of, prefix_of = kept
    prefixes.save(prefix_of(1))
    prefixes.path(prefix_of(1).key).rename(prefixes.path(prefixes.key(model, inputs_of(2))))
    with pytest.raises(ValueError, match="its content is the prefix .* accepted: .* of this model and these inputs"):
        prefixes.load(model, inputs_of(2))
    one, inputs = zoo.ZOO["llama"](batch=1)
    other, _ = zoo.ZOO["llama"](batch=1)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    for x in (one, other):
        x.compile(backend="akvq", options=SMALL)
    prefix = prefixes.get(one, inputs)
    assert prefixes.load(other, inputs) is None
    with pytest.raises(Exception, match="was made by other weights"):
        generated(other, prefix.then(QUESTIONS[:1]))


def test_what_is_no_prefix_is_refused(tmp_path):
    model, inputs = zoo.ZOO["llama"](batch=2)
    prefixes = akvq_fx.Prefixes(tmp_path)
    with pytest.raises(ValueError, match="is not compiled by akvq"):
        prefixes.get(model, inputs)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="is not compiled by akvq"):
        prefixes.get(model, inputs)
    model.compile(backend="akvq", options=SMALL)
    with pytest.raises(ValueError, match="has padding"):
        prefixes.get(model, inputs)
    with pytest.raises(ValueError, match="2 rows"):
        prefixes.get(model, {"input_ids": inputs["input_ids"]})
    assert names(prefixes) == []
    linear, inputs = zoo.ZOO["lfm2_vl"](batch=1)
    linear.compile(backend="akvq", options=SMALL)
    with pytest.raises(NotImplementedError, match="LinearAttention"):
        prefixes.get(linear, inputs)


def test_ids_that_are_no_text_are_refused(kept):
    *_, prefix_of = kept
    for ids in (QUESTIONS[0], QUESTIONS[:, :0], QUESTIONS.float()):
        with pytest.raises(ValueError, match="accepted: int64 .rows, tokens., each >= 1"):
            prefix_of(1).then(ids)
    with pytest.raises(ValueError, match="the attention_mask is .3, 2., accepted: the ids' .3, 5."):
        prefix_of(1).then(QUESTIONS, QUESTIONS[:, :2])


def forked(work):
    """The number of a child process that does some work of files; threads of PyTorch's do not come along."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(0)
    return child


def test_several_processes_write_one_prefix(kept):
    """While others write and take away, a reader sees a whole file or none."""
    prefixes, model, inputs_of, prefix_of = kept
    mine = prefix_of(1)

    def work():
        for _ in range(30):
            prefixes.save(mine)
            prefixes.path(mine.key).unlink(missing_ok=True)

    children, seen = [forked(work) for _ in range(2)], 0
    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() or seen < 1:
        seen += prefixes.load(model, inputs_of(1)) is not None
        if not thread.is_alive():
            prefixes.save(mine)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    prefixes.save(mine)
    assert names(prefixes) == [f"{mine.key}.prefix"]


def test_what_a_killed_process_left_goes(kept, monkeypatch):
    prefixes, model, inputs_of, prefix_of = kept
    mine = prefix_of(1)
    half = prefixes.path(mine.key).with_suffix(".unfinished")

    def work():
        def save(caches, path, *_):
            path.write_bytes(b"half a prefix")
            time.sleep(60)

        monkeypatch.setattr("akvq_fx.cache_file.save", save)
        prefixes.save(mine)

    child = forked(work)
    deadline = time.time() + 20
    while not half.exists() and time.time() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert half.exists() and prefixes.load(model, inputs_of(1)) is None and prefixes.nbytes == 0
    prefixes.save(prefix_of(2))  # the lock is free, and the leftover goes
    assert names(prefixes) == [f"{prefix_of(2).key}.prefix"]

"""Cache files come back to the bit and continue as the original; what save did not write is refused with a reason."""

import contextlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from akvq_fx.digest import compute
from akvq_fx.kernels.layout import DTYPES, STATE_END, STATE_RING, STATE_TEXT, Layout
from akvq_fx.packed_kv import PackedKV, Storage
from tests.kernel_cases import LAYOUTS, assert_caches_same, assert_same, case_of, cases, f32, randn

few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
OWNER = "0123456789abcdef" * 2
owners = st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), min_size=1, max_size=4).map(" ".join)
names = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=9).filter(str.isprintable)
ALL = Layout(16, f32, body_bits=2, text_bits=4, window=3, pivots=2, rotated=True, affine=True)


def packed_of(case, static=False, owner=None) -> PackedKV:
    storage = Storage(case.layout, case.pack(), None if static else case.length, case.length, owner)
    if case.layout.text_bits:
        storage.compact_text(case.length)
    return PackedKV.view_of(storage, case.capacity if static else case.length)


def assert_same_cache(expected: PackedKV, got: PackedKV):
    a, b = expected.storage, got.storage
    assert (expected.layout_text, expected.shape, expected.static) == (got.layout_text, got.shape, got.static)
    assert (a.layout, a.end, a.prompt, a.owner) == (b.layout, b.end, b.prompt, b.owner)
    assert_caches_same(a.buffers, b.buffers, a.layout)
    assert_same("tokens", expected.dequantize(), got.dequantize())


@few
@given(case=cases(), static=st.booleans(), owner=st.none() | owners, name=names)
def test_round_trip(tmp_path_factory, case, static, owner, name):
    path = tmp_path_factory.getbasetemp() / "cache.safetensors"
    x = packed_of(case, static, owner)
    PackedKV.save({name: x}, path)
    loaded = PackedKV.load(path)
    assert list(loaded) == [name]
    assert_same_cache(x, loaded[name])


@every_layout
def test_continues_as_the_original(layout, tmp_path):
    x = packed_of(case_of(layout))
    PackedKV.save({"x": x, "cropped": x[:, :, :6]}, tmp_path / "f")
    loaded = PackedKV.load(tmp_path / "f")
    for a, b in ((x[:, :, :6], loaded["cropped"]), (x, loaded["x"])):
        for count in (1, 4, 1):
            new = randn(2, 2, count, layout.head_dim, seed=count, dtype=layout.dtype)
            a, b = a.append(new, step=8), b.append(new, step=8)
            assert_same_cache(a, b)
        assert_same_cache(a[:, :, :3].append(new), b[:, :, :3].append(new))


@every_layout
def test_static_continues_as_the_original(layout, tmp_path):
    x = packed_of(case_of(layout, capacity=20), static=True)
    PackedKV.save({"x": x}, tmp_path / "f")
    y = PackedKV.load(tmp_path / "f")["x"]
    for start, count in ((11, 3), (14, 1)):
        at = torch.arange(start, start + count)
        for one in (x, y):
            one.index_copy_(2, at, randn(2, 2, count, layout.head_dim, seed=start, dtype=layout.dtype))
        assert_same_cache(x, y)
    for one in (x, y):
        one.zero_().index_copy_(2, torch.arange(4), randn(2, 2, 4, layout.head_dim, seed=1, dtype=layout.dtype))
    assert_same_cache(x, y)


@every_layout
@pytest.mark.parametrize("step", ["grown", "zeroed", "rows", "cropped", "cropped-to-nothing", "appended-below-prompt"])
def test_every_state_that_ops_leave_can_be_saved(layout, step, tmp_path):
    x = packed_of(case_of(layout))
    new = randn(2, 2, 5, layout.head_dim, dtype=layout.dtype)
    x = {
        "grown": lambda: x.append(new),
        "zeroed": lambda: x.zero_(),
        "rows": lambda: x.append(new)[1:],
        "cropped": lambda: x.append(new)[:, :, :12],
        "cropped-to-nothing": lambda: x[:, :, :0],
        "appended-below-prompt": lambda: x[:, :, :2].append(new),
    }[step]()
    PackedKV.save({"x": x}, tmp_path / "f")
    assert_same_cache(x, PackedKV.load(tmp_path / "f")["x"])


def test_many_caches_keep_order_and_stand_apart(tmp_path):
    x = packed_of(case_of(LAYOUTS["2bit"]))
    caches = {f"layer {i} {kind}": x[:, :, : 11 - i] for i in range(3) for kind in "kv"}
    PackedKV.save(caches, str(tmp_path / "f"))
    loaded = PackedKV.load(str(tmp_path / "f"))
    assert sorted(loaded) == sorted(caches)
    addresses = [b.data_ptr() for y in loaded.values() for b in y.storage.buffers]
    assert len(set(addresses)) == len(addresses)


def test_no_caches(tmp_path):
    PackedKV.save({}, tmp_path / "f")
    assert PackedKV.load(tmp_path / "f") == {}


def test_loaded_cache_outlives_its_file(tmp_path):
    x = packed_of(case_of(LAYOUTS["2bit"]))
    PackedKV.save({"x": x}, tmp_path / "f")
    y = PackedKV.load(tmp_path / "f")["x"]
    with (tmp_path / "f").open("r+b") as file:
        file.write(b"\1" * (tmp_path / "f").stat().st_size)
    assert_same_cache(x, y)


def test_owner_of_another_process(tmp_path):
    code = "import torch; from akvq_fx.digest import compute; print(*compute([torch.arange(9.0)]))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip()
    PackedKV.save({"x": packed_of(case_of(LAYOUTS["2bit"]), owner=other)}, tmp_path / "f")
    assert [PackedKV.load(tmp_path / "f")["x"].storage.owner] == compute([torch.arange(9.0)])


@pytest.mark.parametrize("name", ["a/b", "/", "", "new\nline", "\x00", "\ud800", "\u202e", 3, None], ids=ascii)
def test_odd_names_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a cache's name is .* accepted: printable text without"):
        PackedKV.save({name: packed_of(case_of(LAYOUTS["2bit"]))}, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_plain_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cache 'x': its type is Tensor, accepted: PackedKV"):
        PackedKV.save({"x": torch.zeros(1, 1, 1, 8)}, tmp_path / "f")


def test_broken_cache_is_not_written(tmp_path):
    x = packed_of(case_of(LAYOUTS["2bit"]))
    x.storage["state"][STATE_END] = 99
    with pytest.raises(ValueError, match="'state': end is 99"):
        PackedKV.save({"x": x}, tmp_path / "f")
    assert not (tmp_path / "f").exists()


class Forged:
    """A good file of one cache "x", every field in it, to be written with something changed."""

    def __init__(self, tmp_path, layout=ALL):
        self.path = tmp_path / "forged"
        PackedKV.save({"x": packed_of(case_of(layout), owner=OWNER)}, self.path)
        self.tensors = load_file(self.path)
        with safe_open(self.path, "pt") as file:
            self.top = json.loads(file.metadata()["akvq"])
        self.entry = self.top["caches"]["x"]

    def write(self, metadata=None):
        save_file(self.tensors, self.path, {"akvq": json.dumps(self.top)} if metadata is None else metadata)

    def refused(self, *words):
        with pytest.raises(ValueError, match="akvq cache file .*accepted: ") as error:
            PackedKV.load(self.path)
        for word in (self.path.name, *words):
            assert word in str(error.value), str(error.value)


@pytest.fixture
def forged(tmp_path):
    return Forged(tmp_path)


def test_forged_file_is_good_until_changed(forged):
    forged.write()
    assert_same_cache(packed_of(case_of(ALL), owner=OWNER), PackedKV.load(forged.path)["x"])


METADATA = {
    "none": ({}, "its metadata is without a packed cache"),
    "other-key": ({"format": "pt"}, "its metadata is without a packed cache"),
    "no-json": ({"akvq": "{"}, "the JSON that PackedKV.save writes"),
    "deep-json": ({"akvq": "[" * 100_000}, "the JSON that PackedKV.save writes"),
    "huge-number": ({"akvq": '{"version": ' + "9" * 5000 + "}"}, "the JSON that PackedKV.save writes"),
    "twice": ({"akvq": '{"version": 2, "version": 5, "caches": {}}'}, "comes twice"),
    "list": ({"akvq": "[]"}, "the format version is None, accepted: 5"),
    "no-version": ({"akvq": '{"caches": {}}'}, "the format version is None, accepted: 5"),
    "version-4": ({"akvq": '{"version": 4, "caches": {}}'}, "the format version is 4, accepted: 5"),
    "version-true": ({"akvq": '{"version": true, "caches": {}}'}, "the format version is True, accepted: 5"),
    "version-text": ({"akvq": '{"version": "5", "caches": {}}'}, "the format version is 5, accepted: 5"),
    "no-caches": ({"akvq": '{"version": 5}'}, '"version" and "caches"'),
    "more": ({"akvq": '{"version": 5, "caches": {}, "code": ""}'}, '"version" and "caches"'),
    "caches-list": ({"akvq": '{"version": 5, "caches": []}'}, '"version" and "caches"'),
    "name-slash": ({"akvq": '{"version": 5, "caches": {"a/b": {}}}'}, "a cache's name is 'a/b'"),
    "name-empty": ({"akvq": '{"version": 5, "caches": {"": {}}}'}, "a cache's name is ''"),
    "name-twice": ({"akvq": '{"version": 5, "caches": {"x": {}, "x": {}}}'}, "comes twice"),
    "other-cache": ({"akvq": '{"version": 5, "caches": {"y": {}}}'}, "a tensor's name is 'x/"),
    "entry-empty": ({"akvq": '{"version": 5, "caches": {"x": {}}}'}, "cache 'x': its metadata is {}"),
    "entry-list": ({"akvq": '{"version": 5, "caches": {"x": [1]}}'}, "cache 'x': its metadata is [1]"),
}


@pytest.mark.parametrize("metadata, text", METADATA.values(), ids=METADATA)
def test_metadata_is_checked(forged, metadata, text):
    forged.write(metadata)
    forged.refused(text)


NUMBERS = [-1, 14, 2**31, 2**70, 1.0, "3", True, [], {}]
ENTRIES = [
    *(("length", number) for number in [*NUMBERS, None]),
    *(("prompt", number) for number in [*NUMBERS, None]),
    *(("end", number) for number in NUMBERS),
    *(("owner", owner) for owner in (7, 1.5, "7", "", "g" * 32, "0" * 31, f"{OWNER}  {OWNER}", True, [])),
    *(("layout", text) for text in (None, 3, [], "", "f32", "f32/d16", "f32/d16/b3/c1/g128", "f32/d0/b2/c1/g128")),
    *(("layout", text) for text in ("q4/d16/b2/c1/g128", "f32/d16/b2/c1/g128/evil", "f32/d16/b2/cinf/g128", "/" * 999)),
    ("layout", f"f32/d{'9' * 5000}/b2/c1/g128"),
    ("layout", "f32/d16/b8/c1/g128/t4/tc1"),
]


@pytest.mark.parametrize("key, given", ENTRIES, ids=lambda part: repr(part)[:30])
def test_numbers_are_checked(forged, key, given):
    forged.entry[key] = given
    forged.write()
    forged.refused("cache 'x'", f"its {key} is ")


@pytest.mark.parametrize("key", ["layout", "length", "end", "prompt", "owner"])
def test_entry_is_complete(forged, key):
    del forged.entry[key]
    forged.write()
    forged.refused("cache 'x': its metadata is")


@pytest.mark.parametrize("field", ALL.fields)
def test_missing_buffer(forged, field):
    del forged.tensors[f"x/{field}"]
    forged.write()
    forged.refused("cache 'x'", f"['{field}'] missing")


@pytest.mark.parametrize("key", ["x/more", "x/codes/more", "x/", "more", "y/codes", "/x/codes"])
def test_extra_buffer(forged, key):
    forged.tensors[key] = torch.zeros(1)
    forged.write()
    forged.refused(*(["unknown", "cache 'x'"] if key.startswith("x/") else [f"a tensor's name is '{key}'"]))


@pytest.mark.parametrize("field", ALL.fields)
def test_dtype_of_every_buffer(forged, field):
    key = f"x/{field}"
    forged.tensors[key] = forged.tensors[key].to(
        torch.int64 if not forged.tensors[key].is_floating_point() else torch.float64
    )
    forged.write()
    forged.refused("cache 'x'", f"buffer '{field}'", "64")


@pytest.mark.parametrize("change", ["one-more", "one-less", "none", "dropped", "added"])
@pytest.mark.parametrize("field", ALL.fields)
def test_shape_of_every_buffer(forged, field, change):
    """Batch, heads, capacity, groups: one buffer disagrees with the others on one axis."""
    key = f"x/{field}"
    good = forged.tensors[key]
    for axis in range(good.dim()):
        if change == "one-more":
            bad = torch.cat([good, good.narrow(axis, 0, 1)], axis)
        elif change == "one-less":
            bad = good.narrow(axis, 0, good.shape[axis] - 1)
        elif change == "none":
            bad = good.narrow(axis, 0, 0)
        elif change == "dropped":
            bad = good.select(axis, 0)
        else:
            bad = good.unsqueeze(axis)
        forged.tensors[key] = bad.contiguous()
        forged.write()
        forged.refused("cache 'x'", "buffer '")


@pytest.mark.parametrize("shape", [(0, 2, 13, 2), (2, 0, 13, 2), (2, 2, 0, 2), (0, 2**40, 13, 2), (0, 2, 2**60, 2)])
def test_sizes_that_no_bytes_stand_for(tmp_path, shape):
    forged = Forged(tmp_path, LAYOUTS["2bit-no-overlay"])
    B, H, C, _ = shape
    for field in ("classes", "codes", "range"):
        size, dtype = LAYOUTS["2bit-no-overlay"].buffer(field, B, H, C)
        forged.tensors[f"x/{field}"] = torch.empty(size, dtype=dtype)
    forged.entry["length"] = forged.entry["end"] = forged.entry["prompt"] = 0
    forged.write()
    forged.refused("cache 'x'", "buffer 'codes'", "each at least 1")


@pytest.mark.parametrize("part", ["d1000000000000", "w1000000000000", "p1000000000000", "t8", "bf16", "g8"])
def test_layout_of_other_buffers(forged, part):
    parts = forged.entry["layout"].split("/")
    letter = part.rstrip("0123456789")
    parts = [
        part if (i == 0 and part in DTYPES) or (i and p.rstrip("0123456789") == letter) else p
        for i, p in enumerate(parts)
    ]
    forged.entry["layout"] = "/".join(parts)
    assert part in parts
    forged.write()
    forged.refused("cache 'x'", "buffer '")


# case_of: 11 tokens of 13, window 3; text tokens 1, 2, 6, 7 -> 4 + 2 text slots, offset -7
CONTENTS = {
    "end-past-capacity": ("state", STATE_END, 14, "end is 14"),
    "end-negative": ("state", STATE_END, -1, "end is -1"),
    "ring-past-end": ("state", STATE_RING, 12, "first position of the ring is 12"),
    "ring-too-early": ("state", STATE_RING, 7, "first position of the ring is 7"),
    "ring-negative": ("state", STATE_RING, -1, "first position of the ring is -1"),
    "text-offset-up": ("state", STATE_TEXT, -6, "text slot minus position is -6"),
    "text-offset-down": ("state", STATE_TEXT, -8, "text slot minus position is -8"),
    "text-offset-huge": ("state", STATE_TEXT, -(2**31), "text slot minus position is -2147483648"),
    "classes-4": ("classes", (1, 12), 4, "'classes' is 4"),
    "classes-255": ("classes", (0, 0), 255, "'classes' is 255"),
    "pivot-past-capacity": ("pivot_at", (1, 1), 13, "'pivot_at' is 13"),
    "pivot-below-free": ("pivot_at", (0, 0), -2, "'pivot_at' is -2"),
    "text-past-capacity": ("text_at", (0, 0), 13, "'text_at', prompt is 13"),
    "text-below-free": ("text_at", (0, 0), -2, "'text_at', prompt is -2"),
    "text-past-prompt": ("text_at", (0, 3), 11, "'text_at', prompt is 11"),
    "text-of-another-slot": ("text_at", (0, 4), 12, "'text_at', after the prompt is 12"),
    "text-tail-negative": ("text_at", (1, 5), -2, "'text_at', after the prompt is -2"),
    "text-tail-past-capacity": ("text_at", (1, 5), 2**31 - 1, "'text_at', after the prompt is 2147483647"),
}


@pytest.mark.parametrize("field, at, given, text", CONTENTS.values(), ids=CONTENTS)
def test_positions_are_checked(forged, field, at, given, text):
    forged.tensors[f"x/{field}"][at] = given
    forged.write()
    forged.refused("cache 'x'", f"buffer '{field}'", text)


def test_prompt_that_moves_the_next_text_slot_out(forged):
    """offset -7 and a prompt of 3: a crop to 4 would not compact, and the next token would take slot -3."""
    forged.entry["prompt"] = 3
    forged.write()
    forged.refused("text slot minus position is -7")


def test_text_offset_without_text(tmp_path):
    forged = Forged(tmp_path, LAYOUTS["2bit"])
    forged.tensors["x/state"][STATE_TEXT] = 1
    forged.write()
    forged.refused("text slot minus position is 1", "0 without text overlay")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_loaded_cache_can_be_used(tmp_path_factory, data):
    """Random integers in every index buffer: refused, or nothing that is done with the cache leads outside a buffer."""
    folder = tmp_path_factory.getbasetemp()
    forged = Forged(folder, data.draw(st.sampled_from([ALL, LAYOUTS["2bit"], LAYOUTS["2bit-text4-bf16"]])))
    near = st.integers(-15, 15)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(k for k in forged.tensors if k[2:] in ("state", "pivot_at", "text_at"))))
        flat = forged.tensors[key].view(-1)
        if flat.numel():
            flat[data.draw(st.integers(0, flat.numel() - 1))] = data.draw(near)
    for key in ("length", "prompt", "end"):
        if data.draw(st.booleans()):
            forged.entry[key] = data.draw(near)
    forged.write()
    try:
        x = PackedKV.load(forged.path)["x"]
    except ValueError:
        return
    x.dequantize()
    length = data.draw(st.integers(0, x.shape[2]))
    x = x[:, :, :length]
    x = x.append(randn(2, 2, 3, 16, dtype=x.dtype), step=4)
    assert x.dequantize().shape[2] == length + 3


DAMAGE = {
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "one-byte-less": lambda raw: raw[:-1],
    "one-byte-more": lambda raw: raw + b"\0",
    "no-header": lambda raw: raw[8:],
    "huge-header": lambda raw: b"\xff" * 8 + raw[8:],
    "garbage": lambda raw: b"\x80\x04" + bytes(range(256)) * 9,
    "text": lambda raw: b"not a cache",
    "pickle": lambda raw: pickle.dumps({"x": 1}),
    "header-list": lambda raw: (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file(forged, damage):
    forged.path.write_bytes(damage(forged.path.read_bytes()))
    forged.refused("no whole safetensors file")


@few
@given(data=st.data())
def test_flipped_header_bytes_never_crash(tmp_path_factory, data):
    forged = Forged(tmp_path_factory.getbasetemp())
    raw = bytearray(forged.path.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(8, 7 + header))] = data.draw(st.integers(0, 255))
    forged.path.write_bytes(raw)
    with contextlib.suppress(ValueError):
        for x in PackedKV.load(forged.path).values():
            x.dequantize()


def test_missing_file_is_said_as_such(tmp_path):
    with pytest.raises(FileNotFoundError):
        PackedKV.load(tmp_path / "nothing")


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"x": Evil()}, tmp_path / "f")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        PackedKV.load(tmp_path / "f")
    assert not (tmp_path / "ran").exists()


def test_device_of_the_buffers(tmp_path):
    PackedKV.save({"x": packed_of(case_of(LAYOUTS["2bit"]))}, tmp_path / "f")
    x = PackedKV.load(tmp_path / "f", device="meta")["x"]
    assert {b.device.type for b in x.storage.buffers} == {x.device.type} == {"meta"}

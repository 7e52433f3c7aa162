"""Cache files: packed caches in one safetensors file, back to the bit, in another process or on another device.

Tensor `{name}/{field}` is one buffer of one cache (kernels/layout.py), whole, capacity included. The file's metadata
holds one JSON text under the key "akvq":

    {"version": 5, "caches": {name: {"layout": text, "axes": text, "length": T, "end": T | null, "prompt": T,
                                     "owner": text | null}}}

axes are those of the model's tensor (kernels/cache_axes.py). length belongs to the view, the rest to its Storage.
Loading executes no code and trusts nothing: sizes are compared with the layout before a buffer is read, positions with
the capacity after, so no index that an op computes from a file leads outside a buffer.

PackedKV.save and PackedKV.load come here; `kind` is PackedKV, which this module does not import.
"""

from __future__ import annotations

import json
import os
import re

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from akvq_fx.kernels.cache_axes import STANDARD, CacheAxes
from akvq_fx.kernels.layout import (
    BLOCK,
    CLASS_NAMES,
    STATE_BLOCK,
    STATE_END,
    STATE_RING,
    STATE_TEXT,
    Layout,
    blocks_of,
)
from akvq_fx.packed_ops import at_front
from akvq_fx.storage import Storage

KEY = "akvq"
VERSION = 5
ENTRY = ("layout", "axes", "length", "end", "prompt", "owner")
OWNER = re.compile(r"[0-9a-f]{32}( [0-9a-f]{32}){0,63}")  # digests of weights (akvq_fx/digest.py)
SHOWN = 200  # characters of a refused value that an error repeats
DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F32": torch.float32, "F64": torch.float64}  # fmt: skip


class Place:
    """A place in a file, for errors that say where, what came and what is accepted."""

    def __init__(self, text: str):
        self.text = text

    def inside(self, text: str) -> Place:
        return Place(f"{self.text}: {text}")

    def refuse(self, what: str, given, accepted: str) -> None:
        given = given if isinstance(given, str) else repr(given)
        given = given if len(given) <= SHOWN else f"{given[:SHOWN]}... ({len(given)} characters)"
        raise ValueError(f"{self.text}: {what} is {given}, accepted: {accepted}")

    def integer(self, what: str, given, low: int, high: int, accepted: str) -> None:
        if type(given) is not int or not low <= given <= high:
            self.refuse(what, given, f"{accepted}, an integer in [{low}, {high}]")

    def elements(self, what: str, given: Tensor, low: int, high: int, accepted: str) -> None:
        wrong = given[(given < low) | (given > high)]
        if wrong.numel():
            self.refuse(what, int(wrong[0]), f"{accepted}, integers in [{low}, {high}]")


def save(caches: dict[str, Tensor], path, kind: type, about: dict[str, str] | None = None) -> None:
    """Write packed tensors by name (printable text without "/"); views of one storage load as separate caches.

    about: more texts for the file's metadata, by keys of the caller's own, which `load` passes over
    """
    file = Place(f"akvq cache file {os.fspath(path)}")
    tensors, entries, written = {}, {}, set()
    for name, packed in caches.items():
        check_name(file, name)
        place = file.inside(f"cache {name!r}")
        if not isinstance(packed, kind):
            place.refuse("its type", type(packed).__name__, "PackedKV, what a cache of a compiled model holds")
        packed._storage()
        packed = at_front(packed)
        storage, buffers = packed.storage, {}
        for field, buffer in zip(storage.layout.fields, storage.buffers, strict=True):
            buffer = buffer.detach().cpu().contiguous()
            address = buffer.untyped_storage().data_ptr()
            buffers[field] = buffer.clone() if address in written else buffer
            written.add(address)
        entries[name] = {
            "layout": packed.layout_text,
            "axes": str(packed.axes),
            "length": packed.count,
            "end": storage.end,
            "prompt": storage.prompt,
            "owner": storage.owner,
        }
        check_entry(place, entries[name])
        described = {field: (b.dtype, tuple(b.shape)) for field, b in buffers.items()}
        capacity = check_buffers(place, storage.layout, described)
        check_numbers(place, entries[name], capacity)
        check_contents(place, storage.layout, buffers, entries[name])
        tensors |= {f"{name}/{field}": buffer for field, buffer in buffers.items()}
    save_file(tensors, path, {**(about or {}), KEY: json.dumps({"version": VERSION, "caches": entries})})


def load(path, device, kind: type) -> dict[str, Tensor]:
    """Read what `save` wrote. Raises ValueError for a file that `save` cannot have written."""
    place = Place(f"akvq cache file {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            entries = read_metadata(place, file.metadata())
            keys = sort_keys(place, file.keys(), entries)
            inside = {name: place.inside(f"cache {name!r}") for name in entries}
            return {name: read(inside[name], file, keys[name], entries[name], device, kind) for name in entries}
    except SafetensorError as error:
        raise ValueError(
            f"{place.text}: it is no whole safetensors file ({error}), accepted: a file that PackedKV.save wrote"
        ) from None


def read(place: Place, file, keys: dict[str, str], entry: dict, device, kind: type) -> Tensor:
    """One cache; keys name its tensors in the file by field."""
    layout = check_entry(place, entry)
    slices = {field: file.get_slice(key) for field, key in keys.items()}
    described = {field: (DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape())) for field, s in slices.items()}
    capacity = check_buffers(place, layout, described)
    check_numbers(place, entry, capacity)
    # copied: the library's tensor is the mapped file itself, and would change and crash with it
    buffers = {field: file.get_tensor(keys[field]).clone() for field in layout.fields}
    check_contents(place, layout, buffers, entry)
    held, axes = [b.to(device) for b in buffers.values()], CacheAxes.parse(entry["axes"])
    storage = Storage(layout, held, entry["end"], entry["prompt"], entry["owner"], axes)
    storage.loaded = True
    storage.mark_dynamic()
    return kind.view_of(storage, entry["length"])


def check_name(place: Place, name) -> None:
    if not isinstance(name, str) or not name or not name.isprintable() or "/" in name:
        place.refuse(
            "a cache's name",
            repr(name),
            'printable text without "/", which separates the name of a cache from that of a buffer',
        )


def unique(pairs: list) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError(f"a key comes twice among {[key for key, _ in pairs]}")
    return dict(pairs)


def read_metadata(place: Place, metadata: dict[str, str] | None) -> dict[str, dict]:
    """Entries by cache name; what an entry holds is checked by check_entry."""
    text = (metadata or {}).get(KEY)
    if text is None:
        place.refuse("its metadata", "without a packed cache", f"the key {KEY!r}, which PackedKV.save writes")
    try:
        top = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        place.refuse("its metadata", text, f"the JSON that PackedKV.save writes ({str(error)[:SHOWN]})")
    version = top.get("version") if isinstance(top, dict) else None
    if type(version) is not int or version != VERSION:
        place.refuse("the format version", version, f"{VERSION}")
    if set(top) != {"version", "caches"} or not isinstance(top["caches"], dict):
        place.refuse("its metadata", top, 'a JSON object with "version" and "caches", the caches an object by name')
    for name in top["caches"]:
        check_name(place, name)
    return top["caches"]


def sort_keys(place: Place, keys: list[str], entries: dict) -> dict[str, dict[str, str]]:
    """Tensor names by cache and field."""
    found: dict[str, dict[str, str]] = {name: {} for name in entries}
    for key in keys:
        name, _, field = key.partition("/")
        if name not in found:
            place.refuse("a tensor's name", repr(key), "cache/buffer, of a cache that the metadata lists")
        found[name][field] = key
    return found


def check_entry(place: Place, entry) -> Layout:
    """The metadata of one cache, as far as it can be judged without its buffers."""
    if not isinstance(entry, dict) or set(entry) != set(ENTRY):
        place.refuse("its metadata", entry, f"a JSON object with {', '.join(ENTRY)}")
    if not isinstance(entry["layout"], str):
        place.refuse("its layout", entry["layout"], "text such as bf16/d64/b2/c0.8/g128")
    try:
        layout = Layout.parse(entry["layout"])
    except ValueError as error:
        place.refuse("its layout", entry["layout"], f"what str(Layout) writes ({str(error)[:SHOWN]})")
    try:
        CacheAxes.parse(entry["axes"])
    except (TypeError, ValueError):
        place.refuse("its axes", entry["axes"], f"text such as {STANDARD}")
    owner = entry["owner"]
    if owner is not None and not (isinstance(owner, str) and OWNER.fullmatch(owner)):
        place.refuse("its owner", owner, "null, or digests of weights, 32 hexadecimal digits each")
    return layout


def check_buffers(place: Place, layout: Layout, described: dict[str, tuple]) -> int:
    """dtype and shape of every buffer, sizes agreeing with those of codes; returns the capacity."""
    missing, extra = set(layout.fields) - set(described), set(described) - set(layout.fields)
    if missing or extra:
        given = f"{len(described)} buffers, {sorted(missing)} missing, {sorted(extra)} unknown"
        place.refuse("its content", given, f"{', '.join(layout.fields)}, for layout {layout}")
    batch, heads, capacity = sizes = (*described["codes"][1], 0, 0, 0)[:3]
    if min(sizes) < 1:
        place.refuse("buffer 'codes'", list(described["codes"][1]), "[B, H, C, words], each at least 1")
    text = described["text_at"][1][-1:] if layout.text_bits else (0,)
    text_capacity = min(*text, capacity) if text else 0
    blocks = max(1, *described["means"][1][2:3]) if layout.moved else None
    for field in layout.fields:
        shape, dtype = layout.buffer(field, batch, heads, capacity, text_capacity, blocks)
        if described[field] != (dtype, tuple(shape)):
            given_dtype, given_shape = described[field]
            place.refuse(
                f"buffer {field!r}",
                f"{given_dtype} {list(given_shape)}",
                f"{dtype} {list(shape)} for codes {list(described['codes'][1])} and layout {layout}",
            )
    return capacity


def check_numbers(place: Place, entry: dict, capacity: int) -> None:
    place.integer("its length", entry["length"], 0, capacity, "tokens of the view, at most the capacity of 'codes'")
    place.integer("its prompt", entry["prompt"], 0, capacity, "tokens of the prompt, at most the capacity of 'codes'")
    if entry["end"] is not None:
        place.integer("its end", entry["end"], 0, capacity, "null for a static cache, or tokens written")


def check_contents(place: Place, layout: Layout, buffers: dict[str, Tensor], entry: dict) -> None:
    """Classes and positions: everything that an op uses as an index."""
    capacity, prompt = buffers["codes"].shape[2], entry["prompt"]
    state = place.inside("buffer 'state'")
    end, ring, offset = (int(buffers["state"][i]) for i in (STATE_END, STATE_RING, STATE_TEXT))
    state.integer("end", end, 0, capacity, "tokens written, at most the capacity")
    if entry["end"] is not None:
        state.integer("end", end, entry["end"], entry["end"], "the end that the metadata gives")
    state.integer("first position of the ring", ring, max(0, end - layout.window), end, "one of the last W")
    if "classes" in buffers:
        accepted = f"one of {', '.join(CLASS_NAMES)}"
        place.elements("buffer 'classes'", buffers["classes"], 0, len(CLASS_NAMES) - 1, accepted)
    if layout.pivots:
        place.elements("buffer 'pivot_at'", buffers["pivot_at"], -1, capacity - 1, "-1 for a free slot, or a position")
    if layout.moved:
        check_blocks(place, state, buffers, entry)
    if layout.blocks and layout.text_bits:
        state.integer("a kernel's counter", int(buffers["state"][-1]), 0, 0, "0 between calls")
    if not layout.text_bits:
        state.integer("text slot minus position", offset, 0, 0, "0 without text overlay")
        return
    at = buffers["text_at"]
    due = at.shape[1] - capacity
    state.integer(
        "text slot minus position", offset, max(due, -prompt), due, "such that the last position has the last slot"
    )
    first = prompt + offset  # the slot of the first token after the prompt
    place.elements(
        "buffer 'text_at', prompt", at[:, :first], -1, max(prompt - 1, -1), "-1, or a position in the prompt"
    )
    own = torch.arange(prompt, prompt + at.shape[1] - first)
    wrong = at[:, first:][(at[:, first:] != -1) & (at[:, first:] != own)]
    if wrong.numel():
        place.refuse("buffer 'text_at', after the prompt", int(wrong[0]), f"-1, or position = slot - {offset}")


def check_blocks(place: Place, state: Place, buffers: dict[str, Tensor], entry: dict) -> None:
    """Where tokens moved: the blocks that they are in, and those of tokens to come, which a write may begin."""
    block_of, shift = buffers["block_of"], int(buffers["state"][STATE_BLOCK])
    capacity, count, static = block_of.shape[1], buffers["means"].shape[2], entry["end"] is None
    moved = 0 if static else entry["prompt"]
    if not static:
        place.integer("its prompt", moved, 0, entry["end"], "tokens that were moved, at most those written")
    room = count - blocks_of(capacity - moved)  # for blocks of the tokens that were moved
    most = 0 if static else max(0, BLOCK * room - moved)
    state.integer("block times 64 less position", shift, -moved, most, "such that tokens to come have blocks")
    own = (torch.arange(moved, capacity) + shift) // BLOCK
    wrong = block_of[:, moved:][block_of[:, moved:] != own]
    if wrong.numel():
        place.refuse("buffer 'block_of', after the prompt", int(wrong[0]), "that of the position")
    place.elements("buffer 'block_of'", block_of[:, moved:], 0, count - 1, "a block that has a mean")
    begun = min(count, blocks_of(moved + shift))
    place.elements("buffer 'block_of', prompt", block_of[:, :moved], 0, begun - 1, "a block that began before its end")

"""Prefixes: beginnings of prompts that are encoded once and kept on disk as codes, a file each, by content.

    prefixes = akvq_fx.Prefixes("prefixes", max_bytes=20_000_000_000)
    prefix = prefixes.get(model, inputs)                  # images, a document: read from disk, or encoded and kept
    output = model.generate(**prefix.then(question_ids), max_new_tokens=64)

A file's name is a digest of everything that makes the tokens: the model's weights and config, the options of akvq that
packed it, and all inputs, pixels included. A file is written beside its place and renamed, so nobody reads a half one.
Whoever writes holds the folder's lock, which the system gives back when a process dies: what is unfinished then is a
leftover, and goes. Needs `fcntl`, so Linux or another Unix, and a file system whose locks work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from akvq_fx import cache_file, torch_internals
from akvq_fx.backend import akvq
from akvq_fx.config import AKVQConfig
from akvq_fx.digest import DIGESTS, compute
from akvq_fx.packed_kv import PackedKV
from akvq_fx.packed_ops import is_packed
from akvq_fx.slot_requests import SHARED, prepared
from akvq_fx.transformers_names import cache_argument

KEY, ENDING, UNFINISHED = "akvq_prefix", ".prefix", ".unfinished"
# options that change how fast codes are made, not which
OF_SPEED = {"inner", "mode", "cuda_graphs", "kept_share", "share_layers", "compile_uncached", "compile_prompts",
            "capacity_step"}  # fmt: skip
NAMES = ("_name_or_path", "transformers_version")  # of a config, which say where it is from


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt, encoded: one row of packed tokens, which every use copies.

    key        its name in a folder
    ids        [1, n] int64, its tokens
    caches     "3 keys" -> PackedKV, of each layer that keeps tokens
    position   [..., 1, 1] int64, the position ids of the token after it; None where the model takes none
    cache_name of the argument by which the model takes a cache
    kind       the class of that cache, which makes an empty one: transformers' DynamicCache
    from_disk  it was loaded, not encoded
    """

    key: str
    ids: Tensor
    caches: dict[str, PackedKV]
    position: Tensor | None
    cache_name: str
    kind: type
    from_disk: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its codes in memory, spare capacity included."""
        return sum(x.nbytes_packed for x in self.caches.values())

    def cache(self, rows: int = 1):
        """A DynamicCache that holds the prefix in `rows` rows. The rows share memory until they are written: then
        there are `rows` times the packed bytes, and the prefix stays as it is."""
        made = self.kind()
        for i in range(1 + max(int(name.split()[0]) for name in self.caches)):
            pair = [self.caches.get(f"{i} {kind}") for kind in ("keys", "values")]
            if pair[0] is not None:
                made.update(*(x.clone() if rows == 1 else x.expand(rows, -1, -1, -1) for x in pair), i)
        return made

    def then(self, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Arguments of `generate` for prompts that begin with this prefix and go on with text, ids [B, m] int64.

        attention_mask  [B, m], 0 at ids that only fill up a row, on the left

        What comes out has the prefix's ids in front, as generate has a prompt's. `Slots.insert` takes them too, of one
        row without padding.
        """
        if ids.dim() != 2 or 0 in ids.shape or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"akvq: ids are {ids.dtype} {list(ids.shape)}, accepted: int64 [rows, tokens], each >= 1")
        rows, device = len(ids), next(iter(self.caches.values())).device
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        if mask.shape != ids.shape:
            raise ValueError(f"akvq: the attention_mask is {list(mask.shape)}, accepted: the ids' {list(ids.shape)}")
        before = self.ids.expand(rows, -1)
        ids, mask = (torch.cat(x, 1).to(device) for x in ([before, ids.cpu()], [torch.ones_like(before), mask.cpu()]))
        given = {"input_ids": ids, "attention_mask": mask, self.cache_name: self.cache(rows)}
        count = before.shape[1]
        if self.position is not None and (self.position.dim() > 2 or bool((self.position != count).any())):
            # where images have rows and columns, a model goes by what it remembers of its last prompt, if not told;
            # positions of tokens that the cache holds are not read
            more = self.position.to(device) - count
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + more
        return given


class Prefixes:
    """A folder of prefixes.

    max_bytes  of all files; when one is written, those unused longest go (by their times of change). While it is
               written it stands beside the others. None: no limit

    Several processes and threads may use one folder. A folder serves any number of models.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int | None = None):
        if max_bytes is not None and not (isinstance(max_bytes, (int, float)) and max_bytes > 0):
            raise ValueError(f"akvq: max_bytes={max_bytes!r}; accepted: a number above 0, or None")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, model: Any, inputs: Mapping[str, Any]) -> Prefix:
        """The prefix of these inputs, one prompt as the model's processor makes it: loaded, else encoded and saved.

        A damaged file is encoded anew, and what cannot be saved is returned all the same, each with a warning that
        says why. Raises what `make` raises.
        """
        key = self.key(model, inputs)
        try:
            found = self._load(key, model, inputs)
        except ValueError as error:
            warnings.warn(f"{error}; it is encoded anew", UserWarning, stacklevel=2)
            self.path(key).unlink(missing_ok=True)
            found = None
        if found is None:
            found = self.make(model, inputs)
            try:
                self.save(found)
            except (OSError, ValueError) as error:
                warnings.warn(str(error), UserWarning, stacklevel=2)
        return found

    def key(self, model: Any, inputs: Mapping[str, Any]) -> str:
        """32 hexadecimal digits of what makes the tokens.

        Raises ValueError where akvq did not compile the model, and for inputs that are no tensors, numbers or texts.
        """
        module, given = getattr(model, "_orig_mod", model), options_of(model)
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise ValueError("akvq: inputs of a prefix have no input_ids; accepted: what the model's processor makes")
        if given is None:
            raise ValueError(
                f"akvq: {type(module).__name__} is not compiled by akvq, so that its cache stays at 16 bits; accepted: "
                'after model.compile(backend="akvq"), or what torch.compile(model, backend="akvq") returned'
            )
        config = dataclasses.asdict(AKVQConfig.from_options(given.get("options"), given.get("mode")))
        weights = module.state_dict(keep_vars=True)
        parts = [
            cache_file.VERSION,
            type(module).__name__,
            json.dumps(without_names(module.config.to_dict()), sort_keys=True, default=str),
            sorted((name, str(x)) for name, x in config.items() if name not in OF_SPEED),
            sorted(zip(weights, DIGESTS.of(list(weights.values())), strict=True)),
            texts_of(inputs),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def path(self, key: str) -> Path:
        return self.folder / f"{key}{ENDING}"

    @property
    def nbytes(self) -> int:
        """Bytes of all files of prefixes in the folder."""
        return sum(size for _, size, _ in self.files())

    def files(self) -> list[tuple[int, int, Path]]:
        """(time of the last use, bytes, path), the one unused longest first."""
        found = []
        for path in self.folder.glob(f"*{ENDING}"):
            with contextlib.suppress(FileNotFoundError):  # another process took it away
                seen = path.stat()
                found.append((seen.st_mtime_ns, seen.st_size, path))
        return sorted(found)

    @torch.no_grad()
    def make(self, model: Any, inputs: Mapping[str, Any]) -> Prefix:
        """Encode a prefix, and save nothing.

        Raises ValueError for more than one row, for padding, and where a layer's cache stays at 16 bits;
        NotImplementedError for models whose cache cannot be continued so (linear attention, cross-attention).
        """
        key, mask = self.key(model, inputs), inputs.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ValueError("akvq: a prefix has padding (0 in its attention_mask); accepted: one row without any")
        request = prepared(model, dict(inputs), {"max_new_tokens": 1}, None)
        ids = request.ids
        request.run_piece(model)
        caches = {}
        for i, layer in enumerate(request.cache.layers):
            if layer.keys is not None:  # others read another layer's
                caches |= {f"{i} keys": layer.keys, f"{i} values": layer.values}
        plain = [name for name, x in caches.items() if not is_packed(x)]
        if plain or not caches:
            raise ValueError(
                f"akvq: {len(plain)} of {len(caches)} cache tensors stay at 16 bits ({', '.join(plain[:2])}, ...), and "
                "a prefix is kept packed; akvq_fx.report(model) says why they are not"
            )
        position = request.inputs.get("position_ids")
        position = None if position is None else position.cpu()
        return Prefix(key, ids, caches, position, cache_argument(model), type(request.cache), from_disk=False)

    def load(self, model: Any, inputs: Mapping[str, Any]) -> Prefix | None:
        """The prefix of these inputs from the disk, None where there is none. Raises ValueError for a file that is
        damaged, or that is another prefix's."""
        return self._load(self.key(model, inputs), model, inputs)

    def _load(self, key: str, model: Any, inputs: Mapping[str, Any]) -> Prefix | None:
        path, device = self.path(key), device_of(model)
        place = cache_file.Place(f"akvq prefix {path}")
        try:
            with contextlib.suppress(PermissionError):  # another user's file
                os.utime(path)  # the last use
            about = read_about(place, path)
            if about["key"] != key:
                place.refuse("its content", f"the prefix {about['key']}", f"{key}: of this model and these inputs")
            caches = PackedKV.load(path, device)
        except FileNotFoundError:
            return None
        except RuntimeError as error:  # safetensors opens the file once more for its tensors
            if "No such file" in str(error):
                return None
            raise
        if digest_of(caches) != about["digest"]:
            place.refuse("a digest of its buffers", "another one than when it was written", "a file that is whole")
        ids = inputs["input_ids"].cpu()
        sizes = {(name.split(" ")[-1], x.storage.rows[0], x.count) for name, x in caches.items()}
        if sizes != {(half, 1, ids.shape[1]) for half in ("keys", "values")}:
            place.refuse("its content", sorted(sizes), f"keys and values of one row and {ids.shape[1]} tokens")
        position = None if about["position"] is None else torch.tensor(about["position"], dtype=torch.int64)
        kind = type(prepared(model, {"input_ids": inputs["input_ids"][:, :1]}, {"max_new_tokens": 1}, None).cache)
        return Prefix(key, ids, caches, position, cache_argument(model), kind, from_disk=True)

    def save(self, prefix: Prefix) -> None:
        """Write a prefix, if the folder does not have it, and take away what is too much then.

        Raises ValueError for one that is larger than max_bytes, and OSError where it cannot be written: a full disk,
        no permission. Other files are left alone in both cases.
        """
        path = self.path(prefix.key)
        if self.max_bytes is not None and prefix.nbytes > self.max_bytes:
            raise ValueError(
                f"akvq: a prefix of {prefix.nbytes:,} bytes is not kept in {self.folder}; accepted: up to "
                f"max_bytes={self.max_bytes:,}"
            )
        position = None if prefix.position is None else prefix.position.tolist()
        about = {"key": prefix.key, "digest": digest_of(prefix.caches), "position": position}
        with self.locked():
            for leftover in self.folder.glob(f"*{UNFINISHED}"):  # of a process that died: the lock is ours
                leftover.unlink(missing_ok=True)
            if not path.exists():
                self.write(path, prefix, about)
            self.make_room(path)

    def write(self, path: Path, prefix: Prefix, about: dict) -> None:
        beside = path.with_suffix(UNFINISHED)
        try:
            cache_file.save(prefix.caches, beside, PackedKV, {KEY: json.dumps(about)})
            with beside.open("rb") as file:
                os.fsync(file.fileno())  # its contents are on the disk before its name is
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            kind = type(error) if isinstance(error, OSError) else OSError
            raise kind(
                *((error.errno,) if isinstance(error, OSError) else ()),
                f"akvq: a prefix of {prefix.nbytes:,} bytes cannot be written to {self.folder} and is not kept; what "
                f"is there stays as it was ({error})",
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def make_room(self, kept: Path) -> None:
        """Take away the files unused longest, until max_bytes are enough; `kept` stays."""
        files = self.files()
        size = sum(size for _, size, _ in files)
        for _, bytes_of_it, path in files:
            if self.max_bytes is None or size <= self.max_bytes:
                return
            if path != kept:
                path.unlink(missing_ok=True)  # who has it open reads on
                size -= bytes_of_it

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock; other processes and threads that write wait."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def options_of(model: Any) -> dict[str, Any] | None:
    """The options= and mode= with which akvq compiled a model, or the part of it that holds the cache."""
    for part in (model, *getattr(model, "_orig_mod", model).modules()):
        backend, given = torch_internals.compiled_with(part)
        if backend is akvq:
            return given
    return None


def texts_of(inputs: Mapping[str, Any]) -> list[str]:
    """What inputs are, by names and contents. Raises ValueError for objects that have none to compare."""
    given = {name: inputs[name] for name in sorted(inputs) if inputs[name] is not None}
    flat, places = torch.utils._pytree.tree_flatten(given)
    for x in flat:
        if not isinstance(x, (Tensor, *SHARED)):
            raise ValueError(
                f"akvq: an input of a prefix is a {type(x).__name__}; accepted: tensors, numbers, texts, and lists of "
                'these, as the model\'s processor makes them with return_tensors="pt"'
            )
    digests = iter(compute([x for x in flat if isinstance(x, Tensor)]))
    return [str(places), *(next(digests) if isinstance(x, Tensor) else repr(x) for x in flat)]


def without_names(config: Any) -> Any:
    if isinstance(config, dict):
        return {str(name): without_names(x) for name, x in config.items() if name not in NAMES}
    return config


def device_of(model: Any) -> torch.device:
    """Where a model's weights are. Raises NotImplementedError where they are on several devices."""
    devices = {x.device for x in getattr(model, "_orig_mod", model).parameters()}
    if len(devices) != 1:
        shown = ", ".join(sorted(map(str, devices)))
        raise NotImplementedError(f"akvq: a prefix cannot be loaded for a model on {shown}; accepted: one device")
    return devices.pop()


def digest_of(caches: Mapping[str, PackedKV]) -> str:
    """Of all buffers, in the order of their names."""
    names = sorted(caches)
    texts = compute([buffer for name in names for buffer in caches[name].storage.buffers])
    return hashlib.sha256(repr((names, texts)).encode()).hexdigest()[:32]


def read_about(place: cache_file.Place, path: Path) -> dict:
    """What `write` says of a prefix beside its caches. Raises ValueError where it is not as `write` writes it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(KEY)
        about = json.loads(text or "null")
    except (SafetensorError, ValueError, RecursionError) as error:
        place.refuse("the file", f"no whole prefix ({error})", "one that Prefixes.save wrote")
    if not isinstance(about, dict) or set(about) != {"key", "digest", "position"}:
        place.refuse("its metadata", about, "a JSON object with key, digest and position")
    return about

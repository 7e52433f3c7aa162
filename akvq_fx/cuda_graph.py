"""DecodeStep: a decode graph in two parts (passes/split_decode.py), the body of which a CUDA graph replays.

A body reads and writes cache buffers and weights where they lie (held); everything else (tokens, masks, positions) is
copied into tensors of its own before a replay, and results are cloned after it, so a later step overwrites nothing that
the caller has. The first step over buffers of some sizes runs as it is, which compiles and tunes kernels; the second is
captured; later ones are replayed. Capturing runs nothing, so every step runs exactly once. Buffers are recognised by
their addresses, those of caches by a stamp that changes with them. A recording keeps the cache buffers that it runs
over (akvq_fx/kept_buffers.py): a later cache of the same sizes moves into them, so that a second generation captures
nothing. It is dropped when a weight dies, or its buffers where they could not be kept.
"""

from __future__ import annotations

import collections
import gc
import logging
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from akvq_fx import torch_internals
from akvq_fx.cuda_recorder import Replay, is_capturing
from akvq_fx.kept_buffers import POOL, KeptSet, with_room
from akvq_fx.passes.patterns.nodes import is_shared
from akvq_fx.program import Split
from akvq_fx.report import Capture
from akvq_fx.storage import Storage

log = logging.getLogger(__name__)
# recordings of one graph remembered at a time, for sizes that alternate; how much they keep is bounded by bytes, too
KEPT = 32
WARM = 256  # sizes that a graph is known to have run with


def compared_one_by_one(tensors: list[Tensor], addresses: list[int], indices: list[int]) -> bool:
    return all(tensors[i].data_ptr() == addresses[i] for i in indices)


# only in PyTorch built for CUDA; compares 800 tensors in about ten microseconds
same_addresses = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", compared_one_by_one)


class Recording:
    """One set of tensors that stay where they are: their addresses, and, once captured, a replay of the body over them.

    key       sizes of cache buffers, other sizes, numbers, whether outside of inference mode, stream
    stamps    of the storages that it was used with last
    addresses of the held tensors
    inputs    tensors that the moved inputs are copied into
    states    copies of small tensors that the body writes: filled before a replay, copied back after it
    own       per result: True if it lies in the graph's memory and must be cloned, False if it is a held tensor
    kept      the cache buffers among the held tensors; None before they are captured, or where they cannot be kept
    """

    def __init__(self, key: tuple, held: list[Tensor], owner: DecodeStep):
        self.key, self.addresses = key, [x.data_ptr() for x in held]
        self.inputs: list[Tensor] = []
        self.states: list[Tensor] = []
        self.own: list[bool] = []
        self.stamps: list[int] = []
        self.replay: Replay | None = None
        self.kept: KeptSet | None = None
        me, step = weakref.ref(self), weakref.ref(owner)

        def gone(*_):
            recording, keeper = me(), step()
            if recording is not None and keeper is not None:
                keeper.forget_later(recording)

        self.gone = gone
        self.watched = {i: weakref.ref(held[i], gone) for i in owner.every}

    def keep(self, held: list[Tensor], mine: list[int], limit: float) -> None:
        """Keep the cache buffers, which are at `mine` among the held tensors, within `limit` bytes."""
        self.kept = POOL.keep([held[i] for i in mine], self.key[-1], limit, self.gone)
        if self.kept is not None:
            for i in mine:
                del self.watched[i]


class DecodeStep:
    """Called with the inputs of the rewritten graph; gives its results.

    record    makes CUDA graphs, None where there are none to make (counts.reason says why)
    share     of the device's memory that kept buffers of all graphs may take
    counts    what happened, for the report
    asked     somebody asked for CUDA graphs by name, so a capture that fails is worth a warning
    """

    def __init__(
        self, split: Split, prologue, body, counts: Capture, record=None, asked: bool = True, share: float = 0.0
    ):
        self.split, self.prologue, self.body, self.counts, self.record = split, prologue, body, counts, record
        self.feed, self.held, self.numbers, self.moved = map(
            picker, (split.feeds, split.held, split.numbers, split.moved)
        )
        self.asked, self.share, states = asked, share, set(split.states)
        # positions among the held tensors: those that a recording is bound to, and those that it has copies of
        self.every, self.small = ([i for i, p in enumerate(split.held) if (p in states) == x] for x in (False, True))
        plain = [start.argument for start in split.starts]
        self.starts = picker(plain) if None not in plain else lambda inputs: [start(inputs) for start in split.starts]
        self.known: list[Recording] = []  # the latest used last
        self.dead: collections.deque[Recording] = collections.deque()
        self.lock = threading.Lock()
        self.base: Tensor | None = None
        self.mine: list[int] = []  # where among the held tensors the cache buffers are, if all are there
        self.others, self.collected = self.every, False
        self.shards: list[int] | None = None  # where among the held tensors DTensors are, once a call showed it
        self.free_sizes, self.cache_sizes = split.sizes, []  # those of the cache buffers, if all are there
        self.warm: set[tuple] = set()  # (key, thread): kernels and libraries are ready

    def __call__(self, *inputs, storages: Sequence[Storage] = ()):
        """storages: the caches whose buffers are the last inputs, in order. They may move to other buffers."""
        made = self.prologue(*self.feed(inputs)) if self.prologue is not None else ()
        if self.record is None:
            self.counts.ran += 1
            results = self.run(inputs, made)
        else:
            with self.lock:
                results = self.run_captured(inputs, made, storages)
        found = {"input": inputs, "prologue": made[len(self.split.pads) :], "body": results}
        return tuple(i if where == "constant" else found[where][i] for where, i in self.split.results)

    def run(self, inputs, made) -> Sequence:
        """The body as it is, on tensors of this step."""
        moved = [x.contiguous() for x in self.moved(inputs)]
        for x, capacity in zip(made, self.split.pads, strict=False):
            if capacity is not None:
                x = torch.nn.functional.pad(x, (0, inputs[capacity].shape[2] - x.shape[-1]), value=masked_value(x))
            moved.append(x.contiguous())
        if self.split.starts:
            moved.append(self.place_rows(inputs, None))
        return self.body(*self.held(inputs), *self.numbers(inputs), *moved)

    def keep_from(self, first: int, count: int) -> None:
        """The last `count` inputs, from position `first` on, are cache buffers: recordings keep them."""
        found = [i for i, position in enumerate(self.split.held) if position >= first]
        self.mine = found if len(found) == count else []
        self.others = [i for i in self.every if i not in set(self.mine)]
        is_cache = lambda position: bool(self.mine) and position >= first
        self.free_sizes = [size for size in self.split.sizes if not is_cache(size[0])]
        self.cache_sizes = [size for size in self.split.sizes if is_cache(size[0])]

    def run_captured(self, inputs, made, storages: Sequence[Storage] = ()) -> Sequence:
        held = self.in_memory(self.held(inputs))
        device = held[0].device
        normal = not (self.mine and held[self.mine[0]].is_inference())
        outer = (sizes_of(inputs, self.free_sizes), self.numbers(inputs), normal, self.record.place(device))
        recording = self.find_last(outer, held, storages)
        if recording is None:
            key = (sizes_of(inputs, self.cache_sizes), *outer)
            recording = self.find(key, held) or self.move(key, held, storages)
            if recording is None and self.free_what_dynamo_holds(key):
                recording = self.move(key, held, storages)
            if recording is None:
                recording = self.begin(key, held)
                if recording.kept is None:
                    self.counts.ran += 1
                    return self.run(inputs, made)
            recording.stamps = [storage.stamp for storage in storages]
        if recording.replay is None:
            recording.inputs = self.inputs_like(inputs, made)
        self.fill(recording.inputs, inputs, made)
        if recording.replay is None:
            try:
                self.capture(recording, held, inputs, device)
            except RuntimeError as error:
                self.give_up(error)
                self.counts.ran += 1
                return self.run(inputs, made)
        states = [held[i] for i in self.small]
        torch_internals.copy_all(recording.states, states)
        results = recording.replay()
        torch_internals.copy_all(states, recording.states)
        self.counts.replayed += 1
        if not recording.own:
            self.look_at_results(recording, held, results)
        return [x.clone() if own else x for x, own in zip(results, recording.own, strict=True)]

    def in_memory(self, held: Sequence) -> list[Tensor]:
        """The held tensors, of weights that processes share (DTensors) this process's part."""
        held = list(held)
        if self.shards is None:
            self.shards = [i for i, x in enumerate(held) if is_shared(x)]
        for i in self.shards:
            held[i] = torch_internals.part_of(held[i])
        return held

    def free_what_dynamo_holds(self, key: tuple) -> bool:
        """Once, where a cache has the buffers of these sizes: it may be the one that dynamo traced with, which cyclic
        garbage holds. Collecting it takes as long as some captures."""
        if self.collected or all(r.key != key or r.kept is None for r in self.known):
            return False
        self.collected = True
        gc.collect()
        return True

    def begin(self, key: tuple, held: list[Tensor]) -> Recording:
        """A recording to be made. It has kept buffers where it can be made at once.

        That is where none of these sizes is captured, but a step of them ran: buffers change from step to step, as in
        beam search, or what was kept has been given back.
        """
        ready = (key, threading.get_ident())
        is_new = all(r.key != key or r.replay is None for r in self.known)
        recording = Recording(key, held, self)
        self.remember(recording)
        if is_new and ready in self.warm:
            self.keep(recording, held)
        self.warm = {ready} if len(self.warm) >= WARM else self.warm | {ready}
        return recording

    def keep(self, recording: Recording, held: list[Tensor]) -> None:
        if self.mine:
            recording.keep(held, self.mine, self.limit(held[0].device))
            self.count_kept()

    def limit(self, device: torch.device) -> float:
        """Bytes that all recordings on a device may keep."""
        return self.share * self.record.memory(device)

    def move(self, key: tuple, held: list[Tensor], storages: Sequence[Storage]) -> Recording | None:
        """Move caches into buffers that a recording keeps and no cache uses; the held tensors follow.

        None where none fits.
        """
        sizes = [held[i].shape for i in self.mine]
        for recording in reversed(self.known):
            if recording.kept is None or recording.key != key:
                continue
            if same_addresses(held, recording.addresses, self.others):
                buffers = self.move_into(recording, sizes, storages)
                if buffers is not None:
                    for i, x in zip(self.mine, buffers, strict=True):
                        held[i] = x
                    self.known.append(self.known.pop(self.known.index(recording)))
                    return recording
        return None

    def grow(self, storages: Sequence[Storage], capacities: Sequence[int]) -> bool:
        """Move caches into larger buffers that a recording keeps and no cache uses. False where none fits."""
        if self.record is None or not self.mine:
            return False
        sizes = [size for s, capacity in zip(storages, capacities, strict=True) for size in s.grown(capacity).values()]
        normal, place = not storages[0].codes.is_inference(), self.record.place(storages[0].device)
        with self.lock:
            self.forget()
            fitting = [r for r in reversed(self.known) if r.key[-2:] == (normal, place)]
            return any(self.move_into(recording, sizes, storages) is not None for recording in fitting)

    def move_into(self, recording: Recording, sizes: list, storages: Sequence[Storage]) -> list[Tensor] | None:
        """Move caches into what the recording keeps, if it fits and is free; gives the buffers that they have then."""
        alone = len({id(storage) for storage in storages}) == len(storages)
        if recording.kept is None or not alone or not recording.kept.fits(sizes):
            return None
        buffers = POOL.take(recording.kept)
        if buffers is None:
            return None
        rest, parts = iter(buffers), []
        for storage in storages:
            parts.append([next(rest) for _ in storage.held])
        pairs = [storage.copies_to(part) for storage, part in zip(storages, parts, strict=True)]
        torch_internals.copy_all([x for targets, _ in pairs for x in targets], [x for _, from_ in pairs for x in from_])
        for storage, part in zip(storages, parts, strict=True):
            storage.move_to(part)
        self.counts.reused += 1
        return buffers

    def find_last(self, outer: tuple, held: list[Tensor], storages: Sequence[Storage]) -> Recording | None:
        """The recording used last, if every cache has the buffers still that it had then; what most steps find.

        outer: its key without the sizes of cache buffers, whose addresses are not compared either.
        """
        self.forget()
        last = self.known[-1] if self.known else None
        if last is None or not self.mine or last.key[1:] != outer:
            return None
        same = last.stamps == [storage.stamp for storage in storages]
        return last if same and same_addresses(held, last.addresses, self.others) else None

    def find(self, key: tuple, held: list[Tensor]) -> Recording | None:
        self.forget()
        for i in range(len(self.known) - 1, -1, -1):
            recording = self.known[i]
            if recording.key == key and same_addresses(held, recording.addresses, self.every):
                if i + 1 < len(self.known):
                    self.known.append(self.known.pop(i))
                return recording
        return None

    def capture(self, recording: Recording, held: list[Tensor], inputs, device: torch.device) -> None:
        if recording.kept is None:
            self.keep(recording, held)
        held, given = list(held), self.held(inputs)
        for i in self.shards:
            held[i] = given[i]
        if recording.kept is not None:  # not over the tensors of the cache, which a recording could keep alive
            for i, x in zip(self.mine, recording.kept.tensors, strict=True):
                held[i] = x
        with torch.inference_mode(False), torch.no_grad():
            recording.states = [torch.empty_like(held[i]) for i in self.small]
        for i, x in zip(self.small, recording.states, strict=True):
            held[i] = x
        recording.replay = with_room(
            lambda: self.record(self.body, [*held, *self.numbers(inputs), *recording.inputs], device)
        )
        self.counts.captured += 1

    def look_at_results(self, recording: Recording, held: list[Tensor], results: Sequence) -> None:
        """After the first replay: which results are the graph's own, and how much memory it holds besides caches."""
        lies_at = {x.untyped_storage().data_ptr() for x in held}
        is_own = lambda x: isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in lies_at
        recording.own = [is_own(x) for x in results]
        if recording.kept is not None:
            kept = [*recording.inputs, *(x for x, own in zip(results, recording.own, strict=True) if own)]
            recording.kept.extra = sum(x.untyped_storage().nbytes() for x in kept)
            POOL.make_room(self.limit(held[0].device), held[0].device)
            self.count_kept()

    def count_kept(self) -> None:
        """Bytes that the recordings keep, for the report; some may keep the same buffers."""
        sets = [r.kept for r in self.known if r.kept is not None]
        every = {id(kept): kept.nbytes for s in sets for kept in s.buffers}
        self.counts.kept = sum(every.values()) + sum(s.extra for s in sets)

    def give_up(self, error: RuntimeError) -> None:
        """A capture that failed once fails again: later steps run without one, and the report says why."""
        self.counts.reason = f"capturing it failed: {error}"
        self.record = None
        self.known.clear()
        self.count_kept()
        told = f"akvq: no CUDA graph is used for decoding; {self.counts.reason}"
        if self.asked:
            warnings.warn(told, UserWarning, stacklevel=4)
        else:
            log.info(told)

    def remember(self, recording: Recording) -> None:
        self.known.append(recording)
        while len(self.known) > KEPT:
            self.drop(self.known[0])

    def forget_later(self, recording: Recording) -> None:
        """Called when a held tensor dies. During a step or another capture, dropping the recording waits."""
        self.dead.append(recording)
        if self.lock.acquire(blocking=False):
            try:
                if not is_capturing():
                    self.forget()
            finally:
                self.lock.release()

    def forget(self) -> None:
        while self.dead:
            self.drop(self.dead.popleft())

    def drop(self, recording: Recording) -> None:
        if recording in self.known:
            self.known.remove(recording)
            self.counts.dropped += recording.replay is not None
            self.count_kept()

    def inputs_like(self, inputs, made) -> list[Tensor]:
        """Contiguous memory for the moved inputs; masks are as wide as the capacity of the cache."""
        found = []
        with torch.inference_mode(False), torch.no_grad():
            for x, capacity in zip(
                (*self.moved(inputs), *made), (*[None] * len(self.split.moved), *self.split.pads), strict=False
            ):
                size = x.shape if capacity is None else (*x.shape[:-1], inputs[capacity].shape[2])
                fill = 0 if capacity is None else masked_value(x)
                found.append(torch.full(size, fill, dtype=x.dtype, device=x.device))
            if self.split.starts:
                found.append(torch.empty_like(self.place_rows(inputs, None)))
        return found

    def fill(self, places: list[Tensor], inputs, made) -> None:
        """Copy this step's inputs to where the recorded body reads them."""
        count = len(self.split.moved)
        for place, x in zip(places, self.moved(inputs), strict=False):
            place.copy_(x)
        for place, x, capacity in zip(places[count:], made, self.split.pads, strict=False):
            if capacity is None:
                place.copy_(x)
            else:  # columns past the end are never read, so leftovers of a longer sequence may stay
                place.narrow(-1, 0, x.shape[-1]).copy_(x)
        if self.split.starts:
            self.place_rows(inputs, places[-1])

    def place_rows(self, inputs, out: Tensor | None) -> Tensor:
        """[n, q] int64, and a column more where q is odd: the positions of the new tokens in each growing cache."""
        if self.base is None:
            device = inputs[self.split.held[0]].device
            with torch.inference_mode(False):
                self.base = torch.arange(self.split.count + self.split.count % 2, device=device)
                self.base = self.base.repeat(len(self.split.starts), 1)
        starts = self.starts(inputs)
        if len(set(starts)) == 1:
            return torch.add(self.base, starts[0], out=out)
        return torch.add(self.base, torch.tensor(starts, device=self.base.device)[:, None], out=out)


def picker(positions: list[int]) -> Callable[[Sequence], tuple]:
    """inputs -> those at the positions; operator.itemgetter gives no tuple for one or none."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda inputs: tuple(inputs[i] for i in positions)


def sizes_of(inputs: Sequence, places: list[tuple[int, int]]) -> tuple[int, ...]:
    return tuple([inputs[i].shape[dim] for i, dim in places])


def masked_value(mask: Tensor):
    return False if mask.dtype == torch.bool else -torch.inf

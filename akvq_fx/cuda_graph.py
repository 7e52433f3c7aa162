"""DecodeStep: a decode graph in two parts (passes/split_decode.py), the body of which a CUDA graph replays.

A body reads and writes cache buffers and weights where they lie (held); everything else (tokens, masks, positions) is
copied into tensors of its own before a replay, and results are cloned after it, so a later step overwrites nothing that
the caller has. The first step over a set of buffers runs as it is, which compiles and tunes kernels; the second is
captured; later ones are replayed. Capturing runs nothing, so every step runs exactly once. Buffers are recognised by
their addresses and not kept alive; a CUDA graph whose buffers died is dropped.
"""

from __future__ import annotations

import collections
import logging
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from akvq_fx.program import Split
from akvq_fx.report import Capture

log = logging.getLogger(__name__)
# sets of buffers remembered at a time, for generations that alternate; more would hold memory of caches no longer used
KEPT = 8
NO_CUDA = "there is no CUDA device under these tensors"
Replay = Callable[[], Sequence]


def compared_one_by_one(tensors: list[Tensor], addresses: list[int], indices: list[int]) -> bool:
    return all(tensors[i].data_ptr() == addresses[i] for i in indices)


# only in PyTorch built for CUDA; compares 800 tensors in about ten microseconds
same_addresses = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", compared_one_by_one)


class CudaRecorder:
    """record(function, arguments) -> a call that runs the recorded work again, in the same memory.

    Graphs on one stream share a memory pool: they run one after another, so they can use the same scratch memory.
    """

    def __init__(self):
        self.alive: dict[int, weakref.WeakSet] = {}  # stream -> its graphs
        self.pools: dict[int, tuple] = {}
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def place(self, device: torch.device) -> int:
        """The current CUDA stream, as a number. A recording is used only on the stream that it was made for."""
        return torch._C._cuda_getCurrentRawStream(device.index)

    def __call__(self, function: Callable, arguments: list, device: torch.device) -> Replay:
        place = self.place(device)
        alive = self.alive.setdefault(place, weakref.WeakSet())
        if not alive:  # the allocator refuses a pool that no graph uses any more
            self.pools[place] = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream(device)
            graph, stream = torch.cuda.CUDAGraph(), self.streams[device]
            try:
                with torch.cuda.graph(graph, self.pools[place], stream, capture_error_mode="thread_local"):
                    results = list(function(*arguments))
            except RuntimeError:
                release_generator(device)
                raise
        alive.add(graph)

        def replay() -> Sequence:
            graph.replay()
            return results

        return replay


def release_generator(device: torch.device) -> None:
    """Let random numbers be drawn again after a capture that failed.

    PyTorch leaves the device's generator as if the capture went on, and every later torch.rand or sampling would raise.
    """
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())


class Recording:
    """One set of cache buffers: their addresses, and, once captured, a replay of the body over them.

    key       sizes, numbers and stream
    addresses of the held tensors
    inputs    tensors that the moved inputs are copied into
    own       per result: True if it lies in the graph's memory and must be cloned, False if it is a held tensor
    """

    def __init__(self, key: tuple, held: list[Tensor], owner: DecodeStep):
        self.key, self.addresses = key, [x.data_ptr() for x in held]
        self.inputs: list[Tensor] = []
        self.own: list[bool] = []
        self.replay: Replay | None = None
        me, step = weakref.ref(self), weakref.ref(owner)

        def gone(_):
            recording, keeper = me(), step()
            if recording is not None and keeper is not None:
                keeper.forget_later(recording)

        self.watched = [weakref.ref(x, gone) for x in held]


class DecodeStep:
    """Called with the inputs of the rewritten graph; gives its results.

    record    makes CUDA graphs, None where there are none to make (counts.reason says why)
    counts    what happened, for the report
    asked     somebody asked for CUDA graphs by name, so a capture that fails is worth a warning
    """

    def __init__(self, split: Split, prologue, body, counts: Capture, record=None, asked: bool = True):
        self.split, self.prologue, self.body, self.counts, self.record = split, prologue, body, counts, record
        self.feed, self.held, self.numbers, self.moved = map(
            picker, (split.feeds, split.held, split.numbers, split.moved)
        )
        self.every, self.asked = list(range(len(split.held))), asked
        plain = [start.argument for start in split.starts]
        self.starts = picker(plain) if None not in plain else lambda inputs: [start(inputs) for start in split.starts]
        self.known: list[Recording] = []  # the latest used last
        self.dead: collections.deque[Recording] = collections.deque()
        self.lock = threading.Lock()
        self.base: Tensor | None = None

    def __call__(self, *inputs):
        made = self.prologue(*self.feed(inputs)) if self.prologue is not None else ()
        if self.record is None:
            self.counts.ran += 1
            results = self.run(inputs, made)
        else:
            with self.lock:
                results = self.run_captured(inputs, made)
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

    def run_captured(self, inputs, made) -> Sequence:
        held = list(self.held(inputs))
        device = held[0].device
        sizes = tuple([inputs[i].shape[dim] for i, dim in self.split.sizes])
        key = (sizes, self.numbers(inputs), self.record.place(device))
        recording = self.find(key, held)
        if recording is None:
            self.remember(Recording(key, held, self))
            self.counts.ran += 1
            return self.run(inputs, made)
        if recording.replay is None:
            recording.inputs = self.inputs_like(inputs, made)
        self.fill(recording.inputs, inputs, made)
        if recording.replay is None:
            try:
                self.capture(recording, held, self.numbers(inputs), device)
            except RuntimeError as error:
                self.give_up(error)
                self.counts.ran += 1
                return self.run(inputs, made)
        results = recording.replay()
        self.counts.replayed += 1
        if not recording.own:
            lies_at = {x.untyped_storage().data_ptr() for x in held}
            recording.own = [isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in lies_at for x in results]
        return [x.clone() if own else x for x, own in zip(results, recording.own, strict=True)]

    def find(self, key: tuple, held: list[Tensor]) -> Recording | None:
        self.forget()
        for i in range(len(self.known) - 1, -1, -1):
            recording = self.known[i]
            if recording.key == key and same_addresses(held, recording.addresses, self.every):
                if i + 1 < len(self.known):
                    self.known.append(self.known.pop(i))
                return recording
        return None

    def capture(self, recording: Recording, held: list[Tensor], numbers: tuple, device: torch.device) -> None:
        recording.replay = self.record(self.body, [*held, *numbers, *recording.inputs], device)
        self.counts.captured += 1

    def give_up(self, error: RuntimeError) -> None:
        """A capture that failed once fails again: later steps run without one, and the report says why."""
        self.counts.reason = f"capturing it failed: {error}"
        self.record = None
        self.known.clear()
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


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def masked_value(mask: Tensor):
    return False if mask.dtype == torch.bool else -torch.inf


def recorder_for(device: torch.device, counts: Capture) -> CudaRecorder | None:
    """What makes CUDA graphs on a device; None, with the reason in counts, where there are none."""
    if device.type == "cuda":
        return CudaRecorder()
    counts.reason = NO_CUDA
    return None

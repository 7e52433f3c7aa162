"""CudaRecorder: makes the CUDA graphs that a decode step (akvq_fx/cuda_graph.py) replays."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from akvq_fx.report import Capture

NO_CUDA = "there is no CUDA device under these tensors"
Replay = Callable[[], Sequence]


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

    def memory(self, device: torch.device) -> float:
        """Bytes of the device's that this process may take."""
        share = torch.cuda.get_per_process_memory_fraction(device)
        return share * torch.cuda.get_device_properties(device).total_memory

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


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def recorder_for(device: torch.device, counts: Capture) -> CudaRecorder | None:
    """What makes CUDA graphs on a device; None, with the reason in counts, where there are none."""
    if device.type == "cuda":
        return CudaRecorder()
    counts.reason = NO_CUDA
    return None

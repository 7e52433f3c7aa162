"""What rotating values online costs a decode step, beside folding the rotation into copies of the weights.

    python benchmarks/speed/value_rotation.py [--shape llava-1.5-7b] [--layers N] [--batches 1,40] [--tokens 512]
                                              [--rounds 40]
    python benchmarks/speed/value_rotation.py --device cpu --shape tiny --inner eager

Both run the same weights in one process, a few steps at a time in turns, each over a cache of its own. A round's steps
are timed together; the medians and their ratio are printed, with the ratio of one contestant's odd rounds to its even
ones as the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from contestants import Akvq
from decoders import SHAPES, build

STEPS = 8  # of one contestant, then as many of the other


class Online(Akvq):
    options = {"value_rotation": "online"}


class Folded(Akvq):
    options = {"value_rotation": "fold"}


def seconds(contestant, token, cache) -> float:
    wait = torch.cuda.synchronize if token.is_cuda else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(STEPS):
        logits, _ = contestant.step(token, cache)
        token = logits.argmax(-1, keepdim=True)
    wait()
    return (time.perf_counter() - begin) / STEPS


@torch.no_grad()
def compare(decoder, batch: int, tokens: int, rounds: int, inner: str) -> dict[str, float]:
    """Median seconds a step of both, their ratio, and the noise of one."""
    ids = torch.randint(0, decoder.shape.vocab, (batch, tokens), device=decoder.device)
    held = []
    for kind in (Online, Folded):
        contestant = kind(decoder, inner)
        capacity = tokens + STEPS * (rounds + 3)
        logits, cache = contestant.prefill(ids, capacity, min(batch, 8))
        held.append((contestant, logits.argmax(-1, keepdim=True), cache))
    for _ in range(3):  # compiles, captures
        for one in held:
            seconds(*one)
    times: list[list[float]] = [[], []]
    for i in range(rounds):
        for j in (0, 1) if i % 2 else (1, 0):
            times[j].append(seconds(*held[j]))
    online, folded = map(statistics.median, times)
    halves = statistics.median(times[1][::2]) / statistics.median(times[1][1::2])
    return {"online_ms": 1e3 * online, "folded_ms": 1e3 * folded, "ratio": online / folded, "noise": halves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1.5-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batches", default="1,40")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--inner", default="inductor")
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    decoder = build(SHAPES[given.shape], given.layers, torch.device(given.device), dtype)
    for batch in map(int, given.batches.split(",")):
        torch._dynamo.reset()
        found = compare(decoder, batch, given.tokens, given.rounds, given.inner)
        print(f"batch {batch}, {given.tokens} tokens: " + ", ".join(f"{name} {x:.3f}" for name, x in found.items()))


if __name__ == "__main__":
    main()

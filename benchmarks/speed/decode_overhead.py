"""Host cost of a decode step: the akvq wrapper beside plain dynamo, same model, same run.

    python benchmarks/speed/decode_overhead.py [--layers 32] [--tokens 40] [--inner eager]

Three models with the same random weights decode greedily from the same prompt: uncompiled, compiled with a backend that
returns dynamo's graph as it is ("dynamo"), and with akvq in lossless mode and at 2 bits. Printed per step:
milliseconds, the ratio to dynamo, and for akvq the time spent in the wrapper itself (unwrapping and wrapping caches),
as a share of the dynamo step. Times are medians; no figure is meant to be compared between runs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from akvq_fx.runtime import Runtime
from akvq_fx.transformers_names import cache_argument, cache_of


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def decode(model, prompt, tokens: int) -> list[float]:
    """Seconds of every decode step after the third, when nothing compiles any more."""
    times, name = [], cache_argument(model)
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        for _ in range(tokens):
            token = out.logits[:, -1:].argmax(-1)
            begin = time.perf_counter()
            out = model(token, **{name: cache_of(out)}, use_cache=True)
            times.append(time.perf_counter() - begin)
    return times[3:]


class WrapperClock:
    """Seconds spent in Runtime.__call__ outside the compiled graph."""

    def __init__(self):
        self.own: list[float] = []

    def __enter__(self):
        self.call = Runtime.__call__

        def timed(runtime, *args):
            inner, spent = runtime.inner, [0.0]

            def clocked(*inputs, **more):
                begin = time.perf_counter()
                result = inner(*inputs, **more)
                spent[0] += time.perf_counter() - begin
                return result

            runtime.inner = clocked
            begin = time.perf_counter()
            try:
                return self.call(runtime, *args)
            finally:
                runtime.inner = inner
                self.own.append(time.perf_counter() - begin - spent[0])

        Runtime.__call__ = timed
        return self

    def __exit__(self, *exc):
        Runtime.__call__ = self.call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--inner", default="eager", choices=("eager", "aot_eager", "inductor"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # host cost is what is measured, and threads that spin would hide it
    prompt = torch.randint(3, 500, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    cases = {
        "uncompiled": None,
        "dynamo": dict(backend="eager", dynamic=None),
        "akvq lossless": dict(backend="akvq", options={"body_bits": 16, "inner": args.inner}),
        "akvq 2-bit": dict(backend="akvq", options={"inner": args.inner}),
    }
    print(
        f"{args.layers} layers, prompt {args.prompt}, {args.tokens} decode steps, inner "
        f"{args.inner}, {torch.get_num_threads()} threads"
    )
    base = None
    for name, options in cases.items():
        torch._dynamo.reset()
        model = model_of(args.layers)
        if options is not None:
            model.compile(**options)
        with WrapperClock() as clock:
            step = statistics.median(decode(model, prompt, args.tokens))
        base = step if name == "dynamo" else base
        line = f"{name:14s} {1e3 * step:8.2f} ms a step"
        if base is not None:
            line += f"  {step / base:5.2f} x dynamo"
        if clock.own:
            own = statistics.median(clock.own[4:])
            line += f"  wrapper {1e3 * own:6.3f} ms = {100 * own / base:4.1f} % of a dynamo step"
        print(line, flush=True)


if __name__ == "__main__":
    main()

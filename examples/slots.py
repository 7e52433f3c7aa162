"""Requests come and go while others decode, each in a row of one packed cache. Random weights, a minute on a CPU.

    python examples/slots.py
    python examples/slots.py --rows 4 --requests 12

A small Llama with the 2-bit cache gets prompts of unequal length at random times; each line says who came and who left.
That each got the tokens that it gets alone is asserted: a window of 64 tokens keeps all of these at 16 bits.
"""

from __future__ import annotations

import argparse
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import akvq_fx

CONFIG = LlamaConfig(
    vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--requests", type=int, default=8)
    given = parser.parse_args()
    torch.manual_seed(0)
    draw, model = random.Random(0), LlamaForCausalLM(CONFIG).eval()
    prompts = [torch.randint(3, 200, (1, draw.randint(4, 30))) for _ in range(given.requests)]
    options = [{"max_new_tokens": draw.randint(2, 24), "do_sample": False} for _ in prompts]
    alone = [
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0, prompt.shape[1] :].tolist()
        for prompt, how in zip(prompts, options, strict=True)
    ]

    model.compile(backend="akvq", options={"inner": "eager"})  # without options: slower to compile, faster to run
    slots = akvq_fx.Slots(model, rows=given.rows, chunk=16)
    numbers, step = {}, 0
    while len(numbers) < len(prompts) or len(slots):
        while len(numbers) < len(prompts) and len(slots) < slots.rows and draw.random() < 0.3:
            number = len(numbers)
            numbers[slots.insert({"input_ids": prompts[number]}, **options[number])] = number
            print(f"step {step:3}: request {number} comes with {prompts[number].shape[1]} tokens")
        for handle in slots.step():
            if handle.done:
                print(f"step {step:3}: request {numbers[handle]} has its {len(handle.tokens)} tokens and leaves")
        step += 1
    assert [handle.tokens for handle in numbers] == alone
    wanted = sum(map(len, alone))
    print(f"{wanted} tokens in {step} steps; each request got what it gets alone")


if __name__ == "__main__":
    main()

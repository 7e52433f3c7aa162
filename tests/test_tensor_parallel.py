"""Tensor parallel: two processes (gloo, CPU) share a model's weights, and each packs the cache of its own heads.

The processes start once and run every case in turn; the tests read what they wrote. The models that they are compared
with run in this process, on the same weights.
"""

import os
import sys

import pytest
import torch
from torch import nn

import akvq_fx
from akvq_fx import PackedKV
from tests.attention_models import Attention, Decoder, Direct, roll, token_ids

if not torch.distributed.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)

RANKS = 2
LOSSLESS = {"inner": "eager", "body_bits": 16}
TWO_BITS = {"inner": "eager", "window": 4, "pivots": 3}
BATCHES = (1, 3, 2)


class Biased(Attention):
    bias = True


class InPieces(Direct):
    """Keys and values stay what the projections give."""

    def split_heads(self, x, count):
        return x.unflatten(2, (count, self.dim)).transpose(1, 2)


# what runs in each of the two processes


def rank_main(rank: int, folder: str) -> None:
    """Every case; what came of it goes to a file."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({name: str(number) for name, number in here.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS,
        timeout=torch.distributed.default_pg_timeout,
    )  # fmt: skip
    found = {
        "lossless": generated(from_pretrained(folder), LOSSLESS),
        "two bits": generated(from_pretrained(folder), TWO_BITS),
        "native": rolled(shared_out(Decoder(Biased)), {**TWO_BITS, "value_rotation": "fold"}),
        "other half": continued_on_another_half(rank),
        "pieces": rolled(shared_out(Decoder(InPieces), use_local_output=False), TWO_BITS),
    }
    torch.save(found, f"{folder}/rank{rank}")
    torch.distributed.barrier()
    found = after_a_death(rank)
    torch.save(found, f"{folder}/rank{rank}_left")
    os._exit(0)  # gloo waits for the other process otherwise


def from_pretrained(folder: str):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto")


def generated(model, options: dict) -> dict:
    """Tokens of several batch sizes in a row, the bytes of their caches, and the report."""
    from tests.zoo import ZOO

    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    model.compile(backend="akvq", options=options)
    ids, bytes_held, packed = [], [], True
    for batch in BATCHES:
        out = model.generate(**ZOO["llama"](batch=batch)[1], max_new_tokens=6, return_dict_in_generate=True)
        ids.append(out.sequences)
        stats = akvq_fx.cache_stats(out.past_key_values)
        bytes_held.append(stats.packed_bytes)
        packed &= not stats.plain_tensors
    return {"ids": ids, "bytes": bytes_held, "packed": packed, "report": str(akvq_fx.report(model))}


def shared_out(model: Decoder, **columns) -> Decoder:
    """PyTorch's own plan of a decoder: whole heads on each process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (RANKS,))
    plan = {f"{name}_proj": ColwiseParallel(**columns) for name in "qkv"} | {"o_proj": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer.attention, mesh, plan)
        if not columns:  # else sizes are those of the whole
            layer.attention.heads //= RANKS
            layer.attention.kv_heads //= RANKS
    return model


def rolled(model: Decoder, options: dict) -> dict:
    plain, _ = roll(model, prompt=24)
    run = torch.compile(model, backend="akvq", options=options)
    logits, cache = roll(run, prompt=24)
    return {
        "plain": [part(x) for x in plain],
        "logits": [part(x) for x in logits],
        "types": {type(x).__name__ for pair in cache for x in pair},
        "report": str(akvq_fx.report(model)),
    }

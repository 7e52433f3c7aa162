"""Tensor parallel: two processes (gloo, CPU) share a model's weights, and each packs the cache of its own heads.

The processes start once and run every case in turn; the tests read what they wrote. The models that they are compared
with run in this process, on the same weights.
"""

import os
import sys
from datetime import timedelta

import pytest
import torch

import akvq_fx
from akvq_fx import PackedKV
from tests.attention_models import Attention, Decoder, Direct, NoRope, roll, token_ids

if not torch.distributed.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)

RANKS = 2
LOSSLESS = {"inner": "eager", "body_bits": 16}
TWO_BITS = {"inner": "eager", "window": 4, "pivots": 3}
COMPILED = {**TWO_BITS, "inner": "aot_eager"}  # like layers are shared
BATCHES = (1, 3, 2)


class Biased(Attention):
    bias = True


class InPieces(NoRope, Direct):
    """Keys and values stay what the projections give, DTensors; PyTorch shares out no attention call on a CPU."""

    kv_heads = Attention.heads

    def attend(self, q, k, v, mask):
        return torch.softmax(q @ k.transpose(-1, -2) * self.dim**-0.5, -1) @ v


# what runs in each of the two processes


def rank_main(rank: int, folder: str) -> None:
    """Every case; what came of it goes to a file."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({name: str(number) for name, number in here.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300)
    )
    found = {
        "lossless": generated(from_pretrained(folder), LOSSLESS, BATCHES[1:2]),
        "two bits": generated(from_pretrained(folder), TWO_BITS),
        "native": rolled(shared_out(Decoder(Biased, layers=3)), COMPILED),
        "captured": captured(shared_out(Decoder(Biased, layers=3))),
        "pieces": rolled(shared_out(Decoder(InPieces), use_local_output=False), TWO_BITS),
    }
    torch.save(found, f"{folder}/found{rank}")
    torch.save(other_half_and_death(rank, folder), f"{folder}/errors{rank}")
    os._exit(0)  # nothing of gloo's can be shut down properly now


def from_pretrained(folder: str):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto")


def generated(model, options: dict | None, batches=BATCHES) -> dict:
    """Tokens of several batch sizes in a row, the bytes of their caches, and the report's rows of layers.

    options    None: the model is not compiled
    """
    from tests.zoo import ZOO

    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    if options is not None:
        model.compile(backend="akvq", options=options)
    ids, bytes_held, packed = [], [], True
    for batch in batches:
        out = model.generate(**ZOO["llama"](batch=batch)[1], max_new_tokens=6, return_dict_in_generate=True)
        ids.append(out.sequences)
        stats = akvq_fx.cache_stats(out.past_key_values)
        bytes_held.append(stats.packed_bytes)
        packed &= not stats.plain_tensors
    rows = [line for line in str(akvq_fx.report(model)).splitlines() if line[:1].isdigit()]
    return {"ids": ids, "bytes": bytes_held, "packed": packed, "rows": rows}


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
    """Logits uncompiled and compiled, the compiled one's cache, and the report."""
    plain, _ = roll(model, prompt=24)
    logits, cache = roll(torch.compile(model, backend="akvq", options=options), prompt=24)
    types = {type(x).__name__ for pair in cache for x in pair}
    return {"plain": plain, "logits": logits, "types": types, "report": str(akvq_fx.report(model))}


def captured(model: Decoder) -> dict:
    """As `rolled`, with steps that a recorder in place of CUDA's captures."""
    from akvq_fx import backend
    from tests.test_cuda_graph import Rerun

    split_decode = sys.modules["akvq_fx.passes.split_decode"]  # of the package, that name is the pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "recorder_for", lambda device, counts: Rerun())
        patch.setattr(split_decode, "is_captured", lambda state: True)
        return rolled(model, COMPILED)


def told(function) -> str:
    """The error that a call ends with, "" for none."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def other_half_and_death(rank: int, folder: str) -> dict:
    """The errors of a step over the other process's file, and of one that the other process does not live to join."""
    run = torch.compile(shared_out(Decoder()), backend="akvq", options=TWO_BITS)
    found, ids = {}, token_ids(1, 26)
    with torch.no_grad():
        ((keys, values),) = run(ids[:, :24])[1]
        PackedKV.save({"keys": keys, "values": values}, f"{folder}/cache{rank}")
        torch.distributed.barrier()
        for name, owner in (("mine", rank), ("the other's", 1 - rank)):
            cache = PackedKV.load(f"{folder}/cache{owner}")
            found[name] = told(lambda cache=cache: run(ids[:, 24:25], ((cache["keys"], cache["values"]),)))
            torch.distributed.barrier()
        if rank == 1:
            os._exit(3)
        found["alone"] = told(lambda: run(ids[:, 24:25], ((keys, values),)))
    return found


# what the tests read


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, results of one process): the processes run while this one does the same alone."""
    transformers = pytest.importorskip("transformers")
    from tests import zoo

    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "LAYERS", 1)
        model, _ = zoo.ZOO["llama"]()
    model.save_pretrained(folder / "model")
    ranks = torch.multiprocessing.spawn(rank_main, (str(folder),), RANKS, join=False)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    try:
        found = {"two bits": generated(load(), TWO_BITS), "native": rolled(Decoder(Biased, layers=3), TWO_BITS)}
        found["lossless"] = generated(load(), None, BATCHES[1:2])
        for process in ranks.processes:
            process.join(timeout=600)
    finally:
        for process in ranks.processes:
            process.kill()
    return folder, found


@pytest.fixture(scope="module", params=range(RANKS))
def both(request, alone):
    """(results of one of the processes, results of one process alone)"""
    folder, found = alone
    return torch.load(folder / f"found{request.param}", weights_only=False), found


def test_lossless_tokens_are_those_of_the_uncompiled_model_of_one_process(both):
    mine, alone = (side["lossless"] for side in both)
    assert mine["packed"]
    assert all(map(torch.equal, mine["ids"], alone["ids"]))


def test_each_process_packs_its_own_heads(both):
    mine, alone = (side["two bits"] for side in both)
    assert mine["packed"] and alone["packed"]
    assert all(map(torch.equal, mine["ids"], alone["ids"]))
    # classes, positions and the state are the same on both; of four times as many codes they are nothing
    assert all(0.5 <= a / b < 0.6 for a, b in zip(mine["bytes"], alone["bytes"], strict=True))


def test_the_report_is_that_of_one_process_but_for_the_heads(both):
    mine, alone = (side["two bits"]["rows"] for side in both)
    assert len(mine) == 2 and mine == [row.replace("4:2", "2:1") for row in alone]


def test_pytorchs_own_plan_packs(both):
    mine, alone = (side["native"] for side in both)
    assert mine["types"] == {"PackedKV"}
    assert "each kind compiled once" in mine["report"]
    for a, b in zip(mine["logits"], alone["logits"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_steps_are_captured_over_weights_that_processes_share(both):
    mine, alone = both[0]["captured"], both[1]["native"]
    assert "1 CUDA graphs captured" in mine["report"] and "steps replayed" in mine["report"], mine["report"]
    for a, b in zip(mine["logits"], alone["logits"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_attention_over_dtensors_stays_as_it_is(both):
    pieces = both[0]["pieces"]
    assert pieces["types"] == {"DTensor"}
    assert "DTensor, accepted" in pieces["report"]
    for a, b in zip(pieces["logits"], pieces["plain"], strict=True):
        torch.testing.assert_close(a, b)


def test_a_file_is_continued_by_the_process_that_saved_it_and_no_other(alone):
    found = torch.load(alone[0] / "errors0")
    assert not found["mine"]
    assert "made by other weights" in found["the other's"]


def test_a_process_that_dies_is_an_error_of_the_next_step(alone):
    assert torch.load(alone[0] / "errors0")["alone"].startswith("RuntimeError")

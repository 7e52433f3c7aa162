"""One model over the GPUs of a host: tokens a second and bytes a rank, beside transformers' own caches.

    torchrun --nproc-per-node 2 benchmarks/speed/tensor_parallel.py --model llava-1.5-7b [--layers N] [--batch 1]
        [--images 4] [--text 64] [--tokens-out 128] [--peer dynamic,static,akvq] [--rows FILE]
    python benchmarks/speed/tensor_parallel.py --table FILE...
    torchrun --nproc-per-node 2 benchmarks/speed/tensor_parallel.py --tiny

Projections of the language model are shared out by torch.distributed.tensor.parallel (whole heads on each rank); the
rest is on every rank. All ranks draw the same random weights. With one process nothing is shared out, which gives the
row to compare with. Every peer generates three times: the first call compiles, the second captures, the third counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path

import torch
from generate import GB, PEERS
from timing import Table, finish, peers_asked_for, reason_of, wait
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from vision_models import MODELS, build, prompt

import akvq_fx

COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def share_out(model, device: torch.device, ranks: int) -> None:
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in model.model.language_model.layers:
        names = [name for name, _ in layer.named_modules()]
        of = lambda kinds, style, names=names: {n: style() for n in names if n.rsplit(".", 1)[-1] in kinds}
        parallelize_module(layer, mesh, of(COLUMNS, ColwiseParallel) | of(ROWS, RowwiseParallel))


def measure(args, peer: str, device: torch.device, ranks: int) -> dict:
    model, image = build(args.model, args.layers, args.tiny, device)
    if ranks > 1:
        share_out(model, device, ranks)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    inputs = prompt(image, args.batch, args.images, args.text, model.config.text_config.vocab_size, device, model.dtype)
    how = {"static": {"cache_implementation": "static"}}.get(peer, {})
    if peer == "akvq":
        model.compile(backend="akvq")
    elif peer == "inductor":
        model.compile()
    found = {"prompt": inputs["input_ids"].shape[1], "peer": peer}
    for call in ("first", "second", "third"):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            weights = torch.cuda.memory_allocated()
        wait(device)
        begin = time.perf_counter()
        out = model.generate(**inputs, **how, max_new_tokens=args.tokens_out, return_dict_in_generate=True)
        wait(device)
        found[f"{call}_s"] = time.perf_counter() - begin
    found["tokens_s"] = args.batch * args.tokens_out / found["third_s"]
    if device.type == "cuda":
        found["peak_gb"] = (torch.cuda.max_memory_allocated() - weights) / GB
    stats = akvq_fx.cache_stats(out.past_key_values)
    found["cache_gb"] = (stats.packed_bytes + stats.plain_bytes) / GB
    if peer == "akvq":
        found["report"] = str(akvq_fx.report(model))
    found["tokens"] = out.sequences[0, -args.tokens_out :].tolist()
    return found


def tables(rows: list[dict]) -> list[Table]:
    table = Table(
        "one model over the GPUs of a host",
        ["model", "layers", "GPUs", "cache", "batch", "prompt", "first generate s", "tokens/s", "cache GB a rank",
         "peak above weights GB a rank", "note"],
    )  # fmt: skip
    for row in rows:
        shown = lambda name, form, row=row: format(row[name], form) if name in row else ""
        table.add(
            MODELS[row["model"]][0], row["layers"] or "all", row["ranks"], PEERS[row["peer"]], row["batch"],
            shown("prompt", ","), shown("first_s", ".1f"), shown("tokens_s", ".1f"),
            shown("cache_gb", ".3f"), shown("peak_gb", ".2f"), row.get("error", ""),
        )  # fmt: skip
    return [table]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llava-1.5-7b")
    parser.add_argument("--layers", type=int)
    for name, default in (("--batch", 1), ("--images", 4), ("--text", 64), ("--tokens-out", 128)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--peer", default="dynamic,akvq")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", help="file that rows are added to, as JSON lines")
    parser.add_argument("--table", nargs="+", help="print the table of such files")
    args = parser.parse_args(given)
    if args.table:
        rows = [json.loads(line) for path in args.table for line in Path(path).read_text().splitlines()]
        print("\n".join(table.markdown() for table in tables(rows)))
        return
    peers = peers_asked_for(parser, args.peer, PEERS)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpus = torch.cuda.is_available() and not args.tiny
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if ranks > 1:
        distributed.init_process_group("nccl" if on_gpus else "gloo")
    rows = []
    for peer in peers:
        row = {"model": args.model, "layers": args.layers, "ranks": ranks, "batch": args.batch, "peer": peer}
        try:
            row |= measure(args, peer, device, ranks)
        except Exception as error:
            row["error"] = reason_of(error)
        rows.append(row)
        if rank == 0 and args.rows:
            with open(args.rows, "a") as file:
                file.write(json.dumps(row) + "\n")
    if rank == 0:
        finish(tables(rows), device, None)
    if ranks > 1:
        distributed.barrier()
        torch._dynamo.reset()  # CUDA graphs with collectives in them would keep the processes from leaving
        gc.collect()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()

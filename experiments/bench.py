"""How fast it is: training, generation, preparing data; each figure of the README's speed comes from here.

    python -m experiments.bench                                   # training and generation, at this machine's shapes
    python -m experiments.bench --shapes 182m:16384 182m:65536    # scale:tokens per step
    python -m experiments.bench --parts roofline                  # no GPU: where a step on an H100 would spend its time
    python -m experiments.bench --parts prepare                   # prepare_pile.py against tiktoken alone
    python -m experiments.bench --parts transformers              # against Mixtral and OLMoE: pip install transformers

What is compared takes turns, round by round, in one process, so that a machine whose speed drifts slows all alike.
Ratios are taken within a round. Medians, with the quartiles as spread.
"""

import collections
import contextlib
import ctypes
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from command import BadInput, run_command
from experiments.common import ExperimentParser, at_least, machine, markdown, save
from experiments.fake_gpu import GATHERS, SCATTERS, SORTS, WHY_NOT, fake_gpu
from prepare_pile import get_tokenizer, prepare, standard_library_files
from train import Settings, autocast, find_device, keep_freed_memory, peak_flops, shard, whole
from unipool import ARCHS, SCALES, UniPool, UniPoolConfig

# LxM:tokens is a model of L layers and M experts, of width 256, hidden width 1024 and context 256.
CPU_SHAPES = ["tiny:2048", "tiny:4096", "tiny:8192", "12x96:2048", "12x96:8192", "24x192:2048"]
GPU_SHAPES = [f"{scale}:{tokens}" for scale in ("182m", "469m") for tokens in (16384, 32768, 65536)]
WARM_UP = 2  # rounds that do not count
MIN_ROUNDS = 5
COLOURS = {"unipool": "tab:blue", "unipool, autograd": "lightsteelblue", "unipool, locked": "crimson",
           "vanilla": "tab:orange", "dense": "tab:gray"}  # fmt: skip


def compare(functions, args, label, amount, unit, against):
    """{name: figures} of {name: function}, which take turns until --steps rounds or --seconds are over.

    The figures are quartiles over the rounds: seconds of a call, units per second, of which a call does `amount`, and
    how many times as fast it is as each function named in `against`. A function that returns a number has timed itself.
    """
    seconds = {name: [] for name in functions}
    start = time.perf_counter()
    for i in tqdm(range(args.steps + WARM_UP), desc=label, unit="round", leave=False):
        if i >= WARM_UP + MIN_ROUNDS and time.perf_counter() - start > args.seconds:
            break
        for name, function in functions.items():
            began = time.perf_counter()
            own = function()
            if i >= WARM_UP:
                seconds[name].append(own or time.perf_counter() - began)
    figures = {}
    for name, own in seconds.items():
        figures[name] = {"rounds": len(own), "seconds": quartiles(own),
                         f"{unit} per second": quartiles([amount / s for s in own])}  # fmt: skip
        for other in [other for other in against if other in seconds]:
            figures[name][f"times {other}"] = quartiles([o / s for s, o in zip(own, seconds[other])])
    return figures


def quartiles(values):
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3


def table(results):
    """{what: {name: {figure: quartiles, a number, a text or None}}} as Markdown, a column for each figure."""

    def show(value):
        if value is None or isinstance(value, (str, int)):
            return str(value or "")
        if isinstance(value, list):
            low, median, high = map(show, value)
            return f"{median} ({low} to {high})"
        digits = 2 - math.floor(math.log10(abs(value) or 1))  # after the point, for three that count
        return f"{value:,.{max(0, digits)}f}"

    found = [(what, name, f) for what, group in results.items() for name, f in group.items()]
    heads = list(dict.fromkeys(head for _, _, f in found for head in f))
    return markdown(["", "", *heads], [[what, name, *(show(f.get(head)) for head in heads)] for what, name, f in found])


def wait(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(function):
    """MiB that this process uses at the most while function() runs, beyond those before it. On Linux only."""

    def status(name):
        return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and would not ask for more
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def prepare_training(config, device, mesh=None):
    """(model, optimizer) as train.py makes them, sharded over a mesh of processes if there is one."""
    with torch.device(device):
        model = UniPool(config)
    model.rope = model.rope.to(device)  # made on the CPU; not .to() for all, which fake tensors forbid
    if mesh is not None:
        shard(model, device, mesh)
    betas = (Settings.beta1, Settings.beta2)
    return model, model.configure_optimizer(Settings.lr, Settings.weight_decay, betas, Settings.adam_eps)


def training_step(model, optimizer, idx, micro_batches=1, begin=lambda phase: None):
    """One step as train.py makes it, of several processes one's part; returns the mean cross-entropy and balance loss.

    idx: (B, T + 1) tokens, which each micro-batch takes anew. begin: told "forward", "backward", "optimizer" in time.
    Without an optimizer (None) the gradients are made and forgotten.
    """
    losses, routing = torch.zeros(2, device=idx.device), 0.0
    for i in range(micro_batches):
        last = i == micro_batches - 1
        begin("forward")
        if hasattr(model, "set_reshard_after_backward"):
            model.set_reshard_after_backward(last)
        with autocast(idx.device):
            out = model(idx[:, :-1], idx[:, 1:], keep_logits=False)
            loss = out.loss + model.config.balance_coef * out.balance_loss
        begin("backward")
        (loss / micro_batches).backward()
        losses += torch.stack([out.loss.detach(), out.balance_loss.detach()]) / micro_batches
        routing = routing + torch.stack([out.usage, out.mean_scores.detach()]) / micro_batches
        for pool in model.pools:
            pool.keep_copies = not last
    begin("optimizer")
    if optimizer is None:
        model.zero_grad()
        return losses
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), Settings.grad_clip))
    optimizer.found_inf = (~(losses.sum() + norm).isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return losses


# ----------------------------------------------------------------------------------------------------------------------
# The parts: each returns results as table() takes them


def config_of(shape, arch):
    """(UniPoolConfig, tokens per step) of "182m:16384" or "12x96:2048". Raises BadInput."""
    name, _, tokens = shape.partition(":")
    try:
        if name in SCALES:
            config = UniPoolConfig.from_scale(name, arch)
        else:
            n_layer, n_expert = map(int, name.split("x"))
            config = UniPoolConfig.from_scale("tiny", arch, n_layer=n_layer, n_embd=256, n_hidden=1024, block_size=256,
                                              n_expert=n_expert if arch != "dense" else 0)  # fmt: skip
        if int(tokens) < 1 or int(tokens) % config.block_size:
            raise ValueError(f"not whole sequences of {config.block_size}")
    except ValueError as error:
        raise BadInput(f"--shapes={shape} must be as tiny:2048 (tokens) or 12x96:2048: {error}") from None
    return config, int(tokens)


def make_step(shape, arch, device, gradients_only):
    """(model, a function that makes a training step of one micro-batch in one of COLOURS' variants) at one shape."""
    config, tokens = config_of(shape, arch)
    torch.manual_seed(0)
    model, optimizer = prepare_training(config, device)
    compiled = torch.compile(model) if device.type == "cuda" else model
    idx = torch.randint(config.vocab_size, (tokens // config.block_size, config.block_size + 1), device=device)
    layers, experts = torch.arange(config.n_layer, device=device), torch.arange(config.n_expert, device=device)
    own = experts % config.n_layer == layers[:, None]  # (L, M)

    def step(variant):
        model.one_pass = "autograd" not in variant
        if arch == "unipool":
            model.lock(own if "locked" in variant else torch.ones_like(own), progress=1)
        training_step(compiled, None if gradients_only else optimizer, idx)
        wait(device)

    return model, step


def bench_shape(shape, device, args):
    """A training step in each of COLOURS' variants at one shape."""
    gc.collect()  # the models of the shape before
    torch.cuda.empty_cache()
    steps, flops = {}, {}
    for arch in ARCHS:
        with contextlib.suppress(torch.OutOfMemoryError):
            model, step = make_step(shape, arch, device, args.gradients_only)
            for name in [name for name in COLOURS if name.startswith(arch)]:
                with contextlib.suppress(torch.OutOfMemoryError):  # of one variant
                    step(name)
                    steps[name], flops[name] = functools.partial(step, name), model.flops_per_token()
    tokens, peak = config_of(shape, "unipool")[1], peak_flops(device)
    figures = compare(steps, args, shape, tokens, "tokens", ["dense", "vanilla", "unipool, autograd"])
    for name in figures if peak else []:
        figures[name]["MFU"] = figures[name]["tokens per second"][1] * flops[name] / peak
    return {name: figures.get(name, dict(seconds="no room")) for name in COLOURS}


def bench_train(device, args):
    shapes = args.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    for shape, arch in itertools.product(shapes, ARCHS):
        config_of(shape, arch)  # a bad one ends it before the first takes its time
    return {shape: bench_shape(shape, device, args) for shape in shapes}


def draw_train(results, args, about):
    """Speed of each variant as a share of the dense model's, shape by shape."""
    fig = Figure(figsize=(9, 3.8))
    ax = fig.subplots()
    for i, (name, colour) in enumerate(COLOURS.items()):
        xs = np.arange(len(results)) + (i - 2) / 6
        times = [figures[name].get("times dense", [math.nan] * 3) for figures in results.values()]
        low, median, high = np.array(times).T
        bars = ax.bar(xs, median, 0.16, yerr=[median - low, high - median], color=colour, label=name)
        ax.bar_label(bars, fmt="%.2f", label_type="center", fontsize=6)
    ax.set_xticks(range(len(results)), [shape.replace(":", "\n") + " tokens" for shape in results], fontsize=8)
    what = "Forward and backward" if args.gradients_only else "Training step"
    title = f"{what} against the dense twin ({about['gpu'] or about['cpu']})"
    ax.set(ylabel="tokens per second, dense = 1", title=title)
    fig.legend(loc="outside lower center", ncols=5)
    return fig


# Of an H100: what long products reach of its 989e12, and a long copy of its 3.35e12.
FLOPS, BYTES = 800e12, 3.0e12  # a second
KINDS = {"products": "tab:blue", "products, waiting for memory": "lightsteelblue", "attention": "tab:green",
         "rows moved": "tab:red", "elementwise": "tab:gray", "optimizer": "tab:purple"}  # fmt: skip
MOVES = GATHERS | SCATTERS | SORTS | {"masked_fill_", "topk"}


def predicted(variant, tokens, sequences=64):
    """{kind: seconds} of a step of 182m on one H100, not compiled, in micro-batches of so many tokens: each operation
    takes as long as its arithmetic, or as its bytes, whichever is longer.
    """
    config = UniPoolConfig.from_scale("182m", variant.split(",")[0])
    per_micro_batch, seconds = tokens // config.block_size, collections.Counter()
    with fake_gpu(config) as (_, watch):
        model, optimizer = prepare_training(config, torch.device("cuda"))
        model.one_pass = "autograd" not in variant
        watch.pool_share = 1 / config.n_layer if "locked" in variant else 1
        idx = torch.randint(config.vocab_size, (per_micro_batch, config.block_size + 1), device="cuda")
        training_step(model, optimizer, idx)  # makes the optimizer's state
        watch.costs.clear()
        training_step(model, optimizer, idx, sequences // per_micro_batch, watch.begin)
        for (phase, name), costs in watch.costs.items():
            product = name in ("mm", "_grouped_mm")
            kind = ("optimizer" if phase == "optimizer" else "products" if product else "rows moved" if name in MOVES
                    else "attention" if "attention" in name else "elementwise")  # fmt: skip
            for flops, moved in costs:
                seconds[kind] += flops / FLOPS if product else max(flops / FLOPS, moved / BYTES)
                seconds["products, waiting for memory"] += max(0, moved / BYTES - flops / FLOPS) * product
    return {kind: seconds[kind] for kind in KINDS}


def bench_roofline(device, args):
    """Where a step of 64 sequences at 182m would spend its time on an H100."""
    if WHY_NOT or torch.cuda.is_available():
        raise BadInput(f"--parts=roofline: {WHY_NOT or 'here is a GPU: measure'}")
    results = {}
    for tokens in tqdm([2**16, 2**15, 2**14], unit="micro-batch size"):
        steps = {name: predicted(name, tokens) for name in COLOURS}
        total = {name: sum(seconds.values()) for name, seconds in steps.items()}
        results[f"micro-batches of {tokens // 1024} sequences"] = {
            name: {"tokens per second": 2**16 / total[name], "times dense": total["dense"] / total[name]}
            | {f"{kind}, ms": 1e3 * s for kind, s in steps[name].items()} for name in COLOURS}  # fmt: skip
    return results


def draw_roofline(results, args, about):
    fig = Figure(figsize=(9, 4))
    for ax, (title, figures) in zip(fig.subplots(1, len(results), sharex=True, sharey=True), results.items()):
        left = np.zeros(len(figures))
        for kind, colour in KINDS.items():
            widths = [f[f"{kind}, ms"] for f in figures.values()]
            ax.barh(list(figures), widths, left=left, color=colour, label=kind)
            left += widths
        for y, (end, f) in enumerate(zip(left, figures.values())):
            ax.text(end, y, f" {f['times dense']:.2f}", va="center", fontsize=8)
        ax.set(title=title, xlabel="ms per step")
        ax.invert_yaxis()
    ax.set_xlim(right=1.1 * ax.get_xlim()[1])
    fig.suptitle("182m on one H100, PREDICTED from operations and bytes (numbers: speed, dense = 1)", fontsize=10)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def bench_generate(device, args, context=512, new_tokens=32):
    """Tokens after `context` tokens: with the cache, and recomputing the whole context for each of them."""
    scale = "182m" if device.type == "cuda" else "tiny"
    config = UniPoolConfig.from_scale(scale, block_size=1024)
    model = prepare_training(config, device)[0].eval()
    idx = torch.randint(config.vocab_size, (1, context), device=device)

    def cached():
        """Seconds a token, but for the first, which fills the cache."""
        stream = model.stream(idx, new_tokens + 1)
        next(stream)
        wait(device)
        began = time.perf_counter()
        for _ in stream:
            pass
        wait(device)
        return (time.perf_counter() - began) / new_tokens

    def recomputed():
        next(model.stream(idx, 1))
        wait(device)

    figures = compare(dict(cached=cached, recomputed=recomputed), args, "generate", 1, "tokens", ["recomputed"])
    return {f"{scale}, one sequence, after {context} tokens": figures}


def against_transformers(shape, device, args):
    """Forward and backward of our vanilla MoE, and of Hugging Face's models with the same sizes and top-1."""
    import transformers

    config, tokens = config_of(shape, "vanilla")
    sizes = dict(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.block_size, num_experts_per_tok=1, output_router_logits=True,
        experts_implementation="grouped_mm", bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
    M = config.experts_per_pool
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=M)).to(device)
    olmoe = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, num_experts=M)).to(device)
    ours = UniPool(config).to(device)
    idx = torch.randint(config.vocab_size, (tokens // config.block_size, config.block_size + 1), device=device)
    x, y = idx[:, :-1], idx[:, 1:].contiguous()

    def our_loss():
        out = ours(x, y, keep_logits=False)
        return out.loss + config.balance_coef * out.balance_loss

    def their_loss(model):
        return model.train()(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss

    def step(model, loss, *of):
        with autocast(device):
            value = loss(*of)
        value.backward()
        model.zero_grad()
        wait(device)

    theirs = {type(m).__name__: functools.partial(step, m, their_loss, m) for m in (mixtral, olmoe)}
    functions = {"vanilla, ours": functools.partial(step, ours, our_loss)} | theirs
    return compare(functions, args, shape, tokens, "tokens", list(theirs))


def bench_transformers(device, args):
    if importlib.util.find_spec("transformers") is None:
        raise BadInput("--parts=transformers needs a package: pip install transformers")
    shapes = args.shapes or (["182m:8192"] if device.type == "cuda" else ["tiny:4096", "12x96:2048"])
    return {shape: against_transformers(shape, device, args) for shape in shapes}


def bench_prepare(device, args):
    """prepare_pile.py on the standard library as .jsonl: against tiktoken alone, and several workers against one."""
    tokenizer, threads, copies = get_tokenizer("gpt2"), os.cpu_count(), 5
    texts = [Path(f).read_text(encoding="utf-8", errors="replace") for f in standard_library_files()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def alone():
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(tokenizer.encode_ordinary, texts * copies * threads):
                pass

    def prepared(source, workers=threads):
        prepare([f"{folder}/{source}"], Path(folder, "out"), "gpt2", workers=workers, quiet=True)
        shutil.rmtree(f"{folder}/out")

    with tempfile.TemporaryDirectory() as folder:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        Path(folder, "once.jsonl").write_text(lines)
        for i in range(threads):
            Path(folder, f"shard{i}.jsonl").write_text(lines * copies)
        workers = {f"{n} worker(s)": functools.partial(prepared, "shard*.jsonl", n) for n in (1, threads)}
        total = megabytes * copies * threads
        figures = compare({"tiktoken alone": alone} | workers, args, "prepare", total, "MB",
                          ["tiktoken alone", "1 worker(s)"])  # fmt: skip
        sources = {"once.jsonl": megabytes, "shard0.jsonl": megabytes * copies} if sys.platform == "linux" else {}
        for source, size in sources.items():
            figures[f"memory for {size:.0f} MB"] = dict(MiB=peak_memory(functools.partial(prepared, source)))
    return {f"{total:.0f} MB in {threads} files, {threads} threads": figures}


PARTS = dict(train=bench_train, generate=bench_generate, roofline=bench_roofline, transformers=bench_transformers,
             prepare=bench_prepare)  # fmt: skip
PICTURES = dict(train=draw_train, roofline=draw_roofline)


def main(argv=None):
    parser = ExperimentParser(__doc__, "bench")
    parser.add_argument("--parts", nargs="+", default=["train", "generate"], choices=PARTS, help="(train generate)")
    parser.add_argument("--shapes", nargs="+", help="of training: scale:tokens per step, or LxM:tokens (the machine's)")
    parser.add_argument("--gradients_only", action="store_true", help="train: forward and backward, no optimizer")
    parser.add_argument("--steps", type=at_least(1), default=40, help="most timed rounds of each (%(default)s)")
    parser.add_argument("--seconds", type=at_least(0, float), default=60, help="after which rounds end, five at least")
    parser.add_argument("--device", help="cuda, cpu ... (the best there is)")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does
    name, about = args.name, machine(device)  # before results change the working tree, which the commit's name tells
    for part in args.parts:
        results = PARTS[part](device, args)
        pictures = {"": PICTURES[part](results, args, about)} if part in PICTURES else {}
        args.name = f"{name}_{part}" + (f"_{device.type}" if part != "roofline" else "")
        save(args, about, table(results), pictures, results=results)


if __name__ == "__main__":
    run_command(main)

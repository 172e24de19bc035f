"""How fast it is: training, generation, preparing data; each figure of the README comes from here.

    python -m experiments.bench                                   # training and generation, at this machine's shapes
    python -m experiments.bench --shapes 182m:16384 182m:65536    # scale:tokens a step
    python -m experiments.bench --parts prepare                   # prepare_pile.py against tiktoken alone
    python -m experiments.bench --parts save                      # what a checkpoint costs the training loop
    python -m experiments.bench --parts mixtral                   # needs pip install transformers

What is compared takes turns, round by round, in one process, so that a machine whose speed drifts slows all alike.
Ratios are taken within a round. Medians, with the quartiles as spread.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from command import BadInput, Parser, run_command
from prepare_pile import get_tokenizer, prepare, standard_library_files
from train import Settings, autocast, find_device, peak_flops, save_checkpoint, snapshot
from unipool import ARCHS, SCALES, UniPool, UniPoolConfig

HERE = Path(__file__).parent
PARTS = ("train", "generate", "save", "prepare", "mixtral")
# LxM:tokens is a model of L layers and M experts, of width 256, hidden width 1024 and context 256.
CPU_SHAPES = ["tiny:2048", "tiny:4096", "tiny:8192", "12x96:2048", "12x96:8192", "24x192:2048"]
GPU_SHAPES = [f"{scale}:{tokens}" for scale in ("182m", "469m") for tokens in (16384, 32768, 65536)]
WARM_UP = 2  # rounds that do not count
MIN_ROUNDS = 5
COLOURS = {"unipool": "tab:blue", "unipool, autograd": "lightsteelblue", "vanilla": "tab:orange", "dense": "tab:gray"}


def machine(device):
    """What a figure needs beside it to be worth anything."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = f"{len(models)} x {models[0]}" if models else cpu
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return dict(cpu=cpu, threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__,
                python=platform.python_version(), commit=commit.stdout.strip() or None)  # fmt: skip


def save_result(folder, name, module, argv, about, **contents):
    """Write folder/name.json: the contents, beside the command and the machine (as machine() has it) they come from."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join([f"python -m experiments.{module}", *(sys.argv[1:] if argv is None else argv)])
    path = folder / f"{name}.json"
    path.write_text(json.dumps(dict(command=command, machine=about, **contents), indent=1, default=str) + "\n")
    print(f"\n{path}")


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values):
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3


def spread(values, form):
    low, median, high = values
    return f"{form.format(median)} ({form.format(low)} to {form.format(high)})"


def in_turn(named, args, label):
    """Seconds of each function, one list each, taking turns until --steps rounds or --seconds are over."""
    seconds = {name: [] for name in named}
    start = time.perf_counter()
    for i in tqdm(range(args.steps + WARM_UP), desc=label, unit="round", leave=False):
        if i >= WARM_UP + MIN_ROUNDS and time.perf_counter() - start > args.seconds:
            break
        for name, function in named.items():
            began = time.perf_counter()
            function()
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    return seconds


class PeakMemory:
    """Most bytes in use within `with`, beyond those at its start: the GPU's own count, else the process's, sampled."""

    def __init__(self, device):
        self.device = device

    def resident(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def sample(self):
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self.resident())

    def __enter__(self):
        gc.collect()
        self.bytes = None
        if self.device.type == "cuda":
            self.start = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/statm").exists():
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and would not ask for more
            self.start = self.peak = self.resident()
            self.done = threading.Event()
            self.thread = threading.Thread(target=self.sample)
            self.thread.start()
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
        elif hasattr(self, "done"):
            self.done.set()
            self.thread.join()
            self.bytes = self.peak - self.start


# ----------------------------------------------------------------------------------------------------------------------
# Training


def config_of(shape, arch):
    """(UniPoolConfig, tokens a step) of "182m:16384" or "12x96:2048". Raises BadInput."""
    match = re.fullmatch(r"(\w+):(\d+)", shape)
    if not match or not (match[1] in SCALES or re.fullmatch(r"\d+x\d+", match[1])):
        raise BadInput(
            f"--shapes={shape} must be scale:tokens or LAYERSxEXPERTS:tokens, as {CPU_SHAPES[0]}, 12x96:2048"
        )
    if match[1] in SCALES:
        config = UniPoolConfig.from_scale(match[1], arch)
    else:
        n_layer, n_expert = (int(n) for n in match[1].split("x"))
        experts = {} if arch == "dense" else dict(n_expert=n_expert)
        config = UniPoolConfig.from_scale("tiny", arch, n_layer=n_layer, n_embd=256, n_hidden=1024, block_size=256,
                                          **experts)  # fmt: skip
    if int(match[2]) < 1 or int(match[2]) % config.block_size:
        raise BadInput(f"--shapes={shape}: {match[2]} tokens are not whole sequences of {config.block_size}")
    return config, int(match[2])


def make_step(model, tokens, device, use_compile):
    """A function for a training step (one micro-batch, clipping, AdamW), the optimizer, and the bytes kept by both."""
    config = model.config
    betas = (Settings.beta1, Settings.beta2)
    optimizer = model.configure_optimizer(Settings.lr, Settings.weight_decay, betas, Settings.adam_eps)
    runner = torch.compile(model) if use_compile else model
    idx = torch.randint(config.vocab_size, (tokens // config.block_size, config.block_size + 1), device=device)

    def step():
        with autocast(device):
            out = runner(idx[:, :-1], idx[:, 1:], keep_logits=False)
            loss = out.loss + config.balance_coef * out.balance_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), Settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        wait(device)

    return step, optimizer, 12 * model.num_params()  # fp32 weights and AdamW's two moments


def bench_shape(shape, device, args):
    """{name: figures} of the four variants at one shape; None where there is no room."""
    steps, figures = {}, {}
    for arch in ARCHS:
        config, tokens = config_of(shape, arch)
        torch.manual_seed(0)
        try:
            with torch.device(device):
                model = UniPool(config).to(device)
            step, _, state = make_step(model, tokens, device, args.compile)
            for name, one_pass in [(arch, True)] + ([("unipool, autograd", False)] if arch == "unipool" else []):

                def turn(model=model, step=step, one_pass=one_pass):
                    model.one_pass = one_pass
                    step()

                began = time.perf_counter()
                turn()
                first = time.perf_counter() - began
                with PeakMemory(device) as memory:
                    turn()
                steps[name] = turn
                figures[name] = dict(first_step_seconds=first, flops_per_token=model.flops_per_token(),
                                     peak_bytes=memory.bytes and memory.bytes + state)  # fmt: skip
        except torch.OutOfMemoryError:
            figures[arch] = None
    seconds = in_turn(steps, args, shape)
    peak = peak_flops(device)
    for name in steps:
        f, (low, median, high) = figures[name], quartiles(seconds[name])
        f |= dict(seconds=[low, median, high], tokens_per_second=tokens / median, rounds=len(seconds[name]))
        for other in ("dense", "unipool, autograd"):
            if other in steps:
                f[f"times_{other}"] = quartiles([o / s for o, s in zip(seconds[other], seconds[name])])
        f["mfu"] = peak and tokens / median * f["flops_per_token"] / peak
    return figures


def bench_train(device, args):
    shapes = args.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    for shape in shapes:
        config_of(shape, "unipool")  # before the first of them takes its time
    results = {}
    print("| shape | | ms a step | tokens/s | ratio to dense | against autograd | MFU | peak memory |\n|" + "---|" * 8)
    for shape in shapes:
        results[shape] = bench_shape(shape, device, args)
        for name, f in results[shape].items():
            if f is None:
                print(f"| {shape} | {name} | no room |")
                continue
            against = spread(f["times_unipool, autograd"], "{:.2f}") if name == "unipool" else ""
            print(
                f"| {shape} | {name} | {spread([1e3 * s for s in f['seconds']], '{:,.0f}')} | "
                f"{f['tokens_per_second']:,.0f} | {spread(f['times_dense'], '{:.2f}') if 'times_dense' in f else ''} | "
                f"{against} | {format(f['mfu'], '.1%') if f['mfu'] else ''} | "
                f"{format(f['peak_bytes'] / 2**30, '.2f') + ' GiB' if f['peak_bytes'] else ''} |"
            )
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def draw_train(results, where, path):
    """Speed of each variant as a share of the dense model's, shape by shape."""
    fig, ax = plt.subplots(figsize=(9, 3.8), dpi=150, layout="constrained")
    names = list(COLOURS)
    for i, name in enumerate(names):
        for x, figures in enumerate(results.values()):
            f = figures.get(name)
            if f and "times_dense" in f:
                low, median, high = f["times_dense"]
                ax.bar(x + (i - 1.5) / 5, median, 0.19, color=COLOURS[name], label=name if x == 0 else None,
                       yerr=[[median - low], [high - median]], error_kw=dict(lw=1, ecolor="0.25"))  # fmt: skip
                ax.text(x + (i - 1.5) / 5, 0.02, f"{median:.2f}".lstrip("0"), ha="center", fontsize=7)
    ax.set_xticks(range(len(results)), [shape.replace(":", "\n") + " tokens" for shape in results], fontsize=8)
    ax.set_ylabel("tokens per second, dense = 1")
    ax.set_title(f"Training step against the dense twin ({where})", fontsize=10)
    ax.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def bench_generate(device, args, context=512, new_tokens=32):
    """Tokens a second after `context` tokens: with the cache, and recomputing the whole context for every token."""
    scale = "182m" if device.type == "cuda" else "tiny"
    results, functions = {}, {}
    for arch in ("unipool", "dense"):
        torch.manual_seed(0)
        with torch.device(device):
            model = UniPool(UniPoolConfig.from_scale(scale, arch, block_size=1024)).to(device).eval()
        idx = torch.randint(model.config.vocab_size, (1, context), device=device)

        def cached(model=model, idx=idx):
            stream = model.stream(idx, new_tokens + 1)
            next(stream)  # this one fills the cache
            return stream

        def timed(model=model, idx=idx):
            stream = cached(model, idx)
            wait(device)
            began = time.perf_counter()
            for _ in stream:
                pass
            wait(device)
            return (time.perf_counter() - began) / new_tokens

        def recomputed(model=model, idx=idx):
            began = time.perf_counter()
            for _ in range(3):
                next(model.stream(idx, 1))
            wait(device)
            return (time.perf_counter() - began) / 3

        functions[arch] = (timed, recomputed)
    seconds = {arch: ([], []) for arch in functions}
    for i in tqdm(range(args.steps + 1), desc="generate", unit="round", leave=False):
        for arch, pair in functions.items():
            for function, values in zip(pair, seconds[arch]):
                value = function()
                if i:
                    values.append(value)
    print(f"\n{scale}, one sequence, after {context} tokens\n")
    print("| | tokens/s with the cache | tokens/s recomputing | ratio |\n|---|---|---|---|")
    for arch, (cache, recompute) in seconds.items():
        rates = [quartiles([1 / s for s in values]) for values in (cache, recompute)]
        ratio = quartiles([r / c for c, r in zip(cache, recompute)])
        results[arch] = dict(scale=scale, context=context, cached=rates[0], recomputed=rates[1], ratio=ratio)
        print(f"| {arch} | {spread(rates[0], '{:,.0f}')} | {spread(rates[1], '{:,.0f}')} | {spread(ratio, '{:.1f}')} |")
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def bench_save(device, args):
    """What a checkpoint costs the loop: a copy to CPU memory, then steps beside the thread that writes it."""
    config, tokens = config_of("182m:16384" if device.type == "cuda" else "12x96:2048", "unipool")
    with torch.device(device):
        model = UniPool(config).to(device)
    step, optimizer, state_bytes = make_step(model, tokens, device, args.compile)
    step()
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    tensors = [t for s in (state["model"], *state["optimizer"]["state"].values()) for t in s.values()]

    def copied():
        return [t.detach().to("cpu", copy=True) for t in tensors]

    few = argparse.Namespace(steps=min(5, args.steps), seconds=args.seconds)
    seconds = in_turn(dict(copy=copied, snapshot=lambda: snapshot(model, optimizer, True)), few, "copy")
    quiet, beside, writing = [], [], []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(1) as writer:

        def timed_step(times):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)

        def write(contents):
            began = time.perf_counter()
            save_checkpoint(Path(folder), contents, keep=1, is_best=False)
            writing.append(time.perf_counter() - began)

        for _ in tqdm(range(few.steps), desc="save", unit="round", leave=False):
            for _ in range(3):
                timed_step(quiet)
            future = writer.submit(write, snapshot(model, optimizer, True))
            while not future.done():
                timed_step(beside)
            future.result()
    results = dict(bytes=state_bytes, step=quartiles(quiet), step_while_writing=quartiles(beside),
                   longest_step_while_writing=max(beside), writing=quartiles(writing),
                   **{name: quartiles(values) for name, values in seconds.items()})  # fmt: skip
    shown = {name: spread(results[name], "{:.2f}") for name in ("copy", "snapshot", "writing", "step")}
    print(f"\na checkpoint of {state_bytes / 1e9:.2f} GB, seconds\n")
    print("| bare copy | copy by train.py | a step | a step beside the writing | longest | writing |\n|" + "---|" * 6)
    print(
        f"| {shown['copy']} | {shown['snapshot']} | {shown['step']} | "
        f"{spread(results['step_while_writing'], '{:.2f}')} | {max(beside):.2f} | {shown['writing']} |"
    )
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Preparing data


def bench_prepare(device, args):
    """prepare_pile.py on the standard library as .jsonl: against tiktoken alone, and several workers against one."""
    tokenizer = get_tokenizer("gpt2")
    texts = [Path(f).read_text(encoding="utf-8", errors="replace") for f in standard_library_files()]
    size = sum(len(text.encode()) for text in texts)
    threads = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        memory = {}
        for copies in (1, 5, 12):
            with open(f"{folder}/{copies}.jsonl", "w") as file:
                for _ in range(copies):
                    file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

        def alone():
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(tokenizer.encode_ordinary, texts):
                    pass

        number = 0

        def prepared(source="1.jsonl", workers=threads):
            nonlocal number
            number += 1
            prepare([f"{folder}/{source}"], Path(folder) / f"out{number}", "gpt2", workers=workers, quiet=True)

        seconds = in_turn(dict(alone=alone, prepared=prepared), args, "prepare")
        for i in range(threads):
            os.link(f"{folder}/12.jsonl", f"{folder}/shard{i}.jsonl")
        several = {f"{n}": lambda n=n: prepared("shard*.jsonl", workers=n) for n in (1, threads)}
        few = argparse.Namespace(
            steps=min(3, args.steps), seconds=math.inf
        )  # each long, beside which a start is little
        by_workers = in_turn(several, few, "workers")
        for copies in (1, 5):
            with PeakMemory(torch.device("cpu")) as peak:
                prepared(f"{copies}.jsonl")
            memory[copies * size] = peak.bytes
    rates = {name: quartiles([size / 1e6 / s for s in values]) for name, values in seconds.items()}
    share = quartiles([a / p for a, p in zip(seconds["alone"], seconds["prepared"])])
    print(f"\nGPT-2 tokens from {size / 1e6:.1f} MB of text in {len(texts)} documents, {threads} threads, MB/s\n")
    print("| tiktoken alone | prepare_pile.py | share |\n|---|---|---|")
    print(f"| {spread(rates['alone'], '{:.1f}')} | {spread(rates['prepared'], '{:.1f}')} | {spread(share, '{:.0%}')} |")
    times = quartiles([a / b for a, b in zip(by_workers["1"], by_workers[f"{threads}"])])
    megabytes = 12 * threads * size / 1e6
    median = megabytes / statistics.median(by_workers[f"{threads}"])
    print(
        f"\n{megabytes:.0f} MB in {threads} shards: {threads} workers reach {spread(times, '{:.2f}')} times the speed "
        f"of one, {median:.1f} MB/s"
    )
    for total, peak in memory.items():
        print(f"\nmemory for {total / 1e6:.0f} MB of text: {peak / 2**20:.0f} MiB beyond the start" if peak else "")
    return dict(megabytes=size / 1e6, megabytes_per_second=rates, share=share, peak_bytes=memory,
                workers=threads, times_one_worker=times, megabytes_per_second_of_workers=median)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face's Mixtral


def bench_mixtral(device, args):
    """Forward and backward of our vanilla MoE and of Hugging Face's Mixtral: 6 layers, 8 experts each, top-1."""
    try:
        import transformers
    except ImportError:
        raise BadInput("--parts=mixtral needs transformers: pip install transformers") from None
    shape = dict(n_layer=6, n_embd=256, n_hidden=1024, n_head=4, n_kv_head=2, block_size=256, vocab_size=1024)
    torch.manual_seed(0)
    ours = UniPool(UniPoolConfig.from_scale("tiny", "vanilla", **shape)).to(device)
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=1, max_position_embeddings=256,
        output_router_logits=True)).to(device).train()  # fmt: skip
    idx = torch.randint(1024, (4, 257), device=device)

    def step(model, loss):
        with autocast(device):
            value = loss()
        value.backward()
        model.zero_grad()
        wait(device)

    def our_loss():
        out = ours(idx[:, :-1], idx[:, 1:], keep_logits=False)
        return out.loss + ours.config.balance_coef * out.balance_loss

    def their_loss():
        return theirs(input_ids=idx[:, :-1], labels=idx[:, :-1]).loss

    functions = {"ours": lambda: step(ours, our_loss), "mixtral": lambda: step(theirs, their_loss)}
    seconds = in_turn(functions, args, "mixtral")
    rates = {name: quartiles([4 * 256 / s for s in values]) for name, values in seconds.items()}
    ratio = quartiles([m / o for o, m in zip(seconds["ours"], seconds["mixtral"])])
    parameters = {"ours": ours.num_params(), "mixtral": sum(p.numel() for p in theirs.parameters())}
    print(f"\nforward and backward, 4 x 256 tokens, transformers {transformers.__version__}, parameters {parameters}\n")
    print("| our vanilla, tokens/s | Mixtral, tokens/s | ours is faster by |\n|---|---|---|")
    print(f"| {spread(rates['ours'], '{:,.0f}')} | {spread(rates['mixtral'], '{:,.0f}')} | {spread(ratio, '{:.2f}')} |")
    return dict(transformers=transformers.__version__, tokens_per_second=rates, ratio=ratio, parameters=parameters)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS[:2], choices=PARTS, help="what to time (train generate)")
    parser.add_argument("--shapes", nargs="+", help="of training: scale:tokens a step, or LxM:tokens (the machine's)")
    parser.add_argument("--steps", type=int, default=40, help="most timed rounds of each (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="after which rounds end, at five or more (%(default)s)"
    )
    parser.add_argument("--device", help="cuda, cpu ... (the best there is)")
    parser.add_argument("--compile", action="store_true", help="torch.compile (always on a GPU)")
    parser.add_argument("--results", default=HERE / "results", help="folder for JSON and picture; empty for none")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise BadInput(f"--steps={args.steps} must be at least 1")
    device = find_device(args.device)
    args.compile = args.compile or device.type == "cuda"

    about = machine(device)  # before results change the working tree, which the commit's name tells
    runs = dict(train=bench_train, generate=bench_generate, save=bench_save, prepare=bench_prepare,
                mixtral=bench_mixtral)  # fmt: skip
    for part in args.parts:
        results = runs[part](device, args)
        if not str(args.results):
            continue
        name = f"bench_{part}_{device.type}"
        save_result(args.results, name, "bench", argv, about, results=results)
        if part == "train":
            where = about["gpu"] or about["cpu"]
            draw_train(results, where, Path(args.results) / f"{name}.png")


if __name__ == "__main__":
    run_command(main)

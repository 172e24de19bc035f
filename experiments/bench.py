"""Training speed of unipool, vanilla and dense side by side.

    python -m experiments.bench                     # --scale=tiny on this machine
    python -m experiments.bench --scale=182m --batch_size=16 --device=cuda

The three take turns, step by step, in one process, so that a machine whose speed drifts slows all of them alike.
A step is forward, backward, clipping and AdamW on random tokens. Medians, with the quartiles as spread.
"""

import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from tqdm import tqdm

from prepare_pile import Parser, run_command
from train import LARGEST_MICRO_BATCH, Settings, autocast, find_device
from unipool import ARCHS, SCALES, UniPool, UniPoolConfig

HERE = Path(__file__).parent


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


def make_step(config, batch_size, device):
    """A function that makes one training step of a new model and waits for it."""
    torch.manual_seed(0)
    with torch.device(device):
        model = UniPool(config).to(device)
    betas = (Settings.beta1, Settings.beta2)
    optimizer = model.configure_optimizer(Settings.lr, Settings.weight_decay, betas, Settings.adam_eps)
    idx = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=device)

    def step():
        with autocast(device):
            out = model(idx[:, :-1], idx[:, 1:])
            loss = out.loss + config.balance_coef * out.balance_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), Settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--scale", default="tiny", choices=SCALES, help="(%(default)s)")
    parser.add_argument("--batch_size", type=int, default=LARGEST_MICRO_BATCH, help="sequences a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each (%(default)s)")
    parser.add_argument("--device", help="cuda, cpu ... (the best there is)")
    parser.add_argument("--results", default=HERE / "results" / "bench.json", help="JSON to write; empty for none")
    args = parser.parse_args(argv)
    device = find_device(args.device)

    configs = {arch: UniPoolConfig.from_scale(args.scale, arch) for arch in ARCHS}
    steps = {arch: make_step(config, args.batch_size, device) for arch, config in configs.items()}
    seconds = {arch: [] for arch in ARCHS}
    for i in tqdm(range(args.steps + 3), unit="round", desc="bench"):
        for arch, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:  # the first rounds warm up
                seconds[arch].append(time.perf_counter() - start)

    tokens = args.batch_size * configs["dense"].block_size
    results = {}
    print(f"{args.scale}, {tokens} tokens a step, {args.steps} steps each\n")
    print("| arch | ms a step | quartiles | tokens/s | ratio to dense | quartiles |\n|---|---|---|---|---|---|")
    for arch in ARCHS:
        low, median, high = statistics.quantiles(seconds[arch], n=4)
        # The ratio is taken round by round: both sides of it were timed in the same second.
        ratios = statistics.quantiles([d / s for d, s in zip(seconds["dense"], seconds[arch])], n=4)
        results[arch] = dict(seconds=[low, median, high], tokens_per_second=tokens / median, ratio_to_dense=ratios)
        print(
            f"| {arch} | {1e3 * median:.0f} | {1e3 * low:.0f} to {1e3 * high:.0f} | {tokens / median:,.0f} | "
            f"{ratios[1]:.2f} | {ratios[0]:.2f} to {ratios[2]:.2f} |"
        )
    if str(args.results):
        record = dict(
            scale=args.scale, tokens_per_step=tokens, steps=args.steps, machine=machine(device), results=results
        )
        Path(args.results).parent.mkdir(exist_ok=True)
        Path(args.results).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)

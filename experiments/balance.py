"""What balance_coef does to a pool under NormRouter, at tiny: how evenly it is used, how many pairs no expert serves,
and the validation loss; each with f as it is here, and with the phantom load of pairs whose gate is 0 counted in f.

    python -m experiments.balance --jobs 2
    python -m experiments.balance --coefs 0.01 0.1 --seeds 1 --max_steps=100 --runs=runs/short --results=

Flags that are not listed below go to train.py. A run that is done is not trained again.
"""

import statistics
from multiprocessing import get_context
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import train
import unipool
from command import BadInput, Parser, run_command
from experiments.ablate import read_record, write_record
from experiments.bench import machine, save_result
from experiments.compare import read_metrics, spread
from experiments.probe import Statistics, WatchedRouter, evaluate
from prepare_pile import TokenData, read_meta

HERE = Path(__file__).parent
WAYS = {False: ("f of served pairs", "tab:blue"), True: ("with phantom load in f", "tab:red")}
FIGURES = {"utilisation": "pool utilisation", "unserved": "pairs that no expert serves",
           "loss": "validation loss, nats a byte"}  # fmt: skip
pool_ffn = unipool.pool_ffn


def with_phantom_load(x, gates, experts, weights):
    """pool_ffn with every pair in f, also those that no expert serves: on whatever expert topk names for a tie."""
    y, f = pool_ffn(x, gates, experts, weights)
    return y, experts.flatten().bincount(minlength=len(f)) / experts.numel()


def run(job):
    """Train one run if it is not done, and measure it on validation data: {"utilisation", "unserved", "loss", ...}."""
    folder, phantom, threads, tokens, flags = job
    torch.set_num_threads(threads)
    record = read_record(folder) or dict(flags=flags, machine=machine(torch.device("cpu")), done=False)
    if record["flags"] != flags:
        raise BadInput(f"{folder}: this run was made by other flags: give another --runs, or delete it")
    if not record["done"]:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, record)
        unipool.pool_ffn = with_phantom_load if phantom else pool_ffn
        resume = ["--resume"] if (folder / "ckpt.pt").exists() else []
        train.main([*flags, f"--out_dir={folder}", *resume])
        unipool.pool_ffn = pool_ffn
        write_record(folder, record | dict(done=True))
    checkpoint = train.load_checkpoint(folder / "ckpt.pt")
    model = train.load_model(checkpoint, folder, torch.device("cpu")).eval()
    data_dir, config = checkpoint["settings"]["data_dir"], model.config
    data = TokenData(data_dir, "val", read_meta(data_dir, config.vocab_size), config.block_size, config.vocab_size)
    for block in model.blocks:
        block.router = WatchedRouter(block.router)
    found, indices = Statistics(config, torch.device("cpu")), train.validation_indices(data, tokens)
    loss, _ = evaluate(model, data, indices, torch.device("cpu"), tqdm(disable=True), found)
    figures = found.summary() | dict(loss=loss, sigma=[block.router.router.sigma.item() for block in model.blocks])
    figures["logged_utilisation"] = read_metrics(folder)[-1]["pool_utilisation"]  # of the training step, by its own f
    figures["trained_at"] = record["machine"]["commit"]
    return figures | dict(unserved=statistics.fmean(figures["unserved"]), unserved_by_layer=figures["unserved"])


def table(results, coefs):
    lines = ["| balance_coef | f | " + " | ".join(FIGURES.values()) + " |", "|---|" + "---|" * (1 + len(FIGURES))]
    for coef in coefs:
        for phantom, (name, _) in WAYS.items():
            cells = [spread([f[key] for f in results[coef, phantom].values()], "{:.3f}" if key == "loss" else "{:.0%}")
                     for key in FIGURES]  # fmt: skip
            lines.append(f"| {coef:g} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results, coefs, path):
    fig, axes = plt.subplots(1, len(FIGURES), figsize=(10, 3.3), dpi=150, layout="constrained")
    for ax, (key, name) in zip(axes, FIGURES.items()):
        for phantom, (label, colour) in WAYS.items():
            values = [[f[key] for f in results[coef, phantom].values()] for coef in coefs]
            ax.plot([statistics.fmean(v) for v in values], color=colour, label=label)
            for x, v in enumerate(values):
                ax.plot([x] * len(v), v, "o", color=colour, ms=4, alpha=0.5)
        if key == "utilisation":
            logged = [statistics.fmean(f["logged_utilisation"] for f in results[coef, True].values()) for coef in coefs]
            ax.plot(logged, color=WAYS[True][1], ls="--", label="the same, by its log's last step")
        ax.set_xticks(range(len(coefs)), [f"{coef:g}" for coef in coefs])
        ax.set_xlabel("balance_coef (dots: seeds)")
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if key != "loss":
            ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
            ax.set_ylim(0, 1)
    axes[0].legend(fontsize=8, frameon=False)
    fig.savefig(path)
    plt.close(fig)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--coefs", type=float, nargs="+", default=[0, 0.001, 0.01, 0.1, 1], help="(0 0.001 ... 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--runs", default="runs/balance", help="folder for the runs (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--tokens", type=int, default=2**16, help="of the validation split (%(default)s)")
    parser.add_argument("--results", default=HERE / "results", help="folder for JSON and picture; empty for none")
    args, given = parser.parse_known_args(argv)
    if args.jobs < 1:
        raise BadInput(f"--jobs={args.jobs} must be at least 1")
    train.settle(train.parse_flags(given), None)  # bad flags end here, before any run
    jobs = {}
    for seed in args.seeds:
        for coef in args.coefs:
            for phantom in WAYS if coef else [False]:  # without the loss f changes nothing
                folder = Path(args.runs) / f"{coef:g}-{'phantom' if phantom else 'served'}-{seed}"
                flags = [*given, f"--seed={seed}", f"--balance_coef={coef:g}", "--keep=1"]
                threads = max(1, torch.get_num_threads() // args.jobs)
                jobs[coef, phantom, seed] = folder, phantom, threads, args.tokens, flags
    about, results = machine(torch.device("cpu")), {}
    with get_context("spawn").Pool(args.jobs) as pool:
        for (coef, phantom, seed), figures in zip(
            jobs, tqdm(pool.imap(run, jobs.values()), total=len(jobs), unit="run")
        ):
            results.setdefault((coef, phantom), {})[seed] = figures
        pool.close()
        pool.join()
    if 0 in args.coefs:
        results[0, True] = results[0, False]
    print(table(results, args.coefs))
    if str(args.results):
        named = {f"{coef:g}, {WAYS[phantom][0]}": figures for (coef, phantom), figures in results.items()}
        save_result(args.results, "balance", "balance", argv, about, seeds=args.seeds, results=named)
        (Path(args.results) / "balance.md").write_text(table(results, args.coefs))
        draw(results, args.coefs, Path(args.results) / "balance.png")


if __name__ == "__main__":
    run_command(main)

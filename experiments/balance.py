"""What balance_coef does to a pool under NormRouter, at tiny: how evenly it is used, how many pairs no expert serves,
and the validation loss; each with f as it is here, and with the phantom load of pairs whose gate is 0 counted in f.

    python -m experiments.balance --jobs 2
    python -m experiments.balance --coefs 0.01 0.1 --seeds 1 --max_steps=100 --runs=runs/short --results=

Flags that are not listed below go to train.py. A run that is done is not trained again.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

import train
import unipool
from command import run_command
from experiments.ablate import TRAIN, Run, train_all
from experiments.common import RunsParser, markdown, save, spread
from experiments.compare import read_metrics
from experiments.probe import load_run, measure

WAYS = {False: ("f of served pairs", "tab:blue"), True: ("with phantom load in f", "tab:red")}
FIGURES = {"utilisation": "pool utilisation", "unserved": "pairs that no expert serves",
           "loss": "validation loss, nats per byte"}  # fmt: skip
pool_ffn = unipool.pool_ffn


def with_phantom_load(x, gates, experts, weights):
    """pool_ffn with every pair in f, also those that no expert serves: on whatever expert topk names for a tie."""
    y, f = pool_ffn(x, gates, experts, weights)
    return y, experts.flatten().bincount(minlength=len(f)) / experts.numel()


def train_with_phantom_load():
    unipool.pool_ffn = with_phantom_load
    run_command(train.main)


PROGRAMS = {False: TRAIN, True: ["-c", "import experiments.balance as b; b.train_with_phantom_load()"]}


def figures_of(run):
    """What a finished run does on validation data: {"utilisation", "unserved", "loss", ...}."""
    cpu = torch.device("cpu")
    _, model, data = load_run(run.folder / "ckpt.pt", cpu)
    figures = measure(model, data, train.validation_indices(data, 2**16), cpu, tqdm(disable=True))
    figures["logged_utilisation"] = read_metrics(run.folder)[-1]["pool_utilisation"]  # of a step, by the run's own f
    return figures | dict(trained_at=run.record()["machine"]["commit"])


def table(results, coefs):
    rows = []
    for coef in coefs:
        for phantom, (name, _) in WAYS.items():
            values = {key: [np.mean(f[key]) for f in results[coef, phantom].values()] for key in FIGURES}
            forms = {key: "{:.3f}" if key == "loss" else "{:.0%}" for key in FIGURES}
            rows.append([f"{coef:g}", name, *(spread(values[key], forms[key]) for key in FIGURES)])
    return markdown(["balance_coef", "f", *FIGURES.values()], rows)


def draw(results, coefs):
    fig = Figure(figsize=(10, 3.3))
    axes = fig.subplots(1, len(FIGURES))

    def of_seeds(key, phantom):
        """(coefficients, seeds), the mean over layers of what is counted by layer"""
        return np.array([[np.mean(f[key]) for f in results[coef, phantom].values()] for coef in coefs])

    for ax, (key, name) in zip(axes, FIGURES.items()):
        for phantom, (label, colour) in WAYS.items():
            ax.plot(of_seeds(key, phantom).mean(axis=1), color=colour, label=label)
            ax.plot(of_seeds(key, phantom), "o", color=colour, ms=4, alpha=0.5)
        ax.set_xticks(range(len(coefs)), [f"{coef:g}" for coef in coefs])
        ax.set(xlabel="balance_coef (dots: seeds)", title=name)
        ax.grid()
        if key != "loss":
            ax.yaxis.set_major_formatter(PercentFormatter(1))
            ax.set_ylim(0, 1)
    logged = of_seeds("logged_utilisation", True).mean(axis=1)
    axes[0].plot(logged, color=WAYS[True][1], ls="--", label="the same, by its log's last step")
    axes[0].legend()
    return fig


def main(argv=None):
    parser = RunsParser(__doc__, "balance", "runs/balance")
    parser.add_argument("--coefs", type=float, nargs="+", default=[0, 0.001, 0.01, 0.1, 1], help="(0 0.001 ... 1)")
    args, rest = parser.parse_known_args(argv)
    given, runs, results = dict(keep=1) | train.parse_flags(rest), {}, {}
    for seed in args.seeds:
        for coef in args.coefs:
            for phantom in WAYS if coef else [False]:  # without the loss f changes nothing
                name, own = f"{coef:g}-{'phantom' if phantom else 'served'}", dict(balance_coef=coef)
                runs[coef, phantom, seed] = Run(name, seed, given, own, Path(args.runs), PROGRAMS[phantom])
    about = train_all(list(runs.values()), args.jobs)
    for (coef, phantom, seed), run in tqdm(runs.items(), unit="run"):
        results.setdefault((coef, phantom), {})[seed] = figures_of(run)
    if 0 in args.coefs:
        results[0, True] = results[0, False]
    named = {f"{coef:g}, {WAYS[phantom][0]}": figures for (coef, phantom), figures in results.items()}
    save(args, about, table(results, args.coefs), {"": draw(results, args.coefs)}, seeds=args.seeds, results=named)


if __name__ == "__main__":
    run_command(main)

"""Must experts grow with depth? Vanilla models with 8 experts per layer against one pool of 32, at several depths.

    python -m experiments.depth --jobs 2

Flags that are not listed below go to train.py. A run that is done is not trained again.
"""

import statistics
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from command import run_command
from experiments.ablate import Run, read_record, train_all
from experiments.common import RunsParser, at_least, markdown, save, spread
from experiments.compare import methods, read_metrics
from train import parse_flags
from unipool import UniPool

POOL = 32  # experts of the shared pool, at every depth
METHODS = {"vanilla": "vanilla, 8 experts per layer", "unipool": f"UniPool, {POOL} experts in all"}


def table(results, parameters):
    rows = [[METHODS[name], L, f"{parameters[name, L] / 1e6:.2f}M", len(losses), spread(losses.values())]
            for (name, L), losses in results.items()]  # fmt: skip
    return markdown(["method", "layers", "stored parameters", "seeds", "validation loss"], rows)


def draw(results, parameters, title):
    """Mean loss against stored parameters, a point for each depth; bars from the lowest to the highest seed."""
    fig = Figure(figsize=(6, 4))
    ax = fig.subplots()
    for name, label in METHODS.items():
        of_depth = {L: list(losses.values()) for (method, L), losses in results.items() if method == name}
        xs, means = [parameters[name, L] / 1e6 for L in of_depth], [statistics.fmean(v) for v in of_depth.values()]
        bars = np.array([[m - min(v), max(v) - m] for m, v in zip(means, of_depth.values())]).T
        ax.errorbar(xs, means, yerr=bars, color=methods(12)[name].colour, label=label, marker="o", capsize=3)
        for x, y, L in zip(xs, means, of_depth):
            ax.annotate(f"{L} layers", (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    ax.margins(x=0.15)
    ax.set(xlim=(0, None), xlabel="stored parameters, millions", ylabel="validation loss, nats per token", title=title)
    ax.legend()
    ax.grid()
    return fig


def main(argv=None):
    parser = RunsParser(__doc__, "depth_tiny", "runs/depth")
    parser.add_argument("--depths", type=at_least(1), nargs="+", default=[4, 8, 16], help="layers (4 8 16)")
    args, flags = parser.parse_known_args(argv)
    given, runs = parse_flags(flags), {}
    for seed in args.seeds:
        for L in args.depths:
            for name in METHODS:
                own = dict(arch=name, n_layer=L) | (dict(n_expert=POOL) if name == "unipool" else {})
                runs[name, L, seed] = Run(f"{name}-{L}", seed, given, own, Path(args.runs))
    about = train_all(list(runs.values()), args.jobs)
    results, parameters = {}, {}
    for (name, L, seed), run in runs.items():
        with torch.device("meta"):
            parameters[name, L] = UniPool(run.config).num_params()
        results.setdefault((name, L), {})[seed] = read_metrics(run.folder)[-1]["val_loss"]
    run = next(iter(runs.values()))
    tokens = run.settings.max_steps * run.settings.batch_size * run.config.block_size
    title = f"{run.settings.scale}, {tokens / 1e6:,.1f}M tokens, seeds {', '.join(map(str, args.seeds))}"
    figures = {f"{name}-{L}": dict(val_loss=v, parameters=parameters[name, L]) for (name, L), v in results.items()}
    save(args, about, table(results, parameters), {"": draw(results, parameters, title)}, seeds=args.seeds,
         tokens=tokens, results=figures,
         runs={run.folder.name: read_record(run.folder) for run in runs.values()})  # fmt: skip


if __name__ == "__main__":
    run_command(main)

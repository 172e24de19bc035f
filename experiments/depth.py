"""Must experts grow with depth? Vanilla models with 8 experts per layer against one pool of 32, at several depths.

    python -m experiments.depth --jobs 2

Flags that are not listed below go to train.py. A run that is done is not trained again.
"""

import itertools
import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from command import run_command
from experiments.ablate import Run, contents, summarise, train_all
from experiments.common import RunsParser, at_least, markdown, save, spread
from experiments.compare import methods
from train import parse_flags

POOL = 32  # experts of the shared pool, at every depth
METHODS = {"vanilla": "vanilla, 8 experts per layer", "unipool": f"UniPool, {POOL} experts in all"}


def table(results):
    rows = []
    for name, f in results.items():
        method, L = name.split("-")
        losses = f["val_loss"].values()
        rows.append([METHODS[method], L, f"{f['parameters'] / 1e6:.2f}M", len(losses), spread(losses)])
    return markdown(["method", "layers", "stored parameters", "seeds", "validation loss"], rows)


def draw(results, title):
    """Mean loss against stored parameters, a point for each depth; bars from the lowest to the highest seed."""
    fig = Figure(figsize=(6, 4))
    ax = fig.subplots()
    for method, label in METHODS.items():
        of_depth = {name.split("-")[1]: f for name, f in results.items() if name.startswith(method)}
        losses = [list(f["val_loss"].values()) for f in of_depth.values()]
        xs, means = [f["parameters"] / 1e6 for f in of_depth.values()], [statistics.fmean(v) for v in losses]
        bars = np.array([[m - min(v), max(v) - m] for m, v in zip(means, losses)]).T
        ax.errorbar(xs, means, yerr=bars, color=methods(12)[method].colour, label=label, marker="o", capsize=3)
        for x, y, L in zip(xs, means, of_depth):
            ax.annotate(f"{L} layers", (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    ax.margins(x=0.2)
    ax.set(xlim=(0, None), xlabel="stored parameters, millions", ylabel="validation loss, nats per token", title=title)
    ax.legend()
    ax.grid()
    return fig


def main(argv=None):
    parser = RunsParser(__doc__, "depth_tiny", "runs/depth")
    parser.add_argument("--depths", type=at_least(1), nargs="+", default=[4, 8, 16], help="layers (4 8 16)")
    args, flags = parser.parse_known_args(argv)
    given, runs = parse_flags(flags), []
    for seed, L, name in itertools.product(dict.fromkeys(args.seeds), dict.fromkeys(args.depths), METHODS):
        own = dict(arch=name, n_layer=L) | (dict(n_expert=POOL) if name == "unipool" else {})
        runs.append(Run(f"{name}-{L}", seed, given, own, Path(args.runs)))
    about = train_all(runs, args.jobs)
    results = {name: dict(val_loss=f["val_loss"], parameters=f["parameters"]) for name, f in summarise(runs).items()}
    record, title = contents(runs, results)
    save(args, about, table(results), {"": draw(results, title)}, **record)


if __name__ == "__main__":
    run_command(main)

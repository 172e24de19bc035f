"""Runs side by side: the curves in their metrics.jsonl as one picture, and where they end as a table.

    python -m experiments.compare out runs/vanilla
    python -m experiments.compare a b c --labels UniPool UniPool vanilla --key train_loss --out losses.png

Runs of one label are seeds of one method: their mean is drawn, in a band from the lowest to the highest. Without
--labels a run is called by what its checkpoint's configuration is called in the paper.
"""

import contextlib
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from command import BadInput, Parser, run_command
from train import load_checkpoint
from unipool import UniPoolConfig

ROUTING = ("n_expert", "n_pool", "top_k", "router", "balance")  # the fields in which methods differ


class Method(NamedTuple):
    """A row of the paper's tables."""

    label: str
    colour: str  # in every picture: blue what shares one pool, orange what is vanilla, green what lies between
    arch: str
    flags: dict  # of UniPoolConfig, beyond what arch sets


def methods(n_layer):
    """{short name: Method} of the paper's comparisons at n_layer layers, of which vanilla has 8 experts each."""
    L, M = n_layer, 8 * n_layer
    return {
        "dense": Method("dense", "tab:gray", "dense", {}),
        "vanilla": Method("vanilla", "tab:orange", "vanilla", {}),
        "vanilla-norm": Method("vanilla, NormRouter", "goldenrod", "vanilla", dict(router="norm")),
        "vanilla-sigmoid": Method(
            "vanilla, sigmoid, bias", "tab:brown", "vanilla", dict(router="sigmoid", balance="bias")
        ),
        "shared-layer-softmax": Method(
            "shared, layer loss, softmax", "yellowgreen", "unipool", dict(router="softmax", balance="layer")
        ),
        "shared-pool-softmax": Method("shared, pool loss, softmax", "tab:green", "unipool", dict(router="softmax")),
        "unipool": Method("UniPool", "tab:blue", "unipool", {}),
        "unipool-67": Method("UniPool, 67% pool", "deepskyblue", "unipool", dict(n_expert=round(M * 2 / 3))),
        "unipool-50": Method("UniPool, 50% pool", "mediumpurple", "unipool", dict(n_expert=M // 2)),
        "unipool-42": Method("UniPool, 42% pool", "orchid", "unipool", dict(n_expert=round(M * 5 / 12))),
        "g6": Method("G = 6", "turquoise", "unipool", dict(n_pool=6)),
        "g4": Method("G = 4", "lightseagreen", "unipool", dict(n_pool=4)),
        "g2": Method("G = 2", "teal", "unipool", dict(n_pool=2)),
        "vanilla-16": Method("vanilla, 16 a layer, top-2", "orangered", "vanilla", dict(n_expert=16 * L, top_k=2)),
        "vanilla-32": Method("vanilla, 32 a layer, top-4", "darkred", "vanilla", dict(n_expert=32 * L, top_k=4)),
        "unipool-16": Method("UniPool, 16 a layer, top-2", "royalblue", "unipool", dict(n_expert=16 * L, top_k=2)),
        "unipool-32": Method("UniPool, 32 a layer, top-4", "navy", "unipool", dict(n_expert=32 * L, top_k=4)),
    }


OTHER_COLOURS = ["tab:red", "tab:pink", "tab:olive", "black", "tab:cyan"]
UNITS = {"val_loss": "validation loss, nats a token", "train_loss": "training loss, nats a token",
         "balance_loss": "balance loss, without alpha", "pool_utilisation": "pool utilisation",
         "dead_experts": "experts that serve nothing",
         "unserved": "share of pairs that no expert serves", "grad_norm": "norm of the gradient",
         "tokens_per_second": "tokens a second", "mfu": "model FLOP utilisation"}  # fmt: skip


def colour_of(label, labels):
    """The method's own colour, or one of the others in the order of the labels."""
    own = {method.label: method.colour for method in methods(12).values()}
    others = [name for name in labels if name not in own]
    return own.get(label) or OTHER_COLOURS[others.index(label) % len(OTHER_COLOURS)]


def method_of(config):
    """The short name of the method that a UniPoolConfig is an example of, or None."""
    for name, method in methods(config.n_layer).items():
        with contextlib.suppress(ValueError):  # G = 6 pools for 4 layers
            example = UniPoolConfig.from_scale("182m", method.arch, n_layer=config.n_layer, **method.flags)
            if all(getattr(config, field) == getattr(example, field) for field in ROUTING):
                return name
    return None


def label_of(config, folder):
    """What the paper calls the run of this configuration; else its folder."""
    name = method_of(config)
    return methods(config.n_layer)[name].label if name else str(folder)


def read_metrics(folder):
    """The lines of a run's metrics.jsonl as dicts, but one that is still being written. Raises BadInput."""
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not lines or not all("step" in line and "tokens" in line for line in lines):
            raise ValueError("no lines with step and tokens")
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} cannot be read ({reason}): give the --out_dir of a run of train.py") from None
    return lines


def curve(lines, key):
    """(tokens, values) of the lines that have a finite `key`."""
    points = [(line["tokens"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]  # not by layer
    return [x for x, _ in points], [y for _, y in points]


def smooth(values, width):
    """The mean of each value and the up to width - 1 before it."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def spread(values, form="{:.4f}"):
    """Mean, and what the values range over, as text."""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else mean


def draw_curves(ax, curves, key):
    """curves: {label: [(tokens, values) of each run]}. Mean and band over the points that all runs of a label have."""
    longest = max(xs[-1] for runs in curves.values() for xs, _ in runs if xs)
    scale, unit = next((s, u) for s, u in ((1e9, "billion"), (1e6, "million"), (1, "")) if longest >= s or s == 1)
    beginnings = []
    for label, runs in curves.items():
        xs = sorted(set.intersection(*(set(xs) for xs, _ in runs)))
        if not xs:
            continue
        values = [[dict(zip(*run))[x] for run in runs] for x in xs]  # one list a point, one value a run
        means = [statistics.fmean(v) for v in values]
        colour, shown = colour_of(label, list(curves)), [x / scale for x in xs]
        ax.plot(shown, means, color=colour, label=label, lw=1.6, marker="o" if len(xs) == 1 else None)
        if len(runs) > 1:
            ax.fill_between(shown, *zip(*((min(v), max(v)) for v in values)), color=colour, lw=0,
                            alpha=0.2 if len(curves) < 6 else 0.08)  # fmt: skip
        beginnings.append(means[len(xs) // 3])
    if key.endswith("loss") and key != "balance_loss":  # the first steps, from ln V down, would flatten all the rest
        low, high = ax.dataLim.intervaly
        top = min(high, max(beginnings))
        if top > low:
            ax.set_ylim(low - 0.04 * (top - low), top + 0.04 * (top - low))
    ax.set_xlabel(f"{unit} training tokens".strip())
    ax.set_ylabel(UNITS.get(key, key))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(fig, ax, columns):
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders that hold a metrics.jsonl")
    parser.add_argument("--labels", nargs="+", help="one for each run; runs of the same label are taken together")
    parser.add_argument("--key", default="val_loss", help="what to draw, by its name in metrics.jsonl (%(default)s)")
    parser.add_argument("--out", default="compare.png", help="the picture to write (%(default)s)")
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.runs):
        raise BadInput(f"--labels: {len(args.labels)} labels for {len(args.runs)} runs: give one for each")
    curves, ends = {}, []
    for i, folder in enumerate(args.runs):
        lines = read_metrics(folder)
        xs, ys = curve(lines, args.key)
        if not xs:
            raise BadInput(f"--key={args.key}: not in {folder}/metrics.jsonl, which has {', '.join(lines[-1])}")
        path = Path(folder) / "ckpt.pt"
        if args.labels:
            label = args.labels[i]
        elif path.exists():
            label = label_of(UniPoolConfig(**load_checkpoint(path, mmap=True)["config"]), folder)
        else:
            label = str(folder)
        shown = smooth(ys, max(1, len(ys) // 50)) if args.key in ("train_loss", "grad_norm") else ys
        curves.setdefault(label, []).append((xs, shown))
        last = next(line for line in reversed(lines) if line.get(args.key) is not None)
        ends.append((label, folder, last["step"], ys[-1], min(ys)))
    print(f"| | run | step | {args.key} then | lowest |\n|---|---|---|---|---|")
    for label, folder, steps, last, lowest in ends:
        print(f"| {label} | {folder} | {steps:,} | {last:.4f} | {lowest:.4f} |")
    fig, ax = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    draw_curves(ax, curves, args.key)
    legend_below(fig, ax, columns=3)
    try:
        fig.savefig(args.out)
    except (OSError, ValueError) as error:  # ValueError: no such kind of picture
        raise BadInput(f"--out={args.out} cannot be written ({error}): give another, as compare.png") from None
    plt.close(fig)
    print(f"\n{args.out}")


if __name__ == "__main__":
    run_command(main)

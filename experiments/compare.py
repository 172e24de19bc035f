"""Runs side by side: the curves in their metrics.jsonl as one picture, and where they end as a table.

    python -m experiments.compare out runs/vanilla
    python -m experiments.compare runs/tiny/* --key train_loss --out losses.png

A run is called by what its checkpoint's configuration is called in the paper, or else by its folder. Runs that differ
in nothing but the seed are one method: their mean is drawn, in a band from the lowest to the highest. Others of one
name are told apart by what differs. Of train_loss and grad_norm the mean over a fiftieth of the steps is drawn.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from command import BadInput, Parser, run_command
from experiments.common import markdown
from train import load_checkpoint
from unipool import UniPoolConfig

ROUTING = ("n_expert", "n_pool", "top_k", "router", "balance")  # the fields in which methods differ
LOCK = 0.03333  # the paper's share of the run; of tiny's, which begins with 18 steps of warm-up, ablate.py takes 0.2


class Method(NamedTuple):
    """A row of the paper's tables."""

    label: str
    colour: str  # in every picture: blue what shares one pool, orange what is vanilla, green what lies between
    arch: str
    flags: dict  # of UniPoolConfig, beyond what arch sets
    lock: dict = {}  # --lock or --lock_random


def methods(n_layer):
    """{short name: Method} of the paper's comparisons at n_layer layers, of which vanilla has 8 experts each."""
    L, M = n_layer, 8 * n_layer
    rows = {
        "dense": ("dense", "tab:gray", "dense", {}),
        "vanilla": ("vanilla", "tab:orange", "vanilla", {}),
        "vanilla-norm": ("vanilla, NormRouter", "goldenrod", "vanilla", dict(router="norm")),
        "vanilla-sigmoid": ("vanilla, sigmoid, bias", "sienna", "vanilla", dict(router="sigmoid", balance="bias")),
        "shared-layer-softmax": ("shared, layer loss, softmax", "yellowgreen", "unipool",
                                 dict(router="softmax", balance="layer")),
        "shared-pool-softmax": ("shared, pool loss, softmax", "tab:green", "unipool", dict(router="softmax")),
        "unipool": ("UniPool", "tab:blue", "unipool", {}),
        "lock": ("UniPool-lock", "crimson", "unipool", {}, dict(lock=LOCK)),
        "random": ("random owners", "tab:brown", "unipool", {}, dict(lock_random=True)),
        "unipool-67": ("UniPool, 67% pool", "deepskyblue", "unipool", dict(n_expert=round(M * 2 / 3))),
        "unipool-50": ("UniPool, 50% pool", "mediumpurple", "unipool", dict(n_expert=M // 2)),
        "unipool-42": ("UniPool, 42% pool", "orchid", "unipool", dict(n_expert=round(M * 5 / 12))),
        "g6": ("G = 6", "turquoise", "unipool", dict(n_pool=6)),
        "g4": ("G = 4", "lightseagreen", "unipool", dict(n_pool=4)),
        "g2": ("G = 2", "teal", "unipool", dict(n_pool=2)),
        "vanilla-16": ("vanilla, 16 a layer, top-2", "orangered", "vanilla", dict(n_expert=16 * L, top_k=2)),
        "vanilla-32": ("vanilla, 32 a layer, top-4", "darkred", "vanilla", dict(n_expert=32 * L, top_k=4)),
        "unipool-16": ("UniPool, 16 a layer, top-2", "royalblue", "unipool", dict(n_expert=16 * L, top_k=2)),
        "unipool-32": ("UniPool, 32 a layer, top-4", "navy", "unipool", dict(n_expert=32 * L, top_k=4)),
    }  # fmt: skip
    return {name: Method(*row) for name, row in rows.items()}


OTHER_COLOURS = ["tab:red", "tab:pink", "tab:olive", "black", "tab:cyan"]


def colour_of(label, labels):
    """The method's own colour, or one of the others in the order of the labels."""
    own = {method.label: method.colour for method in methods(12).values()}
    others = [name for name in labels if name not in own]
    return own.get(label) or OTHER_COLOURS[others.index(label) % len(OTHER_COLOURS)]


def label_of(checkpoint, folder):
    """What the paper calls the method that a checkpoint is an example of; None of them: the run's folder."""
    config, settings = UniPoolConfig(**checkpoint["config"]), checkpoint["settings"]
    for method in methods(config.n_layer).values():
        if (bool(settings["lock"]), settings["lock_random"]) != ("lock" in method.lock, "lock_random" in method.lock):
            continue
        with contextlib.suppress(ValueError):  # G = 6 pools for 4 layers
            example = UniPoolConfig.from_scale("182m", method.arch, n_layer=config.n_layer, **method.flags)
            if all(getattr(config, field) == getattr(example, field) for field in ROUTING):
                return method.label
    return str(folder)


# Flags that differ between runs of one method: what they learn does not depend on these, up to rounding and chance.
NO_DIFFERENCE = {"seed", "max_steps", "micro_batch_size", "eval_interval", "eval_tokens", "ckpt_interval", "keep",
                 "log_interval", "tensorboard", "compile", "recompute", "one_pass", "shard"}  # fmt: skip


def labels_of(folders):
    """{folder: its run's label}: label_of(its checkpoint), and beside it what sets it apart from others of that label.

    A checkpoint that cannot be read, as of a fork with fields of its own, is told in one line; its folder is the label.
    """
    labels, settings = {}, {}
    for folder in folders:
        labels[folder], path = str(folder), Path(folder) / "ckpt.pt"
        try:
            if path.exists():
                checkpoint = load_checkpoint(path, mmap=True)
                labels[folder] = label_of(checkpoint, folder)
                settings[folder] = checkpoint["settings"] | checkpoint["config"]
        except BadInput as error:
            print(error, file=sys.stderr)
    result = dict(labels)
    for folder, own in settings.items():
        others = [settings[f] for f in settings if labels[f] == labels[folder]]
        differs = [name for name in own if any(other[name] != own[name] for other in others)]
        differs = [f"{name}={own[name]}" for name in differs if name not in NO_DIFFERENCE]
        result[folder] = ", ".join([labels[folder], *differs])
    return result


def read_metrics(folder):
    """The lines of a run's metrics.jsonl as dicts, but one that is still being written. Raises BadInput."""
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not lines or not all(isinstance(line[name], int) for line in lines for name in ("step", "tokens")):
            raise ValueError("no lines with step and tokens")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} cannot be read ({reason}): give the --out_dir of a run of train.py") from None
    return lines


def curve(lines, key):
    """{tokens: value} of the lines that have a finite `key`, which is one number (not one by layer)."""
    return {line["tokens"]: line[key] for line in lines if isinstance(line.get(key), (int, float))}


def draw_curves(ax, curves, key):
    """curves: {label: [{tokens: value} of each run]}. Mean and band over the points that all runs of a label have."""
    longest = max((tokens for runs in curves.values() for run in runs for tokens in run), default=0)
    scale, unit = next((s, u) for s, u in ((1e9, "billion "), (1e6, "million "), (1, "")) if longest >= s or s == 1)
    beginnings = []
    for label, runs in curves.items():
        tokens = sorted(set.intersection(*map(set, runs)))
        if not tokens:
            print(f"{label} is not drawn: its runs have no step in common", file=sys.stderr)
            continue
        values = np.array([[run[x] for x in tokens] for run in runs])  # (runs, points)
        xs, means, colour = np.array(tokens) / scale, values.mean(axis=0), colour_of(label, list(curves))
        ax.plot(xs, means, color=colour, label=label, lw=1.6, marker="o" if len(xs) == 1 else None)
        if len(runs) > 1:
            alpha = 0.2 if len(curves) < 6 else 0.08
            ax.fill_between(xs, values.min(axis=0), values.max(axis=0), color=colour, lw=0, alpha=alpha)
        beginnings.append((xs[len(xs) // 6], means[len(xs) // 6]))
    if beginnings:
        ax.set_xlim(left=min(ax.dataLim.intervalx))
    if beginnings and key in ("train_loss", "val_loss"):  # the first steps, from ln V down, would flatten all the rest
        lefts, tops = zip(*beginnings)
        low, top = min(ax.dataLim.intervaly), max(tops)
        if top > low:
            ax.set(xlim=(min(lefts), None), ylim=(low - 0.04 * (top - low), top + 0.04 * (top - low)))
    name = "validation loss, nats per token" if key == "val_loss" else key
    ax.set(xlabel=f"{unit}training tokens", ylabel=name)
    ax.grid()


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders that hold a metrics.jsonl")
    parser.add_argument("--key", default="val_loss", help="what to draw, by its name in metrics.jsonl (%(default)s)")
    parser.add_argument("--out", default="compare.png", help="the picture to write (%(default)s)")
    args = parser.parse_args(argv)
    curves, rows, labels = {}, [], labels_of(args.runs)
    for folder in args.runs:
        lines, label = read_metrics(folder), labels[folder]
        points = curve(lines, args.key)
        if not points:
            keys = ", ".join(key for key in lines[-1] if curve(lines, key))
            raise BadInput(f"--key={args.key}: no number in {folder}/metrics.jsonl; there are {keys}")
        tokens, values = zip(*points.items())
        step = next(line["step"] for line in lines if line["tokens"] == tokens[-1])
        rows.append([label, folder, f"{step:,}", f"{values[-1]:.4f}", f"{min(values):.4f}"])
        if args.key in ("train_loss", "grad_norm"):  # each point the mean of so many steps
            width = max(1, len(values) // 50)
            tokens, values = tokens[width - 1 :], np.convolve(values, np.full(width, 1 / width), "valid")
        curves.setdefault(label, []).append(dict(zip(tokens, values)))
    print(markdown(["", "run", "step", f"{args.key} then", "lowest"], rows))
    fig = Figure(figsize=(7, 4))
    ax = fig.subplots()
    draw_curves(ax, curves, args.key)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    try:
        fig.savefig(args.out)
    except (OSError, ValueError) as error:  # ValueError: no such kind of picture
        raise BadInput(f"--out={args.out} cannot be written ({error}): give another, as compare.png") from None
    print(args.out)


if __name__ == "__main__":
    run_command(main)

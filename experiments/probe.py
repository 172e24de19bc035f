"""What the routers of trained models do: the paper's Figure 3, Tables 4, 9 and 11, on a run's own validation data.

    python -m experiments.probe                                  # the run in out/
    python -m experiments.probe runs/tiny/unipool-1 runs/tiny/vanilla-1 --tokens 65536

Utilisation   how often each expert serves each layer, and what that adds up to for each expert
Unserved      share of the (token, choice) pairs whose gate is 0: no expert serves them, and no other figure counts them
Reuse         how many different experts a token meets on its way up, and how many layers an expert serves
Scale         NormRouter's sigma, and what a token's scores and its k gates add up to, layer by layer
Probe         what it costs to choose at random in one layer of the deeper half at a time: uniformly over all experts
              that the layer can choose from, or ("matched") over the 8 (times top-k) that it uses most. The gates stay
              those that the router gave to its own choices, so that nothing but the choice of experts changes.
"""

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from command import BadInput, Parser, run_command
from experiments.bench import machine, save_result
from experiments.compare import colour_of, label_of, spread
from prepare_pile import TokenData, read_meta
from train import (
    autocast,
    check_tokenizer,
    find_device,
    load_checkpoint,
    load_model,
    pool_utilisation,
    read_batch,
    validation_indices,
)

HERE = Path(__file__).parent
MATCHED = 8  # experts of the matched probe for each choice of a token: vanilla has 8 a layer at top-1
TOKENS_AT_ONCE = 4096  # of a forward pass, whose logits are held


class WatchedRouter(nn.Module):
    """Stands in a block for its router: remembers what was chosen; with `allowed`, chooses at random among these."""

    def __init__(self, router):
        super().__init__()
        self.router = router
        self.allowed = self.generator = None  # (A,) int64 experts, and where the random numbers come from

    def forward(self, x):
        gates, experts, scores = self.router(x)
        if self.allowed is not None:
            numbers = torch.rand(len(x), len(self.allowed), generator=self.generator, device=x.device)  # (N, A)
            experts = self.allowed[numbers.topk(experts.size(1)).indices]  # k different ones, each set equally likely
        self.gates, self.experts, self.scores = gates, experts, scores
        return gates, experts, scores


class Statistics:
    """What the choices of all layers add up to, batch by batch."""

    def __init__(self, config, device):
        self.config = config
        L, M = config.n_layer, config.experts_per_pool
        # Expert i of layer l's pool has the number first_expert[l] + i among all n_expert.
        self.first_expert = torch.tensor([l * config.n_pool // L * M for l in range(L)], device=device)
        self.counts = torch.zeros(L, config.n_expert, dtype=torch.int64, device=device)
        self.distinct = self.tokens = 0
        self.score_sum, self.gate_sum = torch.zeros(2, L, dtype=torch.float64, device=device)

    def add(self, routers):
        experts = torch.stack([r.experts for r in routers]) + self.first_expert[:, None, None]  # (L, N, k)
        served = torch.stack([r.gates for r in routers]) > 0
        L, N, k = experts.shape
        for l in range(L):
            self.counts[l] += experts[l][served[l]].bincount(minlength=self.config.n_expert)
        self.distinct += distinct_experts(torch.where(served, experts, -1)).sum().item()
        self.tokens += N
        self.score_sum += torch.stack([r.scores.double().sum() for r in routers])
        self.gate_sum += torch.stack([r.gates.double().sum() for r in routers])

    def summary(self):
        c = self.config
        f = self.counts.double() / (self.tokens * c.top_k)  # (L, n_expert): sums to the share that is served
        served, even = f.sum(dim=1), 1 / c.experts_per_pool  # (L,)
        own = torch.stack([f_l[first : first + c.experts_per_pool] for f_l, first in zip(f, self.first_expert)])
        shares = f / served.clamp(min=1e-300)[:, None]
        load = f.sum(dim=0) / f.sum(dim=0).mean()  # (n_expert,), 1 is the mean
        # Drawn evenly and independently, an expert of a pool is missed by all of its layers with this probability.
        missed = (1 - served * c.top_k * even).view(c.n_pool, -1).prod(dim=1)  # (G,)
        visits = served.sum().item() * c.top_k  # that serve a token, on average
        return dict(
            utilisation=pool_utilisation(own, c.n_pool)[0],
            dead_experts=int((load == 0).sum()),
            load=load.tolist(),
            distinct_share=self.distinct / self.tokens / visits,
            distinct_share_if_even=c.experts_per_pool * (1 - missed).sum().item() / visits,
            layers_of_expert=layers_of_experts(shares, even).tolist(),
            unserved=(1 - served).tolist(),
            score_sum=(self.score_sum / self.tokens).tolist(),
            gate_sum=(self.gate_sum / self.tokens).tolist(),
            shares=shares.tolist(),
        )


def distinct_experts(experts):
    """How many different experts serve each token: (L, N, k) expert numbers, -1 for none -> (N,)."""
    met = experts.transpose(0, 1).flatten(1).sort(dim=1).values  # (N, L * k)
    return (met[:, 0] >= 0).long() + (met.diff(dim=1) != 0).sum(dim=1)


def layers_of_experts(shares, even):
    """(n_expert,): the number of layers that give an expert at least half of what an even load would."""
    return (shares >= even / 2).sum(dim=0)


@torch.no_grad()
def evaluate(model, data, indices, device, bar, found=None):
    """(cross-entropy in nats a token, share of tokens that are predicted rightly) over the sequences `indices`."""
    loss, right = torch.zeros(2, dtype=torch.float64, device=device)
    at_once = max(1, TOKENS_AT_ONCE // data.block_size)
    routers = [block.router for block in model.blocks]
    for i in range(0, len(indices), at_once):
        x, y = read_batch(data, indices[i : i + at_once], device)
        with autocast(device):
            out = model(x, y)
        loss += out.loss.double() * len(x)
        right += (out.logits.argmax(dim=-1) == y).double().mean(dim=1).sum()
        if found:
            found.add(routers)
        bar.update(x.numel())
    return loss.item() / len(indices), right.item() / len(indices)


def probe(model, data, tokens, draws, device, label):
    """All figures of one model, as a dict of plain values."""
    config = model.config
    for block in model.blocks:
        block.router = WatchedRouter(block.router)
    indices = validation_indices(data, tokens)
    deeper = range(config.n_layer // 2, config.n_layer)
    M = config.experts_per_pool
    matched = MATCHED * config.top_k
    ways = {"uniform": M} | ({"matched": matched} if M > matched else {})
    passes = 1 + len(ways) * len(deeper) * draws
    with tqdm(total=passes * len(indices) * data.block_size, desc=label, unit="token", unit_scale=True,
              mininterval=0.5 if sys.stderr.isatty() else 10) as bar:  # fmt: skip
        found = Statistics(config, device)
        loss, accuracy = evaluate(model, data, indices, device, bar, found)
        figures = dict(tokens=len(indices) * data.block_size, loss=loss, accuracy=accuracy) | found.summary()
        if config.router == "norm":
            figures["sigma"] = [block.router.router.sigma.item() for block in model.blocks]
        figures["probe"] = {way: {} for way in ways}
        for way, n_allowed in ways.items():
            for l in deeper:
                watched, first = model.blocks[l].router, found.first_expert[l]
                watched.allowed = found.counts[l, first : first + M].topk(n_allowed).indices
                changes = []
                for draw in range(draws):
                    watched.generator = torch.Generator(device).manual_seed(draw)
                    new_loss, new_accuracy = evaluate(model, data, indices, device, bar)
                    changes.append((new_loss - loss, new_accuracy - accuracy))
                watched.allowed = None
                losses, accuracies = zip(*changes)
                figures["probe"][way][l] = dict(loss=losses, accuracy=accuracies)
    return figures


def of_draws(layers, key):
    """One value a draw: the mean over the layers."""
    return [statistics.fmean(values) for values in zip(*(layer[key] for layer in layers.values()))]


def table(results):
    """Rows of figures, a column for each run."""
    rows = {
        "validation loss, nats a token": lambda f: f"{f['loss']:.4f}",
        "next token predicted rightly": lambda f: f"{f['accuracy']:.2%}",
        "pool utilisation": lambda f: f"{f['utilisation']:.1%}",
        "pairs that no expert serves": lambda f: f"{statistics.fmean(f['unserved']):.1%}",
        "dead experts": lambda f: f"{f['dead_experts']} of {len(f['shares'][0])}",
        "load of the most used, mean = 1": lambda f: f"{max(f['load']):.2f}",
        "distinct experts a token meets, of its visits (Table 9)": lambda f: f"{f['distinct_share']:.1%}",
        "the same, if layers chose evenly at random": lambda f: f"{f['distinct_share_if_even']:.1%}",
        "layers that use an expert*, mean": lambda f: f"{statistics.fmean(f['layers_of_expert']):.2f}",
    }
    for name, key in (("pairs that no expert serves", "unserved"), ("sigma", "sigma"),
                      ("sum of a token's scores", "score_sum"), ("sum of its gates", "gate_sum")):  # fmt: skip
        rows[f"{name}, from the lowest layer up"] = lambda f, key=key: (
            " ".join(f"{value:.2f}" for value in f[key]) if key in f else ""
        )
    for way in ("uniform", "matched"):
        for name, key, form in (("loss", "loss", "{:+.4f}"), ("share predicted rightly", "accuracy", "{:+.2%}")):
            rows[f"{way} choice in one deep layer: {name}"] = lambda f, way=way, key=key, form=form: (
                spread(of_draws(f["probe"][way], key), form) if way in f["probe"] else "as uniform"
            )
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    lines += [f"| {name} | " + " | ".join(show(f) for f in results.values()) + " |" for name, show in rows.items()]
    return "\n".join(lines) + "\n\n* give it at least half of an even load\n"


def draw_usage(results, path):
    """The paper's Figure 3: how often each layer chooses each expert, and the sum over layers against an even load."""
    fig, axes = plt.subplots(2, len(results), figsize=(1.5 + 3.5 * len(results), 4.2), dpi=150, layout="constrained",
                             height_ratios=[2, 1], sharex="col", squeeze=False)  # fmt: skip
    for (label, f), above, below in zip(results.items(), *axes):
        shares = np.array(f["shares"])  # (L, n_expert)
        L, n_expert = shares.shape
        per_pool = f["experts_per_pool"]
        pool_of_layer = np.arange(L) * (n_expert // per_pool) // L
        others = np.arange(n_expert)[None] // per_pool != pool_of_layer[:, None]  # experts that a layer cannot reach
        relative = np.where(others, np.nan, shares * per_pool)
        image = above.imshow(relative, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=4,
                             interpolation="nearest")  # fmt: skip
        above.set_facecolor("0.9")
        above.set_title(label, fontsize=10)
        above.yaxis.get_major_locator().set_params(integer=True)
        below.bar(range(n_expert), f["load"], width=1, color=colour_of(label, list(results)), edgecolor="white", lw=0.3)
        below.axhline(1, color="0.2", lw=1, ls="--")
        below.xaxis.get_major_locator().set_params(integer=True)
        below.set_xlabel("expert (dashed: even load)")
        below.spines[["top", "right"]].set_visible(False)
    for below in axes[1]:
        below.set_ylim(0, max(ax.get_ylim()[1] for ax in axes[1]))
    fig.colorbar(image, ax=axes[0], extend="max", label="share of the layer's\nserved pairs, even = 1")
    axes[0][0].set_ylabel("layer")
    axes[1][0].set_ylabel("load over all\nlayers, mean = 1")
    fig.savefig(path)
    plt.close(fig)


def draw_probe(results, path):
    """What a random choice costs, layer by layer, and how many layers each expert serves."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=150, layout="constrained")
    series = [(label, way) for label, f in results.items() for way in f["probe"]]
    for i, (label, way) in enumerate(series):
        layers = results[label]["probe"][way]
        shift = (i - (len(series) - 1) / 2) * 0.8 / len(series)
        xs = [int(l) + shift for l in layers]
        means = [statistics.fmean(layer["loss"]) for layer in layers.values()]
        left.bar(xs, means, 0.75 / len(series), color=colour_of(label, list(results)), label=f"{label}, {way}",
                 hatch="///" if way == "matched" else None, edgecolor="white", lw=0.5)  # fmt: skip
        for x, layer in zip(xs, layers.values()):
            left.plot([x] * len(layer["loss"]), layer["loss"], ".", color="0.15", ms=3)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("layer that chooses at random (dots: draws)")
    left.set_ylabel("change of the validation loss,\nnats a token")
    left.legend(fontsize=8, frameon=False)
    for label, f in results.items():
        counts = np.bincount(f["layers_of_expert"], minlength=len(f["shares"]) + 1)
        right.plot(counts / counts.sum(), marker="o", ms=4, color=colour_of(label, list(results)), label=label)
    right.set_xlabel("layers that use an expert*")
    right.set_ylabel("share of the experts")
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    right.text(
        0.98, 0.55, "* give it at least half\nof an even load", transform=right.transAxes, ha="right", fontsize=8
    )
    for ax in (left, right):
        ax.grid(alpha=0.25, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)
    plt.close(fig)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", default=["out"], help="folders of runs (out)")
    parser.add_argument("--ckpt", default="ckpt.pt", help="checkpoint in them: ckpt.pt, best.pt ... (%(default)s)")
    parser.add_argument("--data_dir", help="(the one that each run was trained on)")
    parser.add_argument(
        "--tokens", type=int, default=2**16, help="of the validation split, spread over it (%(default)s)"
    )
    parser.add_argument("--draws", type=int, default=3, help="of random choices for each layer (%(default)s)")
    parser.add_argument("--device", help="cuda, cpu ... (the best there is)")
    parser.add_argument("--name", default="probe", help="of the files in --results (%(default)s)")
    parser.add_argument("--results", default=HERE / "results", help="folder for JSON and pictures; empty for none")
    args = parser.parse_args(argv)
    for name in ("tokens", "draws"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name}={getattr(args, name)} must be at least 1")
    device = find_device(args.device)
    about, results = machine(device), {}
    for folder in args.runs:
        path = Path(folder) / args.ckpt
        checkpoint = load_checkpoint(path, mmap=True)
        model = load_model(checkpoint, path, device).eval()
        config = model.config
        if not config.n_expert:
            raise BadInput(f"{path} is a dense model: it has no routers to probe")
        data_dir = args.data_dir or checkpoint["settings"]["data_dir"]
        meta = read_meta(data_dir, config.vocab_size)
        check_tokenizer(data_dir, meta, checkpoint, path)
        data = TokenData(data_dir, "val", meta, config.block_size, config.vocab_size)
        label = label_of(config, folder)
        label = f"{label} ({folder})" if label in results else label
        about_run = dict(run=str(folder), step=checkpoint["step"], seed=checkpoint["settings"]["seed"],
                         experts_per_pool=config.experts_per_pool)  # fmt: skip
        results[label] = about_run | probe(model, data, args.tokens, args.draws, device, label)
    print(table(results))
    if str(args.results):
        save_result(args.results, args.name, "probe", argv, about, results=results)
        path = Path(args.results) / args.name
        Path(f"{path}.md").write_text(table(results))
        draw_usage(results, path.with_name(f"{args.name}_usage.png"))
        draw_probe(results, path.with_name(f"{args.name}_routing.png"))
        print(f"{path}_usage.png, {path}_routing.png")


if __name__ == "__main__":
    run_command(main)

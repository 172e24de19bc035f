"""What the routers of trained models do: the paper's Figure 3, Tables 4, 9 and 11, on a run's own validation data.

    python -m experiments.probe                                  # the run in out/
    python -m experiments.probe runs/tiny/unipool-1 runs/tiny/vanilla-1 --tokens 65536

Utilisation   how often each expert serves each layer, and what that adds up to for each expert
Unserved      share of the (token, choice) pairs whose gate is 0: no expert serves them, and no other figure counts them
Reuse         how many different experts a token meets on its way up, and how many layers an expert serves
Scale         NormRouter's sigma, and what a token's scores and its k gates add up to, layer by layer
Worth         the loss without one layer's experts (all its gates 0), less the loss with them
Covered       the part of a layer's pairs that is served by the experts --lock would give it ("owner" in the JSON)
Probe         what it costs to choose at random in one layer of the deeper half at a time: uniformly over all experts
              that the layer can choose from, or ("matched") over the 8 (times top-k) that it uses most. The gates stay
              those that the router gave to its own choices, so that nothing but the choice of experts changes.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import nn
from tqdm import tqdm

import train
from command import BadInput, run_command
from experiments.common import ExperimentParser, at_least, machine, markdown, save, spread
from experiments.compare import colour_of, label_of
from prepare_pile import TokenData, read_meta
from unipool import assign_experts

MATCHED = 8  # experts of the matched probe for each choice of a token: vanilla has 8 a layer at top-1
TOKENS_AT_ONCE = 4096  # of a forward pass, whose logits are held


class WatchedRouter(nn.Module):
    """Stands in a block for its router: remembers what was chosen; with `allowed`, chooses at random among these; with
    `off`, lets no expert serve.
    """

    def __init__(self, router):
        super().__init__()
        self.router, self.seen = router, []  # seen: (experts (N, k), gates (N, k), sum of the scores (N,)) of each call
        self.off = False
        self.allowed = self.generator = None  # (A,) int64 experts, and where the random numbers come from

    def forward(self, x):
        gates, experts, scores = self.router(x)
        if self.allowed is not None:
            numbers = torch.rand(len(x), len(self.allowed), generator=self.generator, device=x.device)  # (N, A)
            experts = self.allowed[numbers.topk(experts.size(1)).indices]  # k different ones, each set equally likely
        self.seen.append((experts.cpu(), gates.cpu(), scores.sum(dim=1).cpu()))
        return gates * (not self.off), experts, scores


def routing_statistics(config, experts, gates, score_sums):
    """Figures of what all layers chose. experts (numbered within a pool), gates: (L, N, k), score_sums: (L, N)."""
    (L, N, k), M, n_expert = experts.shape, config.experts_per_pool, config.n_expert
    first = torch.arange(L) * config.n_pool // L * M  # expert i of layer l's pool is number first[l] + i of all
    numbers = torch.where(gates > 0, experts + first[:, None, None], -1)  # (L, N, k), -1 where no expert serves
    counts = torch.stack([(own.flatten() + 1).bincount(minlength=n_expert + 1)[1:] for own in numbers])  # (L, n_expert)
    f = counts.double() / (N * k)  # sums to the share that is served
    served = f.sum(dim=1)  # (L,)
    shares = f / served.clamp(min=1e-300)[:, None]
    load = f.mean(dim=0) / f.mean()  # (n_expert,), 1 is the mean
    met = numbers.transpose(0, 1).flatten(1).sort(dim=1).values  # (N, L * k)
    distinct = (met.diff(dim=1, prepend=torch.full((N, 1), -1)) != 0).sum().item()
    # Drawn evenly and independently, an expert of a pool is missed by all of its layers with this probability.
    missed = (1 - served * k / M).view(config.n_pool, -1).prod(dim=1)  # (n_pool,)
    visits = served.sum().item() * k  # that serve a token, on average
    own = torch.stack([f[l, i : i + M] for l, i in enumerate(first)])  # (L, M)
    figures = dict(
        utilisation=train.pool_utilisation(own, config.n_pool)[0],
        dead_experts=int((load == 0).sum()),
        load=load.tolist(),
        distinct_share=distinct / N / visits,
        distinct_share_if_even=M * (1 - missed).sum().item() / visits,
        layers_of_expert=(shares >= 0.5 / M).sum(dim=0).tolist(),
        unserved=(1 - served).tolist(),
        score_sum=score_sums.double().mean(dim=1).tolist(),
        gate_sum=gates.double().sum(dim=2).mean(dim=1).tolist(),
        shares=shares.tolist(),
    )
    if config.n_pool == 1 and n_expert % L == 0:
        owned = assign_experts(f)  # as --lock does; of a locked model those that it has, which serve all
        figures |= dict(owner=owned.int().argmax(dim=0).tolist(), covered=(shares * owned).sum(dim=1).tolist())
    return figures


def load_run(path, device, data_dir=None):
    """(checkpoint, model, its validation TokenData) of a checkpoint; the routers are watched. Raises BadInput."""
    checkpoint = train.load_checkpoint(path, mmap=True)
    model = train.load_model(checkpoint, path, device)
    config, data_dir = model.config, data_dir or checkpoint["settings"]["data_dir"]
    if not config.n_expert:
        raise BadInput(f"{path} is a dense model: it has no routers to probe")
    meta = read_meta(data_dir, config.vocab_size)
    train.check_tokenizer(data_dir, meta, checkpoint, path)
    for block in model.blocks:
        block.router = WatchedRouter(block.router)
    return checkpoint, model, TokenData(data_dir, "val", meta, config.block_size, config.vocab_size)


@torch.no_grad()
def evaluate(model, data, indices, device, bar):
    """(cross-entropy in nats per token, share of tokens that are predicted rightly) over the sequences `indices`."""
    loss = right = 0.0
    for block in model.blocks:
        block.router.seen = []
    at_once = max(1, TOKENS_AT_ONCE // data.block_size)
    for i in range(0, len(indices), at_once):
        x, y = train.read_batch(data, indices[i : i + at_once], device)
        with train.autocast(device):
            out = model(x, y)
        loss += out.loss.item() * len(x)
        right += (out.logits.argmax(dim=-1) == y).sum().item() / data.block_size
        bar.update(x.numel())
    return loss / len(indices), right / len(indices)


def measure(model, data, indices, device, bar):
    """The figures of a model whose routers are watched and left alone, as a dict of plain values."""
    loss, accuracy = evaluate(model, data, indices, device, bar)
    of_layers = [[torch.cat(tensors) for tensors in zip(*block.router.seen)] for block in model.blocks]
    experts, gates, score_sums = (torch.stack(tensors) for tensors in zip(*of_layers))
    figures = dict(tokens=len(indices) * data.block_size, loss=loss, accuracy=accuracy)
    figures |= routing_statistics(model.config, experts, gates, score_sums)
    if model.config.router == "norm":
        figures["sigma"] = [block.router.router.sigma.item() for block in model.blocks]
    return figures


def probe(model, data, tokens, draws, device, label):
    """The figures of measure(), "worth" and "probe": {way: {layer: changes of loss and accuracy, one of each draw}}."""
    config, indices = model.config, train.validation_indices(data, tokens)
    deeper, M = range(config.n_layer // 2, config.n_layer), config.experts_per_pool
    choosable = int((model.blocks[0].router.router.seen > 0).sum())  # fewer than M once the layers own their experts
    matched = MATCHED * config.top_k
    ways = {"uniform": choosable} | ({"matched": matched} if choosable > matched else {})
    passes = 1 + len(ways) * len(deeper) * draws + config.n_layer
    with tqdm(total=passes * len(indices) * data.block_size, desc=label, unit="token", unit_scale=True,
              mininterval=0.5 if sys.stderr.isatty() else 10) as bar:  # fmt: skip
        figures = measure(model, data, indices, device, bar) | dict(worth=[])
        for block in model.blocks:
            block.router.off = True
            figures["worth"].append(evaluate(model, data, indices, device, bar)[0] - figures["loss"])
            block.router.off = False
        figures["probe"] = {way: {} for way in ways}
        for way, n_allowed in ways.items():
            for l in deeper:
                router, own = model.blocks[l].router, l * config.n_pool // config.n_layer * M
                used = torch.tensor(figures["shares"][l][own : own + M], device=device) + router.router.seen.sign()
                router.allowed, changes = used.topk(n_allowed).indices, []
                for draw in range(draws):
                    router.generator = torch.Generator(device).manual_seed(draw)
                    found = evaluate(model, data, indices, device, bar)
                    changes.append((found[0] - figures["loss"], found[1] - figures["accuracy"]))
                router.allowed = None
                figures["probe"][way][l] = dict(zip(("loss", "accuracy"), zip(*changes)))
    return figures


def table(results):
    """Rows of figures, a column for each run."""
    runs = list(results.values())
    rows = [
        ["validation loss, nats per token", *(f"{f['loss']:.4f}" for f in runs)],
        ["next token predicted rightly", *(f"{f['accuracy']:.2%}" for f in runs)],
        ["pool utilisation", *(f"{f['utilisation']:.1%}" for f in runs)],
        ["pairs that no expert serves", *(f"{np.mean(f['unserved']):.1%}" for f in runs)],
        ["dead experts", *(f"{f['dead_experts']} of {len(f['load'])}" for f in runs)],
        ["load of the most used, mean = 1", *(f"{max(f['load']):.2f}" for f in runs)],
        ["distinct experts a token meets, of its visits (Table 9)", *(f"{f['distinct_share']:.1%}" for f in runs)],
        ["the same, if layers chose evenly at random", *(f"{f['distinct_share_if_even']:.1%}" for f in runs)],
        ["layers that use an expert*, mean", *(f"{np.mean(f['layers_of_expert']):.2f}" for f in runs)],
    ]
    for name, key in (("pairs that no expert serves", "unserved"), ("sigma", "sigma"),
                      ("served by the layer's own experts, as --lock would give them", "covered"),
                      ("sum of a token's scores", "score_sum"), ("sum of its gates", "gate_sum"),
                      ("loss without the layer's experts, less that with them", "worth")):  # fmt: skip
        cells = [" ".join(f"{value:.2f}" for value in f.get(key, [])) for f in runs]
        rows.append([f"{name}, from the lowest layer up", *cells])
    for way in ("uniform", "matched"):
        for name, key, form in (("loss", "loss", "{:+.4f}"), ("share predicted rightly", "accuracy", "{:+.2%}")):
            layers = [[layer[key] for layer in f["probe"].get(way, {}).values()] for f in runs]
            cells = [spread(np.mean(changes, axis=0), form) if changes else "as uniform" for changes in layers]
            rows.append([f"{way} choice in one deep layer: {name}", *cells])
    return markdown(["", *results], rows) + "\n* give it at least half of an even load\n"


def draw_usage(results):
    """The paper's Figure 3: how often each layer chooses each expert, and the sum over layers against an even load."""
    fig = Figure(figsize=(1.5 + 3.5 * len(results), 4.2))
    axes = fig.subplots(2, len(results), height_ratios=[2, 1], sharex="col", squeeze=False)
    for (label, f), above, below in zip(results.items(), *axes):
        shares, M = np.array(f["shares"]), f["experts_per_pool"]
        L, n_expert = shares.shape
        pool_of_layer = np.arange(L)[:, None] * (n_expert // M) // L
        reachable = np.arange(n_expert) // M == pool_of_layer  # (L, n_expert)
        image = above.imshow(np.where(reachable, shares * M, np.nan), aspect="auto", origin="lower", vmin=0, vmax=4,
                             interpolation="nearest")  # fmt: skip
        above.set(facecolor="0.9", title=label)
        above.yaxis.get_major_locator().set_params(integer=True)
        below.bar(range(n_expert), f["load"], width=1, color=colour_of(label, list(results)), edgecolor="white", lw=0.3)
        below.axhline(1, color="0.2", lw=1, ls="--")
        below.xaxis.get_major_locator().set_params(integer=True)
        highest = max(max(f["load"]) for f in results.values())
        below.set(xlabel="expert (dashed: even load)", ylim=(0, 1.05 * highest))
    fig.colorbar(image, ax=axes[0], extend="max", label="share of the layer's\nserved pairs, even = 1")
    axes[0][0].set_ylabel("layer")
    axes[1][0].set_ylabel("load over all\nlayers, mean = 1")
    return fig


def draw_probe(results):
    """What a random choice costs, layer by layer, and how many layers each expert serves."""
    fig = Figure(figsize=(9, 3.6))
    left, right = fig.subplots(1, 2)
    series = [(label, way) for label, f in results.items() for way in f["probe"]]
    for i, (label, way) in enumerate(series):
        layers, colour = results[label]["probe"][way], colour_of(label, list(results))
        xs = [int(l) + (i - (len(series) - 1) / 2) * 0.8 / len(series) for l in layers]
        changes = [layer["loss"] for layer in layers.values()]
        left.bar(xs, np.mean(changes, axis=1), 0.75 / len(series), color=colour, label=f"{label}, {way}",
                 hatch="///" if way == "matched" else None, edgecolor="white", lw=0.5)  # fmt: skip
        left.plot(xs, changes, ".", color="0.15", ms=3)
    left.set(xlabel="layer that chooses at random (dots: draws)", ylabel="change of the loss,\nnats per token")
    for label, f in results.items():
        counts = np.bincount(f["layers_of_expert"], minlength=len(f["shares"]) + 1)
        right.plot(counts / counts.sum(), marker="o", ms=4, color=colour_of(label, list(results)), label=label)
    right.set(xlabel="layers that use an expert*\n(* give it at least half of an even load)", ylim=(0, None),
              ylabel="share of the experts")  # fmt: skip
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(axis="y")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(series)))
    return fig


def main(argv=None):
    parser = ExperimentParser(__doc__, "probe")
    parser.add_argument("runs", nargs="*", default=["out"], help="folders of runs (out)")
    parser.add_argument("--ckpt", default="ckpt.pt", help="checkpoint in them: ckpt.pt, best.pt ... (%(default)s)")
    parser.add_argument("--data_dir", help="(the one that each run was trained on)")
    parser.add_argument("--tokens", type=at_least(1), default=2**16, help="of the validation split (%(default)s)")
    parser.add_argument("--draws", type=at_least(1), default=3, help="of random choices for each layer (%(default)s)")
    parser.add_argument("--device", help="cuda, cpu ... (the best there is)")
    args = parser.parse_args(argv)
    device = train.find_device(args.device)
    about, results = machine(device), {}
    for folder in args.runs:
        checkpoint, model, data = load_run(Path(folder) / args.ckpt, device, args.data_dir)
        label = label_of(checkpoint, folder)
        label = f"{label} ({folder})" if label in results else label
        run = dict(run=str(folder), step=checkpoint["step"], seed=checkpoint["settings"]["seed"],
                   experts_per_pool=model.config.experts_per_pool)  # fmt: skip
        results[label] = run | probe(model, data, args.tokens, args.draws, device, label)
    pictures = {"_usage": draw_usage(results), "_routing": draw_probe(results)}
    save(args, about, table(results), pictures, results=results)


if __name__ == "__main__":
    run_command(main)

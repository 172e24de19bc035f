"""The paper's comparisons: trains each method with each seed, and writes one table and one picture.

    python -m experiments.ablate                                           # "tiny", pools of several sizes, three seeds
    python -m experiments.ablate --methods table5 --seeds 1 2
    python -m experiments.ablate --methods main table5 --scale 182m --nproc_per_node 8 --data_dir=data/pile
    python -m experiments.ablate --report                                  # table and picture of the runs that are done

Flags that are not listed below go to train.py, for every run alike. Runs are kept in --runs/METHOD-SEED: stopped and
started again, those that are done are skipped and the others go on. One seed gives all methods the same order of the
data, so differences are taken seed by seed. Groups of methods: main, table5, pools, granularity, all.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from experiments.bench import machine
from experiments.compare import colour_of, curve, draw_curves, legend_below, methods, spread
from prepare_pile import BadInput, Parser, run_command
from train import find_device, parse_flags, settle
from unipool import UniPool, UniPoolConfig

HERE = Path(__file__).parent
GROUPS = {
    "main": ["dense", "vanilla", "unipool", "unipool-67", "unipool-50"],
    "table5": ["vanilla", "vanilla-norm", "vanilla-sigmoid", "shared-layer-softmax", "shared-pool-softmax", "unipool",
               "g6", "g4", "g2"],
    "pools": ["vanilla", "unipool", "unipool-67", "unipool-50", "unipool-42"],
    "granularity": ["vanilla", "unipool", "vanilla-16", "unipool-16", "vanilla-32", "unipool-32"],
    "all": list(methods(12)),
}  # fmt: skip
BASELINE = "vanilla"


class Run:
    """One method with one seed: its flags, its folder, and how far it is."""

    def __init__(self, name, method, seed, scale, flags, folder):
        self.name, self.method, self.seed, self.folder = name, method, seed, folder
        own = [f"--{key}={value}" for key, value in method.flags.items()]
        self.flags = [f"--scale={scale}", f"--arch={method.arch}", f"--seed={seed}", *own, *flags]
        self.settings, self.config = settle(parse_flags(self.flags), None)  # bad flags end here, before any run

    def lines(self):
        """What metrics.jsonl holds so far; a line that is being written is left out."""
        try:
            return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines(True)
                    if line.endswith("\n")]  # fmt: skip
        except (OSError, ValueError):
            return []

    def step(self):
        lines = self.lines()
        return lines[-1]["step"] if lines else 0

    def done(self):
        return self.step() >= self.settings.max_steps and (self.folder / "ckpt.pt").exists()

    def check(self):
        """Raise BadInput if the folder holds a run by other flags."""
        path = self.folder / "run.json"
        if not path.exists():
            return
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(path.read_text())["flags"] == self.flags:
                return
        raise BadInput(f"{path}: this run was made by other flags: give another --runs, or delete {self.folder}")

    def start(self, nproc, environment, about):
        """The process that trains it, or goes on with it; what it prints goes to log.txt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "run.json").exists():
            (self.folder / "run.json").write_text(json.dumps(dict(flags=self.flags, machine=about)) + "\n")
        launch = [sys.executable]
        if nproc > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        resume = ["--resume"] if (self.folder / "ckpt.pt").exists() else []
        command = [*launch, HERE.parent / "train.py", *self.flags, f"--out_dir={self.folder}", *resume]
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def choose_runs(names, seeds, scale, flags, folder):
    """The Runs of these groups or methods, all methods with the first seed first. Raises BadInput."""
    n_layer = UniPoolConfig.from_scale(scale).n_layer
    known = methods(n_layer)
    names = [name for group in names for name in GROUPS.get(group, [group])]
    for name in names:
        if name not in known:
            raise BadInput(f"--methods={name} is unknown: choose from {', '.join([*GROUPS, *known])}")
    runs = []
    for seed in seeds:
        for name in dict.fromkeys(names):  # each once
            n_pool = known[name].flags.get("n_pool", 1)
            if n_pool == 1 or (n_pool < n_layer and n_layer % n_pool == 0):
                runs.append(Run(name, known[name], seed, scale, flags, folder / f"{name}-{seed}"))
            elif seed == seeds[0]:
                print(f"{name} is left out: {n_layer} layers cannot share {n_pool} pools", file=sys.stderr)
    return runs


def environment_of(slot, jobs, nproc):
    """Environment variables of the run in place `slot` of `jobs` side by side: its share of the cores, its own GPUs."""
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (jobs * nproc)))
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in range(slot * nproc, (slot + 1) * nproc))
    return environment


def train_all(runs, jobs, nproc, about):
    """Train what is not done, `jobs` at a time. Raises BadInput when one fails; the others then save and end."""
    todo = [run for run in runs if not run.done()]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are done already", file=sys.stderr)
    running = {}  # slot: (run, process)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, as Ctrl-C
    bar = tqdm(total=sum(run.settings.max_steps for run in todo), initial=sum(run.step() for run in todo), unit="step",
               mininterval=0.5 if sys.stderr.isatty() else 60)  # fmt: skip
    waiting = list(todo)
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    run = waiting.pop(0)
                    running[slot] = run, run.start(nproc, environment_of(slot, jobs, nproc), about)
            time.sleep(0.5)
            bar.set_postfix_str(", ".join(run.folder.name for run, _ in running.values()), refresh=False)
            bar.update(sum(run.step() for run in todo) - bar.n)
            for slot, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode or not run.done():
                        lines = (run.folder / "log.txt").read_text(errors="replace").strip().splitlines()
                        last = lines[-1] if lines else f"status {process.returncode}"
                        raise BadInput(f"{run.folder.name} has ended early ({last}): {run.folder / 'log.txt'} has more")
    finally:
        for _, process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)  # it finishes its step and saves
        for _, process in running.values():
            process.wait()
        bar.close()


def summarise(runs):
    """{label: figures} of the runs that are done; differences to the baseline are taken seed by seed."""
    results = {}
    for run in runs:
        figures = results.setdefault(run.method.label, dict(name=run.name, n_expert=run.config.n_expert, val_loss={}))
        with torch.device("meta"):
            model = UniPool(run.config)
        figures |= dict(parameters=model.num_params(), active_parameters=model.num_params(active=True))
        last = run.lines()[-1]
        figures["val_loss"][run.seed] = last["val_loss"]
        if run.config.n_expert:
            figures.setdefault("pool_utilisation", {})[run.seed] = last["pool_utilisation"]
    baseline = next((f["val_loss"] for f in results.values() if f["name"] == BASELINE), {})
    for figures in results.values():
        losses = figures["val_loss"]
        figures["difference"] = {seed: losses[seed] - baseline[seed] for seed in losses if seed in baseline}
    return results


def table(results):
    heads = ("method", "experts", "parameters (active)", "seeds", "validation loss", "against vanilla", "pool used")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for label, f in results.items():
        against = spread(list(f["difference"].values()), "{:+.4f}") if f["difference"] else ""
        used = f"{statistics.fmean(f['pool_utilisation'].values()):.0%}" if "pool_utilisation" in f else ""
        lines.append(
            f"| {label} | {f['n_expert'] or ''} | {f['parameters'] / 1e6:,.2f}M ({f['active_parameters'] / 1e6:,.2f}M) "
            f"| {len(f['val_loss'])} | {spread(list(f['val_loss'].values()))} | "
            f"{'' if f['name'] == BASELINE else against} | {used} |"
        )
    return "\n".join(lines) + "\n"


def draw(runs, results, title, path):
    """The validation curves (the paper's Figure 4), and beside them the difference to the baseline, seed by seed."""
    curves = {}
    for run in runs:
        curves.setdefault(run.method.label, []).append(curve(run.lines(), "val_loss"))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), dpi=150, layout="constrained", width_ratios=[3, 2])
    draw_curves(left, curves, "val_loss")
    names = [label for label, f in results.items() if f["difference"] and f["name"] not in (BASELINE, "dense")]
    for y, label in enumerate(reversed(names)):
        values = list(results[label]["difference"].values())
        right.plot(values, [y] * len(values), "o", color=colour_of(label, names), alpha=0.6, ms=5)
        right.plot([statistics.fmean(values)] * 2, [y - 0.3, y + 0.3], color=colour_of(label, names), lw=2)
    right.axvline(0, color=colour_of("vanilla", []), lw=1.6)
    right.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    right.set_ylim(-0.6, max(0, len(names) - 1) + 0.6)
    right.set_xlabel("against vanilla at the end, nats a token\n(dots: seeds; left is better)")
    right.grid(alpha=0.25, axis="x")
    right.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, fontsize=10)
    legend_below(fig, left, columns=5)
    fig.savefig(path)
    plt.close(fig)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--methods", nargs="+", default=["main"], help=f"groups, or any of {', '.join(methods(12))} (main)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--scale", default="tiny", help="as in train.py (%(default)s)")
    parser.add_argument("--runs", help="folder for the runs (runs/SCALE)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--nproc_per_node", type=int, default=1, help="processes of each, by torchrun (%(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing: table and picture of what is done")
    parser.add_argument("--name", help="of the files in --results (ablate_SCALE)")
    parser.add_argument(
        "--results", default=HERE / "results", help="folder for JSON, table and picture; empty for none"
    )
    given = sys.argv[1:] if argv is None else argv
    args, flags = parser.parse_known_args(given)
    taken = [f for f in flags if f.split("=")[0] in ("--arch", "--seed", "--out_dir", "--resume")]
    if taken:
        raise BadInput(f"{taken[0]}: give --methods, --seeds and --runs instead, for many runs")
    for name in ("jobs", "nproc_per_node"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name}={getattr(args, name)} must be at least 1")
    folder = Path(args.runs or Path("runs") / args.scale)
    try:
        runs = choose_runs(args.methods, args.seeds, args.scale, flags, folder)
    except ValueError as error:
        raise BadInput(f"--scale={args.scale}: {error}") from None
    about = machine(find_device(runs[0].settings.device))
    if not args.report:
        for run in runs:
            run.check()
        train_all(runs, args.jobs, args.nproc_per_node, about)
    runs = [run for run in runs if run.done()]
    if not runs:
        raise BadInput(f"--runs={folder}: none of these runs is done; leave out --report to train them")
    results = summarise(runs)
    print(table(results))
    if str(args.results):
        first = runs[0]
        tokens = first.settings.max_steps * first.settings.batch_size * first.config.block_size
        command = " ".join(["python -m experiments.ablate", *given])
        made_by = {run.folder.name: json.loads((run.folder / "run.json").read_text()) for run in runs}
        record = dict(command=command, machine=about, tokens=tokens, results=results, runs=made_by)
        path = Path(args.results) / (args.name or f"ablate_{args.scale}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(results))
        title = f"{args.scale}, {tokens / 1e6:,.1f}M tokens, mean of {len({run.seed for run in runs})} seeds"
        draw(runs, results, title, path.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)

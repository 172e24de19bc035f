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
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from command import BadInput, Parser, run_command
from experiments.bench import machine, save_result
from experiments.compare import ROUTING, colour_of, curve, draw_curves, legend_below, methods, read_metrics, spread
from train import parse_flags, settle
from unipool import UniPool

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
    """One method with one seed: its flags (as parse_flags gives them), its folder, and how far it is."""

    def __init__(self, name, seed, flags, folder):
        self.name, self.seed, self.flags, self.folder = name, seed, flags, folder
        self.label = methods(12)[name].label
        self.settings, self.config = settle(flags, None)  # bad flags end here, before any run

    def step(self):
        """The newest step in metrics.jsonl; only the end of the file is read."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return 0
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            steps = re.findall(rb'^{"step": (\d+).*}\n', file.read(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def done(self):
        return bool(read_record(self.folder).get("done"))

    def check(self):
        """Raise BadInput if the folder holds something else than this run."""
        if self.folder.exists() and any(self.folder.iterdir()) and read_record(self.folder).get("flags") != self.flags:
            raise BadInput(f"{self.folder}: this run was made by other flags: give another --runs, or delete it")

    def start(self, nproc, environment, about):
        """The process that trains it, or goes on with it; what it prints goes to log.txt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_record(self.folder, dict(flags=self.flags, machine=about, done=False))
        launch = [sys.executable]
        if nproc > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        flags = [f"--{'' if value else 'no-'}{key}" if isinstance(value, bool) else f"--{key}={value}"
                 for key, value in self.flags.items()]  # fmt: skip
        resume = ["--resume"] if (self.folder / "ckpt.pt").exists() else []
        command = [*launch, HERE.parent / "train.py", *flags, f"--out_dir={self.folder}", *resume]
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def ended(self, status):
        """Mark the run as done if it is. Raises BadInput with what its log says if it failed."""
        if status == 0 and self.step() >= self.settings.max_steps:
            write_record(self.folder, read_record(self.folder) | dict(done=True))
            return
        path = self.folder / "log.txt"
        lines = path.read_text(errors="replace").strip().splitlines() or [f"status {status}"]
        why = next((line for line in reversed(lines) if "error:" in line), lines[-1])  # torchrun adds more after it
        raise BadInput(f"{self.folder.name} has ended early ({why}): {path} has more")


def read_record(folder):
    """run.json of a run's folder: its flags, the machine it was started on, and whether it is done; {} without one."""
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def write_record(folder, record):
    temporary = folder / "run.json.tmp"
    temporary.write_text(json.dumps(record) + "\n")
    os.replace(temporary, folder / "run.json")


def method_names(groups):
    """The methods of these groups, each once; a method's own name stands for itself. Raises BadInput."""
    names = list(dict.fromkeys(name for group in groups for name in GROUPS.get(group, [group])))
    for name in names:
        if name not in methods(12):
            raise BadInput(f"--methods={name} is unknown: choose from {', '.join([*GROUPS, *methods(12)])}")
    return names


def choose_runs(groups, seeds, given, folder):
    """The Runs of these groups or methods, all methods with the first seed first. Raises BadInput.

    given: the flags of all of them, as parse_flags gives them.
    """
    for name in ("arch", "seed", "out_dir", "resume", *ROUTING):
        if name in given:
            raise BadInput(f"--{name}={given[name]} belongs to the method or the run: give --methods, --seeds, --runs")
    n_layer = settle(given, None)[1].n_layer
    runs = []
    for seed in dict.fromkeys(seeds):
        for name in method_names(groups):
            method = methods(n_layer)[name]
            n_pool = method.flags.get("n_pool", 1)
            if n_pool == 1 or (n_pool < n_layer and n_layer % n_pool == 0):
                flags = given | dict(arch=method.arch, seed=seed) | method.flags
                runs.append(Run(name, seed, flags, folder / f"{name}-{seed}"))
            elif seed == seeds[0]:
                print(f"{name} is left out: {n_pool} pools do not share {n_layer} layers evenly", file=sys.stderr)
    if not runs:
        raise BadInput(f"--methods={' '.join(groups)}: none of them fits {n_layer} layers")
    return runs


def finished_runs(groups, seeds, folder):
    """The Runs in folder that are done, with the flags that they were made by."""
    runs = []
    for seed in dict.fromkeys(seeds):
        for name in method_names(groups):
            record = read_record(folder / f"{name}-{seed}")
            if record.get("done"):
                runs.append(Run(name, seed, record["flags"], folder / f"{name}-{seed}"))
    if not runs:
        raise BadInput(f"--runs={folder}: none of these runs is done; leave out --report to train them")
    return runs


def environment_of(slot, jobs, nproc):
    """Environment variables of the run in place `slot` of `jobs` side by side: its share of the cores, its own GPUs."""
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (jobs * nproc)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[slot * nproc :][:nproc])
    return environment


def visible_gpus():
    """Their names, as CUDA_VISIBLE_DEVICES has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def train_all(runs, jobs, nproc, about):
    """Train what is not done, `jobs` at a time. Raises BadInput when one fails; the others then save and end."""
    todo = [run for run in runs if not run.done()]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are done already", file=sys.stderr)
    running, waiting = {}, list(todo)  # slot: (run, process)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, as Ctrl-C
    steps = {run.folder: run.step() for run in todo}
    bar = tqdm(total=sum(run.settings.max_steps for run in todo), initial=sum(steps.values()), unit="step",
               mininterval=0.5 if sys.stderr.isatty() else 60)  # fmt: skip
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    run = waiting.pop(0)
                    running[slot] = run, run.start(nproc, environment_of(slot, jobs, nproc), about)
            time.sleep(0.5)
            for slot, (run, process) in list(running.items()):
                status = process.poll()
                steps[run.folder] = run.step()
                if status is not None:
                    del running[slot]
                    run.ended(status)
            bar.set_postfix_str(", ".join(run.folder.name for run, _ in running.values()), refresh=False)
            bar.update(sum(steps.values()) - bar.n)
    finally:
        for _, process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)  # it finishes its step and saves
        for _, process in running.values():
            process.wait()
        bar.close()


def summarise(runs):
    """{label: figures} of finished runs; differences to the baseline are taken seed by seed."""
    results = {}
    for run in runs:
        last = read_metrics(run.folder)[-1]
        if last["val_loss"] is None:
            print(f"{run.folder} is left out: its last validation loss is not finite", file=sys.stderr)
            continue
        with torch.device("meta"):
            model = UniPool(run.config)
        figures = results.setdefault(run.label, dict(name=run.name, n_expert=run.config.n_expert, val_loss={}))
        figures |= dict(parameters=model.num_params(), active_parameters=model.num_params(active=True))
        figures["val_loss"][run.seed] = last["val_loss"]
        if run.config.n_expert:
            figures.setdefault("pool_utilisation", {})[run.seed] = last["pool_utilisation"]
    baseline = next((f["val_loss"] for f in results.values() if f["name"] == BASELINE), {})
    for figures in results.values():
        losses = figures["val_loss"]
        figures["difference"] = {seed: losses[seed] - baseline[seed] for seed in losses if seed in baseline}
    return results


def table(results):
    heads = ["method", "experts", "parameters (active)", "seeds", "validation loss", "against vanilla",
             "pool utilisation, last step"]  # fmt: skip
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
        curves.setdefault(run.label, []).append(curve(read_metrics(run.folder), "val_loss"))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), dpi=150, layout="constrained", width_ratios=[3, 2])
    draw_curves(left, curves, "val_loss")
    names = [label for label, f in results.items() if f["difference"] and f["name"] not in (BASELINE, "dense")]
    right.set_visible(bool(names))
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
    parser.add_argument("--name", help="of the files in --results (ablate_SCALE_METHODS)")
    parser.add_argument(
        "--results", default=HERE / "results", help="folder for JSON, table and picture; empty for none"
    )
    args, flags = parser.parse_known_args(argv)
    for name in ("jobs", "nproc_per_node"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name}={getattr(args, name)} must be at least 1")
    if args.jobs > 1 and 0 < torch.cuda.device_count() < args.jobs * args.nproc_per_node:
        raise BadInput(f"--jobs={args.jobs} x --nproc_per_node={args.nproc_per_node} are more than the "
                       f"{torch.cuda.device_count()} GPUs: lower one of them")  # fmt: skip
    folder = Path(args.runs or Path("runs") / args.scale)
    given = parse_flags([f"--scale={args.scale}", *flags])
    about = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not args.report:
        runs = choose_runs(args.methods, args.seeds, given, folder)
        for run in runs:
            run.check()
        train_all(runs, args.jobs, args.nproc_per_node, about)
    runs = finished_runs(args.methods, args.seeds, folder)
    results = summarise(runs)
    print(table(results))
    if str(args.results):
        first = runs[0]
        tokens = first.settings.max_steps * first.settings.batch_size * first.config.block_size
        seeds = sorted({run.seed for run in runs})
        name = args.name or "_".join(["ablate", args.scale, *args.methods])
        save_result(args.results, name, "ablate", argv, about, seeds=seeds, tokens=tokens, results=results,
                    runs={run.folder.name: read_record(run.folder) for run in runs})  # fmt: skip
        path = Path(args.results) / name
        Path(f"{path}.md").write_text(table(results))
        title = f"{args.scale}, {tokens / 1e6:,.1f}M tokens, seeds {', '.join(map(str, seeds))}"
        draw(runs, results, title, f"{path}.png")
        print(f"{path}.md, {path}.png")


if __name__ == "__main__":
    run_command(main)

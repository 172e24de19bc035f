"""The paper's comparisons: trains each method with each seed, and writes one table and one picture.

    python -m experiments.ablate                                           # "tiny", pools of several sizes, three seeds
    python -m experiments.ablate --methods table5 --seeds 1 2
    python -m experiments.ablate --methods main table5 --scale 182m --nproc_per_node 8 --data_dir=data/pile

Flags that are not listed below go to train.py, for every run alike. Runs are kept in --runs/METHOD-SEED: stopped and
started again, those that are done are skipped and the others go on. One seed gives all methods the same order of the
data, so differences are taken seed by seed. Groups of methods: main, table5, lock, granularity.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from command import BadInput, run_command
from experiments.common import RunsParser, at_least, machine, markdown, save, spread
from experiments.compare import ROUTING, colour_of, curve, draw_curves, methods, read_metrics
from prepare_pile import new_file
from train import parse_flags, settle
from unipool import UniPool

GROUPS = {
    "main": ["dense", "vanilla", "unipool", "unipool-67", "unipool-50"],
    "table5": ["vanilla", "vanilla-norm", "vanilla-sigmoid", "shared-layer-softmax", "shared-pool-softmax", "unipool",
               "g6", "g4", "g2"],
    "lock": ["vanilla", "unipool", "lock", "random"],
    "granularity": ["vanilla", "unipool", "vanilla-16", "unipool-16", "vanilla-32", "unipool-32"],
}  # fmt: skip
BASELINE = "vanilla"
TRAIN = [Path(__file__).parent.parent / "train.py"]


class Run:
    """One method with one seed: its flags, its folder, and how far it is.

    given: the flags of all runs of an experiment, as parse_flags gives them; own: those of this one beside its seed.
    program: train.py, or what takes its place in the command line. Raises BadInput for bad flags.
    """

    def __init__(self, name, seed, given, own, folder, program=TRAIN):
        for flag in given:
            if flag in ("seed", "out_dir", "resume", *own):
                raise BadInput(f"--{flag}={given[flag]} differs from run to run: leave it out (--help lists what sets "
                               "it, as --seeds and --runs)")  # fmt: skip
        self.name, self.seed, self.flags, self.program = name, seed, given | own | dict(seed=seed), program
        self.folder = folder / f"{name}-{seed}"
        self.settings, self.config = settle(self.flags, None)
        if not self.settings.eval_interval:
            raise BadInput("--eval_interval=0: without validations there is nothing to compare: give steps")

    def record(self):
        """run.json: its flags, the machine it was last started on, and whether it is done; {} without one."""
        try:
            return json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            return {}

    def write_record(self, **record):
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_file(self.folder / "run.json") as file:
            file.write(json.dumps(record).encode() + b"\n")

    def check(self):
        """Raise BadInput if the folder holds something else than this run."""
        flags = self.record().get("flags")
        never_began = flags is not None and self.step() == 0 and not (self.folder / "ckpt.pt").exists()
        if self.folder.exists() and any(self.folder.iterdir()) and flags != self.flags and not never_began:
            raise BadInput(f"{self.folder}: this run was made by other flags: give another --runs, or delete it")

    def step(self):
        """The newest step in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        steps = re.findall(rb'^{"step": (\d+).*}\n', path.read_bytes(), re.MULTILINE) if path.exists() else []
        return int(steps[-1]) if steps else 0

    def start(self, nproc, environment, about):
        """The process that trains it, or goes on with it; what it prints goes to log.txt."""
        self.write_record(flags=self.flags, machine=about, done=False)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
        flags = [f"--{'' if value else 'no-'}{key}" if isinstance(value, bool) else f"--{key}={value}"
                 for key, value in self.flags.items()]  # fmt: skip
        resume = ["--resume"] if (self.folder / "ckpt.pt").exists() else []
        command = [sys.executable, *launch, *self.program, *flags, f"--out_dir={self.folder}", *resume]
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def end(self, status):
        """Mark the run as done if it is. Raises BadInput with what its log says if it failed."""
        if status == 0 and self.step() >= self.settings.max_steps:
            self.write_record(**self.record() | dict(done=True))
            return
        path = self.folder / "log.txt"
        lines = path.read_text(errors="replace").strip().splitlines() or [f"status {status}"]
        why = next((line for line in reversed(lines) if "error:" in line), lines[-1])  # torchrun adds more after it
        raise BadInput(f"{self.folder.name} has ended early ({why}): {path} has more")


def choose_runs(groups, seeds, given, folder):
    """The Runs of these groups or methods, each once, all methods with the first seed first. Raises BadInput.

    given: the flags of all of them, as parse_flags gives them.
    """
    for name in ("lock", "lock_random", *ROUTING):
        if name in given:
            raise BadInput(f"--{name}={given[name]} belongs to the method: give --methods")
    n_layer, flags = settle(given, None)[1].n_layer, {}
    for name in [name for group in groups for name in GROUPS.get(group, [group])]:
        if name not in methods(n_layer):
            raise BadInput(f"--methods={name} is unknown: choose from {', '.join([*GROUPS, *methods(n_layer)])}")
        method = methods(n_layer)[name]
        n_pool = method.flags.get("n_pool", 1)
        if n_pool == 1 or (n_pool < n_layer and n_layer % n_pool == 0):
            lock = dict(lock=0.2) if "lock" in method.lock and given.get("scale", "tiny") == "tiny" else method.lock
            flags[name] = dict(arch=method.arch) | method.flags | lock
        else:
            print(f"{name} is left out: {n_pool} pools do not share {n_layer} layers evenly", file=sys.stderr)
    if not flags:
        raise BadInput(f"--methods={' '.join(groups)}: none of them fits {n_layer} layers")
    return [Run(name, seed, given, flags[name], folder) for seed in dict.fromkeys(seeds) for name in flags]


def train_all(runs, jobs, nproc=1):
    """Train what is not done, `jobs` at a time, each in nproc processes; returns what machine() says before, but
    with the threads of one of these. Raises BadInput when one fails; the others then save and end.
    """
    on_gpu = torch.cuda.is_available() and runs[0].settings.device != "cpu"
    if jobs > 1 and on_gpu:
        raise BadInput(f"--jobs={jobs}: on GPUs start several commands, each with its own CUDA_VISIBLE_DEVICES")
    about = machine(torch.device("cuda" if on_gpu else "cpu"))
    about["threads"] = max(1, about["threads"] // (jobs * nproc))  # of each process
    for run in runs:
        run.check()
    waiting = [run for run in runs if not run.record().get("done")]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", file=sys.stderr)
    running = {}  # slot: (run, process)
    environment = os.environ | dict(OMP_NUM_THREADS=str(about["threads"]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, as Ctrl-C
    steps = {run.folder: run.step() for run in waiting}
    bar = tqdm(total=sum(run.settings.max_steps for run in waiting), initial=sum(steps.values()), unit="step",
               mininterval=0.5 if sys.stderr.isatty() else 60)  # fmt: skip
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    run = waiting.pop(0)
                    running[slot] = run, run.start(nproc, environment, about)
            time.sleep(0.5)
            for slot, (run, process) in list(running.items()):
                status = process.poll()
                steps[run.folder] = run.step()
                if status is not None:
                    del running[slot]
                    run.end(status)
            bar.set_postfix_str(", ".join(run.folder.name for run, _ in running.values()), refresh=False)
            bar.update(sum(steps.values()) - bar.n)
    finally:
        for _, process in running.values():
            process.terminate()  # it finishes its step and saves
        for _, process in running.values():
            process.wait()
        bar.close()
    return about


def summarise(runs):
    """{name: figures} of finished runs; those that differ between seeds are {seed: figure}."""
    results = {}
    for run in runs:
        last = read_metrics(run.folder)[-1]
        if last["val_loss"] is None:
            print(f"{run.folder} is left out: its last validation loss is not finite", file=sys.stderr)
            continue
        with torch.device("meta"):
            model = UniPool(run.config)
        figures = results.setdefault(run.name, dict(name=run.name, n_expert=run.config.n_expert, val_loss={}))
        figures |= dict(parameters=model.num_params(), active_parameters=model.num_params(active=True))
        figures["val_loss"][run.seed] = last["val_loss"]
        if run.config.n_expert:
            figures.setdefault("pool_utilisation", {})[run.seed] = last["pool_utilisation"]
    return results


def contents(runs, results):
    """What the file of results holds, and a title that tells of the runs."""
    first, seeds = runs[0], sorted({run.seed for run in runs})
    tokens = first.settings.max_steps * first.settings.batch_size * first.config.block_size
    title = f"{first.settings.scale}, {tokens / 1e6:,.1f}M tokens, seeds {', '.join(map(str, seeds))}"
    records = {run.folder.name: run.record() for run in runs}
    return dict(seeds=seeds, tokens=tokens, results=results, runs=records), title


def against_baseline(figures):
    """summarise()'s figures by the methods' labels, with differences to the baseline, taken seed by seed."""
    baseline = figures[BASELINE]["val_loss"] if BASELINE in figures else {}
    for f in figures.values():
        f["difference"] = {seed: loss - baseline[seed] for seed, loss in f["val_loss"].items() if seed in baseline}
    return {methods(12)[name].label: f for name, f in figures.items()}


def table(results):
    rows = []
    for label, f in results.items():
        losses = f["val_loss"].values()
        parameters = f"{f['parameters'] / 1e6:,.2f}M ({f['active_parameters'] / 1e6:,.2f}M)"
        difference = spread(f["difference"].values(), "{:+.4f}") if f["difference"] and f["name"] != BASELINE else ""
        used = f"{statistics.fmean(f['pool_utilisation'].values()):.0%}" if "pool_utilisation" in f else ""
        rows.append([label, f["n_expert"] or "", parameters, len(losses), spread(losses), difference, used])
    return markdown(["method", "experts", "parameters (active)", "seeds", "validation loss", "against vanilla",
                     "pool utilisation, last step"], rows)  # fmt: skip


def draw(runs, results, title):
    """The validation curves (the paper's Figure 4), and beside them the difference to the baseline, seed by seed."""
    curves = {}
    for run in runs:
        curves.setdefault(methods(12)[run.name].label, []).append(curve(read_metrics(run.folder), "val_loss"))
    names = [label for label, f in results.items() if f["difference"] and f["name"] != BASELINE]
    fig = Figure(figsize=(9, 4.2) if names else (6, 4.2))
    left, *rights = fig.subplots(1, 2, width_ratios=[3, 2]) if names else [fig.subplots()]
    draw_curves(left, curves, "val_loss")
    fig.suptitle(title, fontsize=10)
    columns = 5 if names and len(curves) < 6 else 3
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    if not names:
        return fig
    right = rights[0]
    for y, label in enumerate(reversed(names)):
        values = list(results[label]["difference"].values())
        right.plot(values, [y] * len(values), "o", color=colour_of(label, names), alpha=0.6, ms=5)
        right.plot([statistics.fmean(values)] * 2, [y - 0.3, y + 0.3], color=colour_of(label, names), lw=2)
    right.axvline(0, color=colour_of("vanilla", []), lw=1.6)
    right.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    right.set(ylim=(-0.6, len(names) - 0.4), xlabel="against vanilla, nats per token\n(dots: seeds; left is better)")
    right.locator_params(axis="x", nbins=5)  # their labels are wide
    right.grid(axis="x")
    return fig


def main(argv=None):
    parser = RunsParser(__doc__, "ablate_SCALE_METHODS", "runs/SCALE")
    parser.add_argument("--methods", nargs="+", default=["main"], help=f"groups, or any of {', '.join(methods(12))}")
    parser.add_argument("--list", action="store_true", help="print the groups and methods, and train nothing")
    parser.add_argument("--scale", default="tiny", help="as in train.py (%(default)s)")
    parser.add_argument("--nproc_per_node", type=at_least(1), default=1, help="processes of each (%(default)s)")
    args, flags = parser.parse_known_args(argv)
    if args.list:
        print("\n".join(f"{name}: {', '.join(group)}" for name, group in (GROUPS | dict(all=methods(12))).items()))
        return
    if args.name == parser.get_default("name"):
        args.name = "_".join(["ablate", args.scale, *args.methods])
    folder = Path("runs", args.scale) if args.runs == parser.get_default("runs") else Path(args.runs)
    given = parse_flags([f"--scale={args.scale}", *flags])
    runs = choose_runs(args.methods, args.seeds, given, folder)
    about = train_all(runs, args.jobs, args.nproc_per_node)
    results = against_baseline(summarise(runs))
    record, title = contents(runs, results)
    save(args, about, table(results), {"": draw(runs, results, title)}, **record)


if __name__ == "__main__":
    run_command(main)

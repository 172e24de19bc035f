"""What the experiments share: their flags, the machine they ran on, tables and pictures, and the files of results."""

import argparse
import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch

from command import Parser

matplotlib.rcParams |= {
    "figure.dpi": 150, "figure.constrained_layout.use": True, "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "grid.alpha": 0.25, "legend.fontsize": 8, "legend.frameon": False,
}  # fmt: skip


class ExperimentParser(Parser):
    """A Parser with the flags --name and --results of what save() writes."""

    def __init__(self, description, name):
        super().__init__(description)
        self.add_argument("--name", default=name, type=file_name, help="of the files in --results (%(default)s)")
        self.add_argument("--results", default="results", type=writable_folder,
                          help="folder for JSON, table and pictures; empty for none (%(default)s)")  # fmt: skip


class RunsParser(ExperimentParser):
    """An ExperimentParser for what trains several runs; flags that it does not know are train.py's."""

    def __init__(self, description, name, runs):
        super().__init__(description, name)
        self.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
        self.add_argument("--runs", default=runs, help=f"folder for the runs ({runs})")
        self.add_argument("--jobs", type=at_least(1), default=1, help="runs side by side (%(default)s)")


def file_name(text):
    """The type of a flag that takes the name of a file, without folders."""
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text} must be a file's name, without a folder")
    return text


def writable_folder(text):
    """The type of a flag that takes a folder, tried before the work whose results it is for; empty stays empty."""
    try:
        if text:  # what is not there yet will be made in the last folder that is
            path = Path(text).absolute()
            tempfile.TemporaryFile(dir=next(p for p in (path, *path.parents) if p.exists())).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written ({error.strerror})") from None
    return text


def at_least(low, kind=int):
    """The type of a flag that takes numbers from `low` on; of floats neither infinity nor nan."""

    def number(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}")
        return kind(text)

    return number


def machine(device):
    """What a figure needs beside it to be worth anything: CPU, threads, GPU, versions, the commit of this code."""
    commit = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent,  # maybe without git
                            capture_output=True, text=True)  # fmt: skip
    path = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.+)", path.read_text()) if path.exists() else []
    cpu = f"{len(cpus)} x {cpus[0]}" if cpus else platform.processor()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return dict(cpu=cpu, threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__,
                python=platform.python_version(), commit=commit.stdout.strip() or None)  # fmt: skip


def save(args, about, table, pictures=None, **contents):
    """Write a table, the figures {end of the name: Figure} and the contents to args.results/args.name.

    about: what machine() says, asked before the experiment began. The JSON file holds it and the command beside the
    contents. Without args.results nothing is written.
    """
    if not str(args.results):
        print(table)
        return
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    record = dict(command=shlex.join(["python", *sys.orig_argv[1:]]), machine=about, **contents)
    (folder / f"{args.name}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    (folder / f"{args.name}.md").write_text(table)
    for ending, figure in (pictures or {}).items():
        figure.savefig(folder / f"{args.name}{ending}.png")
    print(table)  # last: no terminal can lose what has been measured
    print(f"{folder / args.name}.json, .md{''.join(f', {ending}.png' for ending in pictures or {})}")


def markdown(heads, rows):
    """A Markdown table; the cells may be anything that has a text."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in [heads, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]]) + "\n"


def spread(values, form="{:.4f}"):
    """Mean, and what the values range over, as text."""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else mean

"""What one GPU must hold, for each scale: a training step on fake tensors (fake_gpu.py), or on a GPU that is there.

    python -m experiments.memory                                       # all scales, --shard on 8 GPUs, 16 sequences
    python -m experiments.memory --scales 978m --sequences 32 --gpus 16 --results=

The second of two steps of two micro-batches, not compiled, and the moment at which it holds most. Fragments, and what
the CUDA libraries and NCCL take for themselves, are not in it: of 80 GiB, 72 count as room.
"""

import itertools

import torch
from tqdm import tqdm

from command import BadInput, run_command
from experiments.bench import prepare_training, training_step
from experiments.common import ExperimentParser, at_least, machine, markdown, save
from experiments.fake_gpu import WHY_NOT, fake_gpu
from unipool import SCALES, UniPoolConfig

GIB = 2**30
MADE_IN = {"weights": "init", "optimizer": "optimizer", "kept by forward": "forward", "made by backward": "backward"}


def two_steps(config, sequences, mesh, recompute, begin_second, begin=lambda phase: None):
    """Two training steps of two micro-batches on the GPU; begin_second() is called between them."""
    begin("init")
    model, optimizer = prepare_training(config, torch.device("cuda"), mesh)
    model.recompute = recompute
    idx = torch.randint(config.vocab_size, (sequences, config.block_size + 1), device="cuda")
    training_step(model, optimizer, idx, 2, begin=begin)
    begin_second()
    training_step(model, optimizer, idx, 2, begin=begin)


def simulated(config, sequences, world_size=1, recompute=False):
    """Bytes at the peak of the second step on one of world_size GPUs: what was made in which phase, and the sum."""
    with fake_gpu(config, world_size) as (mesh, watch):
        two_steps(config, sequences, mesh, recompute, watch.reset, watch.begin)
        made_in = {name: watch.peak[phase] for name, phase in MADE_IN.items()}
        return made_in | dict(peak=watch.peak.total(), phase=watch.peak_phase)


def measured(config, sequences, recompute):
    """Peak bytes of the second step on the GPU that is here."""
    torch.cuda.empty_cache()
    two_steps(config, sequences, None, recompute, torch.cuda.reset_peak_memory_stats)
    return torch.cuda.max_memory_allocated()


def main(argv=None):
    parser = ExperimentParser(__doc__, "memory")
    parser.add_argument("--gpus", type=at_least(2), default=8, help="that --shard splits a run over (%(default)s)")
    parser.add_argument("--sequences", type=at_least(1), default=16, help="of a micro-batch (%(default)s)")
    parser.add_argument("--scales", nargs="+", default=[s for s in SCALES if s != "tiny"], choices=list(SCALES))
    args = parser.parse_args(argv)
    if WHY_NOT:
        raise BadInput(WHY_NOT)
    cuda = torch.cuda.is_available()
    about, rows, results = machine(torch.device("cuda" if cuda else "cpu")), [], {}
    combinations = list(itertools.product(args.scales, (False, True), (False, True)))
    for scale, sharded, recompute in tqdm(combinations, unit="row"):
        config = UniPoolConfig.from_scale(scale)
        held = simulated(config, args.sequences, args.gpus if sharded else 1, recompute)
        has_room = held["peak"] <= 72 * GIB
        if cuda and has_room and not sharded:
            held["measured"] = measured(config, args.sequences, recompute)
        name = " ".join([scale, *["--shard"] * sharded, *["--recompute"] * recompute])
        sizes = [f"{held[part] / GIB:.1f}" if part in held else "" for part in [*MADE_IN, "peak", "measured"]]
        rows.append([name, *sizes[:-1], held["phase"], "yes" if has_room else "no", *sizes[-1:] * cuda])
        results[name] = held
    heads = ["scale, flags", *MADE_IN, "peak", "in", "room in 80 GiB", *["measured"] * cuda]
    title = (f"GiB of one GPU; {args.gpus} GPUs where --shard; micro-batches of {args.sequences} sequences; simulated"
             f"{' (last column: measured)' if cuda else ', not measured'}")  # fmt: skip
    save(args, about, f"{title}\n\n{markdown(heads, rows)}", bytes=results)


if __name__ == "__main__":
    run_command(main)

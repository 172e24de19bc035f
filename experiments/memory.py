"""What one GPU must hold, for each scale: a training step on fake tensors (fake_gpu.py), or on a GPU that is there.

    python -m experiments.memory                                       # all scales, --shard on 8 GPUs, 16 sequences
    python -m experiments.memory --scales 978m --sequences 32 --gpus 16 --results=

The second of two steps of two micro-batches, not compiled, and the moment at which it holds most. Fragments, and what
the CUDA libraries and NCCL take for themselves, are not in it: of 80 GiB, 72 count as room.
"""

import gc
import itertools
from pathlib import Path

import torch
from tqdm import tqdm

from command import BadInput, Parser, run_command
from experiments.bench import machine, save_result
from experiments.fake_gpu import WHY_NOT, Watch, fake_gpu
from train import Settings, autocast, shard, whole
from unipool import SCALES, UniPool, UniPoolConfig

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
ROOM = 0.9  # of a GPU's memory
MADE_IN = {"weights": "init", "optimizer": "optimizer", "kept by forward": "forward", "made by backward": "backward"}


def prepare(config, mesh, recompute=False, one_pass=True):
    """(model, optimizer) on the GPU as train.py makes them; sharded if there is a mesh."""
    device = torch.device("cuda")
    with torch.device(device):
        model = UniPool(config)
    model.rope = model.rope.to(device)
    model.recompute, model.one_pass = recompute, one_pass
    if mesh is not None:
        shard(model, device, mesh)
    betas = (Settings.beta1, Settings.beta2)
    return model, model.configure_optimizer(Settings.lr, Settings.weight_decay, betas, Settings.adam_eps)


def train_step(model, optimizer, sequences, micro_batches, watch=None):
    """One step as train.py makes it, on random tokens. Of several processes, this is one."""
    config, device = model.config, torch.device("cuda")
    watch = watch or Watch()
    losses, routing = torch.zeros(2, device=device), 0.0
    for i in range(micro_batches):
        last = i == micro_batches - 1
        watch.phase = "forward"
        idx = torch.randint(config.vocab_size, (sequences, config.block_size + 1), device=device)
        if hasattr(model, "set_reshard_after_backward"):
            model.set_reshard_after_backward(last)
        with autocast(device):
            out = model(idx[:, :-1], idx[:, 1:], keep_logits=False)
            loss = out.loss + config.balance_coef * out.balance_loss
        watch.phase = "backward"
        (loss / micro_batches).backward()
        losses += torch.stack([out.loss.detach(), out.balance_loss.detach()]) / micro_batches
        routing = routing + torch.stack([out.usage, out.mean_scores.detach()]) / micro_batches
        for pool in model.pools:
            pool.keep_copies = not last
    watch.phase = "optimizer"
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), Settings.grad_clip))
    optimizer.found_inf = (~(losses.sum() + norm).isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return losses


def simulated(config, sequences, world_size=1, recompute=False):
    """Bytes at the peak of a step on one of world_size GPUs: the peak, its phase, and what it is made of."""
    with fake_gpu(config, world_size) as mesh, Watch() as watch:
        watch.phase = "init"
        model, optimizer = prepare(config, mesh, recompute)
        train_step(model, optimizer, sequences, 2, watch)
        watch.reset()
        train_step(model, optimizer, sequences, 2, watch)
        made_of = watch.made_of()
        held = {name: sum(size for (made_in, *_), size in made_of if made_in == phase)
                for name, phase in MADE_IN.items()}  # fmt: skip
        tensors = [dict(made_in=label[0], operation=label[1], shape=label[2], dtype=label[3], bytes=size)
                   for label, size in made_of[:8]]  # fmt: skip
        return held | dict(peak=watch.peak, phase=watch.peak_phase, largest=tensors)


def measured(config, sequences, recompute):
    """Peak bytes of a step on this GPU."""
    model, optimizer = prepare(config, None, recompute)
    train_step(model, optimizer, sequences, 2)
    torch.cuda.reset_peak_memory_stats()
    train_step(model, optimizer, sequences, 2)
    return torch.cuda.max_memory_allocated()


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--gpus", type=int, default=8, help="that --shard splits a run over (%(default)s)")
    parser.add_argument("--gigabytes", type=float, default=80, help="memory of each, in GiB (%(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="of a micro-batch (%(default)s)")
    parser.add_argument("--scales", nargs="+", default=[s for s in SCALES if s != "tiny"], choices=list(SCALES))
    parser.add_argument("--results", default=RESULTS, help="folder for memory.json and memory.md; empty for none")
    args = parser.parse_args(argv)
    for name, least in dict(gpus=2, gigabytes=1, sequences=1).items():
        if not getattr(args, name) >= least:
            raise BadInput(f"--{name}={getattr(args, name)} must be at least {least}")
    if WHY_NOT:
        raise BadInput(WHY_NOT)
    cuda = torch.cuda.is_available()
    heads = ["scale, flags", *MADE_IN, "peak", "in", f"room in {args.gigabytes:g} GiB", *["measured"] * cuda]
    lines, results = [" | ".join(["", *heads, ""]).strip(), "|" + "---|" * len(heads)], {}
    rows = list(itertools.product(args.scales, (False, True), (False, True)))
    for scale, sharded, recompute in tqdm(rows, unit="row"):
        config = UniPoolConfig.from_scale(scale)
        held = simulated(config, args.sequences, args.gpus if sharded else 1, recompute)
        has_room = held["peak"] <= ROOM * args.gigabytes * GIB
        if cuda and has_room and not sharded:
            gc.collect()
            torch.cuda.empty_cache()
            held["measured"] = measured(config, args.sequences, recompute)
        name = " ".join([scale, *["--shard"] * sharded, *["--recompute"] * recompute])
        cells = [f"{held[part] / GIB:.1f}" for part in [*MADE_IN, "peak"]] + [
            held["phase"],
            "yes" if has_room else "no",
        ]
        cells += [f"{held['measured'] / GIB:.1f}" if "measured" in held else ""] * cuda
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        results[name] = held
    about = machine(torch.device("cuda" if cuda else "cpu"))
    text = (f"GiB of one GPU; {args.gpus} GPUs where --shard; micro-batches of {args.sequences} sequences; simulated, "
            f"not measured\n\n" + "\n".join(lines) + "\n")  # fmt: skip
    print(text)
    if str(args.results):
        save_result(args.results, "memory", "memory", argv, about, bytes=results)
        (Path(args.results) / "memory.md").write_text(text)


if __name__ == "__main__":
    run_command(main)

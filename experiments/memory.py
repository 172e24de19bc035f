"""What one GPU must hold, for each scale: which of plain data parallelism, --shard and --recompute fits.

    python -m experiments.memory                          # 8 GPUs of 80 GiB, micro-batches of 16,384 tokens
    python -m experiments.memory --gpus 16 --tokens 8192

Weights, gradients and optimizer state are counted from the model's parameters. Activations are what autograd keeps in
a forward pass of one and two layers with few experts, in the scale's own width, under bf16 autocast on this CPU, and
so scaled to depth and number of experts. Fragmentation and what the CUDA libraries take for themselves are not in it.
Where there is a GPU, a step of each scale that fits without sharding is measured beside it.
"""

import gc
from dataclasses import replace
from pathlib import Path

import torch

from experiments.bench import PeakMemory, machine, make_step, save_result
from prepare_pile import BadInput, Parser, run_command
from train import SHARDED_CAPACITY
from unipool import LOSS_CHUNK, SCALES, PoolGradient, UniPool, UniPoolConfig

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
USABLE = 0.93  # of a GPU's memory: the rest is for fragments and for what CUDA and NCCL take themselves
TOKENS = 72  # of the small forward passes; no weight has this size, which tells activations from weights


def kept_bytes(config, recompute):
    """Bytes a token that autograd keeps between forward and backward, weights and their casts left out."""
    torch.manual_seed(0)
    model = UniPool(config)
    model.recompute = recompute
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if TOKENS in tensor.shape:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    idx = torch.zeros(1, TOKENS, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.trunk(idx)
    return sum(storage.nbytes() for storage in kept.values()) / TOKENS


def activation_bytes(config):
    """{with recomputation?: bytes of activations a token}, at the config's depth and number of experts."""
    small, scaled = replace(config, block_size=TOKENS, vocab_size=64), {}
    for recompute in (False, True):
        one, two, more = (
            kept_bytes(replace(small, n_layer=n_layer, n_expert=n_expert), recompute)
            for n_layer, n_expert in ((1, 4), (2, 4), (2, 8))
        )
        scores_of_an_expert = (more - two) / (2 * 4)
        layer = two - one + scores_of_an_expert * (config.experts_per_pool - 4)
        scaled[recompute] = one - (two - one) + config.n_layer * layer
    scaled[True] += scaled[False] / config.n_layer  # one layer at a time is computed again, with all it keeps
    return scaled


def parts(config, activations, tokens, gpus, shard):
    """{what: bytes} of one GPU, and "peak": the larger of the moments where backward begins and where it ends.

    activations: bytes a token. Sharded, a GPU keeps its share in fp32, all weights in bf16, and one fp32 gradient of
    all weights, which adds up micro-batches; at the end that is copied once more to be exchanged. Not sharded, it keeps
    all in fp32 and casts the weights to bf16.
    """
    with torch.device("meta"):
        model = UniPool(config)
    n = model.num_params()
    pool = sum(p.numel() for p in model.pools.parameters())
    share = gpus if shard else 1
    rows = tokens * config.top_k * config.n_layer
    elements = (
        rows * (2 * config.n_embd + 3 * config.n_hidden),
        (SHARDED_CAPACITY if shard else PoolGradient.capacity) * pool,
    )
    records = 2 * min(elements)
    held = {
        "weights": 4 * n / share + 2 * n,
        "gradients": 4 * n,
        "optimizer": 8 * n / share,
        "activations": tokens * activations + LOSS_CHUNK * config.vocab_size * (2 + 4 + 4),
        # records, those of gate_up sorted once more, this micro-batch's gradient in fp32, a product on its way to it
        "pool's gradient": records * (1 + 2 / 3) + 4 * pool + 2 * pool * 2 / 3,
        "exchange": 4 * n if shard else 0,
    }
    state = held["weights"] + held["gradients"] + held["optimizer"]
    return held | {"peak": state + max(held["activations"], held["pool's gradient"], held["exchange"])}


def measured(config, tokens, recompute):
    """Peak bytes of one training step on this GPU."""
    device = torch.device("cuda")
    with torch.device(device):
        model = UniPool(config)
    model.recompute = recompute
    step, _, state = make_step(model, tokens, device, use_compile=False)
    step()
    with PeakMemory(device) as memory:
        step()
    return memory.bytes + state


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that share a run (%(default)s)")
    parser.add_argument("--gigabytes", type=float, default=80, help="memory of each, in GiB (%(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a micro-batch (%(default)s)")
    parser.add_argument("--scales", nargs="+", default=[s for s in SCALES if s != "tiny"], choices=list(SCALES))
    parser.add_argument("--results", default=RESULTS, help="folder for memory.json; empty for none")
    args = parser.parse_args(argv)
    for name in ("gpus", "gigabytes", "tokens"):
        if not getattr(args, name) > 0:
            raise BadInput(f"--{name}={getattr(args, name)} must be above 0")
    cuda = torch.cuda.is_available()
    results = {}
    columns = ("weights", "gradients", "optimizer", "activations", "pool's gradient", "exchange", "peak")
    print(f"GiB a GPU, {args.gpus} GPUs, {args.tokens:,} tokens a micro-batch\n")
    print(
        "| scale | flags | "
        + " | ".join(columns)
        + f" | fits {args.gigabytes:g} GiB |"
        + (" measured |" if cuda else "")
    )
    print("|" + "---|" * (3 + len(columns) + cuda))
    for scale in args.scales:
        config = UniPoolConfig.from_scale(scale)
        activations = activation_bytes(config)
        for shard in (False, True):
            for recompute in (False, True):
                held = parts(config, activations[recompute], args.tokens, args.gpus, shard)
                fits = held["peak"] < USABLE * args.gigabytes * GIB
                if cuda and fits and not shard:
                    held["measured"] = measured(config, args.tokens, recompute)
                    gc.collect()
                    torch.cuda.empty_cache()
                flags = " ".join(f for f, on in (("--shard", shard), ("--recompute", recompute)) if on) or "none"
                results[f"{scale} {flags}"] = held
                cells = [f"{held[c] / GIB:.1f}" for c in columns] + ["yes" if fits else "no"]
                cells += [f"{held['measured'] / GIB:.1f}"] if "measured" in held else []
                print(f"| {scale} | {flags} | " + " | ".join(cells) + " |")
    if str(args.results):
        about = machine(torch.device("cuda" if cuda else "cpu"))
        settings = vars(args) | dict(results="")
        save_result(args.results, "memory", "memory", argv, about, settings=settings, bytes=results)


if __name__ == "__main__":
    run_command(main)

"""Train a UniPool language model.

    python train.py                                        # "tiny", on this machine's standard library, in minutes
    torchrun --nproc_per_node=8 train.py --scale=182m      # the paper's run, after `python prepare_pile.py`
    python train.py --resume                               # go on from out/ckpt.pt

Every field of UniPoolConfig is a flag too: --n_pool=6 shares each pool among a sixth of the layers, --router=softmax
--balance=layer trains a row of Table 5. Writes into --out_dir:
    ckpt.pt, ckpt-1.pt, ...   the newest checkpoint, and --keep in all
    best.pt                   the one with the lowest validation loss
    metrics.jsonl             one line every --log_interval steps
"""

import argparse
import contextlib
import copy
import ctypes
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from command import BadInput, Parser, only_one, run_command
from prepare_pile import SOURCES, Taken, TokenData, new_file, prepare, read_meta
from unipool import ARCHS, BALANCES, ROUTERS, SCALES, UniPool, UniPoolConfig, assign_experts, cardinality_loss

# ----------------------------------------------------------------------------------------------------------------------
# Settings: each field is a flag, and its default stands here alone


def flag(default, help, low=1, high=2**63):
    """A field of Settings; low <= value < high is checked for numbers, which also refuses inf and nan."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))


@dataclass
class Settings:
    """The flags that are not the model's. The defaults are Table 8's; TINY has those of --scale=tiny."""

    scale: str = flag("tiny", "size of the model")
    arch: str = flag("unipool", "one shared pool, private experts (vanilla), or no experts (dense)")
    data_dir: str | None = flag(None, "made by prepare_pile.py (data/pile; for tiny data/stdlib, made on the spot)")
    out_dir: str = flag("out", "folder for ckpt.pt and metrics.jsonl")
    device: str | None = flag(None, "cuda, cpu, mps, cuda:1 ... (the best there is)")
    seed: int = flag(1337, "of the initial weights and of the order of the data", low=0)
    max_steps: int = flag(60_000, "optimizer steps in all, at which the run ends")
    decay_steps: int = flag(60_000, "where the cosine ends; not moved by --max_steps")
    warmup: float = flag(0.01, "share of --decay_steps in which the learning rate rises", low=0, high=1)
    batch_size: int = flag(512, "sequences per step, over all processes", high=2**24)
    micro_batch_size: int | None = flag(None, "sequences per forward pass, in each process (what a GPU has room for)")
    lr: float = flag(5e-4, "highest learning rate", low=0, high=1e3)
    min_lr: float = flag(5e-5, "learning rate at the end of the cosine", low=0, high=1e3)
    weight_decay: float = flag(0.01, "of parameters with two or more dimensions", low=0, high=1e3)
    beta1: float = flag(0.9, "of AdamW", low=0, high=1)
    beta2: float = flag(0.999, "of AdamW", low=0, high=1)
    adam_eps: float = flag(1e-8, "of AdamW", low=1e-30, high=1e3)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip", low=0, high=math.inf)
    eval_interval: int = flag(1000, "steps between validations; 0 never validates", low=0)
    eval_tokens: int = flag(2**22, "validation tokens used, spread over the split")
    ckpt_interval: int = flag(1000, "steps between checkpoints; 0 saves at the end, and at a new best", low=0)
    keep: int = flag(2, "checkpoints kept, the newest included; the best by validation loss is kept too", high=1000)
    log_interval: int = flag(10, "steps between lines of metrics.jsonl")
    tensorboard: bool = flag(False, "write the metrics for TensorBoard too (pip install tensorboard)")
    lock: float = flag(0.0, "share of --decay_steps after which layers have their own experts; 0 never", low=0, high=1)
    lock_random: bool = flag(False, "the control for --lock: layers have random experts of their own from the start")
    compile: bool | None = flag(None, "use torch.compile (on for CUDA)")
    recompute: bool = flag(False, "keep no activations within layers: less memory, about a third more time")
    one_pass: bool = flag(True, "the pool's gradient in one pass; --no-one_pass leaves it to autograd")
    shard: bool = flag(False, "split weights, gradients and optimizer state over the processes (FSDP2)")
    resume: bool = flag(False, "go on from --out_dir/ckpt.pt; flags not given keep the checkpoint's values")


TINY = dict(max_steps=360, decay_steps=360, warmup=0.05, batch_size=32, lr=1.5e-3, min_lr=2e-4, eval_interval=90,
            eval_tokens=2**16, ckpt_interval=90, log_interval=1)  # fmt: skip
CHOICES = dict(scale=list(SCALES), arch=ARCHS, router=list(ROUTERS), balance=list(BALANCES))
LARGEST_MICRO_BATCH = 2**14  # tokens, where there is no GPU
SHOWN = ("val_loss", "train_loss", "tokens_per_second", "mfu", "pool_utilisation", "unserved")  # on the terminal
ENTROPY_COEF = 5e-3  # of cardinality_loss, with --lock
MOST_SKIPPED = 10  # steps in a row with a non-finite loss or gradient, after which the run ends


def parse_flags(argv):
    """The flags that were given, as a dict; flags left out are not in it."""
    parser = Parser(__doc__, argument_default=argparse.SUPPRESS)
    tiny = ", ".join(f"{name}={value}" for name, value in TINY.items())
    own = parser.add_argument_group("training", f"in brackets the paper's values; --scale=tiny has {tiny}")
    model = parser.add_argument_group("model: see UniPoolConfig (182m's values; --scale and --arch set them)")
    for group, cls in ((own, Settings), (model, UniPoolConfig)):
        for f in fields(cls):
            kind = (typing.get_args(f.type) or (f.type,))[0]  # int, also of `int | None`
            options = dict(type=kind, choices=CHOICES.get(f.name), metavar=None if f.name in CHOICES else kind.__name__)
            if kind is bool:
                options = dict(action=argparse.BooleanOptionalAction)
            default = "" if kind is bool or f.default is None else f" ({f.default})"
            group.add_argument(f"--{f.name}", help=f.metadata.get("help", "") + default, **options)
    return vars(parser.parse_args(argv))


def settle(given, saved):
    """Settings and UniPoolConfig from the given flags and, on resuming, the checkpoint (else None). Raises BadInput."""
    model_flags = {name: value for name, value in given.items() if name in UniPoolConfig.__dataclass_fields__}
    own_flags = {name: value for name, value in given.items() if name not in model_flags}
    if saved is None:
        recipe = TINY if given.get("scale", Settings.scale) == "tiny" else {}
        settings = Settings(**(recipe | own_flags))
        try:
            config = UniPoolConfig.from_scale(settings.scale, settings.arch, **model_flags)
        except ValueError as error:
            raise BadInput(error) from None
    else:
        names = ["scale", "arch", "seed", "lock", "lock_random"] + ["decay_steps"] * bool(saved["settings"]["lock"])
        fixed = saved["config"] | {name: saved["settings"][name] for name in names}
        for name in fixed.keys() & given.keys():
            if given[name] != fixed[name]:
                raise BadInput(f"--{name}={given[name]}, but the checkpoint was trained with {name}={fixed[name]}: "
                               "leave the flag out, or start a new run in another --out_dir")  # fmt: skip
        settings, config = Settings(**(saved["settings"] | own_flags)), UniPoolConfig(**saved["config"])
    dense = config.n_expert == 0
    # flag: whether it changes nothing here
    idle = dict(bias_rate=config.balance != "bias", balance_coef=dense or BALANCES[config.balance] is None)
    idle |= dict.fromkeys(("router", "top_k", "n_pool", "balance", "one_pass"), dense)
    for name in idle.keys() & given.keys():
        if idle[name]:
            raise BadInput(f"--{name}={given[name]} changes nothing with --arch={settings.arch}, "
                           f"--n_expert={config.n_expert} and --balance={config.balance}: leave it out")  # fmt: skip
    for f in fields(settings):
        value, low, high = getattr(settings, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value < high:
            raise BadInput(f"--{f.name}={value} must be at least {low} and below {high}")
    if settings.min_lr > settings.lr:
        raise BadInput(f"--min_lr={settings.min_lr} is above --lr={settings.lr}, from where it falls: give a lower one")
    lock_steps(settings, config)  # only to check
    return settings, config


def lock_steps(settings, config):
    """UniPool-lock's steps: (where each layer is given experts of its own, from where it sees no others); (0, 0) where
    they are random from the start, None without --lock. Raises BadInput.
    """
    if not settings.lock and not settings.lock_random:
        return None
    flags = f"--lock={settings.lock} --lock_random={settings.lock_random}"
    K, left = divmod(config.n_expert, config.n_layer)
    if (config.n_pool, config.router, config.balance) != (1, "norm", "pool") or left or not config.top_k <= K:
        names = ("n_pool", "router", "balance", "n_expert", "n_layer", "top_k")
        found = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        raise BadInput(f"{flags} needs n_pool=1, router=norm, balance=pool, equally many experts for each layer, at "
                       f"least top_k: not {found}")  # fmt: skip
    locked = round(settings.lock * settings.decay_steps)
    if settings.lock and (settings.lock_random or locked < 2):
        raise BadInput(f"{flags}: give one of them, and to --lock at least two steps of --decay_steps")
    return locked // 2, locked


def tokens_with_room(config, n_shards, memory):
    """Tokens of a micro-batch that fit into a GPU of so many bytes, a tenth of which stays free. Fitted to what
    experiments/memory.py finds; a little too few for a dense model and with --recompute.
    """
    with torch.device("meta"):
        n_params = UniPool(config).num_params()
    of_state = n_params * (16 / n_shards + 3)  # weights, gradients, two moments; copies in bf16 and what sums need
    of_choice = 21 * config.n_embd + 8 * config.n_hidden
    of_token = (12 * config.n_embd + config.top_k * of_choice) * config.n_layer  # what layers keep
    return int((0.9 * memory - of_state) / of_token)


def split_batch(settings, config, world_size, device):
    """(sequences of a process's micro-batch, micro-batches of a step). Raises BadInput."""
    size = settings.micro_batch_size or 1
    if settings.batch_size % (world_size * size):
        raise BadInput(f"--batch_size={settings.batch_size} must be a multiple of {world_size * size}: {world_size} "
                       f"process(es) x --micro_batch_size={size}")  # fmt: skip
    per_process = settings.batch_size // world_size
    if settings.micro_batch_size is None:  # the largest that divides
        most = LARGEST_MICRO_BATCH
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            most = tokens_with_room(config, world_size if settings.shard else 1, memory)
        most = max(1, most // config.block_size)
        size = max(n for n in range(1, most + 1) if per_process % n == 0)
    return size, per_process // size


def learning_rate(step, settings):
    """Linear warm-up, then a cosine from lr to min_lr at decay_steps. `step` counts from 0."""
    warmup_steps = max(1, round(settings.warmup * settings.decay_steps))
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, settings.decay_steps - warmup_steps))
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------------------------------------
# Device and data


def find_device(name):
    """The torch.device of that name; None is the best there is; "cuda" under torchrun is this process's own GPU."""
    local_rank, processes_here = (os.environ.get(variable) for variable in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if name is None:  # gloo, which joins processes without CUDA, does not know mps
        mps = torch.backends.mps.is_available() and local_rank is None
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if local_rank and ":" in name:
        raise BadInput(f"--device={name} would put every process on one device: give cuda")
    if name == "cuda" and 0 < torch.cuda.device_count() < int(processes_here or 1):
        raise BadInput(f"--device=cuda: more processes than the {torch.cuda.device_count()} GPUs here: start fewer")
    try:
        device = torch.device(f"cuda:{local_rank or 0}" if name == "cuda" else name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("no such kind of device")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if local_rank not in (None, "0"):  # maybe the only process whose GPU fails: a BadInput of it would not be shown
            raise
        reason = str(error).split("\n")[0]
        raise BadInput(f"--device={name} cannot be used here ({reason}): give cuda, cuda:N, mps or cpu") from None
    return device


def keep_freed_memory():
    """Have glibc keep what a step frees for the next one: given back, it would be faulted in again, page by page."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries have no mallopt
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


def find_data(settings, device):
    """The data folder: the one given, else the Pile's, or the standard library's for tiny and for trials on a CPU."""
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes on this machine
    pile, stdlib = SOURCES["pile"]["out_dir"], SOURCES["stdlib"]["out_dir"]
    data_dir = settings.data_dir or (stdlib if settings.scale == "tiny" else pile)
    if settings.data_dir is None and data_dir == pile and not (Path(pile) / "meta.json").exists():
        if device.type != "cpu":
            raise BadInput(f"--data_dir: {pile} is not made: run python prepare_pile.py, or try --data_dir={stdlib}")
        data_dir = stdlib
        if first_here:
            print(f"{pile} is missing (python prepare_pile.py makes it): a trial on the standard library's sources")
    while Path(data_dir) == Path(stdlib) and not (Path(stdlib) / "meta.json").exists():  # which is written last
        if first_here:
            with contextlib.suppress(Taken):  # another run makes it, or just has
                prepare(["stdlib"])
        time.sleep(0.1)
    return data_dir


def read_batch(data, indices, device):
    """Inputs and targets of the sequences numbered `indices`: two (len(indices), block_size) int64 tensors."""
    tokens = torch.from_numpy(data.sequences(indices))
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def autocast(device):
    """The context of the forward pass: bf16 products on a GPU that has them, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16(device))


def has_bf16(device):
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def shard(model, device, mesh):
    """Split the model's weights, and with them gradients and optimizer state, over the mesh's processes, by FSDP2.

    All is gathered once a step, since every layer uses the pool: the pools in bf16 where autocast would cast them so,
    the rest in fp32 (in bf16 a sigma near 1 has steps of 1/128), so --shard computes what a single process computes.
    Gradients are reduced in fp32 after each micro-batch: unsharded they would take 4 bytes for every weight.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16 if has_bf16(device) else None, reduce_dtype=torch.float32)
    for pool in model.pools:
        fully_shard(pool, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)

    @torch.compiler.disable
    def gather_pools(*_):  # by hand, since nothing calls a pool's forward
        for pool in model.pools:
            pool.unshard()

    model.register_forward_pre_hook(gather_pools)


def whole(tensor):
    """The tensor, gathered if it is split over the processes; then all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ----------------------------------------------------------------------------------------------------------------------
# Measurements

# Dense bf16 FLOP/s from the makers' data sheets; the first name found in the GPU's own counts.
PEAK_FLOPS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device):
    """FLOP/s of the GPU, or None where it is not known (then there is no MFU)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    another = r"\b(?! Ti| D| Laptop|.* MIG)"  # GPUs with these words behind the name have other figures
    return next((flops for gpu, flops in PEAK_FLOPS.items() if re.search(rf"\b{gpu}{another}", name)), None)


def pool_utilisation(usage, n_pool):
    """(effective share of experts, experts that serve nothing) from usage (L, M), the f of each layer.

    The share is exp(entropy of f_bar, normalised to sum to 1) / M, averaged over the pools: 1 if all experts serve
    equally many pairs, 1/M if one serves all, 0 if none serves any.
    """
    f_bar = usage.cpu().double().unflatten(0, (n_pool, -1)).mean(dim=1)  # (G, M)
    total = f_bar.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(f_bar / total.clamp(min=1e-300)).sum(dim=1)  # (G,)
    effective = entropy.exp() * (total[:, 0] > 0)
    return (effective / f_bar.size(1)).mean().item(), int((f_bar == 0).sum())


def routing_figures(model, usage, scores):
    """What the log says of the routing in one step. usage, scores: (L, M), the f and P of each layer.

    unserved: share of the (token, choice) pairs whose gate is 0. By layer: the mean sum of a token's scores, and sigma.
    """
    figures = dict(zip(("pool_utilisation", "dead_experts"), pool_utilisation(usage, model.config.n_pool)))
    unserved = 1 - usage.cpu().double().sum(dim=1).mean().item()
    figures["unserved"] = max(0.0, round(unserved, 6))  # fp32's rounding is not load
    figures["score_sum"] = scores.sum(dim=1).tolist()
    if model.config.router == "norm":
        figures["sigma"] = whole(torch.cat([block.router.sigma.detach() for block in model.blocks])).tolist()
    return figures


def validation_indices(data, eval_tokens, at_once=1):
    """The numbers of at least one and about eval_tokens' worth of sequences, spread evenly over the split."""
    count = max(1, min(len(data), eval_tokens // data.block_size))
    if count > at_once:  # whole micro-batches: another size would be compiled anew
        count -= count % at_once
    return np.linspace(0, len(data) - 1, count).astype(np.int64)


@torch.no_grad()
def validate(model, data, eval_tokens, micro_batch_size, rank, world_size, device):
    """(mean cross-entropy in nats per token, mean usage (L, M)) over validation_indices; each process takes a part."""
    model.eval()
    indices = validation_indices(data, eval_tokens, micro_batch_size * world_size)
    own = indices[rank::world_size]
    count = loss = usage = torch.zeros((), device=device)  # usage is (L, M) from the first sum on
    for i in range(0, max(1, len(own)), micro_batch_size):
        part = own[i : i + micro_batch_size]
        x, y = read_batch(data, part if len(part) else indices[:1], device)  # --shard: all must take part, if 0 times
        with autocast(device):
            out = model(x, y, keep_logits=False)
        count, loss, usage = count + len(part), loss + out.loss * len(part), usage + out.usage * len(part)
    if world_size > 1:
        for tensor in (count, loss, usage):
            dist.all_reduce(tensor)
    model.train()
    return (loss / count).item(), usage / count


# ----------------------------------------------------------------------------------------------------------------------
# The run's files: checkpoints, and metrics.jsonl


def load_checkpoint(path, mmap=False, verify=False):
    """The dict in a checkpoint file, on the CPU: tensors and plain values only, never code. Raises BadInput.

    mmap: leave on the disk what is not used, or used by several processes. verify: read all of it once, and compare
    with the checksums in the file.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} is not there: train first (python train.py), or give the run's --out_dir")
    try:
        if verify and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for name in ("model", "optimizer", "tokenizer", "step", "position", "rng", "best", "validated", "skipped"):
            checkpoint[name]
        UniPoolConfig(**checkpoint["config"])
        checkpoint["settings"] = asdict(Settings(**checkpoint["settings"]))  # newer flags at their defaults
    except Exception as error:  # damaged bytes fail in as many ways as there are places to damage
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise BadInput(f"{path} is damaged, cut short or no checkpoint of train.py ({reason}): use another") from None
    return checkpoint


def kept_name(age):
    """File name of the checkpoint that is `age` checkpoints older than the newest."""
    return f"ckpt-{age}.pt" if age else "ckpt.pt"


def load_newest(out_dir, mmap):
    """(checkpoint, path, damaged paths) of the newest one that is whole. Raises BadInput if there is none."""
    paths = [path for age in range(1000) if (path := out_dir / kept_name(age)).exists()] or [out_dir / kept_name(0)]
    for i, path in enumerate(paths):
        try:
            return load_checkpoint(path, mmap, verify=True), path, paths[:i]
        except BadInput as error:
            if path == paths[-1]:
                raise
            if os.environ.get("RANK", "0") == "0":
                print(f"{error} -- going on from the one before", file=sys.stderr)


def load_model(checkpoint, path, device):
    """The model of a checkpoint, on `device`, to evaluate. Raises BadInput if its weights are none for its config."""
    try:
        model = UniPool.from_checkpoint(checkpoint, device)
    except (TypeError, RuntimeError) as error:
        raise BadInput(f"{path}: its weights and its config do not match ({error}): use another checkpoint") from None
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise BadInput(f"{path}: {name} has values that are not finite (training diverged): use another checkpoint")
    return model


def check_tokenizer(data_dir, meta, checkpoint, path):
    """Raise BadInput unless the data is of the tokenizer that the checkpoint was trained with."""
    if meta["tokenizer"] != checkpoint["tokenizer"]:
        raise BadInput(f"{data_dir}/meta.json: tokenizer {meta['tokenizer']}, but {path} was trained with "
                       f"{checkpoint['tokenizer']}: give the run's own --data_dir")  # fmt: skip


def restore(model, optimizer, saved, path):
    """Load weights and optimizer state, each process its shard where they are sharded. Raises BadInput.

    The optimizer's settings stay those of this run's flags.
    """
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
                       options=StateDictOptions(full_state_dict=True))  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{path}: its weights or optimizer state are damaged ({reason}): use another one") from None
    for group, settings in zip(optimizer.param_groups, own):
        group.update(settings)


def snapshot(model, optimizer):
    """{"model", "optimizer"}: whole tensors on the CPU, in the first process; all others must call it too, for {}."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options)))
    on_cpu = next(model.parameters()).device.type == "cpu"
    return copy.deepcopy(state) if on_cpu else state  # not the tensors themselves, which training goes on to change


def save_checkpoint(out_dir, contents, keep, is_best):
    """Write ckpt.pt whole or not at all; the one that had this name becomes ckpt-1.pt and so on, `keep` in all."""
    path = out_dir / kept_name(0)
    temporary, temporary_best = path.with_name("ckpt.pt.tmp"), path.with_name("best.pt.tmp")
    try:
        # To an open file, not by name: so torch.save lets training go on, else it holds the interpreter lock.
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        if is_best:  # first, because a run resumed from ckpt.pt takes best.pt for written
            temporary_best.unlink(missing_ok=True)
            try:
                os.link(temporary, temporary_best)  # a second name for the same bytes
            except OSError:  # some file systems have none
                shutil.copyfile(temporary, temporary_best)
            os.replace(temporary_best, path.with_name("best.pt"))
        for age in reversed(range(1, keep)):
            if (out_dir / kept_name(age - 1)).exists():
                os.replace(out_dir / kept_name(age - 1), out_dir / kept_name(age))
        os.replace(temporary, path)
        for age in itertools.takewhile(lambda age: (out_dir / kept_name(age)).exists(), itertools.count(keep)):
            (out_dir / kept_name(age)).unlink()  # kept by an earlier, higher --keep
    except (OSError, RuntimeError) as error:
        for unfinished in (temporary, temporary_best):
            with contextlib.suppress(OSError):
                unfinished.unlink()
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise BadInput(f"{path} cannot be written ({reason}): make room, then --resume from what is there") from None


def add_metrics(path, line):
    """Append a line to metrics.jsonl, or raise BadInput; null stands for what is not finite, which JSON cannot hold."""
    finite = json.loads(json.dumps(line), parse_constant=lambda name: None)
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(json.dumps(finite) + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)  # no half line
        raise BadInput(f"{path} cannot be written ({error.strerror}): make room") from None


def trim_metrics(path, step):
    """Drop the lines of metrics.jsonl after `step`: the resumed run writes them anew."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short, or damaged
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with new_file(path) as file:
        file.write(b"".join(kept))


def keep_earlier_run(out_dir):
    """Move the files of a run that this one would overwrite to out_dir/old-1, or old-2 ..."""
    number = next(n for n in itertools.count(1) if not (out_dir / f"old-{n}").exists())
    patterns = "ckpt*.pt", "best.pt", "metrics.jsonl", "events.out.tfevents.*"
    for path in [path for pattern in patterns for path in out_dir.glob(pattern)]:
        (out_dir / f"old-{number}").mkdir(exist_ok=True)
        os.replace(path, out_dir / f"old-{number}" / path.name)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def run(argv, at_end):
    # ---- Flags, device, data. torchrun sets these variables, one process has none of them.
    given = parse_flags(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    is_main = rank == 0
    out_dir = Path(given.get("out_dir", Settings.out_dir))
    resuming = given.get("resume", False)
    saved, ckpt_path, damaged = load_newest(out_dir, mmap=world_size > 1) if resuming else (None, None, [])
    settings, config = settle(given, saved)
    device = find_device(settings.device)
    micro_batch_size, accumulation = split_batch(settings, config, world_size, device)
    per_process = micro_batch_size * accumulation  # sequences per step
    if settings.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadInput("--tensorboard needs a package: pip install tensorboard") from None
    data_dir = settings.data_dir = find_data(settings, device)
    meta = read_meta(data_dir, config.vocab_size)
    if resuming:
        check_tokenizer(data_dir, meta, saved, ckpt_path)
    train_data, val_data = (
        TokenData(data_dir, split, meta, config.block_size, config.vocab_size) for split in ("train", "val")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world_size > 1:  # after all that can be wrong with the flags and the data, which one process then reports
        backend, own_device = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        timeout = timedelta(minutes=10)
        dist.init_process_group(backend, device_id=own_device, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)  # to agree on something without waiting for the GPU

    # ---- Model and optimizer
    torch.manual_seed(settings.seed)
    try:
        with torch.device(device):
            model = UniPool(config).to(device)
    except (RuntimeError, MemoryError) as error:
        raise BadInput(f"--scale={settings.scale}: no room on {device} ({error}): take a smaller one") from None
    model.recompute, model.one_pass = settings.recompute, settings.one_pass
    sharded = settings.shard and world_size > 1
    if sharded:
        shard(model, device, dist.init_device_mesh(device.type, (world_size,)))
    betas = (settings.beta1, settings.beta2)
    optimizer = model.configure_optimizer(settings.lr, settings.weight_decay, betas, settings.adam_eps)
    step = position = 0  # optimizer steps done, training sequences seen
    skipped = torch.zeros(2, dtype=torch.int64, device=device)  # steps skipped: in all, and the last ones in a row
    best = math.inf  # lowest validation loss, of the same tokens of the same data: counts while `validated` is the same
    validated = [meta, len(validation_indices(val_data, settings.eval_tokens, micro_batch_size * world_size))]
    if resuming:
        restore(model, optimizer, saved, ckpt_path)
        torch.set_rng_state(saved["rng"])
        step, position = saved["step"], saved["position"]
        if world_size > 1:
            steps = torch.tensor([step, -step])
            dist.all_reduce(steps, dist.ReduceOp.MAX, group=control)
            if steps.sum():
                raise BadInput(f"--out_dir={out_dir}: processes found different checkpoints in it: wait for the run "
                               "that writes them, then --resume again")  # fmt: skip
        best = saved["best"] if saved["validated"] == validated else best
        skipped[0] = saved["skipped"][0]
        del saved
    first_step = step
    use_compile = settings.compile if settings.compile is not None else device.type == "cuda"
    forward = torch.compile(model) if use_compile else model

    locking, K = lock_steps(settings, config), config.n_expert // config.n_layer
    freeze, locked = locking or (0, 0)
    ramp = freeze or max(1, settings.decay_steps // 60)  # steps in which the entropy loss rises
    # (L, M), of a run that is resumed after `freeze`; otherwise given there
    owned = torch.stack([block.router.seen for block in model.blocks]) == 1 if locking else None

    # ---- Logs, and signals
    metrics_path = out_dir / "metrics.jsonl"
    if is_main:
        try:
            taken = BadInput(f"--out_dir={out_dir} is in use by another run: wait for it, or give another")
            at_end.enter_context(only_one(out_dir / ".lock", taken))
            for path in damaged:
                os.replace(path, path.with_suffix(".damaged"))
            trim_metrics(metrics_path, step) if resuming else keep_earlier_run(out_dir)
        except OSError as error:
            raise BadInput(f"--out_dir={out_dir} cannot be written ({error.strerror}): give another") from None
        pools = f"{config.n_expert} experts in {config.n_pool} pool(s), top-{config.top_k}"
        print(f"model: {settings.arch} {settings.scale}, {model.num_params():,} parameters ({model.num_params(True):,} "
              f"active), {pools if config.n_expert else 'no experts'}{', compiled' if use_compile else ''}\n"
              f"data: {data_dir}, {meta['train_tokens']:,} training tokens ({meta['tokenizer']})\n"
              f"steps: {settings.max_steps:,} (the cosine ends at {settings.decay_steps:,}) of "
              f"{settings.batch_size * config.block_size:,} tokens, in {accumulation} micro-batch(es) of "
              f"{micro_batch_size} sequences on {world_size} {device.type} process(es)")  # fmt: skip
        if settings.shard and not sharded:
            print("--shard changes nothing on one process")
    peak = peak_flops(device)
    board = SummaryWriter(out_dir, purge_step=step + 1) if settings.tensorboard and is_main else None
    bar = tqdm(total=settings.max_steps, initial=step, unit="step", disable=not is_main,
               mininterval=0.5 if sys.stderr.isatty() else 10)  # fmt: skip
    unheard = contextlib.suppress(OSError)  # who reads what is printed, as tee, may have gone: a run of days goes on
    stop = []  # signals that came during the loop: it finishes the step, saves and ends; the third ends at once

    def say(text):
        with unheard:
            bar.write(text)

    def on_signal(number, frame):
        stop.append(number)
        if len(stop) == 3:  # not two: of one Ctrl-C, torchrun passes on a second
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        at_end.callback(signal.signal, number, signal.signal(number, on_signal) or signal.SIG_DFL)
    writer = at_end.enter_context(ThreadPoolExecutor(1))  # writes checkpoints
    writing = writer.submit(lambda: None)  # what it is at
    if is_main and step >= settings.max_steps:
        say(f"nothing to do: step {step} has reached --max_steps={settings.max_steps}; a larger one goes on")

    # ---- The loop
    validation = settings.eval_tokens, micro_batch_size, rank, world_size, device
    window_start, window_tokens, warned, stopping = time.perf_counter(), 0, False, False
    while step < settings.max_steps and not stopping:
        if locking and freeze <= step <= locked:
            if step == freeze:
                seeded = torch.Generator().manual_seed(settings.seed)
                used = (torch.rand(owned.shape, generator=seeded) if settings.lock_random
                        else validate(forward, val_data, *validation)[1])  # fmt: skip
                owned = assign_experts(used).to(device)
                window_start, window_tokens = time.perf_counter(), 0
            model.lock(owned, progress=(step + 1 - freeze) / (locked + 1 - freeze))
        # This step's sequences are the same for any number of processes; each process takes a contiguous part.
        indices = train_data.in_order(position + rank * per_process, per_process, settings.seed)
        losses = torch.zeros(2, device=device)  # cross-entropy and balance loss, averaged over the micro-batches
        routing = 0.0  # usage and scores (2, L, M), likewise
        for i in range(accumulation):
            x, y = read_batch(train_data, indices[i * micro_batch_size :][:micro_batch_size], device)
            last = i == accumulation - 1
            if sharded:
                model.set_reshard_after_backward(last)  # the next micro-batch needs the gathered weights again
            with autocast(device):
                out = forward(x, y, keep_logits=False)
                loss = out.loss + config.balance_coef * out.balance_loss
                if locking:
                    loss = loss + min(1, step / ramp) * ENTROPY_COEF * cardinality_loss(out.mean_scores, K)
            (loss / accumulation).backward()
            losses += torch.stack([out.loss.detach(), out.balance_loss.detach()]) / accumulation
            routing = routing + torch.stack([out.usage, out.mean_scores.detach()]) / accumulation
            del out, loss  # else the graph would hold the pool's cast weights until the next step has made its own
            for pool in model.pools:
                pool.keep_copies = not last  # the next micro-batch finds the same weights
        if world_size > 1:
            # FSDP has averaged --shard's gradients. The pool's is complete only when the backward pass ends, so that
            # there is nothing to overlap with.
            gradients = [] if sharded else [p.grad for p in model.parameters() if p.grad is not None]
            for tensor in (losses, routing, *gradients):
                dist.all_reduce(tensor.div_(world_size))
        usage, scores = routing
        if step == first_step:
            for name, p in model.named_parameters():
                if p.requires_grad and p.grad is None:  # would have no optimizer state to resume from
                    raise BadInput(f"{name} of the model gets no gradient: use it or freeze it (requires_grad_(False))")
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf))
        # A loss or gradient that is not finite skips the step. Fused AdamW does so by itself, told by found_inf as by
        # torch.amp.GradScaler: the loop need not wait for the GPU to know. (On mps it does not, so there we wait.)
        bad = ~(losses.sum() + grad_norm).isfinite()
        optimizer.found_inf = bad.float()
        lr = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if device.type != "mps" or not bad:
            optimizer.step()
        optimizer.zero_grad()
        if config.balance == "bias":
            model.update_bias(usage * ~bad)
        skipped = torch.stack([skipped[0] + bad, (skipped[1] + 1) * bad])
        step += 1
        position += settings.batch_size
        window_tokens += settings.batch_size * config.block_size
        with unheard:
            bar.update()

        # ---- What is logged
        signals = torch.tensor(len(stop))
        if world_size > 1:
            dist.all_reduce(signals, group=control)
        stopping = signals.item() > 0
        is_last = step == settings.max_steps
        evaluating = settings.eval_interval > 0 and (step % settings.eval_interval == 0 or is_last)
        logging, is_best = evaluating or is_last or step % settings.log_interval == 0, False
        if logging:
            (train_loss, balance_loss), grad_norm = losses.tolist(), grad_norm.item()  # waits for the GPU
            n_skipped, in_a_row = skipped.tolist()
            stopping = stopping or in_a_row >= MOST_SKIPPED
            tokens_per_second = window_tokens / (time.perf_counter() - window_start)
            line = dict(step=step, train_loss=train_loss, balance_loss=balance_loss, lr=lr, grad_norm=grad_norm,
                        tokens=position * config.block_size, tokens_per_second=tokens_per_second,
                        skipped_steps=n_skipped)  # fmt: skip
            if config.n_expert:
                line |= routing_figures(model, usage, scores)
            if locking:
                line["others_seen"] = model.blocks[0].router.seen.min().item()  # 1 until the anneal, 0 after it
            unserved = line.get("unserved", 0)
            if unserved > 0.5 and not warned and is_main:
                warned = True
                say(f"warning: step {step}: no expert serves {unserved:.0%} of the (token, choice) pairs, whose scores "
                    f"are all 0: try a lower --balance_coef than {config.balance_coef:g}")  # fmt: skip
            if peak:
                line["mfu"] = tokens_per_second * model.flops_per_token(1 - unserved) / (peak * world_size)
            if evaluating:
                line["val_loss"], _ = validate(forward, val_data, *validation)
                is_best = line["val_loss"] < best
                best = min(best, line["val_loss"])
            if is_main:
                try:
                    add_metrics(metrics_path, line)
                    for name, value in line.items() if board else ():
                        if not isinstance(value, list):
                            board.add_scalar(name, value, step)
                except (BadInput, OSError) as error:  # OSError: what went wrong in TensorBoard's thread
                    say(f"warning: step {step}: {error}")
                bar.set_postfix_str(f"loss {train_loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
                if evaluating:
                    shown = ", ".join(f"{name} {line[name]:.5g}" for name in SHOWN if name in line)
                    say(f"step {step}: {shown}")

        # ---- What is saved
        if writing.done():
            writing.result()  # raises what went wrong in the thread
        ending = is_last or stopping
        saving = ending or is_best or settings.ckpt_interval > 0 and step % settings.ckpt_interval == 0
        if saving and skipped[0] < step:
            writing.result()  # one copy at a time
            state = snapshot(model, optimizer)  # in the CPU's memory; the thread writes while training goes on
            kept = {k: v for k, v in asdict(settings).items() if k not in ("out_dir", "device", "resume")}
            state |= dict(config=asdict(config), settings=kept, tokenizer=meta["tokenizer"], step=step, best=best,
                          validated=validated, position=position, rng=torch.get_rng_state(),
                          skipped=skipped.tolist())  # fmt: skip
            if is_main:
                writing = writer.submit(save_checkpoint, out_dir, state, settings.keep, is_best)
            del state
        if logging or saving:
            window_start, window_tokens = time.perf_counter(), 0

    # ---- The end
    writing.result()
    with unheard:
        bar.close()
        if board:
            board.close()
    n_skipped, in_a_row = skipped.tolist()
    # The others just end: torchrun would answer their errors by killing this one.
    if is_main and (in_a_row >= MOST_SKIPPED or in_a_row == step - first_step > 0):
        there = f"{out_dir / kept_name(0)} has the weights from before them: --resume with a lower --lr"
        mend = "nothing is saved: change the model's flags" if n_skipped == step else there
        raise BadInput(f"--lr={settings.lr}: stopped at step {step}, for the last {in_a_row} steps had a loss or "
                       f"gradient that is not finite, and were skipped; {mend}")  # fmt: skip
    if is_main:
        if step < settings.max_steps:
            print(f"stopped by {signal.Signals(stop[0]).name if stop else 'a signal'}; --resume goes on")
        where = "" if str(out_dir) == Settings.out_dir else f" --out_dir={out_dir}"
        print(f"{out_dir / kept_name(0)} holds step {step}. Text from it: python sample.py{where}")


def main(argv=None):
    with contextlib.ExitStack() as at_end:
        try:
            run(argv, at_end)
        except RuntimeError as error:
            if dist.is_initialized() and ("gloo" in str(error) or isinstance(error, dist.DistError)):
                reason = str(error).strip().split("\n")[0]
                raise BadInput(f"another process of this run has ended or hangs ({reason}): its own message says why; "
                               "--resume goes on from the last checkpoint") from None  # fmt: skip
            raise
    # Not at the end of run(): gloo can deadlock when the process group goes before the model that run() still holds.
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    # Before the processes are joined they all find the same mistakes, so one of each machine speaks.
    run_command(main, silent=lambda: os.environ.get("LOCAL_RANK", "0") != "0" and not dist.is_initialized())

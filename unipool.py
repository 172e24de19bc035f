"""UniPool: a mixture-of-experts language model whose layers all route into ONE shared pool of experts.

The method is from "UniPool: A Globally Shared Expert Pool for Mixture-of-Experts", arXiv 2605.06665; equation and
table numbers in the comments are that paper's. NormRouter is from KERN, arXiv 2509.25913.

A vanilla MoE transformer gives each of its L layers its own experts. UniPool keeps one small router per layer, but
lets all of them choose from the same M expert FFNs. Three parts make that work, and each has its section below: a
router whose gates keep their scale whatever M is (NormRouter), the pool itself (ExpertPool), and a loss that balances
the load over the whole pool instead of within each layer (pool_balance_loss).

Dimensions, as they stand in the shape comments:
    B  sequences in a batch             M  experts in one pool (n_expert / n_pool; all of them when n_pool = 1)
    T  tokens in a sequence             k  experts a token visits in each layer (top_k)
    N  tokens in a batch, B * T         H  hidden width of an expert (n_hidden)
    C  width of the residual stream     L  layers (n_layer)
    D  width of an attention head       G  pools over depth (n_pool): 1 is UniPool, L is one private pool a layer
    V  vocabulary                       R  (token, choice) pairs, N * k: the rows that experts compute
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Configuration

# The paper's scales (Table 6) and "tiny" (bytes, for a laptop), as differences from UniPoolConfig's defaults. A scale's
# name is its active size, embeddings included. Everywhere H = 4 * C and n_expert = 8 * L; `balance_coef` is alpha_pool.
SCALES = {
    "tiny": dict(n_layer=4, n_embd=128, n_head=4, n_kv_head=2, block_size=128, vocab_size=320, init_std=0.04),
    "182m": dict(),
    "469m": dict(n_layer=24, n_embd=1024, n_head=16, balance_coef=2e-2),
    "650m": dict(n_layer=36, n_embd=1024, n_head=16, balance_coef=2e-2),
    "830m": dict(n_layer=48, n_embd=1024, n_head=16, balance_coef=2e-2),
    "978m": dict(n_layer=24, n_embd=1536, n_head=16, balance_coef=2e-2),
}
ARCHS = ("unipool", "vanilla", "dense")


@dataclass
class UniPoolConfig:
    """Everything that shapes the model. The defaults are the paper's 182m UniPool.

    Raises ValueError, naming the fields and their values, for a combination that cannot be built.
    """

    block_size: int = 1024  # T, the longest context
    vocab_size: int = 51200  # V; GPT-2's 50257 tokens, padded
    n_layer: int = 12  # L
    n_head: int = 12
    n_kv_head: int = 4  # grouped-query attention: n_head / n_kv_head query heads share one key and value head
    n_embd: int = 768  # C
    n_hidden: int = 3072  # H, of one expert (of the one FFN a layer, when n_expert is 0)
    n_expert: int = 96  # experts of all pools together, G * M; 0 is a dense model, without any routing
    n_pool: int = 1  # the paper's G: pools over depth, each shared by n_layer / n_pool adjacent layers
    top_k: int = 1  # k
    router: str = "norm"  # norm (Eq. 7) | softmax | sigmoid
    balance: str = "pool"  # pool (Eq. 5) | layer (Eq. 3) | bias (auxiliary-loss-free, arXiv 2408.15664) | none
    balance_coef: float = 1e-2  # alpha (Eq. 3), alpha_pool (Eq. 5)
    bias_rate: float = 1e-3  # step of the bias, when balance is "bias"
    rope_base: float = 1e6
    norm_eps: float = 1e-5
    init_std: float = 0.01

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def experts_per_pool(self):
        """M, the number of experts that each router chooses from."""
        return self.n_expert // self.n_pool

    @classmethod
    def from_scale(cls, scale, arch="unipool", **overrides):
        """The paper's configuration of one scale and architecture; `overrides` are fields that win over it.

        scale: a key of SCALES. arch: "unipool" (one pool, NormRouter, pool loss), "vanilla" (8 private experts a layer,
        softmax router, layer loss) or "dense" (one FFN a layer).
        """
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is unknown: choose from {', '.join(SCALES)}")
        if arch not in ARCHS:
            raise ValueError(f"arch={arch!r} is unknown: choose from {', '.join(ARCHS)}")
        if arch == "dense" and overrides.get("n_expert"):
            raise ValueError(f"n_expert={overrides['n_expert']} contradicts arch='dense', which has no experts")
        given = SCALES[scale] | overrides
        n_layer, n_embd = given.get("n_layer", cls.n_layer), given.get("n_embd", cls.n_embd)
        preset = dict(n_hidden=4 * n_embd, n_expert=8 * n_layer)
        if arch == "vanilla":
            preset |= dict(n_pool=n_layer, router="softmax", balance="layer")
        if arch == "dense":
            preset |= dict(n_expert=0, balance="none")
        fields = SCALES[scale] | preset | overrides
        if fields.get("balance", cls.balance) == "layer" and "balance_coef" not in overrides:
            fields["balance_coef"] = 1e-2  # the layer loss has this alpha at every scale
        return cls(**fields)

    def __post_init__(self):
        def check(possible, names, rule):
            if not possible:
                values = ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())
                raise ValueError(f"{values}: {rule}")

        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "n_pool"):
            check(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("balance_coef", "bias_rate", "norm_eps", "init_std"):
            check(0 <= getattr(self, name) < math.inf, name, "must be a number of at least 0")
        check(0 < self.rope_base < math.inf, "rope_base", "must be a number above 0")
        check(self.n_expert >= 0, "n_expert", "must be 0 (a dense model) or more")
        check(self.router in ROUTERS, "router", f"choose from {', '.join(ROUTERS)}")
        check(self.balance in BALANCES, "balance", f"choose from {', '.join(BALANCES)}")
        check(self.n_embd % self.n_head == 0, "n_embd n_head", "n_head must divide n_embd: heads are equally wide")
        check(self.head_dim % 2 == 0, "n_embd n_head", f"heads of odd width {self.head_dim}, but RoPE turns pairs")
        check(self.n_head % self.n_kv_head == 0, "n_head n_kv_head", "n_kv_head must divide n_head: equal groups")
        if self.n_expert:  # in a dense model the routing fields play no part
            M = self.experts_per_pool
            check(self.n_layer % self.n_pool == 0, "n_pool n_layer", "pools must serve equally many layers")
            check(self.n_expert % self.n_pool == 0, "n_pool n_expert", "pools must hold equally many experts")
            check(1 <= self.top_k <= M, "top_k n_expert n_pool", f"a pool has {M} experts to choose from")


# ----------------------------------------------------------------------------------------------------------------------
# Attention: RoPE, grouped queries, and a cache of keys and values for generation


def rope_table(block_size, head_dim, base):
    """Cosines and sines of RoPE's angles, position * base^(-2i / D) for pair i: (2, block_size, D/2), fp32.

    On the CPU even under torch.device("meta"): a checkpoint fills a model made there with weights, not with this table.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)  # (D/2,)
    angles = torch.outer(torch.arange(block_size, device="cpu").float(), frequencies)  # (block_size, D/2)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x, rope):
    """Turn the pairs (x_i, x_{i + D/2}) by their position's angles. x: (B, heads, T, D); rope: (2, T, D/2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each; bf16 * fp32 below is computed in fp32
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class KVCache:
    """One layer's keys and values of the tokens seen so far, in tensors allocated once."""

    def __init__(self, batch_size, config, device, dtype):
        shape = (batch_size, config.n_kv_head, config.block_size, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k, v):
        """Add the keys and values (B, n_kv_head, T, D) of T new tokens; return those of all tokens so far."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.qkv = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        """x: (B, T, C), rope: (2, T, D/2) of these T positions -> (B, T, C). With a cache, T > 1 only to fill it."""
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head + 2 * n_kv_head, T, D)
        qk, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=1)
        q, k = apply_rope(qk, rope).split([self.n_head, self.n_kv_head], dim=1)
        if cache is not None:
            k, v = cache.append(k, v)
        # A single new token may look at everything before it, so only longer inputs need the causal mask.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)  # (B, n_head, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


# ----------------------------------------------------------------------------------------------------------------------
# Routers: which k experts a token visits, and how much each of them counts


class Router(nn.Module):
    """Scores every expert for every token and picks the k best. A new router is a subclass with its own `score`, which
    turns logits z (N, M) fp32 into scores (N, M) fp32.

    `bias` only sways the choice, never the gates; it is zero unless balance="bias" moves it (UniPool.update_bias).
    """

    def __init__(self, n_embd, n_expert, top_k):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(n_expert, n_embd))
        nn.init.normal_(self.weight, std=n_embd**-0.5)  # for use by itself; UniPool.init_weights draws it anew
        self.register_buffer("bias", torch.zeros(n_expert))

    def forward(self, x):
        """x: (N, C) -> gates (N, k) fp32, experts (N, k) int64, scores (N, M) fp32, computed in fp32 throughout."""
        with torch.autocast(x.device.type, enabled=False):
            scores = self.score(F.linear(x.float(), self.weight.float()))  # (N, M)
        experts = (scores + self.bias).topk(self.top_k, dim=-1).indices  # (N, k)
        return scores.gather(-1, experts), experts, scores  # the gate is the score itself, not normalised again


class NormRouter(Router):
    """Eq. 7: s_i = sigma * c * max(0, z_i / (||z||_2 + eps)), with z = W x and a learnable scalar sigma.

    Dividing by the norm and multiplying by c keeps the gates' scale as the pool grows: the k gates of an untrained
    router have a norm of about 1.
    """

    eps = 1e-8

    def __init__(self, n_embd, n_expert, top_k):
        super().__init__(n_embd, n_expert, top_k)
        self.sigma = nn.Parameter(torch.ones(1))  # (1,) and not (): so that it can be sharded
        self.c = norm_router_scale(n_expert, top_k)

    def score(self, z):
        return self.sigma * self.c * F.relu(z / (z.norm(dim=-1, keepdim=True) + self.eps))  # Eq. 7


class SoftmaxRouter(Router):
    """The baseline: scores are probabilities over the experts (softmax before top-k)."""

    def score(self, z):
        return z.softmax(dim=-1)


class SigmoidRouter(Router):
    """DeepSeek-V3's: every expert is scored by itself. Made for balance="bias"."""

    def score(self, z):
        return z.sigmoid()


ROUTERS = {"norm": NormRouter, "softmax": SoftmaxRouter, "sigmoid": SigmoidRouter}


@functools.cache
def norm_router_scale(n_expert, top_k):
    """The constant c of NormRouter, a float (Eq. 12): E[ 1 / ||top-k of ReLU(x / ||x||)||_2 ], x ~ N(0, I_M).

    The mean over fixed draws, made finite for every M and k: with few experts a draw can have no positive entry (left
    out), or only tiny ones (the norm is bounded below by a tenth of sqrt(k/M), the norm of k entries of average size).
    From M = 24 on this touches no draw.
    """
    x = torch.randn(2**15, n_expert, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    top = F.relu(F.normalize(x)).topk(top_k).values  # (draws, k)
    norm = top.norm(dim=1)
    return (1 / norm[norm > 0].clamp(min=0.1 * math.sqrt(top_k / n_expert))).mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# The pool: stacked SwiGLU experts, and the dispatch of tokens to them


class ExpertPool(nn.Module):
    """M SwiGLU experts e_i(x) = (silu(x W_gate) * (x W_up)) W_down, their weights stacked along the first dimension."""

    def __init__(self, n_expert, n_embd, n_hidden):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_expert, n_embd, 2 * n_hidden))  # W_gate and W_up side by side
        self.down = nn.Parameter(torch.empty(n_expert, n_hidden, n_embd))
        nn.init.normal_(self.gate_up, std=n_embd**-0.5)  # for use by itself; UniPool.init_weights draws both anew
        nn.init.normal_(self.down, std=n_hidden**-0.5)
        self.copies = None  # gate_up and down as cast() last gave them
        self.keep_copies = False  # set by a training loop while no weight changes, between micro-batches

    @torch.compiler.disable
    def weights(self, one_pass=True):
        """The PoolWeights that a forward pass takes once and hands to all layers.

        one_pass: their gradients by PoolGradient, below; False leaves them to autograd. Same values, other speed.
        """
        dtype = product_dtype(self.gate_up)
        if not (one_pass and torch.is_grad_enabled() and self.gate_up.requires_grad):
            return PoolWeights(self.gate_up.to(dtype), self.down.to(dtype), None)
        copies, gradient = self.cast(dtype), PoolGradient()
        return PoolWeights(*HandOut.apply(self.gate_up, self.down, *copies, gradient), gradient)

    def cast(self, dtype):
        """gate_up and down in `dtype`, cast anew unless `keep_copies`."""
        if self.copies is None or not self.keep_copies:
            self.copies = None  # frees the old ones first
            self.copies = self.gate_up.detach().to(dtype), self.down.detach().to(dtype)
        return self.copies

    def forward(self, x, gates, experts):
        """x: (N, C), gates: (N, k), experts: (N, k) int64 -> (N, C): the sum over k of gate * expert(x), Eq. 2.

        For one use by itself; Block calls pool_ffn with the model's weights().
        """
        weights = self.weights()
        y, _ = pool_ffn(x.to(weights.down.dtype), gates, experts, weights)
        return y.to(x.dtype)


class PoolWeights(NamedTuple):
    """A pool's weights in product_dtype."""

    gate_up: torch.Tensor  # (M, C, 2H)
    down: torch.Tensor  # (M, H, C)
    gradient: "PoolGradient | None"  # what makes their gradients; None is autograd


def product_dtype(weight):
    """The dtype of matrix products with `weight`: autocast's where that is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def pool_ffn(x, gates, experts, weights, fuse=False):
    """Eq. 2. x: (N, C), gates and experts: (N, k), weights: PoolWeights -> (N, C), and the ends (M,) of dispatch.

    fuse: compile what lies between the products.
    """
    rows, order, ends = dispatch(x, experts, len(weights.down))
    return combine(run_experts(rows, ends, weights, fuse), order, gates), ends


def dispatch(x, experts, n_expert):
    """Sort the R = N * k (token, choice) pairs by expert, so that each expert's inputs lie next to each other.

    x: (N, C), experts: (N, k) int64 -> rows (R, C), the order, and ends (M,): the rows of expert i are ends[i-1] ...
    ends[i]-1. The order: row r holds pair pair_of_row[r], and pair p lies in row row_of_pair[p]; dispatch gathers by
    the first, combine by the second. No capacity: no token is ever dropped.
    """
    (N, k), C = experts.shape, x.size(1)
    expert_of_row, pair_of_row = experts.flatten().sort(stable=True)  # (R,) each
    row_of_pair = torch.empty_like(pair_of_row).scatter_(0, pair_of_row, torch.arange(N * k, device=x.device))
    ends = torch.searchsorted(expert_of_row, torch.arange(n_expert, device=x.device), right=True)
    pairs = x.unsqueeze(1).expand(N, k, C).reshape(N * k, C)
    return Permute.apply(pairs, pair_of_row, row_of_pair), (pair_of_row, row_of_pair), ends


def combine(rows, order, gates):
    """Eq. 2: FFN(x) = sum over the k chosen experts i of gate_i * e_i(x). rows: (R, C), gates: (N, k) -> (N, C)."""
    pair_of_row, row_of_pair = order
    y = Permute.apply(rows, row_of_pair, pair_of_row).view(*gates.shape, -1) * gates.unsqueeze(-1)  # (N, k, C)
    return y.sum(dim=1)


def one_token_ffn(x, gates, experts, weights):
    """Eq. 2 for one token without a gradient, as in decoding: only its k experts' weights are touched. -> (1, C)."""
    rows = torch.cat([swiglu(x @ weights.gate_up[i]) @ weights.down[i] for i in experts[0].tolist()])  # (k, C)
    return gates @ rows.to(gates.dtype)


class Permute(torch.autograd.Function):
    """x[order]. The inverse order is known, so the gradient is a gather too: autograd's own would be a scatter-add."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


@torch.compiler.disable  # torch.compile knows neither fp32 grouped products nor PoolGradient: one graph break a layer
def run_experts(rows, ends, weights, fuse):
    """e_i(x) for the rows x of every expert i. rows: (R, C), ends: (M,), weights: PoolWeights, one dtype -> (R, C)."""
    if weights.gradient is not None:
        return PoolFFN.apply(rows, ends, *weights, fuse)
    hidden = grouped_linear(rows, weights.gate_up, ends)  # (R, 2H)
    return grouped_linear(maybe_compiled(swiglu, fuse)(hidden), weights.down, ends)


def swiglu(hidden):
    """silu(gate) * up, for gate and up side by side in hidden: (..., 2H) -> (..., H)."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward(hidden, dh):
    """swiglu(hidden) once more, (R, H), and the gradient of hidden (R, 2H) from that of swiglu(hidden), dh (R, H)."""
    gate, up = hidden.chunk(2, dim=-1)
    silu = F.silu(gate)
    return silu * up, torch.cat([torch.ops.aten.silu_backward(dh * up, gate), dh * silu], dim=-1)


def grouped_linear(rows, weight, ends):
    """Rows ends[i-1] ... ends[i]-1 times weight[i]. rows: (R, in), weight: (M, in, out), ends: (M,) -> (R, out)."""
    if has_grouped_product(weight) and (rows.is_cuda or len(rows) >= len(weight)):  # a CPU's visits all M experts
        return F.grouped_mm(rows, weight, offs=ends.int())
    return torch.cat([x @ w for x, w in by_expert(ends, [rows], [weight]) if len(x)])


def has_grouped_product(weight):
    """Whether F.grouped_mm is the way for this weight. Else (fp64, bf16 on a CPU, fp32 on a GPU, odd widths) experts go
    one by one."""
    fast_dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}.get(weight.device.type)
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and weight.dtype == fast_dtype and aligned


def in_one_product(weight):
    """Whether a weight's gradient is made by one grouped product over all layers, or each layer adds its part."""
    return weight.is_cuda and has_grouped_product(weight)


def by_expert(ends, tensors, weights):
    """For each expert, also without rows: its part of the tensors (R, ...), then its part of the weights (M, ...)."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return zip(*(tensor.split(sizes) for tensor in tensors), *weights)


@functools.cache
def maybe_compiled(function, fuse):
    return torch.compile(function) if fuse else function


# ----------------------------------------------------------------------------------------------------------------------
# The pool's gradient in one pass. Autograd would make a full-size gradient of a weight W for each of the L layers that
# use it, and add them up. But dW_i = sum_l X_li^T dY_li = X_i^T dY_i, with expert i's rows of all layers in X_i, dY_i:
# so the layers record X and dY, and one product makes dW when all have. (On a CPU each layer adds its part in place.)


class PoolGradient:
    """The gradients of a pool's two weights, in the making during a backward pass."""

    capacity = 2  # records are added up once they hold more than this many times the weights' elements
    backward_pass = None  # the one that the records and totals are of

    def begin(self):
        """Each layer calls this first. What an earlier backward pass left that failed half-way does not count."""
        current = torch._C._current_graph_task_id()
        if current != self.backward_pass:
            self.backward_pass, self.totals, self.records = current, [None, None], []

    def record(self, weights, ends, *pairs):
        """One layer's x (R, in) and dy (R, out), sorted by expert, for each of the two weights."""
        self.records.append((ends, *pairs))
        recorded = sum(x.numel() + dy.numel() for _, *pairs in self.records for x, dy in pairs)
        if recorded > self.capacity * sum(w.numel() for w in weights):
            self.add_up()

    def add_up(self):
        ends, *uses = zip(*self.records)
        for i, pairs in enumerate(uses):
            product = sum_of_products(ends, *zip(*pairs))
            self.totals[i] = product.float() if self.totals[i] is None else self.totals[i].add_(product)
        self.records = []

    def take(self):
        """The gradients of gate_up and down, complete."""
        if torch._C._current_graph_task_id() != self.backward_pass:
            raise RuntimeError("no layer has recorded: use checkpoint(..., use_reentrant=False), or one_pass = False")
        if self.records:
            self.add_up()
        totals, self.totals = self.totals, [None, None]
        return totals


def sum_of_products(ends, xs, dys):
    """X_i^T dY_i for every expert i: (M, in, out). Tuples, one entry a layer: ends (M,), x (R, in), dy (R, out)."""
    experts = [torch.searchsorted(e, torch.arange(len(x), device=x.device), right=True) for e, x in zip(ends, xs)]
    # places[r]: where row r, of all layers' rows laid end to end, stands once they are sorted by expert together.
    places = torch.cat(experts).argsort(stable=True).argsort()
    x_sorted, dy_sorted = (tensors[0].new_empty(len(places), tensors[0].size(1)) for tensors in (xs, dys))
    for place, x, dy in zip(places.split([len(x) for x in xs]), xs, dys):
        x_sorted[place], dy_sorted[place] = x, dy
    return F.grouped_mm(x_sorted.t(), dy_sorted, offs=sum(ends).int())


class PoolFFN(torch.autograd.Function):
    """run_experts, with a backward that records what the weights' gradients are made of instead of computing them."""

    @staticmethod
    def forward(ctx, rows, ends, gate_up, down, gradient, fuse):
        hidden = grouped_linear(rows, gate_up, ends)  # (R, 2H)
        ctx.save_for_backward(rows, ends, gate_up, down, hidden)
        ctx.gradient, ctx.fuse = gradient, fuse
        return grouped_linear(maybe_compiled(swiglu, fuse)(hidden), down, ends)

    @staticmethod
    @once_differentiable
    @torch.compiler.disable
    def backward(ctx, dy):
        rows, ends, gate_up, down, hidden = ctx.saved_tensors
        ctx.gradient.begin()
        if in_one_product(gate_up):
            dh = grouped_linear(dy, down.transpose(1, 2), ends)  # (R, H)
            h, d_hidden = maybe_compiled(swiglu_backward, ctx.fuse)(hidden, dh)
            ctx.gradient.record((gate_up, down), ends, (rows, d_hidden), (h, dy))
            return grouped_linear(d_hidden, gate_up.transpose(1, 2), ends), None, None, None, None, None
        first = ctx.gradient.totals[0] is None
        if first:
            ctx.gradient.totals = [torch.empty_like(gate_up), torch.empty_like(down)]
        beta, dx = 0 if first else 1, torch.empty_like(rows)  # with beta = 0 products overwrite what they find
        weights = gate_up.mT, down.mT, *ctx.gradient.totals
        for x, dy_i, hidden_i, dx_i, w1_t, w2_t, dw1, dw2 in by_expert(ends, [rows, dy, hidden, dx], weights):
            h, d_hidden = swiglu_backward(hidden_i, dy_i @ w2_t)  # of one expert: small enough to stay in the cache
            dw1.addmm_(x.t(), d_hidden, beta=beta)
            dw2.addmm_(h.t(), dy_i, beta=beta)
            torch.mm(d_hidden, w1_t, out=dx_i)
        return dx, None, None, None, None, None


class HandOut(torch.autograd.Function):
    """Hands a pool's weights to the layers' PoolFFNs. These return no gradient for them, but autograd still calls the
    backward here after all of theirs: then the gradients are complete.
    """

    @staticmethod
    def forward(ctx, gate_up, down, gate_up_copy, down_copy, gradient):
        ctx.gradient, ctx.dtype = gradient, gate_up.dtype
        ctx.set_materialize_grads(False)
        return gate_up_copy.view_as(gate_up), down_copy.view_as(down)

    @staticmethod
    @once_differentiable
    @torch.compiler.disable
    def backward(ctx, *others):  # gradients of other uses than PoolFFN: as a rule None
        grads = zip(ctx.gradient.take(), others)
        return *((total if o is None else total + o).to(ctx.dtype) for total, o in grads), None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Balance losses, on the routing statistics of the layers that share a pool:
#   f (L, M): the share of the layer's (token, choice) pairs that expert i received; sums to 1, carries no gradient
#   P (L, M): the mean over tokens of the router's score for expert i before top-k; carries the gradient
# With G pools these are the rows of one pool's layers, L / G of them.


def layer_balance_loss(f, P):
    """Eq. 3, summed over the layers, without alpha: each layer is to spread its tokens evenly. (L, M), (L, M) -> ()."""
    return f.size(1) * (f.detach() * P).sum()


def pool_balance_loss(f, P):
    """Eq. 5, without alpha: the layers TOGETHER are to spread their tokens evenly, so that each may specialise.

    (L, M), (L, M) -> (). Both means run over the layers first (Eq. 4); the loss equals Eq. 6.
    """
    f_bar, P_bar = f.detach().mean(dim=0), P.mean(dim=0)  # (M,) each, Eq. 4
    return f.size(1) * (f_bar * P_bar).sum()  # Eq. 5


BALANCES = {"pool": pool_balance_loss, "layer": layer_balance_loss, "bias": None, "none": None}


# ----------------------------------------------------------------------------------------------------------------------
# The model


class DenseFFN(nn.Module):
    """The SwiGLU FFN of a dense model, in place of a router and a pool."""

    def __init__(self, n_embd, n_hidden):
        super().__init__()
        self.gate_up = nn.Linear(n_embd, 2 * n_hidden, bias=False)
        self.down = nn.Linear(n_hidden, n_embd, bias=False)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        return self.down(swiglu(self.gate_up(x)))


class Block(nn.Module):
    """One layer: attention, then the FFN. The router belongs to the layer; the experts are handed in."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        if config.n_expert:
            self.router = ROUTERS[config.router](config.n_embd, config.experts_per_pool, config.top_k)
        else:
            self.ffn = DenseFFN(config.n_embd, config.n_hidden)

    def forward(self, x, rope, expert_weights, cache=None):
        """x: (B, T, C), rope: (2, T, D/2), expert_weights: the pool's weights(), None in a dense model.

        Returns x (B, T, C) and the layer's routing statistics f (M,) and P (M,), as the balance losses take them.
        """
        x = x + self.attention(self.attention_norm(x), rope, cache)
        h = self.ffn_norm(x)
        if expert_weights is None:
            no_experts = h.new_zeros(0)
            return x + self.ffn(h), no_experts, no_experts
        h = h.flatten(0, 1)  # (N, C)
        gates, experts, scores = self.router(h)
        h = h.to(expert_weights.down.dtype)
        if len(h) == 1 and not torch.is_grad_enabled():
            y = one_token_ffn(h, gates, experts, expert_weights)
            f = torch.zeros_like(scores[0]).index_fill_(0, experts[0], 1 / experts.numel())  # (M,)
        else:
            y, ends = pool_ffn(h, gates, experts, expert_weights, fuse=torch.compiler.is_compiling())  # (N, C)
            f = ends.diff(prepend=ends.new_zeros(1)) / experts.numel()  # (M,)
        return x + y.view_as(x).to(x.dtype), f, scores.mean(dim=0)


LOSS_CHUNK = 4096  # tokens whose logits are held at a time, when the loss is computed in chunks


class Output(NamedTuple):
    logits: torch.Tensor | None  # (B, T, V); None with keep_logits=False
    loss: torch.Tensor | None  # (), cross-entropy in nats a token and nothing else; None without targets
    balance_loss: torch.Tensor  # (), Eq. 3 or 5 without alpha; 0 for a dense model and for balance "bias" or "none"
    usage: torch.Tensor  # (L, M), the f of each layer


class UniPool(nn.Module):
    """The language model. It owns the pools and hands each block the one it shares with its neighbours."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # How it is computed, not what: neither changes a result.
        self.one_pass = True  # the pools' gradients by PoolGradient; False leaves them to autograd
        self.recompute = False  # keep no activations inside the blocks, compute them again in the backward pass
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        n_pool = config.n_pool if config.n_expert else 0
        shape = config.experts_per_pool, config.n_embd, config.n_hidden
        self.pools = nn.ModuleList(ExpertPool(*shape) for _ in range(n_pool))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("rope", rope_table(config.block_size, config.head_dim, config.rope_base), persistent=False)
        self.init_weights()

    def init_weights(self):
        """N(0, init_std); the projections that write to the residual stream get init_std / sqrt(2L). Vectors stay 1."""
        std = self.config.init_std
        for name, p in self.named_parameters():
            if name.endswith(("attention.out.weight", "down", "down.weight")):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() > 1:
                nn.init.normal_(p, std=std)

    def trunk(self, idx, caches=None):
        """Everything but the head. idx: (B, T) int64; caches: a KVCache a layer: T tokens fill it, then one at a time.

        Returns x (B, T, C) after the final norm, f (L, M) and P (L, M).
        """
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size={self.config.block_size}: crop idx")
        if start and idx.size(1) > 1:
            raise ValueError(f"{idx.size(1)} tokens on a cache that holds {start}: one at a time after the first call")
        x = self.embedding(idx)  # (B, T, C)
        rope = self.rope[:, start:end]
        weights_of_pool = [pool.weights(self.one_pass) for pool in self.pools]
        recompute = self.recompute and torch.is_grad_enabled()
        statistics = []
        for l, block in enumerate(self.blocks):
            # Layer l uses pool floor(l * G / L): all of them pool 0 in UniPool, each its own in a vanilla MoE.
            expert_weights = weights_of_pool[l * self.config.n_pool // self.config.n_layer] if self.pools else None
            args = (x, rope, expert_weights, caches[l] if caches else None)
            x, f, P = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            statistics.append((f, P))
        f, P = (torch.stack(s) for s in zip(*statistics))
        return self.norm(x), f, P

    def balance_loss(self, f, P):
        """The configured loss without alpha, summed over the pools; f, P: (L, M) -> ()."""
        loss, n_pool = BALANCES[self.config.balance], self.config.n_pool
        if loss is None:
            return P.new_zeros(())
        return sum(loss(f_g, P_g) for f_g, P_g in zip(f.chunk(n_pool), P.chunk(n_pool)))

    def forward(self, idx, targets=None, keep_logits=True):
        """idx, targets: (B, T) int64 with T <= block_size; targets of -1 do not count. Returns an Output.

        The training loss is out.loss + config.balance_coef * out.balance_loss. keep_logits=False computes the loss in
        chunks, without ever holding all B * T * V logits, and returns none. Raises ValueError if T > block_size.
        """
        x, f, P = self.trunk(idx)
        logits = loss = None
        if targets is not None and not keep_logits and hasattr(F, "linear_cross_entropy"):  # torch 2.13
            loss = self.chunked_cross_entropy(x.flatten(0, 1), targets.flatten())
        else:
            logits = self.head(x)  # (B, T, V)
            if targets is not None:
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return Output(logits if keep_logits else None, loss, self.balance_loss(f, P), f)

    def chunked_cross_entropy(self, x, targets):
        """x: (N, C), targets: (N,) -> (). Computes the gradients too, chunk by chunk, while the logits are there."""
        dtype = product_dtype(self.head.weight)
        options = nn.LinearCrossEntropyOptions(
            batch_chunk_size=LOSS_CHUNK, acc_policy="balanced", allow_retain_graph=True
        )
        return F.linear_cross_entropy(
            x.to(dtype), self.head.weight.to(dtype), targets, ignore_index=-1, options=options
        )

    # ------------------------------------------------------------------------------------------------------------------
    # For training

    def configure_optimizer(self, lr, weight_decay, betas, eps):
        """AdamW, fused into one kernel; one-dimensional parameters (norms, sigma) are not decayed."""
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def update_bias(self, usage):
        """For balance="bias", after each optimizer step: move each router's bias towards an even load (2408.15664).

        usage: (L, M), the f of each layer over the whole batch. Each router looks at its own layer's load.
        """
        for block, f in zip(self.blocks if self.pools else [], usage):
            block.router.bias += self.config.bias_rate * torch.sign(f.mean() - f)

    def num_params(self, active=False):
        """Number of parameters: all that are stored, or only those that one token meets (k experts in every layer)."""
        stored = sum(p.numel() for p in self.parameters())
        if not active or not self.pools:
            return stored
        pooled = sum(p.numel() for p in self.pools.parameters())
        return stored - pooled + self.config.n_layer * self.config.top_k * (pooled // self.config.n_expert)

    def flops_per_token(self):
        """Floating-point operations of forward and backward for one token in a full context of block_size tokens.

        6 for every weight that the token is multiplied with (so active experts only, and no embedding), and
        12 * L * T * C for the attention, its causal half not deducted: the convention of PaLM's appendix B for MFU.
        """
        c = self.config
        not_multiplied = self.embedding.weight.numel() + sum(p.numel() for p in self.parameters() if p.dim() <= 1)
        return 6 * (self.num_params(active=True) - not_multiplied) + 12 * c.n_layer * c.block_size * c.n_embd

    # ------------------------------------------------------------------------------------------------------------------
    # For generation

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None):
        """Yield one new token (B, 1) at a time, for prompts idx (B, T) int64 of one length T >= 1.

        temperature: 0 takes the likeliest token. top_k: choose only among so many likeliest ones. n_vocab: ids from
        here on are padding of the vocabulary and never chosen. Up to block_size tokens, the keys and values of earlier
        ones are cached. Past it the context is a sliding window: it is cropped to the last block_size tokens and
        computed afresh for every token (as in nanoGPT), because cropping moves every position.
        """
        if idx.size(1) == 0:
            raise ValueError("idx is empty: generation needs at least one token to start from")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature} must not be negative and top_k={top_k} at least 1")
        block_size = self.config.block_size
        idx = new = idx[:, -block_size:]  # new: the tokens that the model has not seen yet
        caches = [KVCache(len(idx), self.config, idx.device, self.head.weight.dtype) for _ in self.blocks]
        for _ in range(max_new_tokens):
            x, _, _ = self.trunk(new, caches)
            logits = self.head(x[:, -1]).float()[:, :n_vocab]  # (B, V)
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                below_best = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no temperature makes it infinite
                p = (below_best / temperature).softmax(dim=-1)
                if top_k is not None:
                    p = p * (logits >= logits.topk(min(top_k, logits.size(-1))).values[:, -1:])
                new = torch.multinomial(p, 1)
            yield new
            idx = torch.cat([idx, new], dim=1)
            if idx.size(1) > block_size:
                idx = new = idx[:, -block_size:]
                caches = None

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None):
        """Continue the prompts idx (B, T): (B, T + max_new_tokens). See `stream` for the arguments and the window."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, n_vocab)], dim=1)

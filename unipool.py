"""UniPool: a mixture-of-experts language model whose layers all route into ONE shared pool of experts.

The method is from "UniPool: A Globally Shared Expert Pool for Mixture-of-Experts", arXiv 2605.06665; equation and
table numbers in the comments are those of its first version. NormRouter is from KERN, arXiv 2509.25913.

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
    V  vocabulary                       R  (token, choice) pairs, N * k
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
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
ARCHS = ("unipool", "vanilla", "dense")  # one pool; 8 private experts per layer, softmax, layer loss; one FFN per layer


@dataclass
class UniPoolConfig:
    """What shapes the model; the defaults are the paper's 182m UniPool. ValueError for what cannot be built."""

    block_size: int = 1024  # T, the longest context
    vocab_size: int = 51200  # V; GPT-2's 50257 tokens, padded
    n_layer: int = 12  # L
    n_head: int = 12
    n_kv_head: int = 4  # grouped-query attention: n_head / n_kv_head query heads share one key and value head
    n_embd: int = 768  # C
    n_hidden: int = 3072  # H, of one expert (of the one FFN per layer, when n_expert is 0); from_scale: 4 * C
    n_expert: int = 96  # of all pools together, G * M; 0 is a dense model, without any routing; from_scale: 8 * L
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
        """The configuration of a scale (a key of SCALES) and an arch (of ARCHS); `overrides` are fields that win."""
        for name, value, known in (("scale", scale, SCALES), ("arch", arch, ARCHS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(known)}")
        if arch == "dense" and overrides.get("n_expert"):
            raise ValueError(f"n_expert={overrides['n_expert']} contradicts arch='dense', which has no experts")
        size = dict(n_layer=cls.n_layer, n_embd=cls.n_embd) | SCALES[scale] | overrides
        if arch == "vanilla" and overrides.get("n_pool", size["n_layer"]) != size["n_layer"]:
            raise ValueError(f"n_pool={overrides['n_pool']} contradicts arch='vanilla', whose layers have a pool each")
        vanilla = dict(n_pool=size["n_layer"], router="softmax", balance="layer")
        of_arch = dict(unipool={}, vanilla=vanilla, dense=dict(n_expert=0, balance="none"))[arch]
        fields = size | dict(n_hidden=4 * size["n_embd"], n_expert=8 * size["n_layer"]) | of_arch | overrides
        if fields.get("balance") == "layer" and "balance_coef" not in overrides:
            fields["balance_coef"] = cls.balance_coef  # the layer loss has this alpha at every scale
        return cls(**fields)

    def __post_init__(self):
        def check(possible, names, rule):
            if not possible:
                raise ValueError(", ".join(f"{name}={getattr(self, name)!r}" for name in names.split()) + f": {rule}")

        for name in "block_size vocab_size n_layer n_head n_kv_head n_embd n_hidden n_pool rope_base".split():
            check(1 <= getattr(self, name) < 2**31, name, "must be a number of at least 1 and below 2^31")
        for name in "n_expert balance_coef bias_rate norm_eps init_std".split():
            check(0 <= getattr(self, name) < 2**31, name, "must be a number of at least 0 and below 2^31")
        for name, known in (("router", ROUTERS), ("balance", BALANCES)):
            check(getattr(self, name) in known, name, f"choose from {', '.join(known)}")
        check(self.n_embd % self.n_head == 0, "n_embd n_head", "n_head must divide n_embd: heads are equally wide")
        check(self.head_dim % 2 == 0, "n_embd n_head", f"heads of odd width {self.head_dim}, but RoPE turns pairs")
        check(self.n_head % self.n_kv_head == 0, "n_head n_kv_head", "n_kv_head must divide n_head: equal groups")
        if self.n_expert:  # in a dense model the routing fields play no part
            M = self.experts_per_pool
            check(self.n_layer % self.n_pool == 0, "n_pool n_layer", "pools must serve equally many layers")
            check(self.n_expert % self.n_pool == 0, "n_pool n_expert", "pools must hold equally many experts")
            check(1 <= self.top_k <= M, "top_k n_expert n_pool", f"a pool has {M} experts to choose from")


# ----------------------------------------------------------------------------------------------------------------------
# Attention: RoPE and grouped queries


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
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each; rope is fp32, so bf16 is turned in fp32
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.qkv = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        """x: (B, T, C), rope: (2, T, D/2) of these T positions -> (B, T, C).

        cache: a list, empty or [keys, values] (B, n_kv_head, T, D) of the tokens before, to which these are added.
        """
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head + 2 * n_kv_head, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache:
            k, v = (torch.cat(before_and_new, dim=2) for before_and_new in zip(cache, (k, v)))
        if cache is not None:
            cache[:] = k, v
        if q.is_cuda and q.dtype == torch.float32:  # no fused kernel takes grouped queries in fp32
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
        # A single new token may look at everything before it; longer inputs find an empty cache, and need the mask.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=k.size(1) < self.n_head)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


# ----------------------------------------------------------------------------------------------------------------------
# Routers: which k experts a token visits, and how much each of them counts


class Router(nn.Module):
    """Scores every expert for every token and picks the k best. A new router is a subclass with its own `score`, which
    turns logits z (N, M) fp32 into scores (N, M) fp32. No expert serves a pair whose score is exactly 0.

    `bias` only sways the choice, never the gates; it is zero unless balance="bias" moves it (UniPool.update_bias).
    `seen` (M,) multiplies the scores: 1 everywhere, unless UniPool.lock takes from this layer what others own.
    """

    def __init__(self, n_embd, n_expert, top_k):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(n_expert, n_embd))
        nn.init.normal_(self.weight, std=n_embd**-0.5)  # for use by itself; UniPool.init_weights draws it anew
        self.register_buffer("bias", torch.zeros(n_expert))
        self.register_buffer("seen", torch.ones(n_expert))

    def forward(self, x):
        """x: (N, C) -> gates (N, k) fp32, experts (N, k) int64, scores (N, M) fp32, computed in fp32 throughout."""
        with torch.autocast(x.device.type, enabled=False):
            scores = self.score(F.linear(x.float(), self.weight.float())) * self.seen  # (N, M)
        choices = scores + self.bias.masked_fill(self.seen == 0, -math.inf)  # a score of 0 could still be among k best
        experts = choices.topk(self.top_k, dim=-1).indices  # (N, k)
        return scores.gather(-1, experts), experts, scores  # the gate is the score itself, not normalised again


class NormRouter(Router):
    """Eq. 7: s_i = sigma * c * max(0, z_i / (||z||_2 + eps)), with z = W x and a learnable scalar sigma.

    Dividing by the norm and multiplying by c keeps the gates' scale as the pool grows: the k gates of an untrained
    router have a norm of about 1. As in the paper nothing keeps sigma from falling below 0, where no expert would serve
    the layer any more and the pool's balance loss would only push it further down.
    """

    eps = 1e-8

    def __init__(self, n_embd, n_expert, top_k):
        super().__init__(n_embd, n_expert, top_k)
        self.sigma = nn.Parameter(torch.ones(1))  # (1,) and not (): so that it can be sharded
        self.c = norm_router_scale(n_expert, top_k)

    def score(self, z):
        return self.sigma * self.c * F.relu(z / (z.norm(dim=-1, keepdim=True) + self.eps))  # Eq. 7


@functools.cache
def norm_router_scale(n_expert, top_k):
    """The constant c of NormRouter (Eq. 12): E[ 1 / ||top-k of ReLU(x / ||x||)||_2 ], x ~ N(0, I_M), over fixed draws.

    With few experts a draw's norm can be 0, or close to it. Draws of norm 0 are left out, and the others count as at
    least a tenth of sqrt(k/M), the norm of k entries of average size. From M = 24 on neither happens.
    """
    x = torch.randn(2**15, n_expert, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    norm = F.relu(F.normalize(x)).topk(top_k).values.norm(dim=1)  # (draws,)
    return (1 / norm[norm > 0].clamp(min=0.1 * math.sqrt(top_k / n_expert))).mean().item()


class SoftmaxRouter(Router):
    """The baseline: scores are probabilities over the experts (softmax before top-k)."""

    def score(self, z):
        return z.softmax(dim=-1)


class SigmoidRouter(Router):
    """DeepSeek-V3's: every expert is scored by itself. Made for balance="bias", which with NormRouter would also choose
    experts of score 0, and those serve nothing.
    """

    def score(self, z):
        return z.sigmoid()


ROUTERS = {"norm": NormRouter, "softmax": SoftmaxRouter, "sigmoid": SigmoidRouter}


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
        self.copies = None  # both weights as weights() last cast them
        self.keep_copies = False  # set by a training loop while no weight changes, between micro-batches

    @torch.compiler.disable
    def weights(self, one_pass=True):
        """[gate_up, down] in the dtype of products: a forward pass takes them once and hands them to all layers.

        one_pass: their gradients by PoolGradient, at the end; False leaves the sum over the layers to autograd.
        """
        stored, dtype = [self.gate_up, self.down], product_dtype(self.gate_up)
        if not (one_pass and torch.is_grad_enabled()):
            return [weight.to(dtype) for weight in stored]
        if not (self.keep_copies and self.copies and self.copies[0].dtype == dtype):
            self.copies = None  # frees the old ones first
            self.copies = [weight.detach().to(dtype) for weight in stored]
        return [HandOut.apply(weight, copy) for weight, copy in zip(stored, self.copies)]

    def forward(self, x, gates, experts):
        """Eq. 2, for use by itself; Block calls pool_ffn. x: (N, C), gates: (N, k), experts: (N, k) int64 -> (N, C)."""
        return pool_ffn(x, gates, experts, self.weights())[0].to(x.dtype)


def swiglu(hidden):
    """silu(gate) * up, for gate and up side by side in hidden: (..., 2H) -> (..., H)."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def pool_ffn(x, gates, experts, weights):
    """Eq. 2: y = sum over the k choices of gate * e_i(x), without a capacity: no token is ever dropped.

    x: (N, C), gates and experts: (N, k), weights: gate_up (M, C, 2H) and down (M, H, C). Returns y (N, C) and f (M,),
    the share of the (token, choice) pairs that each expert serves. A pair whose gate is 0 adds nothing, so no expert
    serves it: f does not count it, and its row stands behind those of all experts, where nothing is computed.
    """
    if len(x) == 1 and not torch.is_grad_enabled():
        return one_token_ffn(x, gates, experts, weights)
    N, k = experts.shape
    gate_up, down = weights
    M = len(down)
    # Sort the R = N * k pairs by expert: row r is pair pair_of_row[r], and expert i has rows ends[i-1] ... ends[i]-1.
    # Pairs that no expert serves come last, as if there were an expert M.
    served = gates != 0  # (N, k)
    expert_of_row, pair_of_row = torch.where(served, experts, M).flatten().sort(stable=True)  # (R,) each
    row_of_pair = torch.empty_like(pair_of_row).scatter_(0, pair_of_row, torch.arange(N * k, device=x.device))
    ends = torch.searchsorted(expert_of_row, torch.arange(M, device=x.device), right=True)  # (M,)
    # Rows that no expert serves are undefined after the products, as are their gradients: where() keeps both out.
    pairs = torch.where(served.unsqueeze(-1), x.to(down.dtype).unsqueeze(1), 0)  # (N, k, C)
    rows = Reorder.apply(pairs.flatten(0, 1), pair_of_row, row_of_pair)  # (R, C), in the order of their experts
    hidden = grouped_linear(rows, gate_up, ends)  # (R, 2H)
    rows = grouped_linear(swiglu(hidden), down, ends)  # (R, C): e_i(x)
    outputs = Reorder.apply(rows, row_of_pair, pair_of_row).view(N, k, -1)  # in the order of the pairs again
    outputs = torch.where(served.unsqueeze(-1), outputs, 0)  # (N, k, C)
    y = (gates.unsqueeze(-1) * outputs).sum(dim=1)  # Eq. 2; the gates are fp32, and so is the sum
    return y, ends.diff(prepend=ends.new_zeros(1)) / (N * k)


# ----------------------------------------------------------------------------------------------------------------------
# Balance losses, of the layers that share a pool (L of them here), without alpha. Their routing statistics:
#   f (L, M): the share of the layer's (token, choice) pairs that expert i serves; carries no gradient. It sums to 1, or
#             with NormRouter to less: pairs whose gate is 0 are served by no expert (the authors' code counts them)
#   P (L, M): the mean over tokens of the router's score for expert i before top-k; carries the gradient


def layer_balance_loss(f, P):
    """Eq. 3 (E is M here), summed over the layers: each is to spread its tokens evenly. (L, M), (L, M) -> ()."""
    return f.size(1) * (f.detach() * P).sum()


def pool_balance_loss(f, P):
    """Eq. 5 (= Eq. 6): the layers TOGETHER spread their tokens evenly; each may specialise. (L, M), (L, M) -> ()."""
    f_bar, P_bar = f.detach().mean(dim=0), P.mean(dim=0)  # (M,) each, Eq. 4
    return f.size(1) * (f_bar * P_bar).sum()  # Eq. 5


BALANCES = {"pool": pool_balance_loss, "layer": layer_balance_loss, "bias": None, "none": None}


# ----------------------------------------------------------------------------------------------------------------------
# UniPool-lock, from the paper's newest version (train.py --lock): after a start with the pool open to all, each expert
# becomes one layer's own, K = M / L to each layer, and the scores of the others fade to 0 (UniPool.lock)


def cardinality_loss(P, n_owned):
    """(1/L) sum_l (entropy_l - log K)^2, entropy_l that of layer l's mean scores, normalised to sum to 1.

    It asks each layer to use about K = n_owned experts (exp(entropy_l) is how many it uses). P: (L, M) -> ().
    """
    p = P / (P.sum(dim=1, keepdim=True) + 1e-8)
    entropy = -(p * (p + 1e-8).log()).sum(dim=1)  # (L,)
    return (entropy - math.log(n_owned)).square().mean()


def assign_experts(usage):
    """Which layer owns which expert. usage: (L, M), the f of each layer -> owned (L, M) bool.

    Each layer gets M / L experts and each expert one layer, such that as many pairs as possible go to a layer's own: a
    balanced assignment problem, in which each layer stands for M / L rows.
    """
    L, M = usage.shape
    _, expert = linear_sum_assignment(usage.cpu().double().repeat_interleave(M // L, dim=0), maximize=True)  # (M,)
    return torch.zeros(L, M, dtype=torch.bool).scatter(1, torch.from_numpy(expert).view(L, -1), True)


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
            return x + self.ffn(h), h.new_zeros(0), h.new_zeros(0)
        h = h.flatten(0, 1)  # (N, C)
        gates, experts, scores = self.router(h)
        y, f = pool_ffn(h, gates, experts, expert_weights)
        return x + y.view_as(x).to(x.dtype), f, scores.mean(dim=0)


class Output(NamedTuple):
    logits: torch.Tensor | None  # (B, T, V); None with keep_logits=False
    loss: torch.Tensor | None  # (), cross-entropy in nats per token and nothing else; None without targets
    balance_loss: torch.Tensor  # (), Eq. 3 or 5 without alpha; 0 for a dense model and for balance "bias" or "none"
    usage: torch.Tensor  # (L, M), the f of each layer: sums to the share of its (token, choice) pairs that is served
    mean_scores: torch.Tensor  # (L, M), the P of each layer


class UniPool(nn.Module):
    """The language model. It owns the pools and hands each block the one it shares with its neighbours."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.one_pass = True  # the pools' gradients by PoolGradient; False leaves them to autograd
        self.recompute = False  # keep no activations inside the blocks, compute them again going backward
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        shape = config.experts_per_pool, config.n_embd, config.n_hidden
        self.pools = nn.ModuleList(ExpertPool(*shape) for _ in range(config.n_pool if config.n_expert else 0))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("rope", rope_table(config.block_size, config.head_dim, config.rope_base), persistent=False)
        self.init_weights()

    @classmethod
    def from_checkpoint(cls, saved, device="cpu"):
        """The model in a checkpoint of train.py: its path, or the dict in it. Code in the file is never run."""
        if not isinstance(saved, dict):
            saved = torch.load(saved, map_location="cpu", weights_only=True, mmap=True)
        with torch.device("meta"):
            model = cls(UniPoolConfig(**saved["config"]))
        model.load_state_dict(saved["model"], assign=True)
        return model.to(device).eval()

    def init_weights(self):
        """N(0, init_std); what writes to the residual stream gets init_std / sqrt(2L). Vectors stay as made."""
        std = self.config.init_std
        for name, p in self.named_parameters():
            if name.endswith(("attention.out.weight", "down", "down.weight")):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() > 1:
                nn.init.normal_(p, std=std)

    def trunk(self, idx, caches=None):
        """Everything but the head. idx: (B, T) int64 -> x (B, T, C) after the final norm, f (L, M) and P (L, M).

        caches: a list per layer, empty at the first call; after it idx must hold one new token.
        """
        start = caches[0][0].size(2) if caches and caches[0] else 0
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
        chunks, without ever holding all B * T * V logits, and returns no logits.
        """
        x, f, P = self.trunk(idx)
        logits = self.head(x) if keep_logits or targets is None else None  # (B, T, V)
        loss = None
        if targets is not None and keep_logits:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits.flatten(0, 1).to(dtype), targets.flatten(), ignore_index=-1)
        elif targets is not None:
            training = torch.is_grad_enabled()
            loss = ChunkedCrossEntropy.apply(x.flatten(0, 1), self.head.weight, targets.flatten(), training)
        return Output(logits, loss, self.balance_loss(f, P), f, P)

    def configure_optimizer(self, lr, weight_decay, betas, eps):
        """AdamW, fused into one kernel; one-dimensional parameters (norms, sigma) are not decayed."""
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def lock(self, owned, progress):
        """Scores of experts that a layer does not own fade by a cosine, from 1 at progress 0 to 0 at 1.

        owned: (L, M) bool, as assign_experts gives it. The norm in Eq. 7 stays that of all M logits, so that no score
        jumps; at progress 1 those experts are never chosen.
        """
        # Below 1 in fp32 too, however small the step: train.py --resume reads from seen == 1 who owns what.
        fading = min((1 + math.cos(math.pi * progress)) / 2, 1 - 2**-24) if progress else 1.0
        for block, own in zip(self.blocks, owned):
            block.router.seen.copy_(torch.where(own, 1.0, fading))

    @torch.no_grad()
    def update_bias(self, usage):
        """For balance="bias", after each step: move each bias towards an even load of its layer. usage: f (L, M)."""
        for block, f in zip(self.blocks, usage):
            block.router.bias += self.config.bias_rate * torch.sign(f.mean() - f)

    def num_params(self, active=False):
        """Number of parameters: all that are stored, or those that one token meets (k experts anew in every layer)."""
        stored, pooled = (sum(p.numel() for p in module.parameters()) for module in (self, self.pools))
        met = self.config.n_layer * self.config.top_k * pooled // max(1, self.config.n_expert)
        return stored - pooled + met if active else stored

    def flops_per_token(self, served=1.0):
        """Floating-point operations of forward and backward for one token in a full context of block_size tokens.

        6 for every weight that the token is multiplied with (so active experts only, and no embedding), and
        12 * L * T * C for the attention, its causal half not deducted: the convention of PaLM's appendix B for MFU.
        served: the share of (token, choice) pairs that an expert serves; the others multiply nothing.
        """
        c = self.config
        unserved = (1 - served) * c.n_layer * c.top_k * 3 * c.n_embd * c.n_hidden  # an expert has 3 * C * H weights
        vectors = sum(p.numel() for p in self.parameters() if p.dim() <= 1)
        multiplied = self.num_params(active=True) - self.embedding.weight.numel() - vectors - unserved
        return 6 * multiplied + 12 * c.n_layer * c.block_size * c.n_embd

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None):
        """Yield one new token (B, 1) at a time, for prompts idx (B, T) int64 of one length T >= 1.

        temperature: 0 takes the likeliest token. top_k: choose only among so many likeliest ones. n_vocab: ids from
        here on are padding and never chosen. Past block_size tokens the context is a sliding window, computed afresh
        for every token (as in nanoGPT), because cropping moves every position; before that, keys and values are cached.
        """
        if idx.size(1) == 0:
            raise ValueError("idx is empty: generation needs at least one token to start from")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature} must not be negative and top_k={top_k} at least 1")
        new, caches = idx, [[] for _ in self.blocks]  # new: the tokens that are not in the caches yet
        for _ in range(max_new_tokens):
            fits = idx.size(1) <= self.config.block_size
            x, _, _ = self.trunk(new, caches) if fits else self.trunk(idx[:, -self.config.block_size :])
            logits = self.head(x[:, -1]).float()[:, :n_vocab]  # (B, V)
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                below_best = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no temperature makes it infinite
                p = (below_best / max(temperature, 1e-30)).softmax(dim=-1)  # below 1e-38 it is 0 in fp32, and 0 / 0 nan
                if top_k is not None:
                    p = p * (logits >= logits.topk(min(top_k, logits.size(-1))).values[:, -1:])
                new = torch.multinomial(p, 1)
            yield new
            idx = torch.cat([idx, new], dim=1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None):
        """Continue the prompts idx (B, T): (B, T + max_new_tokens). The arguments are those of `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, n_vocab)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# What only makes it fast: up to rounding nothing below changes a result, and nothing of the method is here.


def product_dtype(weight):
    """The dtype of matrix products with `weight`: autocast's where that is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def one_token_ffn(x, gates, experts, weights):
    """pool_ffn for one token without a gradient, as in decoding: without sorting, and by the experts that serve it."""
    gate_up, down = weights
    x, f = x.to(down.dtype), gates.new_zeros(len(down))
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, gates.dtype))
    for gate, i in zip(gates[0].tolist(), experts[0].tolist()):
        if gate != 0:
            y += gate * (swiglu(x @ gate_up[i]) @ down[i]).to(y.dtype)
            f[i] += 1 / gates.numel()
    return y, f


class Reorder(torch.autograd.Function):
    """rows[order], a permutation. Its backward is dy[inverse], where that of rows[order] would add up into zeros."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy.index_select(0, *ctx.saved_tensors), None, None


def has_grouped_mm(weight):
    """Whether F.grouped_mm works: bf16 on a GPU, rows of whole 16 bytes, M < 1024. Else experts go one by one."""
    M, *sizes = weight.shape
    return weight.is_cuda and weight.dtype == torch.bfloat16 and M < 1024 and all(size % 8 == 0 for size in sizes)


def grouped_product(rows, weight, ends):
    """Rows ends[i-1] ... ends[i]-1 times weight[i]; those behind ends[M-1] are left undefined.

    rows: (R, in), weight: (M, in, out), ends: (M,) -> (R, out).
    """
    if has_grouped_mm(weight):
        return F.grouped_mm(rows, weight, offs=ends.int())
    out, cuts = rows.new_empty(len(rows), weight.size(2)), ends.tolist()
    for x, y, w in zip(rows.tensor_split(cuts), out.tensor_split(cuts), weight):
        torch.mm(x, w, out=y)
    return out


# The pool's gradient in one pass. Autograd would make a full-size gradient of a weight W for each of the L layers that
# use it, and add them up. But dW_i = sum_l X_li^T dY_li = X_i^T dY_i, with expert i's rows of all layers in X_i, dY_i:
# so the layers record X and dY, and when all have, one product makes dW: a grouped one on a GPU, one for each expert
# elsewhere. Where there are too many rows to keep, a few products add up. HandOut gives W to the layers together with a
# PoolGradient, into which their GroupedLinear records; its own backward runs last and takes the sum.


class PoolGradient:
    """The gradient of a weight (M, in, out), in the making during a backward pass."""

    capacity = 16  # records are multiplied early once they hold more than this many times the weight's elements

    def __init__(self, weight):
        self.weight, self.backward_pass = weight, None

    def begin(self):
        """Forget what another backward pass left: one that failed half-way, or that did not ask for this gradient."""
        if self.backward_pass != torch._C._current_graph_task_id():
            self.backward_pass, self.total, self.records = torch._C._current_graph_task_id(), None, []

    def add(self, ends, x, dy):
        """One layer's x (R, in) and dy (R, out), sorted by expert."""
        self.begin()
        self.records.append((ends, x, dy))
        if sum(a.numel() + b.numel() for _, a, b in self.records) > self.capacity * self.weight.numel():
            self.multiply()

    def multiply(self):
        records, self.records, first = self.records, [], self.total is None
        if has_grouped_mm(self.weight):
            product = sum_of_products(records)
            self.total = product if first else self.total.float().add_(product)  # of several, in fp32
            return
        if first:  # fp32; fp64 for a weight in fp64
            self.total = torch.empty_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        of_experts = [zip(x.tensor_split(cuts := ends.tolist()), dy.tensor_split(cuts)) for ends, x, dy in records]
        for dw, *of_layers in zip(self.total, *of_experts):  # an expert's gradient, and its (x, dy) in each record
            x, dy = (torch.cat(rows) if len(rows) > 1 else rows[0] for rows in zip(*of_layers))
            dw.addmm_(x.t().to(dw.dtype), dy.to(dw.dtype), beta=0 if first else 1)

    def take(self):
        """The gradient, complete; None if no layer has taken part in this backward pass."""
        self.begin()
        if self.records:
            self.multiply()
        total, self.total = self.total, None
        return total


def sum_of_products(records):
    """X_i^T dY_i for every expert i: (M, in, out). records: (ends (M,), x (R, in), dy (R, out)) of each layer."""
    ends, xs, dys = zip(*records)
    x_all, dy_all, ends_of_all = xs[0], dys[0], sum(ends)  # where expert i's rows of all layers end, put together
    if len(records) > 1:
        experts = [torch.searchsorted(e, torch.arange(len(x), device=x.device), right=True) for e, x in zip(ends, xs)]
        # places[r]: where row r, of all layers' rows laid end to end, stands once they are sorted by expert together;
        # the inverse of the permutation that sorts them.
        places = torch.cat(experts).argsort(stable=True).argsort()
        x_all, dy_all = (tensors[0].new_empty(len(places), tensors[0].size(1)) for tensors in (xs, dys))
        for place, x, dy in zip(places.split([len(x) for x in xs]), xs, dys):
            x_all[place], dy_all[place] = x, dy
    product = F.grouped_mm(x_all.t(), dy_all, offs=ends_of_all.int())
    without_rows = ends_of_all.diff(prepend=ends_of_all.new_zeros(1)) == 0
    return product.masked_fill_(without_rows[:, None, None], 0)  # some GPUs leave garbage there (pytorch issue 172439)


class HandOut(torch.autograd.Function):
    """Hands a weight of the pool, cast once, to layers. The ctx here is the result's grad_fn: there GroupedLinear finds
    `gradient`. GroupedLinear returns None for the weight, but autograd still runs this backward after all of theirs.
    """

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.gradient, ctx.dtype = PoolGradient(copy), weight.dtype
        ctx.set_materialize_grads(False)
        return copy.view_as(weight)  # a Function must not return its input itself

    @staticmethod
    @once_differentiable
    @torch.compiler.disable
    def backward(ctx, other):  # of other uses than GroupedLinear: as a rule None
        parts = [part for part in (ctx.gradient.take(), other) if part is not None]
        return (sum(parts[1:], parts[0]).to(ctx.dtype) if parts else None), None


@torch.compiler.disable  # torch.compile knows neither fp32 grouped products nor PoolGradient: two graph breaks a layer
def grouped_linear(rows, weight, ends):
    """x W_i for each row x, of its expert i. rows: (R, in), weight: (M, in, out), ends: (M,) -> (R, out)."""
    # weights(one_pass=False) hands nothing out: then this call does it for itself, and autograd adds up over the calls.
    handed_out = weight if isinstance(weight.grad_fn, HandOut._backward_cls) else HandOut.apply(weight, weight.detach())
    return GroupedLinear.apply(rows, handed_out, ends)


class GroupedLinear(torch.autograd.Function):  # what the weight's gradient is made of goes to its PoolGradient
    @staticmethod
    def forward(ctx, rows, weight, ends):
        ctx.save_for_backward(rows, weight, ends)
        ctx.gradient = getattr(weight.grad_fn, "gradient", None)  # a frozen weight has none
        return grouped_product(rows, weight, ends)

    @staticmethod
    @once_differentiable
    @torch.compiler.disable
    def backward(ctx, dy):
        rows, weight, ends = ctx.saved_tensors
        if ctx.gradient is not None:
            ctx.gradient.add(ends, rows, dy)
        return grouped_product(dy, weight.mT, ends), None, None


LOSS_CHUNK = 4096  # tokens whose logits are held at a time


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x W^T in fp32, without ever holding the logits of more than LOSS_CHUNK tokens:
    the gradients are made chunk by chunk, while its logits are there. d loss / d logits = (softmax - one-hot) / n.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, training):
        """x: (N, C), weight: (V, C), targets: (N,) int64, of which -1 do not count -> (), fp32.

        training: make gradients (autograd switches itself off in here, so that the caller has to tell).
        """
        dtype = product_dtype(weight)
        w, n, loss = weight.to(dtype), (targets != -1).sum(), torch.zeros((), device=x.device)
        if training:
            dx, dw = torch.empty_like(x, dtype=dtype), torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(x), LOSS_CHUNK):
            x_i, target = x[i : i + LOSS_CHUNK].to(dtype), targets[i : i + LOSS_CHUNK].unsqueeze(1)
            share, target = (target != -1) / n, target.where(target != -1, 0)  # share: what the token's loss counts
            log_p = (x_i @ w.t()).float().log_softmax(dim=-1)
            loss = loss - (share * log_p.gather(1, target)).sum()  # torch 2.11 miscompiles `-=` here
            if training:
                d_logits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(share)).to(dtype)  # share comes below
                dx[i : i + LOSS_CHUNK] = (d_logits @ w) * share
                dw += d_logits.t() @ (x_i * share).to(dtype)
            log_p = d_logits = None  # before the next chunk makes its own
        if training:
            ctx.save_for_backward(dx.to(x.dtype), dw.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None

"""Every claim of the other files, checked against something independent of them: the paper's figures, numpy, a loop
over tokens, brute-force counts, or the same model computed another way.

    pytest                      # offline, in minutes
    pytest -k "router or loss"  # a part
    SLOW=1 pytest               # also those that kill runs again and again
"""

import contextlib
import gzip
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import filelock
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

import prepare_pile
import sample
import train
import unipool
from command import BadInput, run_command
from experiments import ablate, compare, evaluate, probe
from experiments import balance as study
from experiments.fake_gpu import WHY_NOT
from prepare_pile import get_tokenizer, prepare
from unipool import (
    ARCHS,
    ROUTERS,
    SCALES,
    ExpertPool,
    NormRouter,
    PoolGradient,
    UniPool,
    UniPoolConfig,
)

HERE = Path(__file__).parent
PAPER_SCALES = [scale for scale in SCALES if scale != "tiny"]
torch.set_num_threads(2)
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by /proc")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes: SLOW=1 runs it")


def small_config(**overrides):
    """A model that takes milliseconds; wide enough that grouped_mm's alignment rules let it in."""
    fields = dict(block_size=16, vocab_size=40, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, n_expert=8,
                  init_std=0.1)  # fmt: skip
    return UniPoolConfig(**(fields | overrides))


def small_model(seed=0, **overrides):
    torch.manual_seed(seed)
    return UniPool(small_config(**overrides))


def random_tokens(config, batch=3, length=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.block_size), generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# Configuration and size


# Table 6, to the digits that the paper prints.
STORED = {"182m": 777.9e6, "469m": 2.588e9, "650m": 3.834e9, "830m": 5.081e9, "978m": 5.742e9}


@pytest.mark.parametrize("scale", PAPER_SCALES)
@pytest.mark.parametrize("arch", ARCHS)
def test_parameter_counts(scale, arch):
    with torch.device("meta"):
        model = UniPool(UniPoolConfig.from_scale(scale, arch))
    # Written out from METHOD's table: layers, width, FFN width and the vocabulary, with 4 KV heads.
    L, C, heads = {"182m": (12, 768, 12), "469m": (24, 1024, 16), "650m": (36, 1024, 16), "830m": (48, 1024, 16),
                   "978m": (24, 1536, 16)}[scale]  # fmt: skip
    ffn = 3 * C * 4 * C
    shared = 2 * 51200 * C + L * (2 * C * C + 2 * C * 4 * C // heads) + (2 * L + 1) * C  # embeddings, attention, norms
    routers = {"unipool": L * (8 * L * C + 1), "vanilla": L * 8 * C, "dense": 0}[arch]
    n_ffn = {"unipool": 8 * L, "vanilla": 8 * L, "dense": L}[arch]
    assert model.num_params() == shared + routers + n_ffn * ffn, f"{scale} {arch} stores another number of parameters"
    assert model.num_params(active=True) == shared + routers + L * ffn, "one expert a layer is active"
    if arch == "unipool":
        printed = STORED[scale]
        assert abs(model.num_params() - printed) <= 0.0005 * 10 ** math.floor(math.log10(printed)), "Table 6 disagrees"
    if arch == "dense":
        assert abs(model.num_params() / float(scale[:-1]) / 1e6 - 1) < 0.01, "a scale is named by its dense twin's size"


def test_exact_count_at_182m():
    with torch.device("meta"):
        assert UniPool(UniPoolConfig.from_scale("182m")).num_params() == 777_898_764


def test_paper_presets():
    """METHOD's table, the baselines' settings and the training recipe of Table 8."""
    alpha = {"182m": 1e-2, "469m": 2e-2, "650m": 2e-2, "830m": 2e-2, "978m": 2e-2}
    for scale in PAPER_SCALES:
        config = UniPoolConfig.from_scale(scale)
        assert (config.n_pool, config.top_k, config.router, config.balance) == (1, 1, "norm", "pool")
        assert config.n_expert == 8 * config.n_layer and config.n_hidden == 4 * config.n_embd
        assert config.balance_coef == alpha[scale] and config.block_size == 1024 and config.n_kv_head == 4
        assert (config.rope_base, config.norm_eps, config.init_std) == (1e6, 1e-5, 0.01)
        assert UniPoolConfig.from_scale(scale, balance="layer").balance_coef == 1e-2
        assert UniPoolConfig.from_scale(scale, "vanilla", balance="pool").balance_coef == alpha[scale]
        vanilla = UniPoolConfig.from_scale(scale, "vanilla")
        assert vanilla.n_pool == vanilla.n_layer and vanilla.experts_per_pool == 8
        assert (vanilla.router, vanilla.balance, vanilla.balance_coef) == ("softmax", "layer", 1e-2)
        assert UniPoolConfig.from_scale(scale, "dense").n_expert == 0
    settings, _ = train.settle(dict(scale="182m"), None)
    assert (settings.max_steps, settings.batch_size, settings.lr, settings.min_lr) == (60_000, 512, 5e-4, 5e-5)
    assert (settings.warmup, settings.grad_clip, settings.weight_decay) == (0.01, 1.0, 0.01)
    assert (settings.beta1, settings.beta2, settings.adam_eps) == (0.9, 0.999, 1e-8)


@pytest.mark.parametrize("router", ["norm", "softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["pool", "layer", "bias", "none"])
@pytest.mark.parametrize("n_pool", [1, 2, 4])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_switch_trains(router, balance, n_pool, top_k):
    model = small_model(router=router, balance=balance, n_pool=n_pool, top_k=top_k)
    idx = random_tokens(model.config)
    out = model(idx, idx)
    (out.loss + model.config.balance_coef * out.balance_loss).backward()
    model.update_bias(out.usage)
    assert out.usage.shape == (4, 8 // n_pool)
    served = out.usage.sum(dim=1)
    assert (served <= 1 + 1e-6).all() and (served >= (0.1 if router == "norm" else 1 - 1e-6)).all(), served
    assert out.mean_scores.shape == out.usage.shape
    assert (out.balance_loss > 0) == (balance in ("pool", "layer"))
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), f"{name} got no finite gradient"


def test_dense_model_has_no_routing():
    model = small_model(n_expert=0, balance="none")
    idx = random_tokens(model.config)
    out = model(idx, idx)
    assert out.balance_loss == 0 and out.usage.shape == (4, 0)
    assert not any("router" in name or "pool" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(top_k=9), ["top_k=9", "n_expert=8"]),
        (dict(top_k=3, n_pool=4), ["top_k=3", "n_pool=4"]),
        (dict(top_k=0), ["top_k=0"]),
        (dict(n_pool=3), ["n_pool=3", "n_layer=4"]),
        (dict(n_pool=4, n_expert=10), ["n_pool=4", "n_expert=10"]),
        (dict(n_head=5), ["n_head=5", "n_embd=32"]),
        (dict(n_kv_head=3), ["n_kv_head=3", "n_head=4"]),
        (dict(n_embd=36, n_head=4), ["n_embd=36", "n_head=4"]),  # heads of width 9
        (dict(router="best"), ["router='best'"]),
        (dict(balance="best"), ["balance='best'"]),
        (dict(n_layer=0), ["n_layer=0"]),
        (dict(rope_base=1e-300), ["rope_base=1e-300"]),
    ],
)
def test_impossible_configurations_name_their_fields(fields, named):
    with pytest.raises(ValueError) as error:
        small_config(**fields)
    for part in named:
        assert part in str(error.value), f"the message should name {part}: {error.value}"


def test_unknown_scale_and_arch():
    for arguments in (("1b",), ("tiny", "mixtral")):
        with pytest.raises(ValueError, match="choose from"):
            UniPoolConfig.from_scale(*arguments)


def test_initialisation():
    """N(0, init_std) for matrices, init_std / sqrt(2L) for the two that write to the residual stream, norms are 1."""
    model = small_model(n_embd=64, n_hidden=256, init_std=0.01)
    scaled = 0.01 / math.sqrt(2 * 4)
    for name, p in model.named_parameters():
        if "norm" in name or "sigma" in name:
            assert (p == 1).all(), f"{name} should start at 1"
        else:
            expected = scaled if "attention.out" in name or "down" in name else 0.01
            error = abs(p.std().item() / expected - 1)
            assert error < 5 / math.sqrt(2 * p.numel()), f"{name}: std {p.std():.5f}, should be {expected:.5f}"
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), f"{name} should have mean 0"


def test_flops_count_active_experts_only():
    few, many = (UniPoolConfig.from_scale("182m", n_expert=n) for n in (48, 96))
    with torch.device("meta"):
        few, many, twice = UniPool(few), UniPool(many), UniPool(UniPoolConfig.from_scale("182m", top_k=2))
    router = 12 * 48 * 768
    assert many.flops_per_token() - few.flops_per_token() == 6 * router, "idle experts must not count"
    assert twice.flops_per_token() - many.flops_per_token() == 6 * 12 * 3 * 768 * 3072, "a second expert a layer counts"
    assert twice.flops_per_token() - twice.flops_per_token(served=0.5) == 6 * 12 * 3 * 768 * 3072, "nor unserved pairs"
    # Every multiplication of a dense model by hand: attention's projections, FFN, head, and scores and values.
    dense = UniPool(UniPoolConfig.from_scale("tiny", "dense"))
    c = dense.config
    per_layer = c.n_embd * (c.n_embd + 2 * c.n_kv_head * c.head_dim) + c.n_embd**2 + 3 * c.n_embd * c.n_hidden
    forward = 2 * (c.n_layer * per_layer + c.n_embd * c.vocab_size) + c.n_layer * 4 * c.block_size * c.n_embd
    assert dense.flops_per_token() == 3 * forward, "backward costs twice the forward pass"


# ----------------------------------------------------------------------------------------------------------------------
# Routers, against numpy in double precision


def numpy_scores(router, x):
    """The scores of a router by the paper's formulas: x (N, C) -> (N, M), float64."""
    z = x.double().numpy() @ router.weight.detach().double().numpy().T
    if isinstance(router, NormRouter):
        norms = np.sqrt((z**2).sum(axis=1, keepdims=True))
        return router.sigma.item() * router.c * np.maximum(0, z / (norms + 1e-8))
    if isinstance(router, unipool.SoftmaxRouter):
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize("name", ["norm", "softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_router_against_numpy(name, top_k):
    torch.manual_seed(0)
    router = ROUTERS[name](24, 10, top_k)
    if name == "norm":
        router.sigma.data.fill_(0.7)
    x = torch.randn(50, 24)
    gates, experts, scores = router(x)
    expected = numpy_scores(router, x)
    assert gates.shape == experts.shape == (50, top_k) and scores.shape == (50, 10)
    assert experts.dtype == torch.int64 and scores.dtype == gates.dtype == torch.float32
    np.testing.assert_allclose(scores.detach().numpy(), expected, atol=1e-5, err_msg="scores differ from the formula")
    best = np.sort(expected, axis=1)[:, ::-1][:, :top_k]
    np.testing.assert_allclose(gates.detach().numpy(), best, atol=1e-5, err_msg="gates must be the k best scores as is")
    chosen = np.take_along_axis(expected, experts.numpy(), axis=1)
    np.testing.assert_allclose(chosen, best, atol=1e-5, err_msg="experts must be those with the k best scores")


def test_norm_router_ignores_the_scale_of_its_input():
    router = NormRouter(24, 10, 1)
    x = torch.randn(50, 24)
    torch.testing.assert_close(router(x)[2], router(1000 * x)[2], msg="z / ||z|| does not depend on the scale of x")
    assert router(torch.zeros(1, 24))[2].abs().sum() == 0, "z = 0 must not become NaN"


def test_routing_is_fp32_under_autocast_and_in_bf16():
    router = NormRouter(64, 32, 2)
    x = torch.randn(100, 64)
    exact = router(x)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)[2]
    assert inside.dtype == torch.float32 and torch.equal(inside, exact), "autocast must not reach the router"
    assert router.bfloat16()(x.bfloat16())[2].dtype == torch.float32


def norm_router_scale_by_integration(n_expert):
    """c at k = 1, by a one-dimensional integral and no random numbers.

    The length of a normal vector is independent of its direction, so E[1 / max(x / ||x||)] is E[1 / max x] over
    E[1 / ||x||]. The maximum of M normals has the density M phi(m) Phi(m)^(M-1), and E[1 / ||x||] is
    Gamma((M-1)/2) / (sqrt(2) Gamma(M/2)).
    """
    m = np.linspace(1e-4, 12, 2_000_000)
    log_cdf = np.log(0.5 * (1 + torch.erf(torch.from_numpy(m) / math.sqrt(2)).numpy()))
    density = n_expert * np.exp(-(m**2) / 2 + (n_expert - 1) * log_cdf) / math.sqrt(2 * math.pi)
    inverse_maximum = np.trapezoid(density / m, m) / np.trapezoid(density, m)
    inverse_length = math.exp(math.lgamma((n_expert - 1) / 2) - math.lgamma(n_expert / 2)) / math.sqrt(2)
    return inverse_maximum / inverse_length


@pytest.mark.parametrize("n_expert", [16, 32, 64, 96, 192, 384])
def test_norm_router_scale_against_integration(n_expert):
    c, expected = unipool.norm_router_scale(n_expert, 1), norm_router_scale_by_integration(n_expert)
    assert abs(c / expected - 1) < 0.01, f"c is {c:.3f} for M={n_expert}, k=1; the integral gives {expected:.3f}"


@pytest.mark.parametrize("n_expert, top_k", [(16, 2), (96, 2), (96, 4), (32, 32)])
def test_norm_router_scale_against_other_draws(n_expert, top_k):
    x = np.random.default_rng(5).standard_normal((40_000, n_expert))
    unit = np.maximum(0, x / np.linalg.norm(x, axis=1, keepdims=True))
    expected = (1 / np.linalg.norm(np.sort(unit, axis=1)[:, -top_k:], axis=1)).mean()
    assert abs(unipool.norm_router_scale(n_expert, top_k) / expected - 1) < 0.01


def test_norm_router_scale_is_about_4_at_the_papers_size():
    assert round(unipool.norm_router_scale(96, 1), 1) == 4.0


def test_norm_router_scale_is_finite_everywhere():
    sizes = [*range(1, 33), 48, 64, 96, 128, 192, 288, 384, 512]
    for n_expert in sizes:
        for top_k in {1, min(2, n_expert), n_expert}:
            c = unipool.norm_router_scale(n_expert, top_k)
            assert math.isfinite(c) and 0.9 < c < 10, f"c({n_expert}, {top_k}) = {c}"
    assert unipool.norm_router_scale(1, 1) == pytest.approx(1), "a positive unit vector of one entry has norm 1"
    unipool.norm_router_scale.cache_clear()
    assert unipool.norm_router_scale(8, 1) == unipool.norm_router_scale.__wrapped__(8, 1), "c must not vary"


def test_gates_of_an_untrained_norm_router_have_norm_one():
    """What c is for (Eq. 12), at widths where the logits are as good as independent normals."""
    torch.manual_seed(0)
    for n_expert, top_k in [(32, 1), (96, 1), (96, 4)]:
        gates = NormRouter(512, n_expert, top_k)(torch.randn(4000, 512))[0]
        assert abs((1 / gates.norm(dim=1)).mean().item() - 1) < 0.03, f"M={n_expert}, k={top_k}"


def test_bias_sways_the_choice_and_not_the_gates():
    torch.manual_seed(0)
    router = ROUTERS["sigmoid"](24, 10, 2)
    x = torch.randn(50, 24)
    _, _, before = router(x)
    router.bias[7] = 100.0
    gates, experts, scores = router(x)
    assert torch.equal(scores, before) and (experts == 7).any(dim=1).all(), "a large bias must win every choice"
    assert torch.equal(gates, scores.gather(1, experts)), "the gate is the score without the bias"


def test_bias_moves_towards_balance():
    model = small_model(router="sigmoid", balance="bias", bias_rate=1e-3)
    usage = torch.full((4, 8), 0.125)
    usage[2] = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0, 0.0, 0.0, 0.0])
    model.update_bias(usage)
    expected = torch.tensor([-1, -1, 0, 0, 1, 1, 1, 1]) * 1e-3
    torch.testing.assert_close(
        model.blocks[2].router.bias, expected, msg="overloaded down, underloaded up, by the rate"
    )
    assert (model.blocks[0].router.bias == 0).all(), "an even load moves nothing"


# ----------------------------------------------------------------------------------------------------------------------
# The pool and its dispatch, against a loop over tokens


def loop_over_tokens(pool, x, gates, experts):
    """Eq. 2 as it is written."""
    rows = []
    for x_n, gates_n, experts_n in zip(x, gates, experts):
        y_n = 0
        for g, i in zip(gates_n, experts_n):
            gate, up = (x_n @ pool.gate_up[i]).chunk(2)
            y_n = y_n + g * ((F.silu(gate) * up) @ pool.down[i])
        rows.append(y_n)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("empty", ["none", "some", "all but one"])
def test_dispatch_against_a_loop_over_tokens(top_k, grouped, empty, monkeypatch):
    calls, real = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    torch.manual_seed(0)
    dtype = torch.float32 if grouped else torch.float64
    pool = ExpertPool(6, 16, 24).to(dtype)
    allowed = {"none": [0, 1, 2, 3, 4, 5], "some": [1, 2, 4], "all but one": [3, 3]}[empty]
    experts = torch.stack([torch.tensor(allowed)[torch.randperm(len(allowed))[:top_k]] for _ in range(20)])
    x = torch.randn(20, 16, dtype=dtype, requires_grad=True)
    gates = torch.rand(20, top_k, dtype=dtype, requires_grad=True)
    weight = torch.randn(20, 16, dtype=dtype)
    results = []
    for compute in (pool, lambda *args: loop_over_tokens(pool, *args)):
        y = compute(x, gates, experts)
        results.append([y.detach(), *torch.autograd.grad((y * weight).sum(), [x, gates, pool.gate_up, pool.down])])
    assert bool(calls) == grouped, "the test must take the path that it names"
    for name, got, expected in zip(["output", "d x", "d gates", "d gate_up", "d down"], *results):
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name} differs from the loop: {m}")
    unused = [i for i in range(6) if i not in allowed]
    assert (results[0][3][unused] == 0).all(), "an expert without tokens must get a gradient of exactly zero"


@pytest.fixture(params=["in place", "one product", "one product in chunks"])
def way(request, monkeypatch):
    """How the pool's gradient is made: as on a CPU, or as on a GPU, with fp32 for which a CPU too has the product."""
    if request.param != "in place":
        monkeypatch.setattr(unipool, "in_one_product", lambda tensor: True)
        monkeypatch.setattr(PoolGradient, "capacity", 0.02 if "chunks" in request.param else 1000)
    return request.param


def poison_rows_of_no_expert(monkeypatch):
    """Rows behind the last expert's, and gradients of experts without rows: not a number, as a GPU may leave them."""
    real_product, real_grouped_mm = unipool.grouped_product, F.grouped_mm

    def product(rows, weight, ends):
        out = real_product(rows, weight, ends)
        out[ends[-1] :] = torch.nan
        return out

    def grouped_mm(a, b, offs):
        out = real_grouped_mm(a, b, offs=offs)
        if b.dim() == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(unipool, "grouped_product", product)
    monkeypatch.setattr(F, "grouped_mm", grouped_mm)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("one_pass", [True, False])
def test_pairs_that_no_expert_serves(top_k, one_pass, way, monkeypatch):
    """Pairs whose gate is 0 add nothing, are not computed, and are not in f; gradients are those of the loop."""
    poison_rows_of_no_expert(monkeypatch)
    torch.manual_seed(0)
    pool = ExpertPool(6, 16, 24).to(torch.float64 if way == "in place" else torch.float32)
    dtype = pool.down.dtype
    experts = torch.stack([torch.randperm(5)[:top_k] for _ in range(20)])  # expert 5 gets none
    x = torch.randn(20, 16, dtype=dtype, requires_grad=True)
    z = torch.randn(20, top_k, dtype=dtype, requires_grad=True)
    z.data[experts == 4] = -1  # chosen, but never with a gate
    weight, results, shares = torch.randn(20, 16, dtype=dtype), [], []

    def as_the_model_does(x, gates, experts):
        y, f = unipool.pool_ffn(x, gates, experts, pool.weights(one_pass))
        shares.append(f)
        return y

    for compute in (as_the_model_does, lambda *args: loop_over_tokens(pool, *args)):
        y = compute(x, z.relu(), experts)
        results.append([y.detach(), *torch.autograd.grad((y * weight).sum(), [x, z, pool.gate_up, pool.down])])
    for name, got, expected in zip(["output", "d x", "d z", "d gate_up", "d down"], *results):
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name} differs from the loop: {m}")
    assert (results[0][3][4:] == 0).all() and (results[0][4][4:] == 0).all(), "experts without rows: exactly zero"
    counts = [((experts == i) & (z > 0)).sum().item() for i in range(6)]
    torch.testing.assert_close(shares[0], torch.tensor(counts) / experts.numel(), msg="f must count what is served")
    assert 0 < sum(counts) < experts.numel(), "the test needs pairs of both kinds"
    with torch.no_grad():  # one token at a time, as in decoding
        single = [unipool.pool_ffn(x[n : n + 1], z[n : n + 1].relu(), experts[n : n + 1], pool.weights())
                  for n in range(20)]  # fmt: skip
        torch.testing.assert_close(torch.cat([y for y, _ in single]).to(dtype), results[0][0])
        mean_f = torch.stack([f for _, f in single]).mean(dim=0)
        torch.testing.assert_close(mean_f, shares[0], check_dtype=False)


def test_no_pair_is_served():
    pool, x = ExpertPool(4, 16, 24), torch.randn(9, 16, requires_grad=True)
    y, f = unipool.pool_ffn(x, torch.zeros(9, 1), torch.full((9, 1), 2), pool.weights())
    y.sum().backward()
    assert (y == 0).all() and (f == 0).all() and (x.grad == 0).all() and (pool.gate_up.grad == 0).all()


def test_the_balance_loss_does_not_press_where_topk_breaks_a_tie():
    """All scores 0: topk names one expert for every token. It serves none, so the loss must not hold it for loaded."""
    model = small_model(n_layer=1)
    model.blocks[0].router.weight.data.zero_()
    out = model(random_tokens(model.config))
    assert (out.usage == 0).all() and out.balance_loss == 0


def test_no_token_is_dropped():
    """All tokens to one expert: with a capacity limit most would come out as zeros."""
    pool = ExpertPool(4, 16, 24)
    x = torch.randn(200, 16)
    y = pool(x, torch.ones(200, 1), torch.full((200, 1), 2))
    gate, up = (x @ pool.gate_up[2]).chunk(2, dim=-1)
    torch.testing.assert_close(y, (F.silu(gate) * up) @ pool.down[2])


def test_the_same_expert_twice_counts_twice():
    pool = ExpertPool(4, 16, 24)
    x, experts = torch.randn(5, 16), torch.full((5, 2), 1)
    twice = pool(x, torch.tensor([[0.3, 0.4]]).expand(5, 2), experts)
    torch.testing.assert_close(twice, pool(x, torch.full((5, 1), 0.7), experts[:, :1]))


def test_pool_in_bf16_is_close_to_fp32():
    torch.manual_seed(0)
    pool = ExpertPool(4, 64, 96)
    x, gates, experts = torch.randn(30, 64), torch.rand(30, 2), torch.randint(4, (30, 2))
    exact = pool(x, gates, experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = pool(x, gates, experts)
    assert rounded.dtype == x.dtype and not torch.equal(rounded, exact), "the products must be in bf16"
    torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0.03)


# ----------------------------------------------------------------------------------------------------------------------
# Balance losses


def random_statistics(L=5, M=7, N=40, seed=0):
    """f by counting choices and P as mean scores, in double precision, with the choices and scores they come from."""
    rng = np.random.default_rng(seed)
    scores = rng.random((L, N, M))
    chosen = scores.argmax(axis=2)
    f = np.array([[(chosen[l] == i).sum() / N for i in range(M)] for l in range(L)])
    return torch.from_numpy(f), torch.from_numpy(scores.mean(axis=1)), chosen, scores


def test_pool_loss_against_brute_force_counts():
    f, P, chosen, scores = random_statistics()
    L, N, M = scores.shape
    total = 0.0
    for i in range(M):  # Eq. 4 and 5, from single tokens
        f_bar = sum(chosen[l, n] == i for l in range(L) for n in range(N)) / (L * N)
        P_bar = sum(scores[l, n, i] for l in range(L) for n in range(N)) / (L * N)
        total += M * f_bar * P_bar
    assert unipool.pool_balance_loss(f, P).item() == pytest.approx(total)


def test_layer_loss_against_brute_force_counts():
    f, P, chosen, scores = random_statistics()
    L, N, M = scores.shape
    total = sum(M * (chosen[l] == i).mean() * scores[l, :, i].mean() for l in range(L) for i in range(M))  # Eq. 3
    assert unipool.layer_balance_loss(f, P).item() == pytest.approx(total)


def test_equation_5_equals_equation_6():
    f, P, _, _ = random_statistics()
    L, M = f.shape
    equation_6 = sum(M * (f.mean(dim=0) * P[l]).sum() for l in range(L)) / L
    torch.testing.assert_close(unipool.pool_balance_loss(f, P), equation_6)


def test_losses_at_known_points():
    L, M = 3, 8
    even = torch.full((L, M), 1 / M)
    assert unipool.pool_balance_loss(even, even).item() == pytest.approx(1), "softmax at perfect balance gives 1"
    assert unipool.layer_balance_loss(even, even).item() == pytest.approx(L), "and L, summed over the layers"
    one = torch.zeros(L, M)
    one[:, 0] = 1
    assert unipool.pool_balance_loss(one, one).item() == pytest.approx(M), "one expert for all gives M"
    # Layers that specialise, each on experts of its own, are balanced for the pool and not for themselves.
    own = torch.eye(8)
    assert unipool.pool_balance_loss(own, own).item() == pytest.approx(1)
    assert unipool.layer_balance_loss(own, own).item() == pytest.approx(64)


def test_f_carries_no_gradient():
    f = torch.rand(3, 4, requires_grad=True)
    P = torch.rand(3, 4, requires_grad=True)
    for loss in (unipool.pool_balance_loss, unipool.layer_balance_loss):
        f.grad = P.grad = None
        loss(f, P).backward()
        assert f.grad is None and P.grad is not None


@pytest.mark.parametrize("n_pool", [1, 2, 4])
@pytest.mark.parametrize("top_k", [1, 2])
def test_model_loss_and_usage_against_counts(n_pool, top_k):
    """The model's usage and balance loss, from its routers called by hand on what they saw."""
    model = small_model(n_pool=n_pool, top_k=top_k)
    idx = random_tokens(model.config)
    seen = []
    for block in model.blocks:
        block.router.register_forward_hook(lambda module, args, result: seen.append(result))
    out = model(idx)
    M = 8 // n_pool
    f = [
        [((experts == i) & (gates > 0)).sum().item() / experts.numel() for i in range(M)] for gates, experts, _ in seen
    ]
    torch.testing.assert_close(out.usage, torch.tensor(f), msg="usage must be the share of the choices that is served")
    torch.testing.assert_close(out.mean_scores, torch.stack([scores.mean(dim=0) for _, _, scores in seen]))
    expected = 0.0
    for g in range(n_pool):  # the pool loss, summed over the pools, each over its own layers
        layers = range(g * 4 // n_pool, (g + 1) * 4 // n_pool)
        for i in range(M):
            f_bar = np.mean([f[l][i] for l in layers])
            P_bar = np.mean([seen[l][2][:, i].mean().item() for l in layers])
            expected += M * f_bar * P_bar
    assert out.balance_loss.item() == pytest.approx(expected, rel=1e-5)


def test_balance_gradient_reaches_routers_and_not_experts():
    model = small_model()
    model(random_tokens(model.config)).balance_loss.backward()
    for l, block in enumerate(model.blocks):
        assert block.router.weight.grad.abs().sum() > 0, f"router {l} is not pressed by the loss"
        assert block.router.sigma.grad.abs().sum() > 0, "the loss presses on sigma as well"
    # Layer 0's experts do reach it, through the inputs of later routers; the last layer's own output does not.
    last = UniPool(small_config(n_layer=1))
    last(random_tokens(last.config)).balance_loss.backward()
    for p in last.pools.parameters():
        assert p.grad is None or (p.grad == 0).all(), "the loss must not flow through the experts' own layer"


def test_pool_loss_with_private_pools_is_the_layer_loss():
    f, P, _, _ = random_statistics(L=4, M=2)
    pool, layer = small_model(n_pool=4, balance="pool"), small_model(n_pool=4, balance="layer")
    torch.testing.assert_close(pool.balance_loss(f, P), layer.balance_loss(f, P))


# ----------------------------------------------------------------------------------------------------------------------
# Sharing


def test_one_pool_in_the_state_dict():
    names = [name for name in small_model().state_dict() if "pool" in name]
    assert names == ["pools.0.gate_up", "pools.0.down"], "the shared pool must stand in the state dict once"
    assert small_model(n_pool=2).state_dict()["pools.1.down"].shape == (4, 48, 32)


def forward_with_weights(model, idx, weights_of_layer):
    """The model's forward pass with the expert weights of each layer given: what private experts would compute."""
    x = model.embedding(idx)
    for block, weights in zip(model.blocks, weights_of_layer):
        x, _, _ = block(x, model.rope[:, : idx.size(1)], weights)
    return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), idx.flatten())


@pytest.mark.parametrize("n_pool", [1, 2, 4])
def test_gradient_of_a_pool_is_the_sum_over_its_layers(n_pool):
    """Every layer contributes: give each layer its own copy of its pool, and add up the copies' gradients."""
    model = small_model(n_pool=n_pool)
    idx = random_tokens(model.config)
    model(idx, idx).loss.backward()
    copies = []
    for l in range(4):
        pool = model.pools[l * n_pool // 4]
        copies.append([p.detach().clone().requires_grad_() for p in (pool.gate_up, pool.down)])
    forward_with_weights(model, idx, copies).backward()
    for g, pool in enumerate(model.pools):
        layers = range(g * 4 // n_pool, (g + 1) * 4 // n_pool)
        assert all(copies[l][0].grad.abs().sum() > 0 for l in layers), "a layer of the pool contributes nothing"
        for p, which in ((pool.gate_up, 0), (pool.down, 1)):
            torch.testing.assert_close(p.grad, sum(copies[l][which].grad for l in layers), rtol=1e-4, atol=1e-6)


def test_as_many_pools_as_layers_are_private_experts():
    """G = L against a vanilla MoE built by hand: every layer loops over its own experts."""
    model = small_model(n_pool=4, router="softmax", top_k=2)
    idx = random_tokens(model.config)
    x = model.embedding(idx)
    for l, block in enumerate(model.blocks):
        x = x + block.attention(block.attention_norm(x), model.rope)
        h = block.ffn_norm(x).flatten(0, 1)
        probabilities = (h @ block.router.weight.T).softmax(dim=-1)
        y = torch.zeros_like(h)
        for i in range(2):
            gate, up = (h @ model.pools[l].gate_up[i]).chunk(2, dim=-1)
            y = y + probabilities[:, i : i + 1] * ((F.silu(gate) * up) @ model.pools[l].down[i])  # both of two: top-2
        x = x + y.view_as(x)
    torch.testing.assert_close(model(idx).logits, model.head(model.norm(x)), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The pool's gradient in one pass, against autograd's


def gradients(model, loss):
    """Every parameter's gradient of loss(model), from a clean start; the name of the switch says who made them."""
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_one_pass_is_autograd(model, loss, **tolerance):
    model.one_pass = True
    got = gradients(model, loss)
    model.one_pass = False
    expected = gradients(model, loss)
    assert got.keys() == expected.keys()
    assert expected["pools.0.gate_up"].abs().sum() > 0, "a test on zeros shows nothing"
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def training_loss(model, idx=None):
    idx = random_tokens(model.config) if idx is None else idx
    out = model(idx, idx)
    return out.loss + out.balance_loss


def one_pass_model(way, **overrides):
    return small_model(**overrides).to(torch.float64 if way == "in place" else torch.float32)


@pytest.mark.parametrize("fields", [dict(), dict(top_k=2), dict(n_pool=2, top_k=2), dict(n_pool=4), dict(n_expert=64)])
def test_one_pass_gives_autograds_gradient(way, fields):
    """n_expert=64: most experts have no token in a layer, and some in none."""
    model = one_pass_model(way, **fields)
    assert_one_pass_is_autograd(model, training_loss)
    if "n_expert" in fields:
        used = model(random_tokens(model.config)).usage.sum(dim=0) > 0
        assert 0 < used.sum() < 64, "the test needs experts without tokens"
        for p in model.pools[0].parameters():
            assert (p.grad[~used] == 0).all(), "an expert without tokens must get a gradient of exactly zero"


def test_one_pass_adds_up_early_when_the_records_grow(way, monkeypatch):
    """Once for all layers where there is room, else as often as the room asks for; on a CPU there are no records."""
    calls = []
    real = PoolGradient.multiply
    monkeypatch.setattr(PoolGradient, "multiply", lambda self: calls.append(len(self.records)) or real(self))
    training_loss(one_pass_model(way)).backward()
    assert calls == {"in place": [], "one product": [4, 4], "one product in chunks": [1] * 8}[way]


@pytest.mark.parametrize("fields", [dict(), dict(n_pool=2, top_k=2)])
def test_one_pass_over_micro_batches(way, fields):
    model = one_pass_model(way, **fields)

    def accumulate(model):
        for seed in (1, 2):
            training_loss(model, random_tokens(model.config, seed=seed)).backward()
        return training_loss(model, random_tokens(model.config, seed=3))

    assert_one_pass_is_autograd(model, accumulate)


def test_one_pass_with_recomputation(way):
    model = one_pass_model(way, top_k=2)
    plain = gradients(model, training_loss)
    model.recompute = True
    assert_one_pass_is_autograd(model, training_loss)
    for name, grad in gradients(model, training_loss).items():
        torch.testing.assert_close(grad, plain[name], msg=lambda m, name=name: f"recomputation changes {name}: {m}")


def test_recomputation_keeps_less():
    """Bytes that autograd keeps for the backward pass, the weights left out."""

    def kept(recompute):
        model = small_model(n_layer=8, n_hidden=256)
        model.recompute = recompute
        own = {p.data_ptr() for p in model.parameters()}
        tensors = {}

        def pack(tensor):
            if tensor.data_ptr() not in own:
                tensors[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        idx = random_tokens(model.config)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = training_loss(model, idx)
        assert loss.requires_grad
        return sum(tensors.values())

    assert kept(True) < kept(False) / 4


def test_one_pass_when_the_output_of_layers_is_not_used(way):
    """The loss looks at the second of four layers: the others run, but no gradient reaches them."""
    model = one_pass_model(way)
    idx = random_tokens(model.config)

    def early_exit(model):
        x, weights, after = model.embedding(idx), model.pools[0].weights(model.one_pass), []
        for block in model.blocks:
            x, _, _ = block(x, model.rope[:, : idx.size(1)], weights)
            after.append(x)
        return after[1].square().sum()

    assert_one_pass_is_autograd(model, early_exit)


def test_one_pass_twice_over_one_graph(way):
    model = one_pass_model(way)
    once = gradients(model, training_loss)
    model.zero_grad()
    loss = training_loss(model)
    torch.autograd.grad(loss, model.embedding.weight, retain_graph=True)  # a pass that never asks for the pool's
    loss.backward(retain_graph=True)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], msg=lambda m, name=name: f"{name}: {m}")


def test_one_pass_with_evaluation_and_another_forward_in_between(way):
    model = one_pass_model(way)
    expected = gradients(model, training_loss)
    model.zero_grad()
    loss, other = training_loss(model), training_loss(model, random_tokens(model.config, seed=2))
    with torch.no_grad():
        model.eval()(random_tokens(model.config, seed=3))
    model.generate(random_tokens(model.config, length=3), 2)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    assert other.requires_grad


def test_one_pass_after_an_exception_in_the_middle_of_a_backward_pass(way):
    model = one_pass_model(way)
    expected = gradients(model, training_loss)

    def fail(grad):
        raise ZeroDivisionError

    model.zero_grad()
    loss = training_loss(model)
    hook = model.blocks[1].attention.qkv.weight.register_hook(fail)  # two layers have recorded by then
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    hook.remove()
    model.zero_grad()
    loss.backward()
    again = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, grad in gradients(model, training_loss).items():
        torch.testing.assert_close(again[name], expected[name], msg=lambda m, name=name: f"same graph, {name}: {m}")
        torch.testing.assert_close(grad, expected[name], msg=lambda m, name=name: f"next step, {name}: {m}")


def test_one_pass_adds_what_other_uses_of_the_weights_give(way):
    """Say, a fork's penalty on the weights that the layers use."""
    model = one_pass_model(way)
    idx = random_tokens(model.config)

    def penalised(model):
        x, weights = model.embedding(idx), model.pools[0].weights(model.one_pass)
        for block in model.blocks:
            x, _, _ = block(x, model.rope[:, : idx.size(1)], weights)
        return x.square().sum() + weights[1].square().sum()

    assert_one_pass_is_autograd(model, penalised)


def test_one_pass_with_reentrant_checkpointing(way, monkeypatch):
    """There each layer's backward is a pass of its own."""
    model = one_pass_model(way)
    expected = gradients(model, training_loss)
    real = unipool.checkpoint
    monkeypatch.setattr(unipool, "checkpoint", lambda f, *args, use_reentrant: real(f, *args, use_reentrant=True))
    model.recompute = True
    for name, grad in gradients(model, training_loss).items():
        torch.testing.assert_close(grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("frozen", ["gate_up", "down"])
def test_one_pass_with_a_frozen_weight(frozen, way):
    model = one_pass_model(way)
    getattr(model.pools[0], frozen).requires_grad_(False)
    other = {"gate_up": "down", "down": "gate_up"}[frozen]
    expected = gradients(one_pass_model(way), training_loss)
    got = gradients(model, training_loss)
    assert f"pools.0.{frozen}" not in got
    torch.testing.assert_close(got[f"pools.0.{other}"], expected[f"pools.0.{other}"])


def test_weights_that_no_layer_used():
    """Only another use, say a penalty, gives a gradient then."""
    model = small_model()
    model.pools[0].weights()[1].sum().backward()
    assert (model.pools[0].down.grad == 1).all() and model.pools[0].gate_up.grad is None


@pytest.mark.parametrize("grouped", [True, False])
def test_another_activation_trains_with_its_own_gradient(grouped, monkeypatch):
    """A fork changes swiglu and nothing else."""
    if grouped:
        monkeypatch.setattr(unipool, "in_one_product", lambda tensor: True)

    def another(hidden):
        gate, up = hidden.chunk(2, dim=-1)
        return gate.relu().square() * up

    monkeypatch.setattr(unipool, "swiglu", another)
    torch.manual_seed(0)
    pool, x = ExpertPool(1, 16, 24), torch.randn(10, 16)
    pool(x, torch.ones(10, 1), torch.zeros(10, 1, dtype=torch.int64)).square().sum().backward()
    expected = torch.autograd.grad((another(x @ pool.gate_up[0]) @ pool.down[0]).square().sum(), [pool.gate_up])[0]
    torch.testing.assert_close(pool.gate_up.grad, expected, rtol=1e-4, atol=1e-4)


def test_pool_is_cast_once_a_step(text_data, tmp_path, monkeypatch):
    kept = []
    real = ExpertPool.weights
    monkeypatch.setattr(
        ExpertPool,
        "weights",
        lambda self, *a: torch.is_grad_enabled() and kept.append(self.keep_copies) or real(self, *a),
    )
    run_train(text_data, tmp_path, "--max_steps=2", "--micro_batch_size=2")
    assert kept == [False, True, True, True] * 2, "the first micro-batch of a step casts, the others take its copies"


@pytest.mark.parametrize("set_to_none", [True, False])
def test_casts_are_of_the_newest_weights(set_to_none):
    """Fused AdamW updates weights without raising their version counter."""
    model = small_model()
    pool = model.pools[0]
    optimizer = model.configure_optimizer(0.1, 0.0, (0.9, 0.99), 1e-8)
    casts = []
    for keep in (False, True, False):
        pool.keep_copies = keep
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training_loss(model)
        casts.append(pool.copies)
        if keep:
            assert casts[1] is casts[0], "keep_copies keeps them"
        else:
            assert torch.equal(pool.copies[1], pool.down.bfloat16()), "the forward pass did not use the newest weights"
        loss.backward()
        if keep:
            optimizer.step()
            optimizer.zero_grad(set_to_none)
    assert not torch.equal(casts[2][1], casts[0][1]), "the test needs an update that bf16 can see"
    assert pool.gate_up.grad.dtype == torch.float32 and "copies" not in str(model.state_dict().keys())


def bf16_errors(model, idx):
    """Of the pool's gradients under autocast, against fp32: {name: (autograd's, one pass's)}, as norms."""
    results = {}
    for name, one_pass, enabled in [("exact", False, False), ("autograd", False, True), ("one pass", True, True)]:
        model.one_pass = one_pass

        def loss(model, enabled=enabled):
            with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=enabled):
                return training_loss(model, idx)

        results[name] = gradients(model, loss)
    return {
        name: [(results[k][name] - results["exact"][name]).norm().item() for k in ("autograd", "one pass")]
        for name in ("pools.0.gate_up", "pools.0.down")
    }


def test_one_pass_in_bf16_is_as_exact_as_autograd():
    model = small_model()
    for name, (autograd, one_pass) in bf16_errors(model, random_tokens(model.config)).items():
        assert 0 < one_pass <= 1.1 * autograd, f"{name}: {one_pass} against {autograd}"


def sharded_process(rank, folder):
    """One of two, sharded as train.py does it, with two micro-batches."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = small_model()
    train.shard(model, torch.device("cpu"), torch.distributed.init_device_mesh("cpu", (2,)))
    for micro_batch in range(2):
        model.set_reshard_after_backward(micro_batch == 1)
        idx = random_tokens(model.config, batch=4, seed=micro_batch)[2 * rank :][:2]
        (model(idx, idx, keep_logits=False).loss / 2).backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    torch.distributed.barrier()  # one that leaves early closes the connection on which the other still waits
    torch.distributed.destroy_process_group()


def test_one_pass_sharded(tmp_path):
    torch.multiprocessing.spawn(sharded_process, (str(tmp_path),), nprocs=2)
    sharded = torch.load(tmp_path / "grads.pt", weights_only=True)
    model = small_model()
    model.one_pass = False

    def both(model):
        batches = [random_tokens(model.config, batch=4, seed=micro_batch) for micro_batch in range(2)]
        return sum(model(idx, idx).loss for idx in batches) / 2

    for name, grad in gradients(model, both).items():
        torch.testing.assert_close(sharded[name], grad, msg=lambda m, name=name: f"{name}: {m}")


def test_compiled_one_pass():
    """Same gradients; one graph break a MoE layer and one for handing out the pool; nothing compiled after step one."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = small_model(n_layer=2)
    expected = gradients(model, training_loss)
    compiled = torch.compile(model)
    counters.clear()
    idx = random_tokens(model.config)

    def step():
        model.zero_grad()
        out = compiled(idx, idx, keep_logits=False)
        (out.loss + out.balance_loss).backward()

    step()
    reasons = " ".join(counters["graph_break"])
    graphs = counters["stats"]["unique_graphs"]
    assert len(counters["graph_break"]) <= 2 and "expert_ffn" in reasons, reasons
    for _ in range(2):
        step()
    assert counters["stats"]["unique_graphs"] == graphs, "something was compiled again"
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("n_expert", [8, 64])
def test_one_pass_on_a_gpu(n_expert):
    model = small_model(n_expert=n_expert).cuda()
    for name, (autograd, one_pass) in bf16_errors(model, random_tokens(model.config).cuda()).items():
        assert 0 < one_pass <= 1.1 * autograd, f"{name}: {one_pass} against {autograd}"


@on_gpu
def test_a_step_on_a_gpu_never_waits():
    model = small_model().cuda()
    optimizer = model.configure_optimizer(1e-3, 0.01, (0.9, 0.99), 1e-8)
    idx = random_tokens(model.config).cuda()
    for mode in ("default", "error"):  # the first step may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = training_loss(model, idx)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------------------------------------------------
# The loss: one fp32 number, in chunks


@pytest.mark.parametrize("chunk", [7, 4096])
def test_loss_in_chunks_is_the_loss(chunk, monkeypatch):
    monkeypatch.setattr(unipool, "LOSS_CHUNK", chunk)
    model = small_model()
    idx, targets = random_tokens(model.config), random_tokens(model.config, seed=2)
    targets[0, 3:9] = -1
    out = model(idx, targets, keep_logits=False)
    assert out.logits is None
    torch.testing.assert_close(out.loss, model(idx, targets).loss)
    with torch.no_grad():
        assert torch.equal(model(idx, targets, keep_logits=False).loss, out.loss), "validation is the same sum"
    in_chunks = gradients(model, lambda model: model(idx, targets, keep_logits=False).loss)
    for name, grad in gradients(model, lambda model: model(idx, targets).loss).items():
        torch.testing.assert_close(in_chunks[name], grad, msg=lambda m, name=name: f"{name}: {m}")
    with pytest.raises((IndexError, RuntimeError)):
        model(idx, torch.full_like(targets, -100), keep_logits=False)


@pytest.mark.parametrize("training", [True, False])
def test_loss_under_bf16_autocast_is_an_fp32_number(training):
    """Against float64 on the same rounded inputs; words are as frequent as in text, and states have a common part."""
    torch.manual_seed(0)
    N, C, V = 2048, 128, 4096
    x = (torch.randn(N, C) + 0.5).bfloat16().float().requires_grad_()
    weight = torch.randn(V, C) * 0.05 + torch.linspace(0.1, -0.1, V).unsqueeze(1)
    weight = weight.bfloat16().float().requires_grad_()
    targets = torch.multinomial(1 / torch.arange(1, V + 1).float(), N, replacement=True)

    def whole(x, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(F.linear(x, weight).float(), targets)

    def chunked(x, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
            return unipool.ChunkedCrossEntropy.apply(x, weight, targets, training)

    exact_inputs = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = F.cross_entropy(F.linear(*exact_inputs), targets)
    loss = chunked(x, weight)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), abs=2e-4)
    assert abs(loss.bfloat16().item() - exact.item()) > 2e-3, "the test needs a loss that bf16 cannot hold"
    if training:
        expected = torch.autograd.grad(exact, exact_inputs)
        errors = []
        for function in (chunked, whole):
            got = torch.autograd.grad(function(x, weight), [x, weight])
            errors.append([((g - e).norm() / e.norm()).item() for g, e in zip(got, expected)])
        for name, ours, of_whole in zip(("states", "head"), *errors):
            assert 0 < ours < 1.1 * of_whole, (
                f"the gradient of the {name} is {ours:.2%} off, of whole logits {of_whole:.2%}"
            )


def test_validation_and_training_report_fp32_under_autocast(text_data, tmp_path, monkeypatch):
    """A run whose forward passes are under bf16 autocast, as on a GPU: losses of more digits than bf16 has."""
    monkeypatch.setattr(train, "autocast", lambda device: torch.autocast(device.type, dtype=torch.bfloat16))
    checkpoint, metrics = run_train(text_data, tmp_path, "--max_steps=3")
    for key in ("train_loss", "balance_loss", "val_loss", "grad_norm"):
        value = torch.tensor(metrics[-1][key])
        assert value != value.bfloat16().float(), f"{key}={value} looks rounded to bf16"
    model = UniPool(UniPoolConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    meta = prepare_pile.read_meta(text_data, 320)
    data = prepare_pile.TokenData(text_data, "val", meta, 32, 320)
    x, y = train.read_batch(data, train.validation_indices(data, 2048, 8), torch.device("cpu"))
    assert metrics[-1]["val_loss"] == pytest.approx(model(x, y).loss.item(), rel=2e-3)


def test_routing_figures_are_fp32_under_autocast():
    model = small_model()
    idx = random_tokens(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(idx, idx, keep_logits=False)
    assert {t.dtype for t in (out.loss, out.balance_loss, out.usage, out.mean_scores)} == {torch.float32}
    rows = []
    with mock.patch.object(unipool, "pool_ffn", lambda *a, real=unipool.pool_ffn: rows.append(real(*a)) or rows[-1]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(idx)
    assert all(y.dtype == torch.float32 for y, _ in rows), "the gated sum over k must be in fp32"


def test_loss_in_chunks_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(unipool, "LOSS_CHUNK", 8)
    model = small_model(vocab_size=8192)  # logits of 48 tokens: 1.5 MB; the head's weights and gradient: 1 MB
    idx = random_tokens(model.config)
    largest = {}
    for keep_logits in (True, False):
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(idx, idx, keep_logits=keep_logits).loss.backward()
        model.zero_grad()
        largest[keep_logits] = max(event.cpu_memory_usage for event in profile.events())
    assert largest[True] >= 48 * 8192 * 4 > largest[False], largest


# ----------------------------------------------------------------------------------------------------------------------
# The transformer around it


def test_attention_against_the_formula():
    """Softmax attention written out with complex rotations and repeated key and value heads, in double precision."""
    config = small_config()
    torch.manual_seed(0)
    attention = unipool.Attention(config).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    rope = unipool.rope_table(16, 8, 1e6).double()
    weight = attention.qkv.weight
    q, k, v = (x @ w.T for w in weight.split([32, 16, 16]))
    q, k, v = (t.unflatten(2, (-1, 8)) for t in (q, k, v))  # (B, T, heads, D)

    def rotate(t):  # pair i of position p, as a complex number, times exp(j p base^(-2i/D))
        pairs = torch.complex(t[..., :4], t[..., 4:])
        angles = torch.arange(7)[:, None] * 1e6 ** (-2 * torch.arange(4, dtype=torch.float64) / 8)
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

    q, k = rotate(q), rotate(k)
    y = torch.zeros(2, 7, 4, 8, dtype=torch.float64)
    for head in range(4):
        for t in range(7):
            shared = head // 2  # two query heads to one key and value head
            logits = torch.einsum("bd,bsd->bs", q[:, t, head], k[:, : t + 1, shared]) / math.sqrt(8)
            y[:, t, head] = torch.einsum("bs,bsd->bd", logits.softmax(dim=1), v[:, : t + 1, shared])
    expected = y.flatten(2) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, rope[:, :7]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", [dict(), dict(n_pool=4, router="softmax", top_k=2), dict(n_expert=0)])
def test_no_token_sees_the_future(arch):
    model = small_model(**arch)
    idx = random_tokens(model.config)
    before = model(idx).logits
    for t in (1, 8, 15):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 40
        after = model(changed).logits
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-4, atol=1e-5, msg=f"position {t} leaks back")
        assert not torch.allclose(after[:, t], before[:, t]), "a changed token must change its own output"


def test_cache_gives_the_full_forward_pass():
    model = small_model()
    idx = random_tokens(model.config)
    full = model(idx).logits
    caches = [[] for _ in model.blocks]
    pieces = [model.trunk(idx[:, :6], caches)[0]] + [model.trunk(idx[:, t : t + 1], caches)[0] for t in range(6, 16)]
    torch.testing.assert_close(model.head(torch.cat(pieces, dim=1)), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_token_touches_only_the_chosen_experts_weights(top_k):
    """The others are not a number: one product with them would show."""
    model = small_model(top_k=top_k)
    idx = random_tokens(model.config, batch=1, length=6)
    caches = [[] for _ in model.blocks]
    with torch.no_grad():
        expected = model(idx).logits[:, -1]
        model.trunk(idx[:, :5], caches)
        assert all(k.shape == v.shape == (1, 2, 5, 8) for k, v in caches)
        filled = [list(cache) for cache in caches]
        _, f, _ = model.trunk(idx[:, 5:], caches)
        assert ((f > 0).sum(dim=1) == (f.sum(dim=1) * top_k).round()).all() and f.sum() > 2
        unused = f.sum(dim=0) == 0
        assert unused.any(), "the test needs experts that no layer chose"
        for p in model.pools[0].parameters():
            p[unused] = torch.nan
        x, _, _ = model.trunk(idx[:, 5:], filled)
    torch.testing.assert_close(model.head(x[:, -1]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", [dict(), dict(n_pool=4, router="softmax", top_k=2), dict(n_expert=0)])
@pytest.mark.parametrize("length", [1, 10, 16, 25])
def test_generate_equals_recomputing_the_cropped_context(arch, length):
    """Greedy text, batched, up to block_size and past it, against nanoGPT's loop without any cache."""
    model = small_model(**arch)
    idx = random_tokens(model.config, length=length)
    expected = idx
    for _ in range(12):
        logits = model(expected[:, -16:]).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(dim=1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)


def test_sampling_follows_temperature_top_k_and_vocabulary():
    model = small_model()
    idx = random_tokens(model.config, batch=1, length=5).expand(4000, 5)
    probabilities = (model(idx[:1]).logits[0, -1] / 0.5).softmax(dim=0)
    torch.manual_seed(0)
    drawn = model.generate(idx, 1, temperature=0.5)[:, -1].bincount(minlength=40) / 4000
    assert (drawn - probabilities).abs().max() < 5 * math.sqrt(0.25 / 4000), "frequencies must follow the softmax"
    best = set(model(idx[:1]).logits[0, -1].topk(3).indices.tolist())
    assert set(model.generate(idx, 1, top_k=3)[:, -1].tolist()) <= best
    for temperature in (1e-45, 1e30, math.inf):
        assert model.generate(idx[:2], 1, temperature=temperature).max() < 40
        assert set(model.generate(idx[:500], 1, temperature=temperature, top_k=3)[:, -1].tolist()) <= best
    assert max(token.max().item() for token in model.stream(idx, 3, n_vocab=11)) < 11, "padding ids must not appear"
    assert model.generate(idx[:2], 1, top_k=1000).shape == (2, 6), "a top_k beyond the vocabulary is no limit"


def test_generation_refuses_an_empty_prompt_and_forward_a_long_one():
    model = small_model()
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="block_size=16"):
        model(random_tokens(model.config, length=17))
    caches = [[] for _ in model.blocks]
    idx = random_tokens(model.config, batch=2)
    model.trunk(idx[:, :5], caches)
    with pytest.raises(ValueError, match="one at a time"):  # the causal mask would be that of the first tokens
        model.trunk(idx[:, 5:8], caches)


def test_weight_decay_spares_one_dimensional_parameters():
    model = small_model()
    decayed, spared = model.configure_optimizer(1e-3, 0.1, (0.9, 0.999), 1e-8).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() >= 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0 and len(spared["params"]) == 4 * 3 + 1  # two norms and a sigma a layer; a norm
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_targets_of_minus_one_do_not_count():
    model = small_model()
    idx = random_tokens(model.config)
    targets = idx.clone()
    targets[:, 8:] = -1
    expected = F.cross_entropy(model(idx).logits[:, :8].flatten(0, 1), idx[:, :8].flatten())
    torch.testing.assert_close(model(idx, targets).loss, expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_overfits_one_batch(arch):
    torch.manual_seed(0)
    model = UniPool(UniPoolConfig.from_scale("tiny", arch, n_layer=2, n_embd=64, block_size=32, vocab_size=64))
    idx = torch.randint(64, (4, 33))  # random tokens: nothing but memory brings the loss below ln 64 = 4.16
    optimizer = model.configure_optimizer(3e-3, 0.0, (0.9, 0.99), 1e-8)
    for _ in range(200):
        out = model(idx[:, :-1], idx[:, 1:])
        (out.loss + model.config.balance_coef * out.balance_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.loss.item() < 0.1, f"{arch} cannot memorise 128 tokens: loss {out.loss.item():.3f}"


# ----------------------------------------------------------------------------------------------------------------------
# Data


def gpt2_or_skip():
    """The GPT-2 vocabulary, if it is here or can be fetched."""
    beside = HERE.parent / "shared" / "tiktoken_cache"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and beside.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(beside)
    try:
        return get_tokenizer("gpt2")
    except BadInput:
        pytest.skip("the GPT-2 vocabulary is not on this machine and there is no network")


DOCUMENTS = [f"Document {i}: naïve café, 你好 😀 <|endoftext|>, tab\t and newline\n" + "word " * i for i in range(60)]


def write_jsonl(path, documents=DOCUMENTS, more=b""):
    lines = "".join(json.dumps({"text": d, "meta": {"n": 1}}) + "\n" for d in documents).encode() + more
    # Two frames or members, as `zstd -T` and `cat` make them.
    if path.suffix == ".zst":
        lines = b"".join(pyarrow.compress(half, "zstd", asbytes=True) for half in (lines[:500], lines[500:]))
    elif path.suffix == ".gz":
        lines = gzip.compress(lines[:500]) + gzip.compress(lines[500:])
    path.write_bytes(lines)


def write_shards(folder, count=7):
    """Shards of every kind, two of their lines broken; in each 60 documents."""
    folder.mkdir()
    for i in range(count):
        documents = [f"{i}.{n} " + document * 5 for n, document in enumerate(DOCUMENTS)]
        if i == 3:
            (folder / f"{i}.txt").write_text("\n".join(documents))
        else:
            more = b'{"text": "cut sh\n{"no text": 1}\n' if i == 1 else b""
            write_jsonl(folder / f"{i}.jsonl{'.gz' if i % 2 == 0 else ''}", documents, more)
    return folder


def read(*sources):
    """The documents that prepare_pile.py finds in sources, in order, with BadInput in the place of bad ones."""
    shards = prepare_pile.find_shards([str(source) for source in sources])
    return [document for document in prepare_pile.read_shards(shards, skip=0) if document is not None]


def prepared(source, folder, **flags):
    """meta.json, when the source is prepared with the flags that most tests give."""
    return prepare([str(source)], folder, **dict(tokenizer="bytes", val_fraction=0.2, quiet=True) | flags)


def tokens_of(folder, split):
    return np.concatenate([np.fromfile(path, dtype="<u2") for path in sorted(folder.glob(f"{split}_*.bin"))])


def documents_of(folder, split, tokenizer="bytes"):
    """The documents of a prepared split, decoded, in order."""
    tokens, tokenizer = tokens_of(folder, split), get_tokenizer(tokenizer)
    assert tokens[-1] == tokenizer.eot_token, "the last document must end with <|endoftext|>"
    pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token) + 1)[:-1]
    return [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]


def contents(folder):
    """The files below a folder: their bytes by their relative paths."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("name", "vocab_size"), [("bytes", 257), ("gpt2", 50257)])
def test_round_trip(name, vocab_size, tmp_path):
    if name == "gpt2":
        gpt2_or_skip()
    write_jsonl(tmp_path / "a.jsonl")
    meta = prepared(tmp_path / "a.jsonl", tmp_path / "data", tokenizer=name)
    documents = {split: documents_of(tmp_path / "data", split, name) for split in ("train", "val")}
    assert sorted(documents["train"] + documents["val"]) == sorted(DOCUMENTS), "text must come back as it went in"
    assert [d for d in DOCUMENTS if d in documents["train"]] == documents["train"], "in the order of the source"
    assert meta == json.loads((tmp_path / "data" / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"]) == (name, vocab_size)
    for split in documents:
        assert meta[f"{split}_documents"] == len(documents[split])
        assert meta[f"{split}_tokens"] == len(tokens_of(tmp_path / "data", split))


def test_every_form_of_source_gives_the_same_documents_once(tmp_path):
    for suffix in (".jsonl", ".jsonl.zst", ".jsonl.gz"):
        write_jsonl(tmp_path / f"x{suffix}")
    shutil.copy(tmp_path / "x.jsonl.gz", tmp_path / "y.JSONL.GZ")
    table = pyarrow.table({"id": list(range(60)), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    (tmp_path / "texts" / "below").mkdir(parents=True)
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "texts" / ("below" if i % 2 else "") / f"{i:02d}.txt").write_text(document, newline="")
    (tmp_path / "texts" / ".hidden").write_bytes(b"\xff")
    for source in ["x.jsonl", "x.jsonl.zst", "x.jsonl.gz", "y.JSONL.GZ", "x.parquet", "texts", "texts/**/*.txt", "te*"]:
        assert sorted(read(tmp_path / source)) == sorted(DOCUMENTS), f"{source} reads differently"
    again = [tmp_path / "texts" / "**", tmp_path / "texts" / "below" / ".." / "00.txt"]  # folders and what is in them
    assert sorted(read(tmp_path / "texts", *again)) == sorted(DOCUMENTS), "a file named twice is read once"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("left", [-1, -60, -400, 30, 1, 0])
def test_a_compressed_file_cut_short_is_noticed(suffix, left, tmp_path):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    write_jsonl(whole)
    cut.write_bytes(whole.read_bytes()[:left])
    *before, bad = read(cut)
    assert isinstance(bad, BadInput) and cut.name in str(bad) and before == DOCUMENTS[: len(before)]
    with pytest.raises(BadInput, match=f"{cut.name}.*--skip_bad"):
        prepared(cut, tmp_path / "data")
    meta = prepared(tmp_path / "*.jsonl.*", tmp_path / "data", skip_bad=True)
    n_documents = meta["train_documents"] + meta["val_documents"]
    assert n_documents == len(before) + 60 and meta["skipped_documents"] == 1, "the file after it must still be read"


@pytest.mark.parametrize("log_window", [27, 28, 31])
def test_a_long_window_of_zstd_is_read_or_named(log_window, tmp_path):
    """A frame by hand: magic number, flags, exponent of the window, one raw block that is the last."""
    text = b'{"text": "fine"}\n'
    frame = b"\x28\xb5\x2f\xfd\0" + bytes([log_window - 10 << 3]) + (len(text) << 3 | 1).to_bytes(3, "little") + text
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    (document,) = read(tmp_path / "a.jsonl.zst")
    assert document == "fine" if log_window == 27 else "window over 2^27" in str(document)


def test_what_is_held_out_depends_on_a_documents_text_alone(tmp_path):
    """Neither on the order nor on the other documents; and the share of it is --val_fraction."""
    held_out = {}
    for name, documents in [("all", DOCUMENTS), ("some", DOCUMENTS[::-2])]:
        write_jsonl(tmp_path / f"{name}.jsonl", documents)
        prepared(tmp_path / f"{name}.jsonl", tmp_path / name, val_fraction=0.3)
        held_out[name] = set(documents_of(tmp_path / name, "val"))
    assert held_out["some"] == held_out["all"] & set(DOCUMENTS[::-2])
    tokenizer = get_tokenizer("bytes")
    splits = [prepare_pile.tokenize(f"text {i}", tokenizer, 0.1)[2] for i in range(20_000)]
    assert abs(splits.count("val") / 20_000 - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 20_000)


@pytest.mark.parametrize("max_tokens", [None, 150_000])
def test_workers_and_parts_change_nothing(max_tokens, tmp_path, monkeypatch):
    """The same files from one worker and from three; the same tokens in the same order in one part and in many."""
    flags = dict(skip_bad=True, val_fraction=0.1, max_tokens=max_tokens)
    source = write_shards(tmp_path / "source")
    whole = prepared(source, tmp_path / "whole", **flags)
    monkeypatch.setattr(prepare_pile, "PART_BYTES", 30_000)
    one, three = (prepared(source, tmp_path / f"{workers}", workers=workers, **flags) for workers in (1, 3))
    assert contents(tmp_path / "1") == contents(tmp_path / "3"), "the number of workers must not matter"
    assert whole["parts"] == 1 and one == three == whole | dict(parts=one["parts"])
    sizes = [path.stat().st_size for path in sorted((tmp_path / "1").glob("train_*.bin"))]
    assert len(sizes) == one["parts"] > 7 and all(size >= 30_000 for size in sizes[:-1]), sizes
    for split in ("train", "val"):
        tokens = tokens_of(tmp_path / "1", split)
        assert np.array_equal(tokens, tokens_of(tmp_path / "whole", split)), "the number of parts must not matter"
        assert len(tokens) == one[f"{split}_tokens"] and (tokens == 256).sum() == one[f"{split}_documents"]
    tokens = tokens_of(tmp_path / "1", "train")
    if max_tokens:
        assert len(tokens) >= max_tokens and 256 not in tokens[max_tokens - 1 : -1], "the last one reaches it"
    assert one["skipped_documents"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "1", "3"}, "nothing is left beside them"


def test_large_text_files_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_pile, "TEXT_PIECE", 1000)
    text = "".join(f"line {i} é\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text, newline="")
    pieces = read(tmp_path / "book.txt")
    assert "".join(pieces) == text and len(pieces) > 5
    assert all(piece.endswith("\n") and 1000 <= len(piece.encode()) < 1020 for piece in pieces[:-1])


def test_skip_bad_counts_what_it_leaves_out(tmp_path):
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot, is no fault: it becomes a replacement character."""
    bad = b'{"text": "cut sh\n{"no text": 1}\n{"text": 3}\n[]\n{"text": "\xff"}\n{"text": "good \\ud83d"}\n'
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "a.jsonl", more=bad)
    (source / "b.txt").write_bytes(b"\xff\xfe")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine", None]}), source / "c.parquet")
    assert prepared(source, tmp_path / "data", skip_bad=True)["skipped_documents"] == 7
    documents = documents_of(tmp_path / "data", "train") + documents_of(tmp_path / "data", "val")
    assert sorted(documents) == sorted([*DOCUMENTS, "good \ufffd", "fine"])


def test_hub_source(tmp_path, monkeypatch):
    """The Pile is streamed from the hub: what `datasets` is asked for, and what becomes of the rows of its shards."""
    import datasets

    rows = datasets.Dataset.from_list([{"text": document, "meta": {"n": 1}} for document in DOCUMENTS])
    load = mock.Mock(return_value=rows.to_iterable_dataset(num_shards=3))
    monkeypatch.setattr(datasets, "load_dataset", load)
    meta = prepared("pile", tmp_path / "data", max_tokens=10**6)
    assert set(map(str, load.mock_calls)) == {"call('monology/pile-uncopyrighted', split='train', streaming=True)"}
    assert meta["source"] == "monology/pile-uncopyrighted" and meta["shards"] == 3
    documents = [documents_of(tmp_path / "data", split) for split in ("train", "val")]
    assert documents[0] == [d for d in DOCUMENTS if d not in documents[1]], "all shards, in order"


def test_nothing_behind_max_tokens_matters(tmp_path, monkeypatch):
    """Workers read ahead, but only so far, and what is wrong there does not count."""

    def read_shard(shard):
        yield from DOCUMENTS
        yield from [BadInput("behind the last")] * 1000
        pytest.fail("read too far ahead")

    monkeypatch.setattr(prepare_pile, "find_shards", lambda sources: [__file__])
    monkeypatch.setattr(prepare_pile, "read_shard", read_shard)
    meta = prepared("endless", tmp_path / "data", max_tokens=2000, workers=3)
    assert meta["skipped_documents"] == 0 and meta["train_tokens"] >= 2000


def test_preparing_goes_on_after_an_error(tmp_path, monkeypatch, capsys):
    """A broken line in a late part loses nothing of the earlier ones; the rest is done under --skip_bad."""
    monkeypatch.setattr(prepare_pile, "PART_BYTES", 30_000)
    source, folder = write_shards(tmp_path / "source"), tmp_path / "data"
    with pytest.raises(BadInput, match=r"1.jsonl line 61: not JSON"):
        prepared(source, folder)
    first = folder / "train_000.bin"
    assert first.exists() and not (folder / "meta.json").exists()
    with pytest.raises(BadInput, match="meta.json"):
        prepare_pile.read_meta(folder, 257)
    with pytest.raises(BadInput, match="other flags"):
        prepared(source, folder, val_fraction=0.1, skip_bad=True)
    before = first.stat().st_ino
    prepared(source, folder, skip_bad=True)
    assert re.search(r"[1-9]\d* part\(s\) are there, going on", capsys.readouterr().out)
    assert first.stat().st_ino == before, "a finished part was made again"
    prepared(source, tmp_path / "whole", skip_bad=True)
    assert contents(folder) == contents(tmp_path / "whole")


def test_preparing_checks_the_disk_first(tmp_path, monkeypatch):
    free = mock.Mock(return_value=mock.Mock(free=2000))
    monkeypatch.setattr(shutil, "disk_usage", free)
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(BadInput, match="GB are needed.*--max_tokens"):
        prepared(tmp_path / "a.jsonl", tmp_path / "data")
    prepared(tmp_path / "a.jsonl", tmp_path / "data", max_tokens=900)
    free.return_value.free = 59 * 10**9
    monkeypatch.setattr(prepare_pile, "find_shards", lambda sources: [0, 1, 2])
    monkeypatch.setattr(prepare_pile, "read_shard", lambda shard: pytest.fail("the disk comes first"))
    with pytest.raises(BadInput, match="62.9 GB are needed and 59.0 GB free"):  # 60,000 steps of 2^19 tokens
        prepared("pile", tmp_path / "pile")


def test_data_on_a_full_disk_does_not_appear(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=[None, OSError(28, "No space left on device")]))
    with pytest.raises(BadInput, match="--out_dir=.*data cannot be written .No space left"):
        prepared(tmp_path / "a.jsonl", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_two_that_prepare_the_same_data(tmp_path, monkeypatch):
    """The one that comes while the other is at work, or has just finished, is told so and harms nothing."""
    source, folder = tmp_path / "a.jsonl", tmp_path / "data"
    write_jsonl(source)
    folder.mkdir()
    (folder / "unfinished.json").touch()
    with filelock.FileLock(f"{folder}.lock"), pytest.raises(prepare_pile.Taken, match="another process"):
        prepared(source, folder)
    assert contents(folder) == {"unfinished.json": b""}, "the second must not touch what the first is making"
    shutil.rmtree(folder)
    find_shards = prepare_pile.find_shards

    def first_finishes(sources):  # while the second still looks at the source
        monkeypatch.setattr(prepare_pile, "find_shards", find_shards)
        prepared(source, folder)
        return find_shards(sources)

    monkeypatch.setattr(prepare_pile, "find_shards", first_finishes)
    with pytest.raises(prepare_pile.Taken, match="exists already"):
        prepared(source, folder)
    assert (folder / "meta.json").exists() and {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "data"}


def test_train_waits_for_the_standard_library_that_another_run_makes(tmp_path, monkeypatch):
    """And makes it itself, if the other ends without it; a later run takes what is there."""
    monkeypatch.chdir(tmp_path)
    files = prepare_pile.standard_library_files()
    assert any(f.endswith("argparse.py") for f in files) and len(files) > 200
    assert not any("site-packages" in f or "/test/" in f for f in files)
    monkeypatch.setattr(prepare_pile, "standard_library_files", lambda: files[:40])
    other = filelock.FileLock("data/stdlib.lock", thread_local=False)
    other.acquire()
    threading.Timer(0.5, other.release).start()
    train.main([*TINY_RUN, "--max_steps=1"])
    assert not other.is_locked and prepare_pile.read_meta("data/stdlib", 257)["source"] == ["stdlib"]
    before = contents("data")
    train.main([*TINY_RUN, "--max_steps=1"])
    assert contents("data") == before, "it is there"


@slow
def test_preparing_killed_at_random_moments_ends_as_if_undisturbed(tmp_path):
    rng = random.Random(0)
    source = write_shards(tmp_path / "source", count=40)
    for path in source.glob("*.jsonl*"):
        path.write_bytes(path.read_bytes() * 60)
    script, killed = tmp_path / "small_parts.py", tmp_path / "killed"
    script.write_text(
        "import command, prepare_pile\nprepare_pile.PART_BYTES = 2_000_000\ncommand.run_command(prepare_pile.main)\n"
    )
    flags = [f"--source={source}", "--tokenizer=bytes", "--skip_bad", "--val_fraction=0.1", "--workers=3"]
    for kill in range(12):
        before = len(list(killed.glob("train_*.bin")))
        process = command(script, *flags, f"--out_dir={killed}", background=True)
        time.sleep(rng.uniform(0.2, 1) if kill % 4 == 0 else 0)
        while kill % 4 and len(list(killed.glob("train_*.bin"))) == before:
            assert process.poll() is None, output_of(process)
            time.sleep(rng.uniform(0, 0.05))
        output_of(process)
        assert not (killed / "meta.json").exists(), "the test needs kills in the middle"
    assert before > 5
    for folder in (killed, tmp_path / "undisturbed"):
        result = command(script, *flags, f"--out_dir={folder}")
        assert result.returncode == 0, result.stderr.decode()
    assert contents(killed) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 4097])
def test_order_is_a_permutation(n):
    orders = [prepare_pile.permute(np.arange(n), n, seed, epoch) for seed, epoch in [(1, 0), (1, 1), (2, 0)]]
    assert all(sorted(order) == list(range(n)) for order in orders), "each sequence once an epoch"
    if n > 60:
        first, of_epoch, of_seed = orders
        assert (first != of_epoch).mean() > 0.9, "another epoch needs another order"
        assert (first != of_seed).mean() > 0.9, "another seed, another order"
        # Like a random permutation's, the correlation between neighbours is about 0, with a deviation of 1/sqrt(n).
        assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / math.sqrt(n)
        assert abs(np.corrcoef(np.arange(n), first)[0, 1]) < 5 / math.sqrt(n)


def tokens_folder(path, n_train=1000, n_val=200, shards=1):
    """A data folder with counted tokens 0, 1, 2 ... 256, 0 ..."""
    path.mkdir(parents=True)
    for i, piece in enumerate(np.array_split(np.arange(n_train) % 257, shards)):
        piece.astype("<u2").tofile(path / f"train_{i:03d}.bin")
    (np.arange(n_val) % 257).astype("<u2").tofile(path / "val_000.bin")
    meta = dict(tokenizer="bytes", vocab_size=257, train_tokens=n_train, val_tokens=n_val)
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def open_split(folder, split="train", block_size=16, vocab_size=257):
    return prepare_pile.TokenData(folder, split, prepare_pile.read_meta(folder, vocab_size), block_size, vocab_size)


def test_sequences_cover_the_shards_once(tmp_path):
    folder = tokens_folder(tmp_path / "data", shards=3)
    (folder / "train_003.bin").touch()  # a part may have nothing for a split
    data = open_split(folder)
    sequences = data.sequences(range(len(data)))
    assert sequences.shape == (sum((n - 1) // 16 for n in (334, 333, 333)), 17)
    assert (sequences[:, 1:] == (sequences[:, :-1] + 1) % 257).all(), "the target of a token is the next one"
    ends = np.cumsum([0, 334, 333, 333])
    starts = [s for a, b in zip(ends, ends[1:]) for s in range(a, b - 16, 16)]
    assert sequences[:, 0].tolist() == [s % 257 for s in starts], "they lie next to each other, each within one shard"
    two_epochs = data.in_order(0, 2 * len(data), seed=3)
    assert sorted(two_epochs[: len(data)]) == sorted(two_epochs[len(data) :]) == list(range(len(data)))
    assert list(data.in_order(10, 5, seed=3)) == list(two_epochs[10:15]), "the order depends on the position alone"
    (folder / "val_000.bin").rename(folder / "val.bin")  # as earlier versions named it
    assert len(open_split(folder, "val")) == 199 // 16


@needs_proc
def test_thirty_billion_tokens_open_in_a_second_and_take_no_memory(tmp_path):
    """Sparse files of the Pile's full size; then reading all over them must not add to this process's memory."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    shards, shard_tokens = 315, 10**8
    for i in range(shards):
        (tmp_path / f"train_{i:03d}.bin").touch()
        os.truncate(tmp_path / f"train_{i:03d}.bin", 2 * shard_tokens)
    began = time.perf_counter()
    data = prepare_pile.TokenData(tmp_path, "train", dict(train_tokens=shards * shard_tokens), 1024, 50257)
    indices = data.in_order(0, 300, seed=1)
    seconds = time.perf_counter() - began
    assert seconds < 1, f"{seconds:.1f} s to open"
    assert len(data) == shards * ((shard_tokens - 1) // 1024) > max(indices) and len(set(indices)) == 300
    data.sequences(indices[:100])
    before = resident()
    for start in (100, 200):
        data.sequences(indices[start : start + 100])
    grown = (resident() - before) / 2**20
    assert grown < 2, f"grown by {grown:.0f} MiB; maps that stay grow by 4 KiB a sequence or more"


def test_learning_rate_schedule():
    settings, _ = train.settle(dict(scale="182m"), None)
    at = [train.learning_rate(step, settings) for step in range(60_000)]
    assert at[0] == pytest.approx(5e-4 / 600) and at[599] == pytest.approx(5e-4), "warm-up is 1% of the steps"
    assert at[600] == pytest.approx(5e-4) and at[600 + 59_400 // 2] == pytest.approx((5e-4 + 5e-5) / 2)
    assert at[-1] == pytest.approx(5e-5, rel=1e-3) and train.learning_rate(10**6, settings) == pytest.approx(5e-5)
    assert at[600:] == sorted(at[600:], reverse=True)


def test_peak_of_the_gpu_found(monkeypatch):
    """Dense bf16 figures of the makers' data sheets; no guess for a GPU that is not in the list."""
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12,
             "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA RTX A1000": None, "Tesla T4": None}  # fmt: skip
    for name, flops in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert train.peak_flops(torch.device("cuda")) == flops, name
    assert train.peak_flops(torch.device("cpu")) is None


def test_pool_utilisation():
    assert train.pool_utilisation(torch.full((4, 8), 1 / 8), 1) == (pytest.approx(1), 0)
    specialists = torch.eye(4).repeat_interleave(2, dim=1) / 2  # each layer uses two experts of its own
    assert train.pool_utilisation(specialists, 1) == (pytest.approx(1), 0), "the pool is what counts, not the layer"
    assert train.pool_utilisation(specialists, 4) == (pytest.approx(2 / 8), 24), "as private pools it is two of eight"
    assert train.pool_utilisation(specialists / 4, 1) == (pytest.approx(1), 0), "of the pairs that are served"
    assert train.pool_utilisation(torch.zeros(4, 8), 1) == (0, 8)


def test_routing_figures_of_a_step():
    """Shares and sums by hand: half of layer 0's pairs, and all of layer 1's, are served."""
    model = small_model(n_layer=2, n_expert=4)
    model.blocks[1].router.sigma.data.fill_(2.5)
    usage = torch.tensor([[0.25, 0.25, 0, 0], [0, 0.5, 0.5, 0]])
    figures = train.routing_figures(model, usage, torch.tensor([[1.0, 2, 0, 0], [0, 3, 0, 0.5]]))
    p = np.array([0.25, 0.75, 0.5]) / 1.5
    assert figures == dict(unserved=0.25, score_sum=[3, 3.5], sigma=[1, 2.5], dead_experts=1,
                           pool_utilisation=pytest.approx(np.exp(-(p * np.log(p)).sum()) / 4))  # fmt: skip
    assert "sigma" not in train.routing_figures(small_model(router="softmax"), torch.ones(4, 8) / 8, torch.ones(4, 8))


# ----------------------------------------------------------------------------------------------------------------------
# Training


TINY_RUN = ["--n_layer=2", "--n_embd=32", "--n_head=4", "--n_hidden=64", "--n_expert=8", "--block_size=32",
            "--batch_size=8", "--eval_tokens=2048", "--device=cpu", "--decay_steps=20"]  # fmt: skip


@pytest.fixture(scope="session")
def text_data(tmp_path_factory):
    """Some 400 kB of Python in bytes."""
    folder = tmp_path_factory.mktemp("text")
    files = [f for f in prepare_pile.standard_library_files() if Path(f).parent == Path(os.__file__).parent][:40]
    prepare(files, folder / "data", "bytes", val_fraction=0.2, quiet=True)
    return folder / "data"


@pytest.fixture(scope="session")
def trained(text_data, tmp_path_factory):
    """A run that nothing disturbed, with the checkpoint of each of its 9 steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run_train(text_data, folder, "--max_steps=9", "--eval_interval=3", "--ckpt_interval=1", "--keep=9")
    return folder


def run_train(text_data, out_dir, *flags):
    train.main([f"--data_dir={text_data}", f"--out_dir={out_dir}", *TINY_RUN, *flags])
    return torch.load(out_dir / "ckpt.pt"), read_metrics(out_dir)


def resume(out_dir, *flags):
    train.main([f"--out_dir={out_dir}", "--device=cpu", "--resume", *flags])


def steps_of(out_dir):
    return {path.name: torch.load(path)["step"] for path in out_dir.glob("*.pt")}


def at_step(out_dir, step):
    """The path of the checkpoint of that step."""
    return next(out_dir / name for name, number in steps_of(out_dir).items() if number == step)


def read_metrics(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def flat(value):
    """The tensors in nested dicts and lists, by their paths."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {f"{key}.{path}": tensor for key, v in items for path, tensor in flat(v).items()}


def assert_same(ours, theirs, rtol=0, atol=0):
    """Two checkpoints hold the same weights and the same state of the optimizer, to the bit unless told otherwise."""
    for part in ("model", "optimizer"):
        torch.testing.assert_close(flat(ours[part]), flat(theirs[part]), rtol=rtol, atol=atol)


ROUNDING = dict(rtol=1e-3, atol=1e-5)


def assert_undisturbed(out_dir, straight, step):
    """The run in out_dir stands at that step; its checkpoint and log are to the bit those of the run in `straight`."""
    ours, theirs = torch.load(out_dir / "ckpt.pt"), torch.load(at_step(straight, step))
    assert_same(ours, theirs)
    assert (ours["step"], ours["position"]) == (step, step * 8) == (theirs["step"], theirs["position"])
    log, their_log = (
        [{name: m[name] for name in ("step", "train_loss", "grad_norm", "lr")} for m in read_metrics(folder)]
        for folder in (out_dir, straight)
    )
    assert log == their_log[:step], "a line is doubled, missing or wrong"


def killed_run(out_dir, straight, *steps):
    """A run as SIGKILL leaves it: the checkpoints of these steps, the newest first, and of the log a line more."""
    out_dir.mkdir()
    for age, step in enumerate(steps):
        shutil.copy(at_step(straight, step), out_dir / (f"ckpt-{age}.pt" if age else "ckpt.pt"))
    lines = (straight / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out_dir / "metrics.jsonl").write_text("".join(lines[: steps[0] + 1]) + lines[steps[0] + 1][:20])
    return out_dir


@pytest.mark.parametrize("flags", [[], ["--router=sigmoid", "--balance=bias", "--micro_batch_size=4"]])
def test_resume_is_bit_equal(flags, text_data, tmp_path):
    straight = tmp_path / "straight"
    run_train(text_data, straight, "--max_steps=8", "--ckpt_interval=5", *flags)
    resume(killed_run(tmp_path / "killed", straight, 5))
    assert_undisturbed(tmp_path / "killed", straight, step=8)


def test_checkpoint_and_metrics_hold_what_is_promised(text_data, trained):
    checkpoint, metrics = torch.load(trained / "ckpt.pt"), read_metrics(trained)
    model = UniPool(UniPoolConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    assert asdict(model.config) == checkpoint["config"]
    for m in metrics:
        assert {"step", "train_loss", "balance_loss", "lr", "grad_norm", "tokens", "tokens_per_second"} <= m.keys()
        assert m["tokens"] == m["step"] * 8 * 32 and m["train_loss"] > 0 and "mfu" not in m
        progress = max(0, m["step"] - 2) / 19  # of 20 steps the first is warm-up
        assert m["lr"] == pytest.approx(2e-4 + (1.5e-3 - 2e-4) * (1 + math.cos(math.pi * progress)) / 2)
    assert [m["step"] for m in metrics if "val_loss" in m] == [3, 6, 9]
    # The last validation loss is the plain cross-entropy of the saved model, computed here over the same tokens.
    tokens = np.fromfile(text_data / "val_000.bin", dtype="<u2").astype(np.int64)
    picks = np.linspace(0, (len(tokens) - 1) // 32 - 1, 2048 // 32).astype(int)
    rows = torch.from_numpy(np.stack([tokens[32 * i : 32 * i + 33] for i in picks]))
    expected = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert metrics[-1]["val_loss"] == pytest.approx(expected, rel=1e-5), "validation must be pure cross-entropy"


def test_a_step_is_the_gradient_of_loss_plus_alpha_times_balance(text_data, tmp_path):
    """A step of two micro-batches against AdamW's first by hand: p - lr * g / (|g| + eps), after clipping and decay."""
    flags = ["--max_steps=1", "--warmup=0", "--balance_coef=0.5", "--lr=1e-3", "--adam_eps=1e-3", "--weight_decay=0.1"]
    checkpoint, (line,) = run_train(text_data, tmp_path, *flags, "--micro_batch_size=4")
    torch.manual_seed(1337)
    model = UniPool(UniPoolConfig(**checkpoint["config"]))
    data = open_split(text_data, block_size=32, vocab_size=320)
    tokens = torch.from_numpy(data.sequences(data.in_order(0, 8, 1337)))
    outs = [model(part[:, :-1], part[:, 1:]) for part in tokens.split(4)]
    loss, balance_loss = (sum(getattr(out, name) for out in outs) / 2 for name in ("loss", "balance_loss"))
    (loss + 0.5 * balance_loss).backward()
    norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters()))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert line["train_loss"] == pytest.approx(loss.item(), rel=1e-5), "the logged loss is without balance"
    assert line["balance_loss"] == pytest.approx(balance_loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        g = p.grad * min(1, 1 / norm)
        decay = 0.1 if p.dim() > 1 else 0
        expected = p * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-3)
        assert torch.allclose(checkpoint["model"][name], expected, rtol=1e-4, atol=1e-6), f"{name} moved wrongly"


@pytest.mark.parametrize(
    ("flag", "heard"),
    [("--seed=1337", (False, True)), ("--recompute", (True, True)), ("--no-one_pass", (False, False))],
)
def test_switches_of_speed_change_no_result(flag, heard, text_data, trained, tmp_path, monkeypatch):
    """They reach the model and give the same weights."""
    seen, real = set(), UniPool.forward

    def forward(self, *args, **kwargs):
        seen.add((self.recompute, self.one_pass))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(UniPool, "forward", forward)
    checkpoint, _ = run_train(text_data, tmp_path, "--max_steps=2", flag)
    assert seen == {heard}
    assert_same(checkpoint, torch.load(at_step(trained, 2)), **ROUNDING)


def test_compiled_model_gives_the_same_losses(text_data, trained, tmp_path, capsys):
    _, compiled = run_train(text_data, tmp_path, "--max_steps=2", "--compile")
    assert re.search(r"first step: \d+ s, with torch.compile's work", capsys.readouterr().out)
    for a, b in zip(compiled, read_metrics(trained)):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def command(script, *flags, processes=None, cwd=HERE, background=False, **kwargs):
    """Run a command of this repository, or a script that imports from it, as a user would: to its end, or for now."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    arguments = [sys.executable, *torchrun, str(HERE / script), *map(str, flags)]
    threads = "1" if processes else "2"
    environment = os.environ | dict(PYTHONUNBUFFERED="1", OMP_NUM_THREADS=threads, PYTHONPATH=str(HERE))
    if background:
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, timeout=200, **kwargs)


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, []),
        (2, ["--shard", "--router=sigmoid", "--balance=bias"]),
        pytest.param(2, ["--shard"], marks=slow),
        pytest.param(4, [], marks=slow),
        pytest.param(4, ["--shard"], marks=slow),
    ],
)
def test_several_processes_equal_one(processes, flags, text_data, tmp_path):
    """Losses, usage and weights, with accumulation; then one process goes on from what several have saved."""
    several, one = tmp_path / "several", tmp_path / "one"
    flags = [*TINY_RUN, "--micro_batch_size=1", "--adam_eps=1e-4", *flags, f"--data_dir={text_data}"]
    result = command("train.py", *flags, f"--out_dir={several}", "--max_steps=4", processes=processes)
    assert result.returncode == 0, result.stderr.decode()
    train.main([*flags, f"--out_dir={one}", "--max_steps=6", "--ckpt_interval=4"])
    assert_same(torch.load(several / "ckpt.pt"), torch.load(one / "ckpt-1.pt"), **ROUNDING)
    resume(several, "--max_steps=6")
    assert_same(torch.load(several / "ckpt.pt"), torch.load(one / "ckpt.pt"), **ROUNDING)
    logs = [read_metrics(one), read_metrics(several)]
    assert [[m["step"] for m in log] for log in logs] == [[1, 2, 3, 4, 5, 6]] * 2
    for key in ("train_loss", "balance_loss", "grad_norm", "pool_utilisation"):
        ours, theirs = ([m[key] for m in log] for log in logs)
        assert ours == pytest.approx(theirs, rel=1e-4), f"{key} must be that of all processes"
    assert logs[0][-1]["val_loss"] == pytest.approx(logs[1][-1]["val_loss"], rel=1e-4)


def test_sharded_processes_go_on_from_one(text_data, tmp_path):
    flags = ["--adam_eps=1e-4", "--micro_batch_size=4"]
    straight, _ = run_train(text_data, tmp_path / "straight", *flags, "--max_steps=5", "--ckpt_interval=3")
    killed_run(tmp_path / "run", tmp_path / "straight", 3)
    result = command("train.py", "--resume", f"--out_dir={tmp_path / 'run'}", "--shard", "--device=cpu", processes=2)
    assert result.returncode == 0, result.stderr.decode()
    assert_same(torch.load(tmp_path / "run" / "ckpt.pt"), straight, **ROUNDING)


COUNT_COLLECTIVES = """
import os, sys, torch.distributed as dist, train
from unittest import mock
names = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
called = {n: mock.patch.object(dist, n, wraps=getattr(dist, n)).start() for n in names if hasattr(dist, n)}
train.main(sys.argv[1:])
if os.environ["RANK"] == "0":
    print("COUNTS", [sum(m.call_count for name, m in called.items() if k in name) for k in ("gather", "reduce")])
"""


def test_sharded_weights_are_gathered_once_a_step_and_gradients_reduced_each_micro_batch(text_data, tmp_path):
    """In three steps of four micro-batches, and one validation; the pool is one group, all else another."""
    (tmp_path / "count.py").write_text(COUNT_COLLECTIVES)
    flags = [f"--data_dir={text_data}", f"--out_dir={tmp_path / 'out'}", *TINY_RUN, "--shard", "--eval_tokens=32"]
    result = command(tmp_path / "count.py", *flags, "--max_steps=3", "--micro_batch_size=1", processes=2)
    assert result.returncode == 0, result.stderr.decode()
    gathers, reductions = map(int, re.search(r"COUNTS \[(\d+), (\d+)\]", result.stdout.decode()).groups())
    assert reductions == 2 * 3 * 4, f"gradients were reduced {reductions} times"
    assert gathers == 2 * (3 + 1), f"weights were gathered {gathers} times: once a step, and for the validation"


def test_it_learns_more_than_how_often_each_byte_occurs(text_data, tmp_path):
    flags = ["--max_steps=120", "--decay_steps=120", "--lr=5e-3", "--batch_size=16", "--init_std=0.05"]
    _, metrics = run_train(text_data, tmp_path, *flags)
    counts = np.bincount(np.fromfile(text_data / "val_000.bin", dtype="<u2"), minlength=257)
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log(p)).sum()  # of the validation bytes themselves: no model of single bytes can do better
    assert metrics[-1]["val_loss"] < entropy - 0.3, f"val loss {metrics[-1]['val_loss']:.3f}, unigrams {entropy:.3f}"


def test_a_new_run_keeps_the_old_one(text_data, tmp_path):
    old = {}
    for number in (1, 2, 3):
        run_train(text_data, tmp_path, f"--max_steps={number}")
        if number == 2:
            (tmp_path / "ckpt.pt").unlink()  # as if it had ended before its first checkpoint
        old[f"old-{number}"] = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    run_train(text_data, tmp_path, "--max_steps=1")
    for name, files in old.items():
        assert contents(tmp_path / name) == files, "a checkpoint and its metrics must stay together, as they were"


def test_the_last_checkpoints_and_the_best_are_kept(text_data, tmp_path):
    """With so high a rate that the best one is neither the last nor, in all likelihood, one of --ckpt_interval."""
    flags = ["--max_steps=8", "--ckpt_interval=5", "--eval_interval=1", "--keep=3", "--lr=0.2", "--warmup=0"]
    _, metrics = run_train(text_data, tmp_path, *flags)
    losses = {m["step"]: m["val_loss"] for m in metrics}
    new_best = [step for step in losses if losses[step] == min(losses[s] for s in losses if s <= step)]
    last = sorted({5, 8, *new_best})[-3:]
    assert steps_of(tmp_path) == dict(zip(("ckpt-2.pt", "ckpt-1.pt", "ckpt.pt"), last)) | {"best.pt": new_best[-1]}
    assert len(contents(tmp_path)) == 5, "these four and metrics.jsonl"


def test_resuming_keeps_what_is_there(trained, tmp_path, capsys):
    """All of a finished run; and the best model, though it is of a step before the checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    resume(run)
    assert "nothing to do" in capsys.readouterr().out and contents(run) == contents(trained)
    torch.save(torch.load(run / "ckpt.pt") | dict(best=0.1), run / "ckpt.pt")
    resume(run, "--max_steps=10")
    assert contents(run)["best.pt"] == contents(trained)["best.pt"], "a worse model took the best one's place"
    assert steps_of(run)["ckpt.pt"] == 10 and torch.load(run / "ckpt.pt")["best"] == 0.1


def at_each_step(monkeypatch, action):
    """Call action(number) whenever a step begins: 0 is the first."""
    real = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, settings: (action(step), real(step, settings))[1])


def test_saving_does_not_hold_up_training(text_data, trained, tmp_path, monkeypatch):
    """The writer is held until the next step is done, too, and still writes the weights of its checkpoint."""
    later, waited, real = threading.Event(), [], torch.save

    def save(contents, file):
        if contents["step"] == 2:
            waited.append(later.wait(timeout=30))
        real(contents, file)

    monkeypatch.setattr(torch, "save", save)
    at_each_step(monkeypatch, lambda step: step == 3 and later.set())
    run_train(text_data, tmp_path, "--max_steps=6", "--ckpt_interval=2", "--keep=9")
    assert waited == [True], "training waited for the checkpoint to be written"
    assert steps_of(tmp_path) == {"ckpt-2.pt": 2, "ckpt-1.pt": 4, "ckpt.pt": 6, "best.pt": 6}
    assert_same(torch.load(tmp_path / "ckpt-2.pt"), torch.load(at_step(trained, 2)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(number, text_data, trained, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(number)
    at_each_step(monkeypatch, lambda step: step == 2 and os.kill(os.getpid(), number))
    run_train(text_data, tmp_path, "--max_steps=6")  # ends as usual: status 0
    assert f"stopped by {number.name}" in capsys.readouterr().out and signal.getsignal(number) is before
    assert_undisturbed(tmp_path, trained, step=3)
    resume(tmp_path)
    assert_undisturbed(tmp_path, trained, step=6)


def test_the_third_signal_ends_at_once(text_data, tmp_path, monkeypatch):
    at_each_step(monkeypatch, lambda step: [os.kill(os.getpid(), signal.SIGINT) for _ in range(3)])
    with pytest.raises(KeyboardInterrupt):
        run_train(text_data, tmp_path, "--max_steps=6")
    assert not list(tmp_path.glob("*.pt"))


def poison(monkeypatch, bad_steps, how):
    """Make the loss, or only the gradient, not finite in the training steps named."""
    real, steps = UniPool.forward, iter(range(1, 1000))

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        if self.training and next(steps) in bad_steps:
            loss = out.loss * (torch.nan if how == "loss" else 1)
            if how == "gradient":
                loss.register_hook(lambda grad: grad * torch.inf)
            out = out._replace(loss=loss)
        return out

    monkeypatch.setattr(UniPool, "forward", forward)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("balance", ["pool", "bias"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(how, balance, text_data, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3}, how)
    flags = ["--max_steps=4", "--ckpt_interval=1", "--keep=9", f"--balance={balance}", "--bias_rate=0.1"]
    last, metrics = run_train(text_data, tmp_path, *flags)
    assert steps_of(tmp_path) == {"ckpt-2.pt": 2, "ckpt-1.pt": 3, "ckpt.pt": 4, "best.pt": 4}, "step 1 did nothing"
    assert [m["skipped_steps"] for m in metrics] == [1, 1, 2, 2] and last["skipped"] == [2, 0]
    assert metrics[2]["train_loss" if how == "loss" else "grad_norm"] is None
    before, skipped = torch.load(tmp_path / "ckpt-2.pt"), torch.load(tmp_path / "ckpt-1.pt")
    assert_same(before, skipped)
    assert all(tensor.isfinite().all() for tensor in flat(last["model"]).values())
    assert {float(state["step"]) for state in last["optimizer"]["state"].values()} == {2.0}
    assert not torch.equal(skipped["model"]["head.weight"], last["model"]["head.weight"]), "then it goes on"


@pytest.mark.parametrize("good_steps", [0, 2])
def test_steps_that_are_not_finite_end_the_run(good_steps, text_data, trained, tmp_path, monkeypatch, capsys):
    """All of a run's, or ten in a row; nothing that was saved is lost."""
    poison(monkeypatch, range(good_steps + 1, 100), "loss")
    flags = [f"--data_dir={text_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--ckpt_interval=2"]
    if good_steps:
        named = "last 10 steps", "at step 12", tmp_path / "ckpt.pt"
        fails(capsys, train.main, [*flags, "--max_steps=50"], "--lr=", "not finite", *named)
        assert_same(torch.load(tmp_path / "ckpt.pt"), torch.load(at_step(trained, 2)))
    else:
        named = "last 3 steps", "nothing is saved"
        fails(capsys, train.main, [*flags, "--max_steps=3"], "--lr=", "not finite", *named)
        assert not list(tmp_path.glob("*.pt"))


def test_a_warning_when_most_pairs_are_unserved(text_data, tmp_path, capsys):
    """Once. A balance loss alone, with a large rate, drives the scores to 0."""
    flags = ["--max_steps=30", "--balance_coef=100", "--lr=0.03", "--warmup=0"]
    _, metrics = run_train(text_data, tmp_path, *flags)
    assert metrics[-1]["unserved"] > 0.5 and len(metrics[-1]["sigma"]) == len(metrics[-1]["score_sum"]) == 2
    printed = "".join(capsys.readouterr())
    assert printed.count("warning: ") == 1 and "--balance_coef" in printed and "unserved" in printed


@pytest.mark.parametrize("how", ["flipped byte", "cut short", "vanished"])
def test_resume_goes_on_from_the_checkpoint_before_a_damaged_one(how, trained, tmp_path, capsys):
    run = killed_run(tmp_path / "run", trained, 4, 2)
    newest, raw = run / "ckpt.pt", bytearray((run / "ckpt.pt").read_bytes())
    (run / "ckpt.pt.tmp").write_bytes(raw[:1000])  # of a run that was killed while saving
    if how == "vanished":
        newest.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        newest.write_bytes(raw if how == "flipped byte" else raw[: len(raw) // 2])
    resume(run, "--max_steps=6", "--ckpt_interval=2", "--keep=2", "--eval_interval=99")
    if how != "vanished":
        error = capsys.readouterr().err
        assert f"{newest} is damaged" in error and "the one before" in error
        assert (run / "ckpt.damaged").read_bytes() == (raw if how == "flipped byte" else raw[: len(raw) // 2])
    assert_undisturbed(run, trained, step=6)
    assert steps_of(run) == {"best.pt": 6, "ckpt.pt": 6, "ckpt-1.pt": 4}


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(text_data, tmp_path, monkeypatch, capsys):
    real, began = torch.save, []

    def save(contents, file):
        if contents["step"] == 2:
            return real(contents, file)
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    at_each_step(monkeypatch, lambda step: began.append(step) or time.sleep(0.2))
    flags = [f"--data_dir={text_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--max_steps=50", "--ckpt_interval=2"]
    fails(capsys, train.main, flags, tmp_path / "ckpt.pt", "No space left", "--resume")
    assert len(began) < 10, "the run went on for long after it could not write"
    assert steps_of(tmp_path) == {"ckpt.pt": 2} and len(contents(tmp_path)) == 2, "beside it metrics.jsonl alone stays"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_metrics_on_a_full_disk(tmp_path):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    with pytest.raises(BadInput, match="metrics.jsonl cannot be written.*No space left"):
        train.add_metrics(tmp_path / "metrics.jsonl", dict(step=1))


@pytest.mark.parametrize("harm", [os.unlink, lambda path: os.truncate(path, 100)], ids=["vanished", "cut short"])
def test_a_data_file_that_is_lost_ends_the_run(harm, text_data, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(text_data, tmp_path / "data")
    shard, out_dir = tmp_path / "data" / "train_000.bin", tmp_path / "out"
    flags = [f"--data_dir={shard.parent}", f"--out_dir={out_dir}", *TINY_RUN, "--max_steps=9", "--ckpt_interval=2"]

    def lose(step):
        if step == 3:
            while not (out_dir / "ckpt.pt").exists():  # which a thread writes
                time.sleep(0.01)
            harm(shard)

    with monkeypatch.context() as patched:
        at_each_step(patched, lose)
        fails(capsys, train.main, flags, shard, "vanished or shrunk")
    shutil.copy(text_data / "train_000.bin", shard)
    resume(out_dir)
    assert_undisturbed(out_dir, trained, step=9)


def wait_for(process, metrics, lines):
    """Until the log of the run has so many lines."""
    end = time.monotonic() + 100
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < end and process.poll() is None, output_of(process)
        time.sleep(0.01)


def output_of(process):
    process.kill()
    return process.communicate()[0].decode()


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_of_which_one_gets_a_signal(number, text_data, tmp_path):
    """SIGKILL to one ends all within a minute, with an error; SIGTERM to one lets both finish the step and save."""
    flags = [f"--data_dir={text_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--max_steps=100000", "--ckpt_interval=5"]
    run = command("train.py", *flags, processes=2, background=True)
    wait_for(run, tmp_path / "metrics.jsonl", lines=8)
    os.kill(max(children_of(run)), number)
    status = run.wait(timeout=60)
    output = output_of(run)
    step = train.load_checkpoint(tmp_path / "ckpt.pt", verify=True)["step"]
    if number == signal.SIGKILL:
        assert status != 0 and step % 5 == 0 and "another process of this run has ended" in output, output
        assert f'Traceback (most recent call last):\n  File "{HERE}' not in output, output
    else:
        assert status == 0 and "stopped by" in output, output
        assert len(read_metrics(tmp_path)) == step, "the checkpoint is of the step that was finished"


@slow
@needs_proc
@pytest.mark.parametrize(("processes", "kills"), [(None, 20), (2, 5)])
def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(processes, kills, text_data, tmp_path):
    """Checkpoints every second step, so that many a SIGKILL comes while one is written; some come during the start."""
    rng, reached = random.Random(0), 0
    out_dir, metrics = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"

    def begin(folder, *more):
        flags = [f"--data_dir={text_data}", *TINY_RUN, "--ckpt_interval=2", "--eval_interval=5", f"--out_dir={folder}"]
        resume = ["--resume"] if (folder / "ckpt.pt").exists() else []
        return command("train.py", *flags, *resume, *more, processes=processes, background=True)

    for kill in range(kills):
        run = begin(out_dir, "--max_steps=100000")
        if kill % 5 == 4:
            time.sleep(rng.uniform(1, 5))
        else:
            time.sleep(1.5)  # until metrics.jsonl has been trimmed, at the latest
            before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            wait_for(run, metrics, before + rng.randrange(1, 20))
            time.sleep(rng.uniform(0, 0.03))
        with contextlib.suppress(ProcessLookupError):  # what a dying process leaves is looked at all the same
            os.kill(rng.choice(children_of(run)) if processes else run.pid, signal.SIGKILL)
        run.wait(timeout=60)
        output_of(run)
        for path in out_dir.glob("*.pt"):
            reached = max(reached, train.load_checkpoint(path, verify=True)["step"])
    assert reached > 20, "the test needs runs that get on"
    for folder in (out_dir, tmp_path / "undisturbed"):
        run = begin(folder, f"--max_steps={reached + 5}")
        assert run.wait(timeout=300) == 0, output_of(run)
    assert_undisturbed(out_dir, tmp_path / "undisturbed", step=reached + 5)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line on standard error that names the flag or file, status 2, and nothing written


def fails(capsys, main, arguments, *named, touching=None):
    """Run main(arguments) and check that it ends as bad input should; `named` must stand in its one line."""
    before = contents(touching) if touching else None
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([str(a) for a in arguments]))
    error = capsys.readouterr().err.strip()
    error = re.sub(r".*\r", "", error)  # what a progress bar drew on that line before
    assert stop.value.code == 2, f"exit status {stop.value.code}: {error}"
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in error, f"more than one line: {error}"
    for part in named:
        assert str(part) in lines[0], f"the line should name {part}: {lines[0]}"
    if touching:
        assert contents(touching) == before, "bad input must not change any file"


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--scale=best", "--scale best 182m"),
        ("--arch=best", "--arch best vanilla"),
        ("--router=best", "--router best softmax"),
        ("--balance=best", "--balance best layer"),
        ("--lr=best", "--lr best float"),
        ("--n_embd=400000000", "--scale=tiny no room"),
    ],
)
def test_bad_values_of_train(flag, named, text_data, capsys, tmp_path):
    flags = [f"--data_dir={text_data}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", flag]
    fails(capsys, train.main, flags, *named.split(), touching=tmp_path)


@pytest.mark.parametrize(
    "flags",
    ["--learning_rate=1", "--max_step=1", "--decay_steps=0", "--max_steps=-1", "--seed=-1", "--lr=nan", "--lr=-1",
     "--weight_decay=inf", "--warmup=1.5", "--beta2=1", "--batch_size=99999999999", "--balance_coef=nan",
     "--n_expert=8 --arch=dense", "--top_k=33", "--n_pool=3 --n_layer=4", "--n_pool=4 --n_expert=30",
     "--n_head=3 --n_embd=128", "--n_head=4 --n_embd=60", "--n_kv_head=3 --n_head=4",
     "--batch_size=8 --micro_batch_size=3", "--device=tpu", "--device=meta", "--data_dir=nowhere", "--out_dir=file"],
)  # fmt: skip
def test_bad_flags_of_train(flags, text_data, capsys, tmp_path, monkeypatch):
    """A flag that is unknown, or not written out, and numbers that are out of range or do not go together."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    named = [flag.removeprefix("--").removeprefix("arch=") for flag in flags.split()]
    fails(capsys, train.main, ["--device=cpu", f"--data_dir={text_data}", *flags.split()], *named, touching=tmp_path)


def test_batch_not_divisible_by_processes():
    with pytest.raises(BadInput, match=r"--batch_size=8 .* 3 process"):
        train.split_batch(*train.settle(dict(batch_size=8), None), 3)


DAMAGE = {
    "no shard": ("train_000.bin", lambda raw: None),
    "empty shard": ("train_000.bin", lambda raw: b""),
    "odd length": ("train_000.bin", lambda raw: raw[:-1]),
    "cut short": ("train_000.bin", lambda raw: raw[:-200]),
    "token outside the vocabulary": ("train_000.bin", lambda raw: raw[:1000] + b"\x40\x01" + raw[1002:]),
    "empty validation": ("val_000.bin", lambda raw: b""),
    "no validation": ("val_000.bin", lambda raw: None),
    "meta missing": ("meta.json", lambda raw: None),
    "meta cut short": ("meta.json", lambda raw: raw[:20]),
    "meta not a dict": ("meta.json", lambda raw: b"[]"),
    "meta without a count": ("meta.json", lambda raw: raw.replace(b"train_tokens", b"tokens")),
    "meta of gpt2": ("meta.json", lambda raw: raw.replace(b"bytes", b"gpt2").replace(b" 257", b" 50257")),
    "meta of gpt2 with another size": ("meta.json", lambda raw: raw.replace(b"bytes", b"gpt2")),
    "meta of an unknown tokenizer": ("meta.json", lambda raw: raw.replace(b"bytes", b"llama")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_bad_data(name, damage, capsys, tmp_path):
    path = tokens_folder(tmp_path / "data") / name
    raw = damage(path.read_bytes())
    path.unlink() if raw is None else path.write_bytes(raw)
    flags = [f"--data_dir={path.parent}", f"--out_dir={tmp_path / 'out'}", *TINY_RUN]
    fails(capsys, train.main, flags, path, touching=tmp_path)
    assert not (tmp_path / "out").exists()


def test_too_few_tokens_for_one_sequence(tmp_path):
    with pytest.raises(BadInput, match="train_000.bin: 16 tokens .*--block_size=16"):
        open_split(tokens_folder(tmp_path / "data", n_train=16))


def test_bad_token_beyond_the_part_checked_at_start(capsys, tmp_path, monkeypatch):
    path = tokens_folder(tmp_path / "data") / "train_000.bin"
    path.write_bytes(DAMAGE["token outside the vocabulary"][1](path.read_bytes()))
    monkeypatch.setattr(prepare_pile.TokenData, "CHECKED", 3)
    flags = [f"--data_dir={path.parent}", f"--out_dir={tmp_path / 'out'}", *TINY_RUN, "--max_steps=9"]
    fails(capsys, train.main, flags, path, "320")


@pytest.mark.parametrize("main", [train.main, sample.main])
@pytest.mark.parametrize("name", ["missing", "empty", "cut short", "code", "other content", "another config"])
def test_bad_checkpoints(main, name, trained, capsys, tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path, good, raw = tmp_path / "ckpt.pt", torch.load(trained / "ckpt.pt"), (trained / "ckpt.pt").read_bytes()
    if name in ("empty", "cut short"):
        path.write_bytes(raw[: len(raw) // 2] if name == "cut short" else b"")
    elif name != "missing":
        other = good | dict(config=good["config"] | dict(n_hidden=128))
        torch.save({"code": good | dict(trap=Code()), "other content": raw, "another config": other}[name], path)
    fails(capsys, main, [f"--out_dir={tmp_path}", "--device=cpu", *["--resume"][: main is train.main]], path,
          touching=tmp_path)  # fmt: skip
    assert not (tmp_path / "ran").exists(), "loading a checkpoint ran code from it"


@pytest.mark.parametrize("flag", ["--n_embd=64", "--scale=182m", "--arch=vanilla", "--router=softmax", "--seed=2"])
def test_resume_with_another_config(flag, trained, capsys):
    fails(capsys, train.main, ["--resume", f"--out_dir={trained}", flag], flag, "was trained with", touching=trained)


def test_resume_with_data_of_another_tokenizer(trained, capsys, tmp_path):
    run, folder = killed_run(tmp_path / "run", trained, 2), tokens_folder(tmp_path / "data")
    torch.save(torch.load(run / "ckpt.pt") | dict(tokenizer="gpt2"), run / "ckpt.pt")
    flags = ["--resume", f"--out_dir={run}", f"--data_dir={folder}"]
    fails(capsys, train.main, flags, folder / "meta.json", "bytes", "gpt2", touching=tmp_path)


@pytest.mark.parametrize(
    "flag", ["--num_samples=0", "--max_new_tokens=0", "--temperature=-1", "--top_k=0", "--prompts=x"]
)
def test_bad_flags_of_sample(flag, trained, capsys):
    fails(capsys, sample.main, [f"--out_dir={trained}", "--device=cpu", flag], flag, touching=trained)


@pytest.mark.parametrize(("bad", "prompt", "stdin"), [("empty", "", b""), ("UTF-8", "\udcff", b"caf\xe9")])
def test_bad_prompts(bad, prompt, stdin, trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    for flag in (f"--prompt={prompt}", "--prompt=-"):
        fails(capsys, sample.main, [f"--out_dir={trained}", "--device=cpu", flag], "--prompt", bad)


@pytest.mark.parametrize(
    ("name", "content", "flags", "named"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut sh', [], ["a.jsonl line 2", "--skip_bad"]),
        ("a.jsonl", b'{"text": "fine"}\n\n{"words": "none"}\n', [], ["a.jsonl line 3", "--skip_bad"]),
        ("a.jsonl", b"[" * 100_000, [], ["a.jsonl line 1", "--skip_bad"]),
        ("a.jsonl", b'{"text": "\xff"}\n', [], ["a.jsonl line 1", "UTF-8"]),
        ("a.parquet", b"no parquet", [], ["a.parquet"]),
        ("a.txt", b"caf\xe9", [], ["a.txt", "0xe9", "offset 3"]),
        ("a.txt", b"", [], ["--val_fraction=0.05", "0 documents"]),
        ("a.txt", b"one document", [], ["--val_fraction=0.05", "1 documents to train and 0 to"]),
        ("a.txt", b"text", ["--val_fraction=1.5"], ["--val_fraction=1.5"]),
        ("a.txt", b"text", ["--workers=0"], ["--workers=0"]),
        ("a.txt", b"text", ["--tokenizer=llama"], ["--tokenizer", "llama", "gpt2"]),
        ("a.txt", b"text", ["--source", "nothing/*"], ["--source nothing/*"]),
        ("a.txt", b"text", ["--source", "pile", "stdlib"], ["--source pile", "alone"]),
        ("a.txt", b"text", ["--out_dir=."], ["--out_dir=.", "exists"]),
        ("a.txt", b"text", ["--out_dir=a.txt/data"], ["--out_dir=a.txt/data", "cannot be written"]),
    ],
)
def test_bad_input_of_prepare_pile(name, content, flags, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    arguments = ["--source", name, "--out_dir=data", "--tokenizer=bytes", *flags]
    fails(capsys, prepare_pile.main, arguments, *named, touching=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing may be left behind"


@pytest.mark.parametrize(
    ("function", "flags", "named"),
    [
        ("datasets.load_dataset", ["--tokenizer=bytes"], ["monology/pile-uncopyrighted", "hub", "--source"]),
        ("tiktoken.get_encoding", ["--source", __file__], ["gpt2", "TIKTOKEN_CACHE_DIR", "--tokenizer bytes"]),
    ],
)
def test_no_network(function, flags, named, capsys, tmp_path, monkeypatch):
    """As the libraries report it: an OSError while they download."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(function, mock.Mock(side_effect=ConnectionError("no route to host")))
    fails(capsys, prepare_pile.main, flags, *named)
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


# ----------------------------------------------------------------------------------------------------------------------
# What a GPU must hold


FAKE_STEPS = """
import json, sys, torch, unipool
from experiments.fake_gpu import Watch, fake_gpu
from experiments.memory import main, prepare, simulated, train_step
from unipool import UniPoolConfig

results = {}
for arch in ("unipool", "vanilla", "dense"):
    config = UniPoolConfig.from_scale("tiny", arch)
    for name in ("plain", "autograd", "recompute", "shard", "shard recompute", "fp32"):
        if name == "fp32" and arch != "dense":
            continue  # without bf16 experts go one by one, which has to wait for their numbers of rows
        world_size = 8 if "shard" in name else 1
        found = results[f"{arch} {name}"] = {}
        try:
            with fake_gpu(config, world_size, bf16=name != "fp32") as mesh, Watch() as watch:
                model, optimizer = prepare(config, mesh, "recompute" in name, name != "autograd")
                losses = train_step(model, optimizer, 4, 2, watch)
                watch.products.clear()
                train_step(model, optimizer, 4, 2, watch)
                with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=name != "fp32"):
                    idx = torch.zeros(2, 128, dtype=torch.int64, device="cuda")
                    out = model.eval()(idx, idx, keep_logits=False)
                figures = losses, out.loss, out.balance_loss, out.usage, out.mean_scores
                found["dtypes"] = [str(tensor.dtype) for tensor in figures]
                found["products"] = watch.products
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
config = UniPoolConfig.from_scale("tiny", vocab_size=2**15)
results["memory"] = {name: simulated(config, *rest) for name, rest in dict(
    plain=[64], sharded=[64, 8], small=[32], recompute=[64, 1, True]).items()}
with fake_gpu(config), Watch():
    try:
        torch.ones(1, device="cuda").item()
    except Exception as error:
        results["wait"] = type(error).__name__
main(["--scales", "tiny", "--sequences=4", f"--results={sys.argv[1]}"])
print("RESULTS", json.dumps(results))
"""


@pytest.fixture(scope="session")
def fake_steps(tmp_path_factory):
    """Training steps on a GPU that is not there; in a process of its own, because torch's insides are touched."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    folder = tmp_path_factory.mktemp("memory")
    arguments = [sys.executable, "-c", FAKE_STEPS, folder]
    result = subprocess.run(arguments, cwd=HERE, capture_output=True, text=True, timeout=200)
    assert "RESULTS" in result.stdout, result.stderr
    return json.loads(result.stdout.split("RESULTS")[1]) | dict(table=(folder / "memory.md").read_text())


@pytest.mark.parametrize("name", ["plain", "autograd", "recompute", "shard", "shard recompute"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_on_a_gpu(arch, name, fake_steps):
    """It ends, never waits for the GPU, and every grouped product is one that the fast kernel takes."""
    found = fake_steps[f"{arch} {name}"]
    assert "error" not in found, found["error"]
    assert set(found["dtypes"]) == {"torch.float32"}, "what is reported must be fp32"
    assert all(fast for _, _, fast in found["products"]), found["products"]
    of_weights = sum(len(b) == 2 for _, b, _ in found["products"])
    by_layer = arch == "vanilla" or name == "autograd"  # else once for all layers and micro-batch
    assert of_weights == (0 if arch == "dense" else 2 * 2 * (4 if by_layer else 1)), "gradients of gate_up and down"


def test_a_fake_gpu_notices_a_wait(fake_steps):
    assert fake_steps["wait"] == "DataDependentOutputException"


def test_memory_as_a_command(fake_steps):
    rows = [line.split(" | ") for line in fake_steps["table"].splitlines() if line.startswith("| tiny")]
    assert [row[0] for row in rows] == ["| tiny", "| tiny --recompute", "| tiny --shard", "| tiny --shard --recompute"]
    assert all("yes" in row[-1] and row[-2] in ("forward", "backward", "optimizer") for row in rows)


def test_attention_in_fp32_has_a_fused_kernel_on_a_gpu(fake_steps):
    """None takes grouped queries: keys and values must be repeated there."""
    assert "error" not in fake_steps["dense fp32"], fake_steps["dense fp32"]


def test_memory_of_a_step_by_hand(fake_steps):
    """tiny with many words, 64 sequences: weights, moments, gradients; what each layer keeps; a chunk of the loss."""
    config = UniPoolConfig.from_scale("tiny", vocab_size=2**15)
    L, C, H, M, V, N = 4, 128, 512, 32, 2**15, 64 * 128
    q, kv = 128, 64  # widths
    layer = 2 * 4 * C  # the residual stream before either norm
    layer += 2 * C + 2 * (q + 2 * kv) + 2 * (q + kv) + 2 * q + 4 * 4  # norm's output, qkv, turned q and k, output, sums
    layer += 4 * C + 4 * 4 * M  # norm's output in fp32, logits, scores and two steps between them
    layer += 2 * C + 2 * 2 * H + 2 * C  # an expert's rows, gate and up, and what it gives
    outside = 3 * 4 * C + 2 * C  # embeddings, the final norm's input and output, the gradient of the latter
    loss = unipool.LOSS_CHUNK * V * (4 + 4) + V * C * (2 + 4)  # a chunk's logits, log-softmax; head in bf16, gradient
    with torch.device("meta"):
        model = UniPool(config)
    n, pool = model.num_params(), sum(p.numel() for p in model.pools.parameters())
    memory = fake_steps["memory"]
    plain = memory["plain"]
    assert plain["weights"] == pytest.approx(4 * n, rel=0.01) and plain["optimizer"] == pytest.approx(8 * n, rel=0.01)
    assert plain["phase"] == "forward", "the loss is where a GPU holds most"
    expected = 16 * n + 2 * pool + N * (L * layer + outside) + loss
    assert plain["peak"] == pytest.approx(expected, rel=0.05)
    per_token = (plain["peak"] - memory["small"]["peak"]) / (N // 2)
    assert per_token == pytest.approx(L * layer + outside, rel=0.05), "another half of the tokens"
    assert memory["sharded"]["weights"] == pytest.approx(plain["weights"] / 8, rel=0.05)
    saved = plain["kept by forward"] - memory["recompute"]["kept by forward"]
    assert 0.8 * N * L * layer < saved < N * L * layer, "--recompute keeps little more than a layer's input"


# ----------------------------------------------------------------------------------------------------------------------
# Experiments: comparisons of methods


# n_expert, n_pool, top_k, router, balance at 182m, as METHOD and Table 5 have them.
METHODS_AT_182M = {
    "dense": (0, 1, 1, "norm", "none"),
    "vanilla": (96, 12, 1, "softmax", "layer"),
    "vanilla-norm": (96, 12, 1, "norm", "layer"),
    "vanilla-sigmoid": (96, 12, 1, "sigmoid", "bias"),
    "shared-layer-softmax": (96, 1, 1, "softmax", "layer"),
    "shared-pool-softmax": (96, 1, 1, "softmax", "pool"),
    "unipool": (96, 1, 1, "norm", "pool"),
    "unipool-67": (64, 1, 1, "norm", "pool"),
    "unipool-50": (48, 1, 1, "norm", "pool"),
    "unipool-42": (40, 1, 1, "norm", "pool"),
    "g6": (96, 6, 1, "norm", "pool"),
    "g4": (96, 4, 1, "norm", "pool"),
    "g2": (96, 2, 1, "norm", "pool"),
    "vanilla-16": (192, 12, 2, "softmax", "layer"),
    "vanilla-32": (384, 12, 4, "softmax", "layer"),
    "unipool-16": (192, 1, 2, "norm", "pool"),
    "unipool-32": (384, 1, 4, "norm", "pool"),
}


def test_methods_are_the_papers_and_are_told_apart():
    methods = compare.methods(12)
    assert methods.keys() == METHODS_AT_182M.keys()
    for name, expected in METHODS_AT_182M.items():
        config = UniPoolConfig.from_scale("182m", methods[name].arch, **methods[name].flags)
        assert tuple(getattr(config, field) for field in compare.ROUTING) == expected, name
        assert compare.method_of(config) == name
    assert compare.method_of(UniPoolConfig.from_scale("182m", n_expert=50)) is None, "none of the paper's"
    for scale, n_expert in {"469m": 96, "650m": 144, "830m": 160}.items():  # the paper's reduced pools
        name = compare.method_of(UniPoolConfig.from_scale(scale, n_expert=n_expert))
        assert name == ("unipool-42" if scale == "830m" else "unipool-50")
    assert len({method.colour for method in methods.values()}) == len(methods), "one colour a method"


def make_finished_run(run, losses):
    """Its folder as ablate.py leaves it, with these validation losses in its metrics."""
    run.folder.mkdir(parents=True)
    lines = [dict(step=i + 1, tokens=1000 * (i + 1), train_loss=9.0, val_loss=loss, pool_utilisation=0.5)
             for i, loss in enumerate(losses)]  # fmt: skip
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "run.json").write_text(json.dumps(dict(flags=run.flags, machine={}, done=True)))
    (run.folder / "ckpt.pt").touch()


def test_differences_are_taken_seed_by_seed(tmp_path, capsys):
    """Seeds that differ by far more than the methods: the paired difference is exact, and its spread small."""
    given = dict(scale="tiny", max_steps=2, decay_steps=2, n_embd=64)
    runs = ablate.choose_runs(["vanilla", "unipool", "unipool-67"], [1, 2, 3], given, tmp_path)
    finals = {("vanilla", 1): 1.0, ("vanilla", 2): 2.0, ("vanilla", 3): 3.0, ("unipool", 1): 0.9,
              ("unipool", 2): 1.92, ("unipool", 3): 2.94, ("unipool-67", 1): None}  # fmt: skip
    for run in runs:
        if (run.name, run.seed) in finals:
            make_finished_run(run, [5.0, finals[run.name, run.seed]])
    # The report takes the flags from the folders, whatever is given with it.
    ablate.main(["--methods", "vanilla", "unipool", "unipool-67", "--report", f"--runs={tmp_path}", "--max_steps=9",
                 f"--results={tmp_path}", "--name=lr0.5"])  # fmt: skip
    record = json.loads((tmp_path / "lr0.5.json").read_text())
    assert record["tokens"] == 2 * 32 * 128 and record["seeds"] == [1, 2, 3]
    results = record["results"]
    assert results["UniPool"]["difference"] == pytest.approx({"1": -0.1, "2": -0.08, "3": -0.06})
    assert results["UniPool"]["val_loss"] == {"1": 0.9, "2": 1.92, "3": 2.94}
    assert results["UniPool"]["parameters"] == UniPool(UniPoolConfig.from_scale("tiny", n_embd=64)).num_params()
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert "1.9200 (0.9000 to 2.9400)" in rows[3] and "-0.0800 (-0.1000 to -0.0600)" in rows[3]
    assert "2.0000 (1.0000 to 3.0000)" in rows[2] and "-0." not in rows[2], "vanilla is not compared with itself"
    assert "unipool-67-1 is left out" in err and "67%" not in out, "a run that diverged has no loss to show"


def test_groups_of_methods_and_pools_that_do_not_fit(tmp_path, capsys):
    names = lambda groups, scale: [  # noqa: E731
        run.name for run in ablate.choose_runs(groups, [7, 7], dict(scale=scale), tmp_path)
    ]
    assert names(["main", "unipool"], "tiny") == ["dense", "vanilla", "unipool", "unipool-67", "unipool-50"]
    assert names(["table5"], "182m") == list(METHODS_AT_182M)[1:7] + ["g6", "g4", "g2"]
    capsys.readouterr()
    assert "g6" not in names(["table5"], "tiny") and "g6 is left out" in capsys.readouterr().err
    assert set(names(["all"], "182m")) == set(METHODS_AT_182M)
    runs = ablate.choose_runs(["unipool-67"], [1], dict(scale="tiny", n_layer=2), tmp_path)
    assert [run.config.n_expert for run in runs] == [11], "two thirds of 8 experts in each of 2 layers"


def test_runs_side_by_side_have_their_own_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    named = [ablate.environment_of(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert named == ["4,5", "6,7"]
    assert ablate.environment_of(0, 1, 4)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"


ABLATE = ["--methods", "vanilla", "unipool", "--scale=tiny", *(flag for flag in TINY_RUN if "n_expert" not in flag),
          "--eval_interval=1"]  # fmt: skip


def test_ablate_trains_what_is_missing_and_reports(text_data, tmp_path, capsys):
    """Two methods, one seed; then the same once more, which trains nothing; then with other flags, which is refused."""
    flags = [*ABLATE, f"--data_dir={text_data}", "--max_steps=2", f"--runs={tmp_path / 'runs'}", "--jobs=2",
             f"--results={tmp_path / 'results'}", "--seeds=5"]  # fmt: skip
    ablate.main(flags)
    first = contents(tmp_path / "runs")
    ablate.main([*flags, "--max_steps", "2"])  # the same, spelt otherwise
    assert contents(tmp_path / "runs") == first, "what is done is not done again"
    assert "2 of 2 runs are done already" in capsys.readouterr().err
    record = json.loads((tmp_path / "results" / "ablate_tiny_vanilla_unipool.json").read_text())
    for name in ("vanilla", "unipool"):
        last = json.loads((tmp_path / "runs" / f"{name}-5" / "metrics.jsonl").read_text().splitlines()[-1])
        assert record["results"][compare.methods(2)[name].label]["val_loss"] == {"5": last["val_loss"]}
    assert record["tokens"] == 2 * 8 * 32 and record["runs"].keys() == {"vanilla-5", "unipool-5"}
    assert {"commit", "cpu", "torch", "python"} <= record["machine"].keys()
    assert "| UniPool |" in (tmp_path / "results" / "ablate_tiny_vanilla_unipool.md").read_text()
    assert (tmp_path / "results" / "ablate_tiny_vanilla_unipool.png").read_bytes().startswith(b"\x89PNG")
    fails(capsys, ablate.main, [*flags, "--lr=0.01"], "vanilla-5", "--runs", touching=tmp_path)
    (tmp_path / "runs" / "unipool-5" / "run.json").unlink()  # a run of someone else's, by its looks
    fails(capsys, ablate.main, flags, "unipool-5", "--runs", touching=tmp_path)


@slow
@needs_proc
def test_ablate_stopped_in_the_middle_goes_on(text_data, tmp_path):
    """SIGTERM while runs are under way: they save; the same command then ends with the losses of an undisturbed one."""
    losses = []
    for name in ("stopped", "undisturbed"):
        flags = [*ABLATE, f"--data_dir={text_data}", "--max_steps=30", "--seeds=5", f"--runs={tmp_path / name}",
                 f"--results={tmp_path / name}"]  # fmt: skip
        launch = [sys.executable, "-m", "experiments.ablate", *flags]
        if name == "stopped":
            process = subprocess.Popen(launch, cwd=HERE, stderr=subprocess.DEVNULL)
            metrics = tmp_path / name / "vanilla-5" / "metrics.jsonl"
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
                assert process.poll() is None, "it ended too early"
                time.sleep(0.05)
            process.terminate()
            process.wait(timeout=60)
            step = torch.load(metrics.with_name("ckpt.pt"))["step"]
            assert 3 <= step < 30, f"the run should have saved when it was stopped, and has step {step}"
        assert subprocess.run(launch, cwd=HERE, capture_output=True).returncode == 0
        results = json.loads((tmp_path / name / "ablate_tiny_vanilla_unipool.json").read_text())["results"]
        losses.append({label: figures["val_loss"] for label, figures in results.items()})
    assert losses[0] == losses[1]


def test_a_run_that_fails_ends_the_others(text_data, tmp_path, capsys):
    flags = ["--methods", "dense", "--seeds=1", f"--runs={tmp_path}", "--data_dir=nowhere", "--results="]
    fails(capsys, ablate.main, flags, "dense-1", "--data_dir=nowhere", "log.txt")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--methods=best"], ["--methods=best", "unipool-67"]),
        (["--seed", "1"], ["--seed=1", "--seeds"]),
        (["--balance=layer"], ["--balance=layer", "--methods"]),
        (["--methods=g6"], ["--methods=g6", "4 layers"]),
        (["--lr=fast"], ["--lr", "fast"]),
        (["--jobs=0"], ["--jobs=0"]),
        (["--scale=1b"], ["--scale", "1b", "182m"]),
        (["--report"], ["--runs", "--report"]),
    ],
)
def test_bad_flags_of_ablate(flags, named, capsys, tmp_path):
    fails(capsys, ablate.main, [f"--runs={tmp_path / 'runs'}", *flags], *named, touching=tmp_path)


def test_compare_names_runs_by_their_method(text_data, tmp_path, capsys):
    for name, flags in {"a": [], "b": ["--arch=dense", "--n_expert=0"], "c": ["--seed=2"]}.items():
        tiny = [flag for flag in TINY_RUN if "n_expert" not in flag]
        train.main([*tiny, f"--data_dir={text_data}", f"--out_dir={tmp_path / name}", "--max_steps=2",
                    "--eval_interval=1", *flags])  # fmt: skip
    capsys.readouterr()
    runs = [str(tmp_path / name) for name in "abc"]
    compare.main([*runs, f"--out={tmp_path / 'x.png'}"])
    out = capsys.readouterr().out
    assert out.count("| UniPool |") == 2 and out.count("| dense |") == 1
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert f"{last:.4f}" in out
    fails(capsys, compare.main, [*runs, "--key=loss"], "--key=loss", "val_loss", touching=tmp_path)
    fails(capsys, compare.main, [*runs, "--key=sigma"], "--key=sigma", touching=tmp_path)  # one value for each layer
    fails(capsys, compare.main, [*runs, "--labels", "x"], "--labels", "3 runs", touching=tmp_path)
    fails(capsys, compare.main, [tmp_path / "d"], tmp_path / "d" / "metrics.jsonl", touching=tmp_path)
    fails(capsys, compare.main, [*runs, "--out=x.txt"], "--out=x.txt", touching=tmp_path)


def test_a_curve_is_the_mean_of_its_runs():
    _, ax = compare.plt.subplots()
    runs = [([1e6, 2e6, 3e6], [3.0, 2.0, 1.0]), ([1e6, 2e6], [4.0, 3.0])]
    compare.draw_curves(ax, {"UniPool": runs, "mine": runs[:1]}, "val_loss")
    first, second = ax.lines
    np.testing.assert_allclose(first.get_xydata(), [[1, 3.5], [2, 2.5]], err_msg="over the points that all runs have")
    _, other = compare.plt.subplots()
    compare.draw_curves(other, {"UniPool": [runs[0], ([2e6, 4e6], [5.0, 4.0])]}, "val_loss")
    np.testing.assert_allclose(other.lines[0].get_xydata(), [[2, 3.5]], err_msg="by tokens, not by their number")
    assert first.get_color() == compare.methods(12)["unipool"].colour != second.get_color()
    assert ax.get_xlabel() == "million training tokens"
    assert compare.smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    compare.plt.close("all")


# ----------------------------------------------------------------------------------------------------------------------
# Experiments: probes of the routing


def watched_model(**overrides):
    """A small model whose routers are watched, and what the routers themselves returned, call by call."""
    model, seen = small_model(**overrides).eval(), []
    for block in model.blocks:
        block.router.register_forward_hook(lambda module, args, result: seen.append(result))
        block.router = probe.WatchedRouter(block.router)
    return model, seen


@pytest.mark.parametrize("n_pool, top_k", [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_routing_statistics_against_counts(n_pool, top_k):
    model, seen = watched_model(n_pool=n_pool, top_k=top_k)
    found = probe.Statistics(model.config, torch.device("cpu"))
    with torch.no_grad():
        for seed in (1, 2):
            model(random_tokens(model.config, seed=seed))
            found.add([block.router for block in model.blocks])
    figures = found.summary()
    M, L = 8 // n_pool, 4
    counts = [[0] * 8 for _ in range(L)]
    met = {}  # (call, token): experts
    for i, (gates, experts, _) in enumerate(seen):
        layer = i % L
        for token, choices in enumerate(experts.tolist()):
            for expert, gate in zip(choices, gates[token].tolist()):
                if gate > 0:
                    number = layer * n_pool // L * M + expert
                    counts[layer][number] += 1
                    met.setdefault((i // L, token), set()).add(number)
    assert found.counts.tolist() == counts
    total = 2 * 3 * 16
    served = [sum(of_layer) / total / top_k for of_layer in counts]
    assert figures["unserved"] == pytest.approx([1 - share for share in served]) and min(served) < 1
    assert figures["distinct_share"] == pytest.approx(sum(map(len, met.values())) / sum(map(sum, counts)))
    loads = [sum(column) for column in zip(*counts)]
    assert figures["dead_experts"] == loads.count(0)
    assert figures["load"] == pytest.approx([load / (sum(loads) / 8) for load in loads])
    used = [sum(counts[l][i] >= sum(counts[l]) / M / 2 for l in range(L)) for i in range(8)]
    assert figures["layers_of_expert"] == used
    for l in range(L):
        scores = torch.cat([result[2] for result in seen[l::L]]).sum(dim=1).mean().item()
        gates = torch.cat([result[0] for result in seen[l::L]]).sum(dim=1).mean().item()
        assert (figures["score_sum"][l], figures["gate_sum"][l]) == pytest.approx((scores, gates), rel=1e-5)
    entropies = []
    for g in range(n_pool):
        p = np.array(loads[g * M : (g + 1) * M]) / sum(loads[g * M : (g + 1) * M])
        entropies.append(np.exp(-sum(x * np.log(x) for x in p if x)) / M)
    assert figures["utilisation"] == pytest.approx(np.mean(entropies), rel=1e-5)


@pytest.mark.parametrize("n_pool, top_k", [(1, 1), (2, 2), (4, 1)])
def test_distinct_experts_of_even_random_choices(n_pool, top_k):
    """The closed form beside the measured share, against choices that are drawn."""
    config = small_config(n_pool=n_pool, top_k=top_k)
    found = probe.Statistics(config, torch.device("cpu"))
    torch.manual_seed(0)

    class Drawn:
        experts = None

    routers = [Drawn() for _ in range(4)]
    for router in routers:
        router.experts = torch.rand(20000, 8 // n_pool).topk(top_k).indices
        router.scores = router.gates = (torch.rand(20000, top_k) < 0.8).float()  # some pairs are not served
    found.add(routers)
    figures = found.summary()
    assert figures["distinct_share"] == pytest.approx(figures["distinct_share_if_even"], abs=0.005)


def test_random_choices_are_uniform_over_the_allowed_and_keep_the_gates():
    router = NormRouter(32, 8, 2)
    watched = probe.WatchedRouter(router)
    watched.allowed, watched.generator = torch.tensor([1, 4, 5, 7]), torch.Generator().manual_seed(0)
    x = torch.randn(24000, 32)
    gates, experts, scores = watched(x)
    torch.testing.assert_close(gates, router(x)[0])
    torch.testing.assert_close(scores, router(x)[2])
    assert (experts[:, 0] != experts[:, 1]).all(), "k different experts"
    for column in experts.t():
        share = column.bincount(minlength=8) / len(x)
        torch.testing.assert_close(share, torch.tensor([0, 1, 0, 0, 1, 1, 0, 1]) / 4, atol=0.015, rtol=0)
    together = (experts == 1).any(dim=1) & (experts == 7).any(dim=1)
    assert together.float().mean().item() == pytest.approx(1 / 6, abs=0.015), "each pair is equally likely"


@pytest.mark.parametrize("alike", [True, False])
def test_probe_costs_nothing_when_all_experts_are_alike(alike, text_data):
    """And its loss is that of train.py's validation, its accuracy that of the logits."""
    config = dict(vocab_size=320, n_expert=24)
    model = small_model(**config)
    if alike:
        for weight in model.pools.parameters():
            weight.data[:] = weight.data[:1]
    data = prepare_pile.TokenData(text_data, "val", prepare_pile.read_meta(text_data, 320), 16, 320)
    reference = small_model(**config)
    reference.load_state_dict(model.state_dict())
    device = torch.device("cpu")
    figures = probe.probe(model.eval(), data, 512, 2, device, "test")
    loss = train.validate(reference, data, 512, 8, 0, 1, device)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    indices = np.linspace(0, len(data) - 1, 32).astype(np.int64)
    tokens = torch.from_numpy(data.sequences(indices))
    logits = reference.eval()(tokens[:, :-1]).logits
    assert figures["accuracy"] == pytest.approx((logits.argmax(-1) == tokens[:, 1:]).float().mean().item())
    assert figures["probe"].keys() == {"uniform", "matched"} and figures["tokens"] == 512
    changes = []
    for way in figures["probe"].values():
        assert way.keys() == {2, 3}, "the deeper half of four layers"
        changes += [change for layer in way.values() for change in layer["loss"]]
    assert len(changes) == 8 and (max(map(abs, changes)) < 1e-5) == alike, f"changes of the loss: {changes}"


def test_probe_as_a_command(text_data, tmp_path, capsys):
    for name, flags in {"unipool": [], "vanilla": ["--arch=vanilla"], "dense": ["--arch=dense"]}.items():
        tiny = [flag for flag in TINY_RUN if "n_expert" not in flag]
        train.main([*tiny, f"--data_dir={text_data}", f"--out_dir={tmp_path / name}", "--max_steps=2", *flags])
    capsys.readouterr()
    runs = [str(tmp_path / "unipool"), str(tmp_path / "vanilla")]
    probe.main([*runs, "--tokens=256", "--draws=2", "--device=cpu", f"--results={tmp_path / 'results'}"])
    assert "| | UniPool | vanilla |" in capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "probe.json").read_text())
    assert record["results"]["UniPool"]["tokens"] == 256 and record["results"]["vanilla"]["distinct_share"] == 1
    assert len(record["results"]["UniPool"]["unserved"]) == 2 == len(record["results"]["UniPool"]["sigma"])
    assert "matched" not in record["results"]["vanilla"]["probe"], "8 experts are all a vanilla layer has"
    for picture in ("usage", "routing"):
        assert (tmp_path / "results" / f"probe_{picture}.png").read_bytes().startswith(b"\x89PNG")
    fails(capsys, probe.main, [tmp_path / "dense", "--device=cpu"], tmp_path / "dense", "dense", touching=tmp_path)
    fails(capsys, probe.main, [tmp_path / "none"], tmp_path / "none", touching=tmp_path)
    fails(capsys, probe.main, [*runs, "--draws=0"], "--draws=0", touching=tmp_path)
    fails(capsys, probe.main, [*runs, "--data_dir=nowhere"], "--data_dir=nowhere", touching=tmp_path)


def test_study_of_the_balance_loss(text_data, tmp_path, capsys):
    """Two coefficients with two steps; f with phantom load counts every pair, also those that no expert serves."""
    gates, experts = torch.tensor([[0.5], [0.0], [0.0]]), torch.tensor([[1], [2], [2]])
    weights = [w.detach() for w in ExpertPool(4, 16, 24).weights()]
    _, f = study.with_phantom_load(torch.randn(3, 16), gates, experts, weights)
    torch.testing.assert_close(f, torch.tensor([0, 1, 2, 0]) / 3)
    flags = [
        f"--data_dir={text_data}",
        *TINY_RUN,
        "--max_steps=2",
        "--coefs",
        "0",
        "0.1",
        "--seeds",
        "1",
        "--tokens=256",
    ]
    study.main([*flags, f"--runs={tmp_path / 'runs'}", f"--results={tmp_path}"])
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"0-served-1", "0.1-served-1", "0.1-phantom-1"}
    results = json.loads((tmp_path / "balance.json").read_text())["results"]
    assert len(results) == 4 and all(0 <= f["1"]["unserved"] < 1 for f in results.values())
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")
    fails(capsys, study.main, ["--jobs=0"], "--jobs=0")


# ----------------------------------------------------------------------------------------------------------------------
# Experiments: zero-shot tasks


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def adapter():
    pytest.importorskip("lm_eval", reason="an extra: pip install lm_eval==0.4.13")
    model = small_model(vocab_size=320, block_size=32).eval()
    return evaluate.Adapter(model, get_tokenizer("bytes"), batch_size=3)


@torch.no_grad()
def log_p_by_hand(model, tokens):
    """log p of each token of a list, given those before it, from the model's logits: the first has none."""
    log_p = F.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
    return [None] + [log_p[i, token].item() for i, token in enumerate(tokens[1:])]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@torch.no_grad()
def test_log_likelihoods_by_hand(name, adapter):
    """Texts of all lengths, in batches of three; also without context, and longer than the model's 32 tokens."""
    if name == "gpt2":
        adapter = evaluate.Adapter(small_model(vocab_size=51200, block_size=32).eval(), gpt2_or_skip(), batch_size=3)
    encode, model = adapter.tokens.encode, adapter.model
    requests = [("def f", "(x)"), ("", "abc"), ("a b c d e f", " g h" * 4), ("x", " y"), ("zy 0" * 30, " later"),
                ("q", " r" * 33), ("Naïve café, 你好", " 😀")]  # fmt: skip
    found = adapter.loglikelihood([Request(*pair) for pair in requests], disable_tqdm=True)
    for (context, continuation), (log_p, greedy) in zip(requests, found):
        tokens = encode(context + continuation) if context else [adapter.tokens.eot_token, *encode(continuation)]
        kept = tokens[-33:]  # 32 tokens of input, and the last one
        predicted = min(len(encode(continuation)), len(kept) - 1)
        logits = model(torch.tensor([kept[:-1]])).logits[0].double()
        steps = F.log_softmax(logits, dim=-1)
        by_hand = [steps[i, token].item() for i, token in enumerate(kept[1:])]
        assert log_p == pytest.approx(sum(by_hand[-predicted:]), rel=1e-5), (context, continuation)
        assert greedy == (logits[-predicted:].argmax(-1).tolist() == kept[-predicted:])


@torch.no_grad()
def test_greedy_continuation_is_recognised(adapter):
    context = list(b"import os")
    likeliest = adapter.model(torch.tensor([context])).logits[0, -1].argmax().item()
    other = (likeliest + 1) % 256
    found = adapter._loglikelihood_tokens([(None, context, [likeliest]), (None, context, [other])], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]


@torch.no_grad()
def test_rolling_log_likelihoods_by_hand(adapter):
    """Every token once; those that do not fit into the first window of 32 are predicted in windows of their own."""
    short, long = "hello world", "0123456789" * 7  # 70 tokens: windows of 32, 32 and 6
    found = adapter.loglikelihood_rolling([Request(short), Request(long)], disable_tqdm=True)
    assert found[0] == pytest.approx(sum(log_p_by_hand(adapter.model, [256, *short.encode()])[1:]), rel=1e-5)
    tokens, total = [256, *long.encode()], 0.0
    for start, end, first in ((0, 32, 0), (32, 64, 0), (38, 70, 26)):  # inputs start ... end - 1 predict the next
        log_p = F.log_softmax(adapter.model(torch.tensor([tokens[start:end]])).logits[0].double(), dim=-1)
        total += sum(log_p[i, tokens[start + i + 1]].item() for i in range(first, end - start))
    assert found[1] == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_continuations_stop_where_they_should(adapter):
    """Against greedy decoding one token at a time; stop strings are left out."""
    prompts = ["one", "two", "three", "four", "five"]
    texts = []
    for prompt in prompts:
        tokens = list(prompt.encode())
        for _ in range(20):
            tokens.append(adapter.model(torch.tensor([tokens])).logits[0, -1, :257].argmax().item())
        new = tokens[len(prompt) :]
        new = new[: new.index(256)] if 256 in new else new
        texts.append(bytes(new).decode("utf-8", errors="replace"))
    plain = dict(until=[], max_gen_toks=20)
    assert adapter.generate_until([Request(p, plain) for p in prompts], disable_tqdm=True) == texts
    stop = texts[2][5:7]
    stopped = adapter.generate_until([Request(p, dict(until=[stop], max_gen_toks=20)) for p in prompts], True)
    assert stopped == [text.split(stop)[0] for text in texts] and stopped[2] != texts[2]


TASK = """
task: endings
dataset_path: json
dataset_kwargs:
  data_files: {folder}/endings.jsonl
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_a_local_task_through_the_harness(text_data, tmp_path, capsys, monkeypatch):
    """Accuracy on a task of our own, against choosing the likeliest ending by hand; offline."""
    pytest.importorskip("lm_eval", reason="an extra: pip install lm_eval==0.4.13")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train.main([*TINY_RUN, f"--data_dir={text_data}", f"--out_dir={tmp_path / 'out'}", "--max_steps=5"])
    rng = random.Random(0)
    examples = [dict(text=f"def f{i}(self", endings=[rng.choice([")", "):", " x", "zz", "=1"]) + rng.choice("ab ")
                     for _ in range(3)], right=rng.randrange(3)) for i in range(12)]  # fmt: skip
    (tmp_path / "endings.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "endings.yaml").write_text(TASK.format(folder=tmp_path))
    flags = ["--tasks", "endings", f"--include_path={tmp_path / 'tasks'}", "--device=cpu"]
    evaluate.main([str(tmp_path / "out"), *flags, f"--results={tmp_path / 'results'}"])
    model = train.load_model(train.load_checkpoint(tmp_path / "out" / "ckpt.pt"), "", torch.device("cpu"))
    rights = []
    for example in examples:
        sums = []
        for ending in example["endings"]:
            n = len(example["text"])
            sums.append(sum(log_p_by_hand(model, list((example["text"] + ending).encode()))[n:]))
        rights.append(np.argmax(sums) == example["right"])
    record = json.loads((tmp_path / "results" / "evaluate.json").read_text())
    assert record["results"]["endings"]["acc,none"] == pytest.approx(np.mean(rights))
    assert 0 < np.mean(rights) < 1, "the test needs right and wrong answers"
    capsys.readouterr()
    fails(capsys, evaluate.main, [tmp_path / "out", "--tasks=nothing", "--device=cpu"], "--tasks=nothing")


def test_the_harness_is_an_extra(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "lm_eval", None)
    fails(capsys, evaluate.main, ["out"], "pip install lm_eval")
    fails(capsys, evaluate.main, ["out", "--batch_size=0"], "--batch_size=0")


# ----------------------------------------------------------------------------------------------------------------------
# The commands themselves, and the README


def test_commands_from_text_to_text(tmp_path):
    """prepare_pile.py, train.py, train.py --resume and sample.py, run in an empty folder as a user runs them."""
    write_jsonl(tmp_path / "mine.jsonl.zst")
    result = command(
        "prepare_pile.py", "--source", "mine.jsonl.zst", "--tokenizer=bytes", "--out_dir=data/mine", cwd=tmp_path
    )
    assert result.returncode == 0 and b"data/mine: " in result.stdout, result.stderr.decode()
    result = command("train.py", "--data_dir=data/mine", *TINY_RUN, "--max_steps=3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    assert b"python sample.py" in result.stdout.splitlines()[-1] and b"tokens/s" in result.stderr
    result = command("train.py", "--resume", "--data_dir=data/mine", "--max_steps=4", cwd=tmp_path)
    assert result.returncode == 0 and b"step 4" in result.stdout, result.stderr.decode()
    texts = []
    for prompt in (["--prompt=Document é"], ["--prompt=-"]):
        flags = ["--num_samples=2", "--max_new_tokens=40", "--seed=3", *prompt]
        result = command("sample.py", *flags, cwd=tmp_path, input="Document é".encode())
        assert result.returncode == 0, result.stderr.decode()
        texts.append(result.stdout.decode())
    assert texts[0] == texts[1], "the same prompt, by flag or standard input, and seed give the same text"
    assert texts[0].count("-" * 80 + "\nDocument é") == 2
    result = command("sample.py", "--max_new_tokens=5", cwd=tmp_path, input=b"")
    assert result.returncode == 0, "without a prompt it begins at the start of a document"


@pytest.mark.parametrize(
    "arguments",
    [["train.py", "--scale=1b"], ["train.py", "--top_k=99"], ["sample.py"], ["prepare_pile.py", "--source", "nothing"]],
)
def test_bad_input_as_a_command(arguments, tmp_path):
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"{arguments[0]}: error: ".encode()) and result.stderr.count(b"\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_pile.py"])
def test_help(script):
    result = command(script, "--help")
    assert result.returncode == 0 and b"--out_dir" in result.stdout and not result.stderr


EXPERIMENTS = [path.stem for path in sorted((HERE / "experiments").glob("*.py")) if "def main(" in path.read_text()]


@pytest.mark.parametrize("module", EXPERIMENTS)
def test_help_of_experiments(module, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"experiments.{module}").main(["--help"])
    assert stop.value.code == 0 and f"python -m experiments.{module}" in capsys.readouterr().out


def test_readme_points_at_the_lines_it_names():
    """Each [`code`](file#L12) in the README names the one line with that code; UPDATE_README=1 corrects the numbers."""
    readme = (HERE / "README.md").read_text()

    def correct(link):
        code, file, _ = link.groups()
        numbers = [n for n, line in enumerate((HERE / file).read_text().splitlines(), start=1) if code in line]
        assert len(numbers) == 1, f"{code} of the README is on lines {numbers} of {file}: name what stands there once"
        return f"[`{code}`]({file}#L{numbers[0]})"

    corrected, links = re.subn(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", correct, readme)
    assert links >= 12, "the map from equations to lines is missing"
    if os.environ.get("UPDATE_README"):
        (HERE / "README.md").write_text(corrected)
    else:
        assert corrected == readme, "lines have moved: UPDATE_README=1 pytest -k readme"


def test_readme_flags_exist():
    """Every train.py command in the README parses, and its model can be built."""
    readme = (HERE / "README.md").read_text()
    commands = re.findall(r"train\.py((?: +--(?!help)[\w-]+(?:=[^\s`]+)?)+)", readme)
    assert len(commands) > 8
    for flags in commands:
        given = train.parse_flags(flags.split())
        if not given.pop("resume", False):
            train.settle(given, None)

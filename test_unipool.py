"""Every claim of the other files, checked against something independent of them: the paper's figures, numpy, a loop
over tokens, brute-force counts, or the same model computed another way.

    pytest                      # offline, in minutes
    pytest -k "router or loss"  # a part
    SLOW=1 pytest               # also those that kill runs again and again
"""

import contextlib
import copy
import functools
import gzip
import importlib
import io
import itertools
import json
import math
import os
import platform
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
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import prepare_pile
import sample
import train
import unipool
from command import BadInput, only_one, run_command
from experiments import ablate, bench, common, compare, depth, evaluate, export, probe
from experiments import balance as study
from experiments.fake_gpu import WHY_NOT
from prepare_pile import SOURCES, get_tokenizer, prepare
from unipool import ARCHS, ROUTERS, ExpertPool, NormRouter, PoolGradient, UniPool, UniPoolConfig

HERE = Path(__file__).parent
torch.set_num_threads(2)
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by /proc")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes: SLOW=1 runs it")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = [dict(), dict(top_k=2), dict(n_pool=4, router="softmax", top_k=2), dict(n_expert=0)]  # of models
ROUNDING = dict(rtol=1e-3, atol=1e-5)  # what several steps make of it


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


def assert_close(got, expected, what="", **tolerance):
    """Tensors, or dicts of tensors with the same names, are equal up to rounding; the message names what is not."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, **tolerance, msg=lambda m: f"{what}: {m}")
    else:
        assert got.keys() == expected.keys(), what
        for name in expected:
            assert_close(got[name], expected[name], f"{what} {name}", **tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Configuration and size


@pytest.mark.parametrize("scale, L, C, heads, alpha, printed", [
    ("182m", 12, 768, 12, 1e-2, 777.9e6),
    ("469m", 24, 1024, 16, 2e-2, 2.588e9),
    ("650m", 36, 1024, 16, 2e-2, 3.834e9),
    ("830m", 48, 1024, 16, 2e-2, 5.081e9),
    ("978m", 24, 1536, 16, 2e-2, 5.742e9),
])  # fmt: skip
def test_the_papers_scales(scale, L, C, heads, alpha, printed):
    """Table 6, with the number of parameters to the digits that it prints, and the settings of the baselines."""
    configs = {arch: UniPoolConfig.from_scale(scale, arch) for arch in ARCHS}
    for c in configs.values():
        assert (c.n_layer, c.n_embd, c.n_hidden, c.n_head, c.n_kv_head) == (L, C, 4 * C, heads, 4)
        assert (c.block_size, c.top_k, c.rope_base, c.norm_eps, c.init_std) == (1024, 1, 1e6, 1e-5, 0.01)
    routing = {arch: (c.n_expert, c.n_pool, c.router, c.balance, c.balance_coef) for arch, c in configs.items()}
    assert routing["unipool"] == (8 * L, 1, "norm", "pool", alpha)
    assert routing["vanilla"] == (8 * L, L, "softmax", "layer", 1e-2), "8 private experts per layer"
    assert routing["dense"][0] == 0
    assert UniPoolConfig.from_scale(scale, balance="layer").balance_coef == 1e-2
    assert UniPoolConfig.from_scale(scale, "vanilla", balance="pool").balance_coef == alpha

    ffn = 3 * C * 4 * C
    common = 2 * 51200 * C + L * (2 * C * C + 2 * C * 4 * C // heads) + (2 * L + 1) * C  # embeddings, attention, norms
    routers = {"unipool": L * (8 * L * C + 1), "vanilla": L * 8 * C, "dense": 0}
    with torch.device("meta"):
        models = {arch: UniPool(config) for arch, config in configs.items()}
    for arch, model in models.items():
        n_ffn = L if arch == "dense" else 8 * L
        assert model.num_params() == common + routers[arch] + n_ffn * ffn, f"{arch} stores another number of parameters"
        assert model.num_params(active=True) == common + routers[arch] + L * ffn, "one expert a layer is active"
    stored = models["unipool"].num_params()
    assert f"{stored:.3e}" == f"{printed:.3e}", "Table 6 prints another number"
    assert scale != "182m" or stored == 777_898_764, "the README's figure"
    assert abs(models["dense"].num_params() / float(scale[:-1]) / 1e6 - 1) < 0.01, "a scale is named by its dense twin"


def test_training_recipe_of_table_8_and_its_learning_rate():
    settings, _ = train.settle(dict(scale="182m"), None)
    assert (settings.max_steps, settings.batch_size, settings.lr, settings.min_lr) == (60_000, 512, 5e-4, 5e-5)
    assert (settings.warmup, settings.grad_clip, settings.weight_decay) == (0.01, 1.0, 0.01)
    assert (settings.beta1, settings.beta2, settings.adam_eps) == (0.9, 0.999, 1e-8)
    at = [train.learning_rate(step, settings) for step in range(60_000)]
    assert at[0] == pytest.approx(5e-4 / 600) and at[599] == pytest.approx(5e-4), "warm-up is 1% of the steps"
    assert at[600] == pytest.approx(5e-4) and at[600 + 59_400 // 2] == pytest.approx((5e-4 + 5e-5) / 2)
    assert at[-1] == pytest.approx(5e-5, rel=1e-3) and train.learning_rate(10**6, settings) == pytest.approx(5e-5)
    assert at[600:] == sorted(at[600:], reverse=True)


@pytest.mark.parametrize("fields", [
    dict(scale="1b"), dict(arch="mixtral"), dict(router="best"), dict(balance="best"), dict(arch="dense", n_expert=8),
    dict(top_k=33, n_expert=32), dict(top_k=9, n_pool=4), dict(top_k=0), dict(n_layer=0), dict(n_pool=3, n_layer=4),
    dict(n_pool=4, n_expert=10), dict(n_head=5, n_embd=128), dict(n_kv_head=3, n_head=4), dict(rope_base=1e-300),
    dict(n_embd=36, n_head=4),  # heads of width 9
])  # fmt: skip
def test_impossible_configurations_name_their_fields(fields):
    with pytest.raises(ValueError) as error:
        UniPoolConfig.from_scale(**(dict(scale="tiny") | fields))
    for name, value in fields.items():
        assert f"{name}={value!r}" in str(error.value), f"the message should name {name} and its value: {error.value}"


@pytest.mark.parametrize("n_expert", [8, 0])
def test_initialisation(n_expert):
    model = small_model(n_embd=64, n_hidden=256, init_std=0.01, n_expert=n_expert)
    for name, p in model.named_parameters():
        if "norm" in name or "sigma" in name:
            assert (p == 1).all(), f"{name} should start at 1"
        else:
            expected = 0.01 / math.sqrt(2 * 4) if "attention.out" in name or "down" in name else 0.01
            error = abs(p.std().item() / expected - 1)
            assert error < 5 / math.sqrt(2 * p.numel()), f"{name}: std {p.std():.5f}, should be {expected:.5f}"
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), f"{name} should have mean 0"


def test_flops_count_active_experts_only():
    with torch.device("meta"):
        few, many = (UniPool(UniPoolConfig.from_scale("182m", n_expert=n)) for n in (48, 96))
        twice = UniPool(UniPoolConfig.from_scale("182m", top_k=2))
        dense = UniPool(UniPoolConfig.from_scale("tiny", "dense"))
    an_expert_a_layer = 6 * 12 * 3 * 768 * 3072
    assert many.flops_per_token() - few.flops_per_token() == 6 * 12 * 48 * 768, "of idle experts only the routers count"
    assert twice.flops_per_token() - many.flops_per_token() == an_expert_a_layer, "a second expert a layer counts"
    assert twice.flops_per_token() - twice.flops_per_token(served=0.5) == an_expert_a_layer, "unserved pairs do not"
    # Every multiplication of a dense model by hand: attention's projections, FFN, head, and scores and values.
    c = dense.config
    per_layer = c.n_embd * (c.n_embd + 2 * c.n_kv_head * c.head_dim) + c.n_embd**2 + 3 * c.n_embd * c.n_hidden
    forward = 2 * (c.n_layer * per_layer + c.n_embd * c.vocab_size) + c.n_layer * 4 * c.block_size * c.n_embd
    assert dense.flops_per_token() == 3 * forward, "backward costs twice the forward pass"


# ----------------------------------------------------------------------------------------------------------------------
# Routers, against numpy in double precision


@pytest.mark.parametrize("name", ["norm", "softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_router_against_numpy(name, top_k):
    torch.manual_seed(0)
    router = ROUTERS[name](24, 10, top_k)
    x = torch.randn(50, 24)
    x[0], x[1] = 0, 100 * x[2]  # z = 0 must not become NaN; NormRouter does not depend on the scale of x
    router.bias.normal_()
    z = x.double().numpy() @ router.weight.detach().double().numpy().T
    if name == "norm":
        router.sigma.data.fill_(0.7)
        expected = 0.7 * router.c * np.maximum(0, z / (np.sqrt((z**2).sum(axis=1, keepdims=True)) + 1e-8))
    else:
        expected = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) if name == "softmax" else 1 / (1 + np.exp(-z))
    gates, experts, scores = router(x)
    assert gates.shape == experts.shape == (50, top_k) and scores.shape == (50, 10)
    assert experts.dtype == torch.int64 and scores.dtype == gates.dtype == torch.float32
    np.testing.assert_allclose(scores.detach().numpy(), expected, atol=1e-5, err_msg="scores differ from the formula")
    swayed = expected + router.bias.double().numpy()
    best = np.sort(swayed, axis=1)[:, ::-1][:, :top_k]
    chosen, unswayed = (np.take_along_axis(a, experts.numpy(), axis=1) for a in (swayed, expected))
    np.testing.assert_allclose(chosen, best, atol=1e-5, err_msg="experts must have the k best scores plus bias")
    np.testing.assert_allclose(gates.detach().numpy(), unswayed, atol=1e-5, err_msg="gates must be scores as they are")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x)[2], scores), "autocast must not reach the router"
    assert router.bfloat16()(x.bfloat16())[2].dtype == torch.float32


@pytest.mark.parametrize("top_k, n_expert", [(1, 16), (1, 32), (1, 64), (1, 96), (1, 192), (1, 384), (2, 16), (2, 96),
                                             (4, 96), (32, 32)])  # fmt: skip
def test_gates_of_an_untrained_norm_router_have_norm_one(top_k, n_expert):
    """What c is for (Eq. 12), with other draws than those that made it: logits that are independent normals."""
    router = NormRouter(n_expert, n_expert, top_k)
    torch.nn.init.eye_(router.weight)
    z = torch.randn(40_000, n_expert, generator=torch.Generator().manual_seed(5))
    z = z[(z > 0).any(dim=1)]  # all but one in 2^n_expert
    assert (1 / router(z)[0].norm(dim=1)).mean().item() == pytest.approx(1, abs=0.01)
    assert (top_k, n_expert) != (1, 96) or round(router.c, 1) == 4.0, "the paper's figure"


def test_norm_router_scale_is_finite_everywhere():
    for n_expert in [*range(1, 33), 48, 64, 96, 128, 192, 288, 384, 512]:
        for top_k in {1, min(2, n_expert), n_expert}:
            c = unipool.norm_router_scale(n_expert, top_k)
            assert math.isfinite(c) and 0.9 < c < 10, f"c({n_expert}, {top_k}) = {c}"
    assert unipool.norm_router_scale(1, 1) == pytest.approx(1), "a positive unit vector of one entry has norm 1"
    before = unipool.norm_router_scale(8, 1)
    unipool.norm_router_scale.cache_clear()
    assert unipool.norm_router_scale(8, 1) == before, "c must not vary"


def test_bias_moves_towards_balance():
    model = small_model(router="sigmoid", balance="bias", bias_rate=1e-3)
    usage = torch.full((4, 8), 0.125)
    usage[2] = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0, 0.0, 0.0, 0.0])
    model.update_bias(usage)
    expected = torch.tensor([-1, -1, 0, 0, 1, 1, 1, 1]) * 1e-3
    assert_close(model.blocks[2].router.bias, expected, "overloaded down, underloaded up, by the rate")
    assert (model.blocks[0].router.bias == 0).all(), "an even load moves nothing"


# ----------------------------------------------------------------------------------------------------------------------
# The pool, its dispatch and the balance losses, against loops over tokens


def loop_over_tokens(pool, x, gates, experts, activation=F.silu):
    """Eq. 2 as it is written."""

    def expert(x, i):
        gate, up = (x @ pool.gate_up[i]).chunk(2)
        return (activation(gate) * up) @ pool.down[i]

    return torch.stack([sum(g * expert(x_n, i) for g, i in zip(*pairs)) for x_n, *pairs in zip(x, gates, experts)])


@pytest.fixture(params=["expert by expert", "in one product", "in one product, in chunks"])
def way(request, monkeypatch):
    """How products and the gradient of a weight are made: expert by expert, or as on a GPU by grouped products, which
    torch has for fp32 on a CPU too; then with room for the records of all layers, or hardly for one."""
    monkeypatch.setattr(unipool, "has_grouped_mm", lambda weight: "in one product" in request.param)
    monkeypatch.setattr(PoolGradient, "capacity", 0.02 if "chunks" in request.param else 1000)
    return request.param


@pytest.fixture
def products(monkeypatch):
    """The calls of F.grouped_mm: "forward" for X W, "gradient" for X^T dY. And what products leave undefined is not a
    number, as a GPU may leave it: rows behind the last expert's, gradients of experts without rows, new tensors."""
    calls, real = [], F.grouped_mm

    def grouped_mm(a, b, offs):
        out = real(a, b, offs=offs)
        if b.dim() == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        else:
            out[offs[-1] :] = torch.nan
        calls.append("gradient" if b.dim() == 2 else "forward")
        return out

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    torch.use_deterministic_algorithms(True)  # fills new tensors with nan
    yield calls
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("chosen, lowest, highest, activation", [
    (range(6), 0.1, 1, F.silu),
    (range(6), 0.1, 1, F.gelu),  # a fork changes swiglu and nothing else
    ([1, 2, 4], 0.1, 1, F.silu),
    ([3, 3], 0.1, 1, F.silu),
    (range(5), -1, 1, F.silu),
    (range(6), -1, -0.1, F.silu),
], ids=["all", "another activation", "some", "one, also twice", "some gates 0", "all gates 0"])  # fmt: skip
def test_pool_against_a_loop_over_tokens(top_k, chosen, lowest, highest, activation, way, products, monkeypatch):
    """No token is dropped, whatever the load. Pairs whose gate is 0 add nothing, are not computed, and not in f. Under
    autocast the products are in bf16, and the gated sum over k in fp32."""
    if activation is not F.silu:
        monkeypatch.setattr(unipool, "swiglu", lambda hidden: activation(hidden[..., :24]) * hidden[..., 24:])
    torch.manual_seed(0)
    pool = ExpertPool(6, 16, 24)
    experts = torch.stack([torch.tensor(chosen)[torch.randperm(len(chosen))[:top_k]] for _ in range(20)])
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(20, 16)
    z = torch.empty(20, top_k).uniform_(lowest, highest)
    if lowest < 0:
        z[experts == 4] = -1  # chosen, but never with a gate
    z.requires_grad_()

    def results(y):
        gradients = torch.autograd.grad((y * weight).sum(), [x, z, pool.gate_up, pool.down])
        return dict(zip(["y", "d x", "d z", "d gate_up", "d down"], [y.detach(), *gradients]))

    expected = results(loop_over_tokens(pool, x, z.relu(), experts, activation))
    load = torch.stack([((experts == i) & (z > 0)).sum() for i in range(6)])
    for one_pass in (True, False):
        y, f = unipool.pool_ffn(x, z.relu(), experts, pool.weights(one_pass))
        got = results(y)
        assert_close(got, expected, f"one_pass={one_pass}")
        assert_close(f, load / experts.numel(), "f must be the share that is served")
        for name in ("d gate_up", "d down"):
            assert (got[name][load == 0] == 0).all(), f"{name} of experts without rows must be exactly zero"
    assert bool(products) == (way != "expert by expert"), "the test must take the way that it names"
    with torch.no_grad():
        assert_close(pool(x, z.relu(), experts), y, "by itself")
        each = [unipool.pool_ffn(x[[n]], z[[n]].relu(), experts[[n]], pool.weights()) for n in range(20)]
    assert_close(torch.cat([y_n for y_n, _ in each]), y, "one token at a time, as in decoding")
    assert_close(torch.stack([f_n for _, f_n in each]).mean(dim=0), f, "f of one token at a time", check_dtype=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = unipool.pool_ffn(x, z.relu(), experts, pool.weights())
    assert_close(rounded, y, "in bf16", atol=0.03, rtol=0.03)
    assert torch.equal(rounded, y) == (highest < 0), "the products must be in bf16"


@pytest.mark.parametrize("router", ["norm", "softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["pool", "layer", "bias", "none"])
@pytest.mark.parametrize("n_pool", [1, 2, 4])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_switch_against_counts(router, balance, n_pool, top_k):
    """From what its routers return. The losses of several pools are summed, each over its own layers."""
    model, seen = small_model(router=router, balance=balance, n_pool=n_pool, top_k=top_k), []
    for block in model.blocks:
        block.router.register_forward_hook(lambda module, args, result: seen.append(result))
    idx, M = random_tokens(model.config), 8 // n_pool
    out = model(idx, idx)
    (out.loss + out.balance_loss).backward(retain_graph=True)
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), f"{name} got no finite gradient"
    f = torch.tensor([[((experts == i) & (gates > 0)).sum() / experts.numel() for i in range(M)]
                      for gates, experts, _ in seen])  # fmt: skip
    P = torch.stack([scores.mean(dim=0) for _, _, scores in seen])
    assert_close(out.usage, f, "usage must be the share of the choices that is served")
    assert_close(out.mean_scores, P, "mean_scores")
    together = 4 // n_pool if balance == "pool" else 1  # layers over which the mean is taken first
    groups = [slice(l, l + together) for l in range(0, 4, together)]
    expected = sum(M * (f[g].mean(dim=0) * P[l]).sum() / together for g in groups for l in range(4)[g]).item()  # Eq. 6
    assert out.balance_loss.item() == pytest.approx(expected if unipool.BALANCES[balance] else 0, rel=1e-5)
    if balance in ("bias", "none"):
        return
    model.zero_grad()
    out.balance_loss.backward()
    for name, p in model.blocks.named_parameters():
        assert "router" not in name or (p.grad != 0).any(), f"the loss does not press on {name}"
    if n_pool == 4:  # other pools serve layers whose output reaches later routers
        of_experts = [p.grad for p in model.pools[-1].parameters()]
        assert all(grad is None or (grad == 0).all() for grad in of_experts), "it must not flow through its own experts"


# ----------------------------------------------------------------------------------------------------------------------
# UniPool-lock


def partition(L, M, seed=0):
    """A random owner for each expert, each layer having equally many: (L, M) bool."""
    owner = torch.randperm(M, generator=torch.Generator().manual_seed(seed)) % L
    return owner == torch.arange(L)[:, None]


def test_assignment_against_all_partitions():
    """2 layers, 4 experts: the six ways of giving each layer two."""
    for seed in range(20):
        usage = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed))
        owned = unipool.assign_experts(usage)
        assert owned.sum(dim=0).tolist() == [1] * 4 and owned.sum(dim=1).tolist() == [2, 2]
        best = max(usage[0, list(first)].sum() + usage[1, [i for i in range(4) if i not in first]].sum()
                   for first in itertools.combinations(range(4), 2))  # fmt: skip
        assert usage[owned].sum().item() == pytest.approx(best.item())


def test_cardinality_loss_against_numpy():
    P = np.random.default_rng(0).random((5, 12))
    p = P / P.sum(axis=1, keepdims=True)
    expected = np.mean([(-(row * np.log(row)).sum() - math.log(3)) ** 2 for row in p])
    assert unipool.cardinality_loss(torch.tensor(P), 3).item() == pytest.approx(expected, rel=1e-6)


def test_the_anneal_of_a_lock():
    """Scores of others' experts fade as (1 + cos(pi x)) / 2, their own stay, and nothing jumps at the lock."""
    model, owned = small_model(top_k=2), partition(4, 8)
    idx = random_tokens(model.config)
    before = model(idx)
    model.lock(owned, 0)
    assert_close(model(idx).logits, before.logits, "at 0", rtol=0, atol=0)
    for progress, seen in ((1e-9, 1 - 2**-24), (1 / 3, 0.75), (1 / 2, 0.5), (2 / 3, 0.25), (1, 0.0)):
        model.lock(owned, progress)
        for block, own in zip(model.blocks, owned):
            assert_close(block.router.seen, torch.where(own, 1.0, seen), f"at {progress}")
            assert torch.equal(block.router.seen == 1, own), "a run that is resumed finds the owners so"
    router, x = model.blocks[0].router, torch.randn(50, 32)
    _, experts, scores = router(x)
    assert owned[0][experts].all() and (scores[:, ~owned[0]] == 0).all()
    model.lock(owned, 1 - 1e-4)
    assert_close(router(x)[2], scores, "just before", rtol=0, atol=1e-6)
    model.lock(owned, 1)
    out = model(idx, idx)
    assert (out.usage[~owned] == 0).all() and (out.mean_scores[~owned] == 0).all(), "exactly"
    (out.loss + out.balance_loss).backward()


# ----------------------------------------------------------------------------------------------------------------------
# Sharing, and the pool's gradient in one pass, against autograd's


@pytest.mark.parametrize("fields", [dict(), dict(n_pool=2, top_k=2), dict(n_pool=4, router="softmax", top_k=2)])
def test_a_pool_is_shared_by_adjacent_layers(fields):
    """Against a vanilla MoE by hand: each layer has its own copy of its pool, and loops over tokens. Outputs are equal,
    and a pool's gradient is the sum of its copies'. All norms are new, and have the weight 1."""
    model = small_model(**fields)
    assert sum("pool" in name for name in model.state_dict()) == 2 * model.config.n_pool, "each pool is stored once"
    idx = random_tokens(model.config)
    copies = [[copy.deepcopy(pool) for _ in range(4 // len(model.pools))] for pool in model.pools]
    x, norm = model.embedding(idx), functools.partial(F.rms_norm, normalized_shape=(32,), eps=1e-5)
    for block, own_pool in zip(model.blocks, sum(copies, [])):
        x = x + block.attention(norm(x), model.rope)
        h = norm(x).flatten(0, 1)
        gates, experts, _ = block.router(h)
        x = x + loop_over_tokens(own_pool, h, gates, experts).view_as(x)
    logits = model.head(norm(x))
    F.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
    out = model(idx, idx)
    out.loss.backward()
    assert_close(out.logits, logits, "logits", rtol=1e-4, atol=1e-5)
    for pool, of_layers in zip(model.pools, copies):
        for name, p in pool.named_parameters():
            parts = [getattr(own_pool, name).grad for own_pool in of_layers]
            assert all((part != 0).any() for part in parts), f"a layer contributes nothing to {name}"
            assert_close(p.grad, sum(parts), name, rtol=1e-4, atol=1e-6)


def training_loss(model, seed=1):
    idx = random_tokens(model.config, seed=seed).to(model.head.weight.device)
    out = model(idx, idx, keep_logits=False)
    return out.loss + out.balance_loss


def micro_batches(model):
    for seed in (2, 3):
        training_loss(model, seed).backward()
    return training_loss(model)


def through_the_layers(model):
    """The pool's weights, and the residual stream behind each layer."""
    x, weights, after = model.embedding(random_tokens(model.config)), model.pools[0].weights(model.one_pass), []
    for block in model.blocks:
        x, _, _ = block(x, model.rope, weights)
        after.append(x)
    return weights, after


def another_use(model):
    """Say, a fork's penalty on the weights that the layers use."""
    weights, after = through_the_layers(model)
    return after[-1].square().sum() + weights[1].square().sum()


def recomputed(model):
    model.recompute = True
    return training_loss(model)


def frozen_weights(model):
    model.pools[0].gate_up.requires_grad_(False)
    model.pools[1].down.requires_grad_(False)
    return training_loss(model)


def gradients(model, loss=training_loss, one_pass=True):
    """Every parameter's gradient of loss(model), from a clean start; of those that get one."""
    model.zero_grad()
    model.one_pass = one_pass
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss, fields", [
    (training_loss, dict(top_k=2)),
    (training_loss, dict(n_pool=2)),
    (training_loss, dict(n_pool=4)),
    (training_loss, dict(n_expert=64)),  # most experts have no token in a layer, and some in none
    (micro_batches, dict(n_pool=2, top_k=2)),
    (lambda model: through_the_layers(model)[1][1].square().sum(), dict()),  # no gradient reaches two of four layers
    (another_use, dict()),
    (lambda model: model.pools[0].weights(model.one_pass)[1].sum(), dict()),  # no layer uses the weights
    (frozen_weights, dict(n_pool=2)),
    (recomputed, dict(top_k=2)),
])  # fmt: skip
def test_one_pass_gives_autograds_gradient(loss, fields, way, products):
    model = small_model(**fields)
    expected = gradients(model, loss, one_pass=False)
    assert any(grad.abs().sum() > 0 for name, grad in expected.items() if "pools" in name), "zeros show nothing"
    products.clear()
    got = gradients(model, loss)
    assert_close(got, expected)
    if loss is training_loss:  # two weights in each pool
        n = {"in one product": 2 * model.config.n_pool, "in one product, in chunks": 2 * 4}.get(way, 0)
        assert products.count("gradient") == n, "once for all layers where there is room, else for each"
    if "n_expert" in fields:
        unused = model(random_tokens(model.config)).usage.sum(dim=0) == 0
        assert 0 < unused.sum() < 64, "the test needs experts without tokens"
        assert (got["pools.0.down"][unused] == 0).all(), "without tokens the gradient is exactly zero"


def test_one_pass_whatever_happened_before(way):
    model = small_model()
    expected = gradients(model, one_pass=False)
    gradients(model)  # a step before
    loss = training_loss(model)
    training_loss(model, seed=2)  # a forward pass whose backward pass never comes
    with torch.no_grad():
        training_loss(model, seed=3)
    model.generate(random_tokens(model.config, length=3), 2)
    torch.autograd.grad(loss, model.embedding.weight, retain_graph=True)  # a pass that never asks for the pool's

    def fail(grad):
        raise ZeroDivisionError

    hook = model.blocks[1].attention.qkv.weight.register_hook(fail)  # two layers have recorded by then
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    hook.remove()
    model.zero_grad()
    for times in (1, 2):
        loss.backward(retain_graph=True)
        for name, p in model.named_parameters():
            assert_close(p.grad, times * expected[name], f"{name} after {times} backward passes over this graph")
    assert_close(gradients(model), expected, "in the next step")


def test_casts_are_of_the_newest_weights():
    """Fused AdamW updates weights without raising their version counter."""
    model = small_model()
    pool, optimizer = model.pools[0], model.configure_optimizer(0.1, 0.0, (0.9, 0.99), 1e-8)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def cast(keep):
        pool.keep_copies = keep
        training_loss(model).backward()
        return pool.weights()[1].detach()

    before = cast(keep=False)
    optimizer.step()
    assert torch.equal(cast(keep=True), before), "keep_copies keeps them"
    after = cast(keep=False)
    assert torch.equal(after, pool.down.bfloat16()) and not torch.equal(after, before), "casts must be of new weights"
    assert pool.gate_up.grad.dtype == torch.float32 and "copies" not in str(model.state_dict().keys())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("n_expert", [8, 64])
def test_one_pass_in_bf16_is_as_exact_as_autograd(device, n_expert):
    model = small_model(n_expert=n_expert).to(device)
    exact = gradients(model, one_pass=False)
    with torch.autocast(device, dtype=torch.bfloat16):
        autograd, one_pass = gradients(model, one_pass=False), gradients(model)
    for name in ("pools.0.gate_up", "pools.0.down"):
        off = [(grads[name] - exact[name]).norm().item() for grads in (autograd, one_pass)]
        assert 0 < off[1] <= 1.1 * off[0], f"{name}: autograd's is {off[0]} off, one pass's {off[1]}"


def test_sums_of_the_pools_gradient_are_in_fp32(way):
    """In bf16 the sum of fifty records would lose several times as much as rounding each of them does."""
    torch.manual_seed(0)
    gradient, experts = PoolGradient(torch.zeros(2, 8, 16, dtype=torch.bfloat16)), (slice(3), slice(3, 10))
    records = [(torch.randn(10, 8).bfloat16(), torch.randn(10, 16).bfloat16()) for _ in range(50)]
    gradient.capacity = 0  # each is multiplied by itself
    for x, dy in records:
        gradient.add(torch.tensor([3, 10]), x, dy)
    exact = sum(torch.stack([x[i].double().t() @ dy[i].double() for i in experts]) for x, dy in records)
    off = ((gradient.take() - exact).norm() / exact.norm()).item()
    assert off < 2**-8, f"it is {off:.3%} off"


def test_compiled_one_pass():
    """Same gradients; two kinds of graph breaks; nothing compiled after step one, also while others' experts fade."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    model = small_model(n_layer=2)
    compiled = torch.compile(model)
    counters.clear()
    for progress in (0, 0.2, 0.7, 1):
        model.lock(partition(2, 8), progress)
        expected = gradients(model)
        assert_close(gradients(model, lambda _: training_loss(compiled)), expected, rtol=1e-4, atol=1e-6)
        if progress == 0:
            breaks, graphs = counters["graph_break"].copy(), counters["stats"]["unique_graphs"]
    assert len(breaks) <= 2 and "grouped_linear" in " ".join(breaks), breaks
    assert counters["stats"]["unique_graphs"] == graphs, "something was compiled again"


# ----------------------------------------------------------------------------------------------------------------------
# The loss: one fp32 number, in chunks


@pytest.mark.parametrize("chunk", [7, 4096])
def test_loss_with_and_without_logits(chunk, monkeypatch):
    """Against the mean of -log p over targets that are not -1; and both ways give the same gradients."""
    monkeypatch.setattr(unipool, "LOSS_CHUNK", chunk)
    model = small_model()
    idx, targets = random_tokens(model.config), random_tokens(model.config, seed=2)
    targets[0, 3:9] = -1
    counts = targets != -1
    out = model(idx, targets)
    log_p = out.logits.double().log_softmax(dim=-1)[counts]
    assert out.loss.item() == pytest.approx(-log_p[torch.arange(len(log_p)), targets[counts]].mean().item(), rel=1e-5)
    in_chunks = model(idx, targets, keep_logits=False)
    assert in_chunks.logits is None
    assert_close(in_chunks.loss, out.loss, "loss in chunks")
    with torch.no_grad():
        assert torch.equal(model(idx, targets, keep_logits=False).loss, in_chunks.loss), "validation is the same sum"
    ways = (gradients(model, lambda model, keep=keep: model(idx, targets, keep_logits=keep).loss) for keep in (0, 1))
    assert_close(*ways)
    with pytest.raises((IndexError, RuntimeError)):
        model(idx, torch.full_like(targets, -100), keep_logits=False)
    assert model.double()(idx, targets).loss.dtype == torch.float64, "of a float64 model it is not rounded"


def test_loss_under_bf16_autocast_is_an_fp32_number(monkeypatch):
    """Against float64 on the same rounded inputs; words are as frequent as in text, and states have a common part."""
    monkeypatch.setattr(unipool, "LOSS_CHUNK", 64)
    torch.manual_seed(0)
    N, C, V = 2048, 128, 4096
    x = torch.randn(N, C) + 0.5
    weight = torch.randn(V, C) * 0.05 + torch.linspace(0.1, -0.1, V).unsqueeze(1)
    targets = torch.multinomial(1 / torch.arange(1, V + 1).float(), N, replacement=True)
    inputs = [t.bfloat16().float().requires_grad_() for t in (x, weight)]

    def whole(x, weight):
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = whole(*exact_inputs)
    expected = torch.autograd.grad(exact, exact_inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [unipool.ChunkedCrossEntropy.apply(*inputs, targets, training) for training in (True, False)]
        of_whole = whole(*inputs)
    for loss in losses:
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), abs=2e-4)
        assert abs(loss.bfloat16().item() - exact.item()) > 2e-3, "the test needs a loss that bf16 cannot hold"
    ours, autograds = (torch.autograd.grad(loss, inputs) for loss in (losses[0], of_whole))
    for name, *grads, e in zip(("states", "weights"), ours, autograds, expected):
        off = [((grad - e).norm() / e.norm()).item() for grad in grads]
        assert 0 < off[0] < 1.1 * off[1], f"the {name}' gradient is {off[0]:.2%} off, that of whole logits {off[1]:.2%}"


def test_a_run_under_autocast(text_data, tmp_path, monkeypatch):
    """As on a GPU: what it reports is fp32, with more digits than bf16 has, and it casts the pool once a step."""
    kept, real = [], ExpertPool.weights

    def weights(self, *args):
        if torch.is_grad_enabled():
            kept.append(self.keep_copies)
        return real(self, *args)

    monkeypatch.setattr(ExpertPool, "weights", weights)
    monkeypatch.setattr(train, "autocast", lambda device: torch.autocast(device.type, dtype=torch.bfloat16))
    _, metrics = run_train(text_data, tmp_path, "--max_steps=3", "--micro_batch_size=2")
    assert kept == [False, True, True, True] * 3, "the first micro-batch of a step casts, the others take its copies"
    for key in ("train_loss", "balance_loss", "val_loss", "grad_norm"):
        value = torch.tensor(metrics[-1][key])
        assert value != value.bfloat16().float(), f"{key}={value} looks rounded to bf16"


# ----------------------------------------------------------------------------------------------------------------------
# The transformer around it


def test_attention_against_the_formula():
    """Softmax attention written out with complex rotations and repeated key and value heads, in double precision."""
    torch.manual_seed(0)
    attention, x = unipool.Attention(small_config()).double(), torch.randn(2, 7, 32, dtype=torch.float64)
    q, k, v = (x @ w.T for w in attention.qkv.weight.split([32, 16, 16]))
    q, k, v = (t.unflatten(2, (-1, 8)).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))  # two query heads to one key and value head
    # Pair i of position p, as a complex number, times exp(j p base^(-2i/D)).
    angles = torch.arange(7)[:, None] * 1e6 ** (-2 * torch.arange(4, dtype=torch.float64) / 8)
    q, k = (torch.complex(*t.chunk(2, dim=-1)) * torch.exp(1j * angles) for t in (q, k))
    logits = (q @ k.mH).real / math.sqrt(8)
    y = logits.masked_fill(torch.ones(7, 7).triu(1) == 1, -math.inf).softmax(dim=-1) @ v
    rope = unipool.rope_table(16, 8, 1e6).double()[:, :7]
    assert_close(attention(x, rope), y.transpose(1, 2).flatten(2) @ attention.out.weight.T, rtol=1e-5, atol=1e-6)


def test_dense_ffn_against_the_formula():
    ffn, x = unipool.DenseFFN(16, 24), torch.randn(5, 16)
    gate, up = (x @ ffn.gate_up.weight.T).chunk(2, dim=-1)
    assert_close(ffn(x), (F.silu(gate) * up) @ ffn.down.weight.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_cache_gives_the_full_forward_pass(batch, kind):
    """So no token sees the future. And one token alone touches only the weights of experts that serve it: NaN shows."""
    model = small_model(**kind)
    idx = random_tokens(model.config, batch)
    full, caches = model(idx).logits, [[] for _ in model.blocks]
    x = model.trunk(idx[:, :6], caches)[0]
    assert all(k.shape == v.shape == (batch, 2, 6, 8) for k, v in caches)
    for t in range(6, 15):
        x = torch.cat([x, model.trunk(idx[:, t : t + 1], caches)[0]], dim=1)
    before = copy.deepcopy(caches)
    last, f, _ = model.trunk(idx[:, 15:], caches)
    assert_close(model.head(torch.cat([x, last], dim=1)), full, rtol=1e-4, atol=1e-5)
    if batch == 1 and len(model.pools) == 1:
        unused = f.sum(dim=0) == 0
        assert 0 < unused.sum() < 8, "the test needs experts that no layer chose"
        for p in model.pools[0].parameters():
            p[unused] = torch.nan
        assert_close(model.trunk(idx[:, 15:], before)[0], last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 10, 16, 25])
def test_generate_equals_recomputing_the_cropped_context(kind, length):
    """Greedy text, batched, up to block_size and past it, against nanoGPT's loop without any cache."""
    model = small_model(**kind)
    idx = expected = random_tokens(model.config, length=length)
    for _ in range(12):
        logits = model(expected[:, -16:]).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(dim=1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)


def test_sampling_follows_temperature_top_k_and_vocabulary():
    model = small_model()
    idx = random_tokens(model.config, batch=1, length=5).expand(4000, 5)
    logits = model(idx[:1]).logits[0, -1]
    torch.manual_seed(0)
    drawn = model.generate(idx, 1, temperature=0.5)[:, -1].bincount(minlength=40) / 4000
    p = (logits / 0.5).softmax(dim=0)
    assert ((drawn - p).abs() < 5 * (p / 4000).sqrt()).all(), "frequencies must follow the softmax"
    best = set(logits.topk(3).indices.tolist())
    assert set(model.generate(idx, 1, top_k=3)[:, -1].tolist()) == best
    for temperature in (1e-300, 1e-45, 1e30, math.inf):
        assert model.generate(idx[:2], 1, temperature=temperature).max() < 40
        assert set(model.generate(idx[:500], 1, temperature=temperature, top_k=3)[:, -1].tolist()) <= best
    assert max(token.max().item() for token in model.stream(idx, 3, n_vocab=11)) < 11, "padding ids must not appear"
    assert model.generate(idx[:2], 1, top_k=1000).shape == (2, 6), "a top_k beyond the vocabulary is no limit"


def test_generation_refuses_what_it_cannot_do_and_forward_a_long_prompt():
    model = small_model()
    idx, caches = random_tokens(model.config, length=17), [[] for _ in model.blocks]
    with pytest.raises(ValueError, match="empty"):
        model.generate(idx[:, :0], 1)
    for flag in (dict(temperature=-0.1), dict(top_k=0)):
        with pytest.raises(ValueError, match="temperature=.* must not be negative and top_k=.* at least 1"):
            model.generate(idx, 1, **flag)
    with pytest.raises(ValueError, match="block_size=16"):
        model(idx)
    model.trunk(idx[:, :5], caches)
    with pytest.raises(ValueError, match="one at a time"):  # the causal mask would be that of the first tokens
        model.trunk(idx[:, 5:8], caches)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def gpt2_or_skip():
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
    return path


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
    return [document for document in prepare_pile.read_shards(shards, 0, 2**20) if document is not None]


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
    meta = prepared(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "data", tokenizer=name)
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
    whole, cut = write_jsonl(tmp_path / f"whole{suffix}"), tmp_path / f"cut{suffix}"
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
    if log_window > 27:  # it is whole: --skip_bad must not pass over it
        with pytest.raises(BadInput, match="a.jsonl.zst: its zstd window is longer than 2\\^27"):
            prepared(tmp_path / "a.jsonl.zst", tmp_path / "data", skip_bad=True)
    else:
        assert read(tmp_path / "a.jsonl.zst") == ["fine"]


def test_a_file_that_cannot_be_read_is_not_one_bad_document(tmp_path, capsys, monkeypatch):
    """Nor its other documents lost without a word; what is wrong with a single text costs that one alone."""
    texts = pyarrow.array([f"text {i}".encode() * 50 for i in range(20)] + [b"\xff", b"fine"], pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), len(texts), texts.buffers())})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    raw, page = bytearray(path.read_bytes()), pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    place = slice(page.data_page_offset, page.data_page_offset + page.total_compressed_size)
    raw[place] = bytes(page.total_compressed_size)  # the second of three row groups
    path.write_bytes(raw)
    meta = prepared(path, tmp_path / "data", skip_bad=True)
    assert meta["train_documents"] + meta["val_documents"] == 11 and meta["skipped_documents"] == 2
    assert re.search("a.parquet: row group 1 .*its other documents are left out", capsys.readouterr().out)


def test_what_is_held_out_depends_on_a_documents_text_alone(tmp_path):
    """Neither on the order nor on the other documents; and the share of it is --val_fraction."""
    held_out = {}
    for name, documents in [("all", DOCUMENTS), ("some", DOCUMENTS[::-2])]:
        prepared(write_jsonl(tmp_path / f"{name}.jsonl", documents), tmp_path / name, val_fraction=0.3)
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


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", ""])
def test_plain_text_is_cut_into_small_documents(end, tmp_path):
    """At line ends, where there are any: one file is everyone's first try, and must be split. A byte order mark is no
    text. Sources of the standard library stay whole, or parts of one file would be trained on and validated by."""
    text = "".join(f"line {i} é{end}" for i in range(30_000))
    (tmp_path / "book.txt").write_text("\ufeff" + text, newline="")
    meta = prepared(tmp_path / "book.txt", tmp_path / "data")
    pieces = [text for split in ("train", "val") for text in documents_of(tmp_path / "data", split)]
    assert meta["val_documents"] > 0 and "".join(sorted(pieces, key=text.index)) == text, "nothing is lost or doubled"
    assert max(map(len, pieces)) <= 2 * 4096 and all(piece.endswith(end) for piece in pieces)
    assert len(list(prepare_pile.read_text(tmp_path / "book.txt", SOURCES["stdlib"]["piece"]))) == 1


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


def test_a_text_that_the_tokenizer_fails_on_is_a_bad_document(tmp_path):
    """tiktoken's regular expression for GPT-2 steps back over spaces, but not over a million."""
    gpt2_or_skip()
    write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, " " * 10**6 + "a"])
    with pytest.raises(BadInput, match="1,000,001 characters.*--skip_bad"):
        prepared(tmp_path / "a.jsonl", tmp_path / "data", tokenizer="gpt2")
    meta = prepared(tmp_path / "a.jsonl", tmp_path / "data", tokenizer="gpt2", skip_bad=True)
    assert meta["train_documents"] + meta["val_documents"] == 60 and meta["skipped_documents"] == 1


def test_hub_source(tmp_path, monkeypatch):
    """The Pile is streamed from the hub: what `datasets` is asked for, and what becomes of the rows of its shards."""
    import datasets

    rows = datasets.Dataset.from_list([{"text": document, "meta": {"n": 1}} for document in DOCUMENTS])
    there = rows.to_iterable_dataset(num_shards=3)

    def breaks(num_shards, index):
        yield from there.shard(num_shards, index).take(10 if index == 2 else 20)
        if index == 2:
            raise type("ReadTimeout", (Exception,), {})("the HTTP library's own")

    load = mock.Mock(return_value=mock.Mock(num_shards=3, shard=breaks))
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(prepare_pile, "PART_BYTES", 2_000)
    with pytest.raises(BadInput, match="cannot be read from the hub .*ReadTimeout"):  # in the third shard
        prepared("pile", tmp_path / "data", max_tokens=10**6)
    assert (tmp_path / "data" / "train_000.bin").exists(), "the parts before it are kept"
    load.return_value = there
    meta = prepared("pile", tmp_path / "data", max_tokens=10**6)  # the same command goes on
    assert set(map(str, load.mock_calls)) == {"call('monology/pile-uncopyrighted', split='train', streaming=True)"}
    assert meta["source"] == "monology/pile-uncopyrighted" and meta["shards"] == 3
    documents = [documents_of(tmp_path / "data", split) for split in ("train", "val")]
    assert documents[0] == [d for d in DOCUMENTS if d not in documents[1]], "all shards, in order"


def test_nothing_behind_max_tokens_matters(tmp_path, monkeypatch):
    """Workers read ahead, but only so far, and what is wrong there does not count."""

    def read_shard(shard, piece):
        yield from DOCUMENTS
        yield from [BadInput("behind the last")] * 1000
        pytest.fail("read too far ahead")

    monkeypatch.setattr(prepare_pile, "find_shards", lambda sources: [__file__])
    monkeypatch.setattr(prepare_pile, "read_shard", read_shard)
    meta = prepared("endless", tmp_path / "data", max_tokens=2000, workers=3)
    assert meta["skipped_documents"] == 0 and meta["train_tokens"] >= 2000


def test_preparing_goes_on_after_an_error(tmp_path, monkeypatch, capsys):
    """A broken line loses nothing of earlier parts, which are no source, though below it; --skip_bad does the rest."""
    monkeypatch.setattr(prepare_pile, "PART_BYTES", 30_000)
    source = write_shards(tmp_path / "source")
    folder = source / "data"
    prepared(source, tmp_path / "whole", skip_bad=True)
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
    assert contents(folder) == contents(tmp_path / "whole")


def test_preparing_checks_the_disk_first(tmp_path, monkeypatch):
    free, source = mock.Mock(return_value=mock.Mock(free=2000)), write_jsonl(tmp_path / "a.jsonl")
    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(BadInput, match="GB are needed.*--max_tokens"):
        prepared(source, tmp_path / "data")
    prepared(source, tmp_path / "data", max_tokens=900)
    free.return_value.free = 59 * 10**9
    monkeypatch.setattr(prepare_pile, "find_shards", lambda sources: [0, 1, 2])
    monkeypatch.setattr(prepare_pile, "read_shard", lambda shard: pytest.fail("the disk comes first"))
    with pytest.raises(BadInput, match="62.9 GB are needed and 59.0 GB free"):  # 60,000 steps of 2^19 tokens
        prepared("pile", tmp_path / "pile")


def test_data_on_a_full_disk_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=[None, OSError(28, "No space left on device")]))
    with pytest.raises(BadInput, match="--out_dir=.*data cannot be written .No space left"):
        prepared(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_two_that_prepare_the_same_data(tmp_path, monkeypatch):
    """The one that comes while the other is at work, or has just finished, is told so and harms nothing."""
    source, folder = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "data"
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
    lines = "import prepare_pile", "prepare_pile.PART_BYTES = 2_000_000", "prepare_pile.main()"
    script.write_text("\n".join(lines))
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
        command(script, *flags, f"--out_dir={folder}")
    assert contents(killed) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 4097])
def test_order_is_a_permutation(n):
    orders = [prepare_pile.permute(np.arange(n), n, seed, epoch) for seed, epoch in [(1, 0), (1, 1), (2, 0)]]
    assert all(sorted(order) == list(range(n)) for order in orders), "each sequence once an epoch"
    if n > 60:
        for one, other in itertools.combinations(orders, 2):
            assert (one != other).mean() > 0.9, "another epoch or seed needs another order"
        for order in orders:  # as of random permutations, correlations are about 0, with a deviation of 1/sqrt(n)
            assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / math.sqrt(n)
            assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 5 / math.sqrt(n)


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
    with pytest.raises(BadInput, match="train_000.bin: 16 tokens .*--block_size=16"):
        open_split(tokens_folder(tmp_path / "short", n_train=16))


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
    assert time.perf_counter() - began < 1, "it took longer to open"
    assert len(data) == shards * ((shard_tokens - 1) // 1024) > max(indices) and len(set(indices)) == 300
    data.sequences(indices[:100])
    before = resident()
    for start in (100, 200):
        data.sequences(indices[start : start + 100])
    grown = (resident() - before) / 2**20
    assert grown < 0.5, f"grown by {grown:.1f} MiB; maps that stay grow by 4 KiB a sequence or more, 0.8 MiB in all"


def test_peak_of_the_gpu_found(monkeypatch):
    """Dense bf16 figures of the makers' data sheets; no guess for a GPU that is not in the list."""
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA RTX A1000": None, "Tesla T4": None,
             "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA GeForce RTX 4090": 165e12,
             "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GeForce RTX 4090 D": None,
             "NVIDIA GeForce RTX 3090 Ti": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None}  # fmt: skip
    for name, flops in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert train.peak_flops(torch.device("cuda")) == flops, name
    assert train.peak_flops(torch.device("cpu")) is None


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
    specialists = torch.eye(4).repeat_interleave(2, dim=1) / 2  # each layer uses two experts of its own
    assert train.pool_utilisation(specialists, 1) == (pytest.approx(1), 0), "the pool is what counts, not the layer"
    assert train.pool_utilisation(specialists, 4) == (pytest.approx(2 / 8), 24), "as private pools it is two of eight"
    assert train.pool_utilisation(torch.zeros(4, 8), 1) == (0, 8)


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
    return next(out_dir / name for name, number in steps_of(out_dir).items() if number == step)


def read_metrics(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same(ours, theirs, rtol=0, atol=0):
    """Two checkpoints hold the same weights and the same state of the optimizer, to the bit unless told otherwise."""
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=rtol, atol=atol)
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=rtol, atol=atol)


def assert_undisturbed(out_dir, straight, step):
    """The run in out_dir stands at that step; its checkpoint and log are to the bit those of the run in `straight`."""
    ours, theirs = torch.load(out_dir / "ckpt.pt"), torch.load(at_step(straight, step))
    assert_same(ours, theirs)
    assert (ours["step"], ours["position"]) == (step, step * 8) == (theirs["step"], theirs["position"])
    names = "step", "train_loss", "grad_norm", "lr"
    log, their_log = ([[m[name] for name in names] for m in read_metrics(folder)] for folder in (out_dir, straight))
    assert log == their_log[:step], "a line is doubled, missing or wrong"


def killed_run(out_dir, straight, *steps):
    """A run as SIGKILL leaves it: the checkpoints of these steps, the newest first, and of the log a line more."""
    out_dir.mkdir()
    for age, step in enumerate(steps):
        shutil.copy(at_step(straight, step), out_dir / (f"ckpt-{age}.pt" if age else "ckpt.pt"))
    lines = (straight / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out_dir / "metrics.jsonl").write_text("".join(lines[: steps[0] + 1]) + lines[steps[0] + 1][:20])
    return out_dir


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


def test_a_parameter_without_a_gradient_is_told(text_data, tmp_path, capsys, monkeypatch):
    """A fork's mistake, which would show only when the run is resumed; one that is frozen trains and resumes."""
    init = UniPool.__init__

    def with_more(self, config):
        init(self, config)
        self.more = torch.nn.Parameter(torch.ones(3), requires_grad=asks)

    monkeypatch.setattr(UniPool, "__init__", with_more)
    flags = [*TINY_RUN, f"--data_dir={text_data}", f"--out_dir={tmp_path / 'out'}"]
    asks = True
    fails(capsys, train.main, [*flags, "--max_steps=1"], "more", "gradient", "requires_grad_(False)")
    asks = False
    train.main([*flags, "--max_steps=1"])
    train.main(["--resume", "--max_steps=2", f"--out_dir={tmp_path / 'out'}"])
    assert (torch.load(tmp_path / "out" / "ckpt.pt")["model"]["more"] == 1).all()


@pytest.mark.parametrize("clip", [1, 0])  # 0 does not clip
def test_a_step_is_the_gradient_of_loss_plus_alpha_times_balance(clip, text_data, tmp_path):
    """A step of two micro-batches against AdamW's first by hand: p - lr * g / (|g| + eps), after clipping and decay."""
    flags = ["--max_steps=1", "--warmup=0", "--balance_coef=0.5", "--lr=1e-3", "--adam_eps=1e-3", "--weight_decay=10"]
    checkpoint, (line,) = run_train(text_data, tmp_path, *flags, "--micro_batch_size=4", f"--grad_clip={clip}")
    torch.manual_seed(1337)
    model = UniPool(UniPoolConfig(**checkpoint["config"]))
    data = open_split(text_data, block_size=32, vocab_size=320)
    tokens = torch.from_numpy(data.sequences(data.in_order(0, 8, 1337)))
    outs = [model(part[:, :-1], part[:, 1:]) for part in tokens.split(4)]
    loss, balance_loss = (sum(getattr(out, name) for out in outs) / 2 for name in ("loss", "balance_loss"))
    (loss + 0.5 * balance_loss).backward()
    norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters()))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1, "the test needs a gradient to clip"
    assert line["train_loss"] == pytest.approx(loss.item(), rel=1e-5), "the logged loss is without balance"
    assert line["balance_loss"] == pytest.approx(balance_loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        g, decay = p.grad * (clip / norm if clip else 1), 10 if p.dim() > 1 else 0  # which spares vectors
        expected = p * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-3)
        assert torch.allclose(checkpoint["model"][name], expected, rtol=1e-4, atol=1e-6), f"{name} moved wrongly"


@pytest.mark.parametrize("flag, heard", [("--seed=1337", (False, True)), ("--recompute", (True, True)),
                                         ("--no-one_pass", (False, False)), ("--compile", (False, True))])  # fmt: skip
def test_switches_of_speed_change_no_result(flag, heard, text_data, trained, tmp_path, monkeypatch, capsys):
    seen, real = set(), UniPool.forward

    def forward(self, *args, **kwargs):
        seen.add((self.recompute, self.one_pass))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(UniPool, "forward", forward)
    checkpoint, _ = run_train(text_data, tmp_path, "--max_steps=2", flag)
    assert seen == {heard} and (", compiled\n" in capsys.readouterr().out) == (flag == "--compile")
    assert_same(checkpoint, torch.load(at_step(trained, 2)), **ROUNDING)


def command(script, *flags, processes=None, cwd=HERE, background=False, status=0, **kwargs):
    """Run a command of this repository, or a script that imports from it, as a user would: to its end, or for now."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    arguments = [sys.executable, *torchrun, str(HERE / script), *map(str, flags)]
    threads = "1" if processes else "2"
    environment = os.environ | dict(PYTHONUNBUFFERED="1", OMP_NUM_THREADS=threads, PYTHONPATH=str(HERE))
    if background:
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, timeout=200, **kwargs)
    assert result.returncode == status, result.stderr.decode()
    return result


@pytest.mark.parametrize("processes, flags", [
    (2, []), (2, ["--shard", "--router=sigmoid", "--balance=bias"]), (2, ["--shard", "--decay_steps=8", "--lock=0.5"]),
    pytest.param(2, ["--decay_steps=8", "--lock=0.5"], marks=slow),
    pytest.param(4, [], marks=slow), pytest.param(4, ["--shard"], marks=slow),
])  # fmt: skip
def test_several_processes_equal_one(processes, flags, text_data, tmp_path):
    """Losses, usage, weights and biases, with accumulation; then one process goes on from what several have saved."""
    several, one = tmp_path / "several", tmp_path / "one"
    flags = [*TINY_RUN, "--micro_batch_size=1", "--adam_eps=1e-4", *flags, f"--data_dir={text_data}"]
    command("train.py", *flags, f"--out_dir={several}", "--max_steps=4", processes=processes)
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
    command("train.py", "--resume", f"--out_dir={tmp_path / 'run'}", "--shard", "--device=cpu", processes=2)
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
    gathers, reductions = map(int, re.search(r"COUNTS \[(\d+), (\d+)\]", result.stdout.decode()).groups())
    assert reductions == 2 * 3 * 4, f"gradients were reduced {reductions} times"
    assert gathers == 2 * (3 + 1), f"weights were gathered {gathers} times: once a step, and for the validation"


@pytest.mark.parametrize("arch", [["--arch=unipool"], ["--arch=vanilla"], ["--arch=dense", "--n_expert=0"]])
def test_it_learns_more_than_how_often_each_byte_occurs(arch, text_data, tmp_path):
    flags = ["--max_steps=120", "--decay_steps=120", "--lr=5e-3", "--batch_size=16", "--init_std=0.05", *arch]
    _, metrics = run_train(text_data, tmp_path, *flags)
    counts = np.bincount(np.fromfile(text_data / "val_000.bin", dtype="<u2"), minlength=257)
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log(p)).sum()  # of the validation bytes themselves: no model of single bytes can do better
    assert metrics[-1]["val_loss"] < entropy - 0.3, f"val loss {metrics[-1]['val_loss']:.3f}, unigrams {entropy:.3f}"


def test_a_new_run_keeps_the_old_one(text_data, tmp_path):
    old = {}
    for number in (1, 2, 3):
        run_train(text_data, tmp_path, f"--max_steps={number}")
        for path in tmp_path.glob("ckpt*.pt") if number == 2 else ():  # best.pt and metrics.jsonl are left
            path.unlink()
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


@pytest.mark.parametrize("other", ["--data_dir={}/data", "--eval_tokens=256", "--grad_clip=1"])
def test_the_best_model_stays_unless_its_loss_is_of_other_data(other, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    torch.save(torch.load(run / "ckpt.pt") | dict(best=0.1), run / "ckpt.pt")
    prepared(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "data")
    resume(run, "--max_steps=10", other.format(tmp_path))
    best, steps = torch.load(run / "ckpt.pt")["best"], steps_of(run)
    if other == "--grad_clip=1":  # as before
        assert best == 0.1 and contents(run)["best.pt"] == contents(trained)["best.pt"] and steps["ckpt.pt"] == 10
    else:
        assert best > 0.1 and steps["best.pt"] == 10


def test_every_setting_given_on_resuming_acts(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    given = dict(lr=0.5, weight_decay=0.3, beta1=0.7, beta2=0.8, adam_eps=0.1, grad_clip=0.2, min_lr=0.5, keep=2)
    resume(run, "--max_steps=10", *[f"--{name}={value}" for name, value in given.items()])
    checkpoint = torch.load(run / "ckpt.pt")
    assert checkpoint["settings"].items() >= given.items()
    groups = checkpoint["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0]
    assert all((g["lr"], tuple(g["betas"]), g["eps"]) == (0.5, (0.7, 0.8), 0.1) for g in groups)
    assert read_metrics(run)[-1]["lr"] == 0.5
    assert steps_of(run).keys() == {"ckpt.pt", "ckpt-1.pt", "best.pt"}, "of nine that were kept"


def test_two_runs_in_one_folder(text_data, trained, capsys):
    with only_one(trained / ".lock", None):
        for flags in (["--max_steps=1"], ["--resume", "--max_steps=99"]):
            flags = [f"--data_dir={text_data}", f"--out_dir={trained}", "--device=cpu", *flags]
            fails(capsys, train.main, flags, "--out_dir", "in use", touching=trained)


def test_resuming_a_finished_run_changes_nothing(trained, capsys):
    before = contents(trained)
    resume(trained)
    assert "nothing to do" in capsys.readouterr().out and contents(trained) == before


def at_each_step(monkeypatch, action):
    """Call action(number) whenever a step begins: 0 is the first."""
    real = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, settings: (action(step), real(step, settings))[1])


def test_intervals_of_zero_are_never_and_the_end_is_saved(text_data, tmp_path):
    checkpoint, metrics = run_train(text_data, tmp_path, "--max_steps=3", "--eval_interval=0", "--ckpt_interval=0")
    assert not any("val_loss" in line for line in metrics)
    assert steps_of(tmp_path) == {"ckpt.pt": 3} and checkpoint["best"] == math.inf


def test_tensorboard(text_data, tmp_path, monkeypatch, capsys):
    """A stand-in for the package is told what stands in metrics.jsonl, but for lists; without it one line says so."""
    board = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.Mock(SummaryWriter=board))
    _, metrics = run_train(text_data, tmp_path, "--max_steps=2", "--tensorboard")
    told = {(name, step): value for name, value, step in (call.args for call in board().add_scalar.mock_calls)}
    assert told == {(name, line["step"]): value for line in metrics for name, value in line.items()
                    if not isinstance(value, list)}  # fmt: skip
    board().add_scalar.side_effect = board().close.side_effect = OSError(28, "No space left on device")
    run_train(text_data, tmp_path, "--max_steps=2", "--tensorboard")
    assert capsys.readouterr().out.count("No space left") == 2, "a log that cannot be written does not end a run"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fails(capsys, train.main, [f"--out_dir={tmp_path}", "--tensorboard"], "--tensorboard", "pip install tensorboard",
          touching=tmp_path)  # fmt: skip


def test_a_run_that_locks(text_data, tmp_path):
    """Before, plain UniPool; the owners are those of the validation's usage; resumed at any step it is the same run."""
    straight, lock = tmp_path / "straight", ["--decay_steps=12", "--lock=0.5"]  # begins at step 3, is locked from 6 on
    checkpoint, metrics = run_train(text_data, straight, *lock, "--max_steps=8", "--ckpt_interval=1", "--keep=9")
    seen = {step: torch.stack([torch.load(at_step(straight, step))["model"][f"blocks.{l}.router.seen"] for l in (0, 1)])
            for step in range(1, 9)}  # fmt: skip
    assert all((seen[step] == 1).all() for step in (1, 2, 3))
    owned = seen[8] == 1
    assert owned.sum(dim=0).tolist() == [1] * 8 and owned.sum(dim=1).tolist() == [4, 4] and (seen[8][~owned] == 0).all()
    for step in (4, 5, 6, 7):
        fading = (1 + math.cos(math.pi * min(1, (step - 3) / 4))) / 2
        assert_close(seen[step], torch.where(owned, 1.0, fading), f"step {step}")
        assert metrics[step - 1]["others_seen"] == pytest.approx(fading, abs=1e-6)
    model = train.load_model(torch.load(at_step(straight, 3)), "", torch.device("cpu"))
    data = open_split(text_data, "val", block_size=32, vocab_size=320)
    tokens = torch.from_numpy(data.sequences(train.validation_indices(data, 2048, 8)))
    assert torch.equal(unipool.assign_experts(model(tokens[:, :-1]).usage), owned)
    model = train.load_model(checkpoint, "", torch.device("cpu"))
    assert (model(tokens[:, :-1]).usage[~owned] == 0).all()
    for step in (3, 5):
        resume(killed_run(tmp_path / f"killed{step}", straight, step))
        assert_undisturbed(tmp_path / f"killed{step}", straight, 8)


@pytest.mark.parametrize("flags", [["--lock=0.1", "--decay_steps=60"], ["--lock_random", "--decay_steps=180"]])
def test_the_entropy_loss_rises(flags, text_data, tmp_path, monkeypatch):
    """Until the freeze, here at step 3, or for a sixtieth of the control's run. Read from the gradient it gets."""
    weights = []

    def loss(P, n_owned):
        value = P.sum().detach().requires_grad_()
        value.register_hook(lambda gradient: weights.append(gradient.item()))
        return value

    monkeypatch.setattr(train, "cardinality_loss", loss)
    run_train(text_data, tmp_path, *flags, "--max_steps=5", "--micro_batch_size=8")
    assert weights == pytest.approx([0, 5e-3 / 3, 5e-3 * 2 / 3, 5e-3, 5e-3])


def test_random_owners_from_the_start(text_data, tmp_path):
    """The control. The same for the same seed, and not what the data would give."""
    found = []
    for number, seed in enumerate((1, 1, 2)):
        checkpoint, _ = run_train(text_data, tmp_path / str(number), "--max_steps=1", "--lock_random", f"--seed={seed}")
        found.append(torch.stack([checkpoint["model"][f"blocks.{l}.router.seen"] for l in (0, 1)]))
    assert set(found[0].flatten().tolist()) == {0, 1} and found[0].sum(dim=1).tolist() == [4, 4]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


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
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: run_train(text_data, tmp_path, "--max_steps=6"))
    assert stop.value.code == 130 and not list(tmp_path.glob("*.pt"))


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
    flags = ["--max_steps=4", "--ckpt_interval=1", "--keep=9", f"--balance={balance}"]
    last, metrics = run_train(text_data, tmp_path, *flags)
    assert steps_of(tmp_path) == {"ckpt-2.pt": 2, "ckpt-1.pt": 3, "ckpt.pt": 4, "best.pt": 4}, "step 1 did nothing"
    assert [m["skipped_steps"] for m in metrics] == [1, 1, 2, 2] and last["skipped"] == [2, 0]
    assert metrics[2]["train_loss" if how == "loss" else "grad_norm"] is None
    before, skipped = torch.load(tmp_path / "ckpt-2.pt"), torch.load(tmp_path / "ckpt-1.pt")
    assert_same(before, skipped)
    assert all(tensor.isfinite().all() for tensor in last["model"].values())
    assert {float(state["step"]) for state in last["optimizer"]["state"].values()} == {2.0}
    assert not torch.equal(skipped["model"]["head.weight"], last["model"]["head.weight"]), "then it goes on"
    resume(tmp_path, "--max_steps=5")
    assert read_metrics(tmp_path)[-1]["skipped_steps"] == 2, "also of the run before"


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


def test_a_warning_when_most_pairs_are_unserved(text_data, tmp_path, capsys, monkeypatch):
    """Once. A balance loss alone, with a large rate, drives the scores to 0. The MFU counts what is served."""
    monkeypatch.setattr(train, "peak_flops", lambda device: 1e12)
    flags = ["--max_steps=30", "--balance_coef=100", "--lr=0.03", "--warmup=0"]
    checkpoint, metrics = run_train(text_data, tmp_path, *flags)
    last, model = metrics[-1], UniPool(UniPoolConfig(**checkpoint["config"]))
    assert last["unserved"] > 0.5 and len(last["sigma"]) == len(last["score_sum"]) == 2
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * model.flops_per_token(1 - last["unserved"]) / 1e12)
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
def test_metrics_on_a_full_disk_are_told_and_the_run_goes_on(text_data, tmp_path, monkeypatch, capsys):
    full = tmp_path / "metrics.jsonl"
    at_each_step(monkeypatch, lambda step: step == 1 and (full.unlink(), full.symlink_to("/dev/full")))
    at_each_step(monkeypatch, lambda step: step == 2 and full.unlink())
    checkpoint, metrics = run_train(text_data, tmp_path, "--max_steps=3")
    assert checkpoint["step"] == 3 and [line["step"] for line in metrics] == [3]
    told = re.findall(r"warning: step (\d): .*metrics.jsonl cannot be written .No space", capsys.readouterr().out)
    assert told == ["2"]


@pytest.mark.parametrize("harm", [os.unlink, lambda path: os.truncate(path, 100)], ids=["vanished", "cut short"])
def test_a_data_file_that_is_lost_ends_the_run(harm, text_data, trained, tmp_path, monkeypatch, capsys):
    shard, out_dir = shutil.copytree(text_data, tmp_path / "data") / "train_000.bin", tmp_path / "out"
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


def lines_in(path):
    """0 of no file: a run that begins anew removes what an earlier one logged, at any moment."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for(process, metrics, lines):
    """Until the log of the run has so many lines."""
    end = time.monotonic() + 100
    while lines_in(metrics) < lines:
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


@pytest.mark.parametrize("patch, flags, named", [
    ("train.UniPool.balance_loss = lambda self, f, P: P.sum() * math.nan", ["--max_steps=3"], "not finite"),
    ("load = train.load_newest\ntrain.load_newest = lambda *args, **kwargs: (\n"
     "    load(*args, **kwargs)[0] | dict(step=int(os.environ['RANK'])), '', [])", ["--resume"], "different check"),
], ids=["only NaN", "another step"])  # fmt: skip
def test_two_processes_that_cannot_go_on(patch, flags, named, text_data, trained, tmp_path):
    """Where a checkpoint may still be written, only the one that writes it ends with an error, or torchrun kills it."""
    script, out_dir = tmp_path / "broken.py", shutil.copytree(trained, tmp_path / "run")
    script.write_text(f"import command, math, os, train\n{patch}\ncommand.run_command(train.main)\n")
    flags = [f"--data_dir={text_data}", f"--out_dir={out_dir}", *TINY_RUN, *flags]
    errors = command(script, *flags, processes=2, status=1).stderr.decode()
    assert errors.count("error: --") in ([1] if "nan" in patch else [1, 2]) and named in errors, errors


def test_a_run_whose_output_nobody_reads_any_more_goes_on(text_data, tmp_path):
    """As behind `| tee`, which a Ctrl-C ends first."""
    flags = [f"--data_dir={text_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--max_steps=60", "--eval_interval=5"]
    run = command("train.py", *flags, background=True)
    wait_for(run, tmp_path / "metrics.jsonl", lines=2)
    run.stdout.close()
    assert run.wait(timeout=100) == 0
    assert train.load_checkpoint(tmp_path / "ckpt.pt")["step"] == len(read_metrics(tmp_path)) == 60


def test_output_held_back_that_nobody_reads_is_no_failure():
    """As Python holds it back where nothing says PYTHONUNBUFFERED: torchrun would call a run that is done failed."""
    code = "import command, sys; sys.stdin.read(); command.run_command(lambda: print('text'))"
    environment = os.environ | dict(PYTHONUNBUFFERED="")
    run = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, env=environment, stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    run.stdout.close()
    run.stdin.close()
    assert (run.wait(timeout=60), run.stderr.read()) == (0, b"")


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
            wait_for(run, metrics, lines_in(metrics) + rng.randrange(1, 20))
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


def test_a_model_without_room(text_data, capsys, tmp_path):
    flags = [f"--data_dir={text_data}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--n_embd=400000000"]
    fails(capsys, train.main, flags, "--scale=tiny", "no room", touching=tmp_path)


@pytest.mark.parametrize("flags", [
    "--scale best", "--arch best", "--router best", "--balance best", "--lr best", "--learning_rate=1", "--max_step=1",
    "--decay_steps=0", "--max_steps=-1", "--seed=-1", "--lr=nan", "--lr=-1", "--weight_decay=inf", "--warmup=1.5",
    "--beta2=1", "--batch_size=99999999999", "--balance_coef=nan", "--n_expert=8 --arch=dense", "--adam_eps=0",
    "--n_pool=3 --n_layer=4", "--batch_size=8 --micro_batch_size=3", "--device=tpu", "--device=meta",
    "--data_dir=nowhere", "--out_dir=file", "--n_layer=9223372036854775808", "--n_expert=99999999999999999999",
    "--keep=1000", "--n_pool=1 --arch=vanilla", "--min_lr=0.1 --lr=0.01",
    # what would change nothing is not accepted in silence
    "--router=norm --arch=dense", "--top_k=1 --arch=dense", "--n_pool=1 --arch=dense", "--balance_coef=1 --arch=dense",
    "--bias_rate=0.1", "--balance_coef=0.1 --balance=none", "--balance_coef=1 --n_expert=0", "--top_k=1 --n_expert=0",
    "--lock=1", "--lock=0.001", "--lock=0.5 --lock_random", "--lock=0.5 --n_pool=2", "--lock=0.5 --router=softmax",
    "--lock=0.5 --balance=layer", "--lock=0.5 --n_expert=30", "--lock=0.5 --n_expert=8 --top_k=3",
])  # fmt: skip
def test_bad_flags_of_train(flags, text_data, capsys, tmp_path, monkeypatch):
    """A flag that is unknown, or not written out, and numbers that are out of range or do not go together."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    named = [flag.removeprefix("--").removeprefix("arch=") for flag in flags.split()]
    fails(capsys, train.main, ["--device=cpu", f"--data_dir={text_data}", *flags.split()], *named, touching=tmp_path)


@needs_proc
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_step_finds_the_memory_of_the_one_before():
    """64 MB that are freed stay with the process once keep_freed_memory() was called, and go back without it."""
    code = """
import os, torch, train
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
before = resident()
torch.ones(2**24)
print(resident() - before)
"""
    codes = code.replace("before", "train.keep_freed_memory()\nbefore", 1), code
    kept, given_back = (int(subprocess.check_output([sys.executable, "-c", code], cwd=HERE)) for code in codes)
    assert kept > 50 > 10 > given_back, (kept, given_back)


@pytest.mark.parametrize("scale, gib, expected", [("182m", 80, (64, 1)), ("182m", 24, (8, 8)), ("469m", 80, (16, 4)),
                                                  ("182m", 8, (1, 64))])  # fmt: skip
def test_a_micro_batch_is_what_a_gpu_has_room_for(scale, gib, expected, monkeypatch):
    memory = mock.Mock(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    settings, config = train.settle(dict(scale=scale), None)
    assert train.split_batch(settings, config, 8, torch.device("cuda")) == expected, "(sequences, micro-batches)"
    settings.micro_batch_size = 2
    assert train.split_batch(settings, config, 8, torch.device("cuda")) == (2, 32), "a size that is given stays"
    with pytest.raises(BadInput, match=r"--batch_size=512 must be a multiple of 6: 3 process"):
        train.split_batch(settings, config, 3, torch.device("cuda"))


DAMAGE = {
    "no shard": ("train_000.bin", lambda raw: None),
    "cut short": ("train_000.bin", lambda raw: raw[:-1]),
    "token outside the vocabulary": ("train_000.bin", lambda raw: raw[:1000] + b"\x40\x01" + raw[1002:]),
    "empty validation": ("val_000.bin", lambda raw: b""),
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


@pytest.mark.parametrize("flag", ["--num_samples=0", "--temperature=-1", "--top_k=0", "--prompts=x"])
def test_bad_flags_of_sample(flag, trained, capsys):
    fails(capsys, sample.main, [f"--out_dir={trained}", "--device=cpu", flag], flag, touching=trained)


def test_weights_that_are_not_finite_are_told(trained, tmp_path, capsys):
    checkpoint, path = torch.load(trained / "ckpt.pt"), tmp_path / "ckpt.pt"
    checkpoint["model"]["pools.0.down"][3, 0, 0] = math.nan
    torch.save(checkpoint, path)
    fails(capsys, sample.main, [f"--out_dir={tmp_path}", "--device=cpu"], path, "pools.0.down", "finite")


@pytest.mark.parametrize(("bad", "prompt", "stdin"), [("empty", "", b""), ("UTF-8", "\udcff", b"caf\xe9")])
def test_bad_prompts(bad, prompt, stdin, trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    for flag in (f"--prompt={prompt}", "--prompt=-"):
        fails(capsys, sample.main, [f"--out_dir={trained}", "--device=cpu", flag], "--prompt", bad)


@pytest.mark.parametrize("name, content, flags, named", [
    ("a.jsonl", b'{"text": "fine"}\n\n{"words": "none"}\n', [], ["a.jsonl line 3", "--skip_bad"]),
    ("a.jsonl", b"[" * 100_000, [], ["a.jsonl line 1", "--skip_bad"]),
    ("a.jsonl", b'{"text": "\xff"}\n', [], ["a.jsonl line 1", "UTF-8"]),
    ("a.parquet", b"no parquet", [], ["a.parquet"]),
    ("a.txt", b"caf\xe9", [], ["a.txt", "0xe9", "after 3 characters"]),
    ("a.txt", b"one document", [], ["--val_fraction=0.05", "1 documents to train and 0 to"]),
    ("a.txt", b"text", ["--val_fraction=1.5"], ["--val_fraction=1.5"]),
    ("a.txt", b"text", ["--workers=0"], ["--workers=0"]),
    ("a.txt", b"text", ["--tokenizer=llama"], ["--tokenizer", "llama", "gpt2"]),
    ("a.txt", b"text", ["--source", "nothing/*"], ["--source nothing/*"]),
    ("a.txt", b"text", ["--source", "pile", "stdlib"], ["--source pile", "alone"]),
    ("a.txt", b"text", ["--out_dir=."], ["--out_dir=.", "exists"]),
    ("a.txt", b"text", ["--out_dir=a.txt/data"], ["--out_dir=a.txt/data", "cannot be written"]),
])  # fmt: skip
def test_bad_input_of_prepare_pile(name, content, flags, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    arguments = ["--source", name, "--out_dir=data", "--tokenizer=bytes", *flags]
    fails(capsys, prepare_pile.main, arguments, *named, touching=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing may be left behind"


@pytest.mark.parametrize("function, flags, named", [
    ("datasets.load_dataset", ["--tokenizer=bytes"], ["monology/pile-uncopyrighted", "hub", "--source"]),
    ("tiktoken.get_encoding", ["--source", __file__], ["gpt2", "TIKTOKEN_CACHE_DIR", "--tokenizer bytes"]),
])  # fmt: skip
def test_no_network(function, flags, named, capsys, tmp_path, monkeypatch):
    """As the libraries report it: an OSError while they download."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(function, mock.Mock(side_effect=ConnectionError("no route to host")))
    fails(capsys, prepare_pile.main, flags, *named)
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


# ----------------------------------------------------------------------------------------------------------------------
# What a GPU must hold


FAKE_STEPS = """
import json, sys, torch, train
from experiments.bench import predicted, prepare_training, training_step
from experiments.fake_gpu import fake_gpu
from experiments.memory import main, simulated
from torch.nn import functional as F
from unipool import UniPoolConfig

def is_fast(x):
    # Whether grouped_mm's kernel for Hopper takes x: bf16, one dimension dense, the others in 16 bytes.
    dense, *steps = sorted(x.stride())
    return x.dtype == torch.bfloat16 and dense == 1 and not any(s * x.element_size() % 16 for s in steps)

def watched(a, b, offs, real=F.grouped_mm):
    out = real(a, b, offs=offs)
    products.append((b.dim(), is_fast(a) and is_fast(b) and out.dtype == torch.bfloat16))
    return out

F.grouped_mm, results = watched, {}
for arch in ("unipool", "vanilla", "dense"):
    config = UniPoolConfig.from_scale("tiny", arch)
    for name in ("plain", "autograd", "recompute", "shard", "shard recompute", "fp32"):
        if name == "fp32" and arch != "dense":
            continue  # without bf16 experts go one by one, which has to wait for their numbers of rows
        found, products = results.setdefault(f"{arch} {name}", {}), []
        try:
            with fake_gpu(config, 8 if "shard" in name else 1, bf16=name != "fp32") as (mesh, _):
                model, optimizer = prepare_training(config, torch.device("cuda"), mesh)
                model.recompute, model.one_pass = "recompute" in name, name != "autograd"
                idx = torch.zeros(4, 129, dtype=torch.int64, device="cuda")
                losses = training_step(model, optimizer, idx, 2)
                products.clear()
                training_step(model, optimizer, idx, 2)
                found["products"] = list(products)
                with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=name != "fp32"):
                    out = model.eval()(idx[:, 1:], idx[:, 1:], keep_logits=False)
                figures = losses, out.loss, out.balance_loss, out.usage, out.mean_scores
                found["dtypes"] = [str(tensor.dtype) for tensor in figures]
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
config = UniPoolConfig.from_scale("tiny", vocab_size=2**15)
results["memory"] = {name: simulated(config, *rest) for name, rest in dict(
    plain=[64], sharded=[64, 8], small=[32], recompute=[64, 1, True]).items()}
for scale, shards in (("182m", 1), ("978m", 8)):
    large = UniPoolConfig.from_scale(scale)
    sequences = train.tokens_with_room(large, shards, 80 * 2**30) // large.block_size
    results["room " + scale] = simulated(large, sequences, shards)["peak"]
for name in ("dense", "unipool", "unipool, locked"):
    results["roofline " + name] = predicted(name, 2**14, sequences=16)
with fake_gpu(config):
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
    assert all(fast for _, fast in found["products"]), found["products"]
    of_weights = sum(dimensions == 2 for dimensions, _ in found["products"])
    by_layer = arch == "vanilla" or name == "autograd"  # else once for all layers and micro-batch
    assert of_weights == (0 if arch == "dense" else 2 * 2 * (4 if by_layer else 1)), "gradients of gate_up and down"


def test_a_fake_gpu_notices_what_a_gpu_would(fake_steps):
    assert fake_steps["wait"] == "DataDependentOutputException", "reading a number waits for the GPU"
    # No fused attention in fp32 takes grouped queries: keys and values must be repeated there.
    assert "error" not in fake_steps["dense fp32"], fake_steps["dense fp32"]


def test_memory_as_a_command(fake_steps):
    rows = [line.split(" | ") for line in fake_steps["table"].splitlines() if line.startswith("| tiny")]
    assert [row[0] for row in rows] == ["| tiny", "| tiny --recompute", "| tiny --shard", "| tiny --shard --recompute"]
    assert all("yes" in row[-1] and row[-2] in ("forward", "backward", "optimizer") for row in rows)


def test_roofline_by_hand(fake_steps):
    """A dense step's products and a locked one's: arithmetic, and the experts' weights that a layer reads."""
    dense, unipool, locked = (fake_steps[f"roofline {name}"] for name in ("dense", "unipool", "unipool, locked"))
    L, C, H, V = 12, 768, 3072, 51200
    weights = L * (C * (C + 2 * C // 3) + C * C + 3 * C * H) + V * C  # that a token meets: attention, FFN, head
    assert dense["products"] == pytest.approx(6 * weights * 2**14 / 800e12, rel=0.01)
    assert 0 < locked["products, waiting for memory"] < unipool["products, waiting for memory"]
    assert dense["rows moved"] < 0.1 * unipool["rows moved"]
    assert unipool["optimizer"] > 0.679e9 * 28 / 3.0e12, "AdamW reads and writes 28 bytes for each weight of the pool"


def test_memory_of_a_step_by_hand(fake_steps):
    """tiny with many words, 64 sequences: weights, moments, gradients; what each layer keeps; a chunk of the loss."""
    config = UniPoolConfig.from_scale("tiny", vocab_size=2**15)
    L, C, H, M, V, N = 4, 128, 512, 32, 2**15, 64 * 128
    q, kv = 128, 64  # widths
    layer = 2 * 4 * C  # the residual stream before either norm
    layer += 2 * C + 2 * (q + 2 * kv) + 2 * (q + kv) + 2 * q + 4 * 4  # norm's output, qkv, turned q and k, output, sums
    layer += 4 * C + 4 * 4 * M  # norm's output in fp32, logits, scores and two steps between them
    layer += 2 * C + 2 * 2 * H + 2 * 2 * H + 2 * C  # an expert's rows; gate and up; silu(gate), h; and what it gives
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
    for scale in ("182m", "978m"):
        assert 0.8 < fake_steps["room " + scale] / (80 * 2**30) < 0.93, "of what has room, about a tenth stays free"


# ----------------------------------------------------------------------------------------------------------------------
# Experiments: comparisons of methods


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


# n_expert, n_pool, top_k, router, balance at 182m, as METHOD and Table 5 have them.
METHODS_AT_182M = {
    "dense": (0, 1, 1, "norm", "none"), "vanilla": (96, 12, 1, "softmax", "layer"),
    "vanilla-norm": (96, 12, 1, "norm", "layer"), "vanilla-sigmoid": (96, 12, 1, "sigmoid", "bias"),
    "shared-layer-softmax": (96, 1, 1, "softmax", "layer"), "shared-pool-softmax": (96, 1, 1, "softmax", "pool"),
    "unipool": (96, 1, 1, "norm", "pool"), "lock": (96, 1, 1, "norm", "pool"), "random": (96, 1, 1, "norm", "pool"),
    "unipool-67": (64, 1, 1, "norm", "pool"),
    "unipool-50": (48, 1, 1, "norm", "pool"), "unipool-42": (40, 1, 1, "norm", "pool"),
    "g6": (96, 6, 1, "norm", "pool"), "g4": (96, 4, 1, "norm", "pool"), "g2": (96, 2, 1, "norm", "pool"),
    "vanilla-16": (192, 12, 2, "softmax", "layer"), "vanilla-32": (384, 12, 4, "softmax", "layer"),
    "unipool-16": (192, 1, 2, "norm", "pool"), "unipool-32": (384, 1, 4, "norm", "pool"),
}  # fmt: skip


def test_methods_are_the_papers_and_are_told_apart():

    def label_of(config, **settings):
        settings = asdict(train.Settings(**settings))
        return compare.label_of(dict(config=asdict(config), settings=settings), "out")

    methods = compare.methods(12)
    assert methods.keys() == METHODS_AT_182M.keys()
    for name, expected in METHODS_AT_182M.items():
        config = UniPoolConfig.from_scale("182m", methods[name].arch, **methods[name].flags)
        assert tuple(getattr(config, field) for field in compare.ROUTING) == expected, name
        assert label_of(config, **methods[name].lock) == methods[name].label
    assert label_of(UniPoolConfig.from_scale("182m", n_expert=50)) == "out", "none of the paper's"
    for scale, n_expert in {"469m": 96, "650m": 144, "830m": 160}.items():  # the paper's reduced pools
        label = label_of(UniPoolConfig.from_scale(scale, n_expert=n_expert))
        assert label == ("UniPool, 42% pool" if scale == "830m" else "UniPool, 50% pool")
    assert len({method.colour for method in methods.values()}) == len(methods), "one colour a method"


def test_differences_are_taken_seed_by_seed(tmp_path, capsys):
    """Seeds that differ by far more than the methods: the paired difference is exact, and its spread small."""
    flags = ["--max_steps=2", "--decay_steps=2", "--n_embd=64"]
    given = train.parse_flags(["--scale=tiny", *flags])
    finals = {"vanilla": [1.0, 2.0, 3.0], "unipool": [0.9, 1.92, 2.94], "unipool-67": [None] * 3}
    for run in ablate.choose_runs(list(finals), [1, 2, 3], given, tmp_path):
        run.folder.mkdir()  # as a finished run leaves it
        lines = [dict(step=i + 1, tokens=1000 * (i + 1), val_loss=loss, pool_utilisation=0.5)
                 for i, loss in enumerate([5.0, finals[run.name][run.seed - 1]])]  # fmt: skip
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run.folder / "run.json").write_text(json.dumps(dict(flags=run.flags, machine={}, done=True)))
    ablate.main(["--methods", *finals, f"--runs={tmp_path}", *flags, f"--results={tmp_path}", "--name=lr0.5"])
    record = json.loads((tmp_path / "lr0.5.json").read_text())
    assert record["tokens"] == 2 * 32 * 128 and record["seeds"] == [1, 2, 3]
    results = record["results"]
    assert results["UniPool"]["difference"] == pytest.approx({"1": -0.1, "2": -0.08, "3": -0.06})
    assert results["UniPool"]["val_loss"] == {"1": 0.9, "2": 1.92, "3": 2.94}
    assert results["UniPool"]["parameters"] == UniPool(UniPoolConfig.from_scale("tiny", n_embd=64)).num_params()
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert "1.9200 (0.9000 to 2.9400)" in rows[3] and "-0.0800 (-0.1000 to -0.0600)" in rows[3]
    assert "2.0000 (1.0000 to 3.0000)" in rows[2]
    assert "-0." not in rows[2] and "+0.0" not in rows[2], "vanilla is not compared with itself"
    assert "unipool-67-1 is left out" in err and "67%" not in out, "a run that diverged has no loss to show"


def test_groups_of_methods_and_pools_that_do_not_fit(tmp_path, capsys):
    def names(groups, scale):
        return [run.name for run in ablate.choose_runs(groups, [7, 7], dict(scale=scale), tmp_path)]

    assert names(["main", "unipool"], "tiny") == ["dense", "vanilla", "unipool", "unipool-67", "unipool-50"]
    assert names(["table5"], "182m") == list(METHODS_AT_182M)[1:7] + ["g6", "g4", "g2"]
    assert set(names(["granularity"], "182m")) == {"vanilla", "unipool"} | set(list(METHODS_AT_182M)[-4:])
    ablate.main(["--list"])
    assert "lock: vanilla, unipool, lock, random\n" in capsys.readouterr().out
    assert "g6" not in names(["table5"], "tiny") and "g6 is left out" in capsys.readouterr().err
    runs = ablate.choose_runs(["unipool-67"], [1], dict(scale="tiny", n_layer=2), tmp_path)
    assert [run.config.n_expert for run in runs] == [11], "two thirds of 8 experts in each of 2 layers"
    for scale, share in (("tiny", 0.2), ("182m", 1 / 30)):
        *_, lock, random_owners = ablate.choose_runs(["lock"], [1], dict(scale=scale), tmp_path)
        assert lock.settings.lock == pytest.approx(share, rel=1e-3) and random_owners.settings.lock_random


TINY_LAYERS = [flag for flag in TINY_RUN if "n_expert" not in flag]  # the method says how many experts
ABLATE = ["--methods", "vanilla", "unipool", "--scale=tiny", *TINY_LAYERS, "--eval_interval=1"]


def test_ablate_trains_what_is_missing_and_reports(text_data, tmp_path, capsys):
    flags = [*ABLATE, f"--data_dir={text_data}", "--max_steps=2", f"--runs={tmp_path / 'runs'}", "--jobs=2",
             f"--results={tmp_path / 'results'}", "--seeds=5"]  # fmt: skip
    ablate.main(flags)
    first = contents(tmp_path / "runs")
    ablate.main([*flags, "--max_steps", "2"])  # the same, spelt otherwise
    assert contents(tmp_path / "runs") == first, "what is done is not done again"
    assert "2 of 2 runs are done already" in capsys.readouterr().err
    path = tmp_path / "results" / "ablate_tiny_vanilla_unipool.json"
    record = json.loads(path.read_text())
    for name in ("vanilla", "unipool"):
        last = read_metrics(tmp_path / "runs" / f"{name}-5")[-1]
        assert record["results"][compare.methods(2)[name].label]["val_loss"] == {"5": last["val_loss"]}
    assert record["tokens"] == 2 * 8 * 32 and record["runs"].keys() == {"vanilla-5", "unipool-5"}
    assert {"commit", "cpu", "torch", "python"} <= record["machine"].keys() and "pytest" in record["command"]
    assert "| UniPool |" in path.with_suffix(".md").read_text() and is_picture(path.with_suffix(".png"))
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
        if name == "stopped":
            process, run = command("experiments/ablate.py", *flags, background=True), tmp_path / name / "vanilla-5"
            wait_for(process, run / "metrics.jsonl", lines=3)
            process.terminate()
            process.wait(timeout=60)
            step = torch.load(run / "ckpt.pt")["step"]
            assert 3 <= step < 30, f"the run should have saved when it was stopped, and has step {step}"
        command("experiments/ablate.py", *flags)
        results = json.loads((tmp_path / name / "ablate_tiny_vanilla_unipool.json").read_text())["results"]
        losses.append({label: figures["val_loss"] for label, figures in results.items()})
    assert losses[0] == losses[1]


@pytest.mark.parametrize("flag, named", [
    ("--methods=best", "unipool-67"), ("--methods=g6", "4 layers"), ("--seed=1", "--seeds"), ("--lr=fast", "float"),
    ("--balance=layer", "--methods"), ("--jobs=0", "--jobs: 0"), ("--scale=1b", "182m"),
    ("--arch=dense", "--arch=dense"), ("--eval_interval=0", "validations"),
])  # fmt: skip
def test_bad_flags_of_ablate(flag, named, capsys, tmp_path):
    flags = [f"--runs={tmp_path / 'runs'}", flag]
    fails(capsys, ablate.main, flags, *flag.split("="), named, touching=tmp_path)


def test_a_run_that_never_made_a_step_does_not_stand_in_the_way(text_data, tmp_path, capsys):
    """Of the corrected command."""
    flags = ["--methods", "dense", "--seeds=1", f"--runs={tmp_path}", "--results=", *TINY_LAYERS, "--max_steps=1"]
    fails(capsys, ablate.main, [*flags, "--data_dir=nowhere"], "dense-1", "--data_dir=nowhere", "log.txt")
    ablate.main([*flags, f"--data_dir={text_data}"])
    assert read_metrics(tmp_path / "dense-1")[-1]["step"] == 1 and "| dense |" in capsys.readouterr().out


@pytest.fixture(scope="session")
def short_runs(text_data, tmp_path_factory):
    """A folder with runs of two steps: unipool, another seed of it, vanilla and dense."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"unipool": [], "other": ["--seed=2"], "vanilla": ["--arch=vanilla"],
                        "dense": ["--arch=dense"]}.items():  # fmt: skip
        train.main([*TINY_LAYERS, f"--data_dir={text_data}", f"--out_dir={folder / name}", "--max_steps=2",
                    "--eval_interval=1", *flags])  # fmt: skip
    return folder


def test_compare_as_a_command(short_runs, tmp_path, capsys):
    runs = [str(short_runs / name) for name in ("unipool", "dense", "other")]
    compare.main([*runs, f"--out={tmp_path / 'x.png'}"])
    out = capsys.readouterr().out
    assert out.count("| UniPool |") == 2 and out.count("| dense |") == 1 and is_picture(tmp_path / "x.png")
    assert f"| 2 | {read_metrics(short_runs / 'dense')[-1]['val_loss']:.4f} |" in out
    compare.main([*runs, f"--out={tmp_path / 'y.png'}", "--key=train_loss"])
    assert f"| {read_metrics(short_runs / 'dense')[-1]['train_loss']:.4f} |" in capsys.readouterr().out
    for flag, named in {"--key=loss": "val_loss", "--key=sigma": "--key=sigma", "--out=x.txt": "x.txt"}.items():
        fails(capsys, compare.main, [*runs, flag], flag, named, touching=tmp_path)
    fails(capsys, compare.main, [tmp_path / "none"], tmp_path / "none" / "metrics.jsonl", touching=tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": "many", "val_loss": 2.0}\n')
    fails(capsys, compare.main, [tmp_path], tmp_path / "metrics.jsonl", touching=tmp_path)


def test_only_runs_that_differ_in_their_seed_are_one_method(short_runs, tmp_path, capsys):
    """Another learning rate is named; a fork's checkpoint, with a field that is unknown here, goes by its folder."""
    runs = {name: torch.load(short_runs / "unipool" / "ckpt.pt") for name in ("a", "b", "c", "faster", "fork")}
    runs["b"]["settings"] |= dict(seed=5, log_interval=7)
    runs["faster"]["settings"] |= dict(lr=0.25, data_dir="other")
    runs["fork"]["config"] |= dict(n_shared=1)
    for name, checkpoint in runs.items():
        (tmp_path / name).mkdir()
        torch.save(checkpoint, tmp_path / name / "ckpt.pt")
    names = [str(tmp_path / name) for name in runs]
    labels = list(compare.labels_of(names[:3]).values())
    assert labels == ["UniPool"] * 3, "nothing sets seeds apart"
    compare.draw_curves(Figure().subplots(), {"UniPool": [{1e6: 3.0}, {2e6: 2.0}]}, "val_loss")
    assert "UniPool is not drawn" in capsys.readouterr().err, "runs without a step in common"
    *same, faster, fork = compare.labels_of(names).values()
    assert len(set(same)) == 1 and faster == "UniPool, data_dir=other, lr=0.25" != same[0] and fork == names[4]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "n_shared" in error, "one line that says what is unknown"


def test_a_curve_is_the_mean_of_its_runs():
    first, second = {1e6: 3.0, 2e6: 2.0, 3e6: 1.0}, {1e6: 4.0, 2e6: 3.0}
    ax, other = Figure().subplots(1, 2)
    compare.draw_curves(ax, {"UniPool": [first, second], "mine": [first]}, "val_loss")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 3.5], [2, 2.5]], err_msg="over points that all runs have")
    band = ax.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose(band.get_points(), [[1, 2], [2, 4]], err_msg="from the lowest run to the highest")
    compare.draw_curves(other, {"UniPool": [first, {2e6: 5.0, 4e6: 4.0}]}, "val_loss")
    np.testing.assert_allclose(other.lines[0].get_xydata(), [[2, 3.5]], err_msg="by tokens, not by their number")
    assert ax.lines[0].get_color() == compare.methods(12)["unipool"].colour != ax.lines[1].get_color()
    assert ax.get_xlabel() == "million training tokens"


# ----------------------------------------------------------------------------------------------------------------------
# Experiments: probes of the routing, the study of the balance loss, speed


@pytest.mark.parametrize("n_pool, top_k", [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_routing_statistics_against_counts(n_pool, top_k, text_data):
    """What measure() finds, against loops over what the routers themselves returned."""
    model, seen = small_model(vocab_size=320, n_pool=n_pool, top_k=top_k).eval(), []
    for block in model.blocks:
        block.router.register_forward_hook(lambda module, args, result: seen.append(result))
        block.router = probe.WatchedRouter(block.router)
    data = open_split(text_data, "val", vocab_size=320)
    figures = probe.measure(model, data, np.arange(6), torch.device("cpu"), mock.Mock())
    M, L = 8 // n_pool, 4
    visits = np.zeros((L, 6 * 16, 8))  # of each token to each expert of all pools
    for l, (gates, experts, _) in enumerate(seen):
        for token, choice in (gates > 0).nonzero().tolist():
            visits[l, token, l * n_pool // L * M + experts[token, choice]] += 1
    counts, loads = visits.sum(axis=1), visits.sum(axis=(0, 1))
    shares = counts / counts.sum(axis=1, keepdims=True)
    p = loads.reshape(n_pool, M) / loads.reshape(n_pool, M).sum(axis=1, keepdims=True)
    expected = dict(
        unserved=1 - counts.sum(axis=1) / (6 * 16 * top_k), shares=shares, load=loads / loads.mean(),
        dead_experts=(loads == 0).sum(), distinct_share=visits.any(axis=0).sum() / visits.sum(),
        layers_of_expert=(shares >= 0.5 / M).sum(axis=0), utilisation=np.prod(p**-p, axis=1).mean() / M,
        score_sum=[scores.sum(dim=1).mean().item() for _, _, scores in seen],
        gate_sum=[gates.sum(dim=1).mean().item() for gates, _, _ in seen],
    )  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-5, atol=1e-9, err_msg=name)
    assert max(figures["unserved"]) > 0, "the test needs pairs that no expert serves"
    if n_pool == 1:
        own = np.array(figures["owner"]) == np.arange(L)[:, None]
        assert own.sum(axis=1).tolist() == [2] * L
        assert np.array_equal(own, unipool.assign_experts(torch.tensor(counts))), "by what is served, as --lock"
        assert figures["covered"] == pytest.approx((shares * own).sum(axis=1))


def test_probe_of_a_locked_model(text_data):
    """Its owners are found, serve all, and random choices stay among them."""
    model, owned = small_model(vocab_size=320).eval(), partition(4, 8)
    model.lock(owned, 1)
    for block in model.blocks:
        block.router = probe.WatchedRouter(block.router)
    data = open_split(text_data, "val", vocab_size=320)
    figures = probe.probe(model, data, 512, 2, torch.device("cpu"), "test")
    assert figures["owner"] == owned.int().argmax(dim=0).tolist() and figures["covered"] == pytest.approx([1] * 4)
    assert figures["probe"].keys() == {"uniform"} and owned[3][model.blocks[3].router.seen[-1][0]].all()


@pytest.mark.parametrize("n_pool, top_k", [(1, 1), (2, 2), (4, 1)])
def test_distinct_experts_of_even_random_choices(n_pool, top_k):
    """The closed form beside the measured share, against choices that are drawn."""
    torch.manual_seed(0)
    experts = torch.rand(4, 20000, 8 // n_pool).topk(top_k).indices
    gates = (torch.rand(4, 20000, top_k) < 0.8).float()  # some pairs are not served
    config = small_config(n_pool=n_pool, top_k=top_k)
    figures = probe.routing_statistics(config, experts, gates, gates.sum(dim=2))
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
    """And its loss is that of train.py's validation, with and without a layer; its accuracy that of the logits."""
    model, device = small_model(vocab_size=320, n_expert=24), torch.device("cpu")
    if alike:
        for weight in model.pools.parameters():
            weight.data[:] = weight.data[:1]
    data = open_split(text_data, "val", vocab_size=320)
    tokens = torch.from_numpy(data.sequences(np.linspace(0, len(data) - 1, 32).astype(np.int64)))
    right = model(tokens[:, :-1]).logits.argmax(dim=-1) == tokens[:, 1:]
    losses = {}
    for seen in (0, 1):  # without layer 1's experts, and with them
        model.blocks[1].router.seen.fill_(seen)
        losses[seen], _ = train.validate(model, data, 512, 8, 0, 1, device)
    for block in model.blocks:
        block.router = probe.WatchedRouter(block.router)
    figures = probe.probe(model.eval(), data, 512, 2, device, "test")
    assert figures["loss"] == pytest.approx(losses[1], rel=1e-5)
    worth = losses[0] - losses[1]
    assert figures["worth"][1] == pytest.approx(worth, abs=1e-5) and abs(worth) > 1e-4
    assert figures["accuracy"] == pytest.approx(right.float().mean().item())
    assert figures["probe"].keys() == {"uniform", "matched"} and figures["tokens"] == 512
    changes = []
    for way in figures["probe"].values():
        assert way.keys() == {2, 3}, "the deeper half of four layers"
        changes += [change for layer in way.values() for change in layer["loss"]]
    assert len(changes) == 8 and (max(map(abs, changes)) < 1e-5) == alike, f"changes of the loss: {changes}"
    assert alike or len(set(changes)) == 8, "each draw is another"
    chosen, shares = model.blocks[3].router.seen[-1][0].unique(), figures["shares"][3]  # of the last, matched, pass
    assert min(shares[i] for i in chosen) >= sorted(shares)[-8], "the 8 experts that the layer uses most"


def test_probe_as_a_command(short_runs, tmp_path, capsys):
    runs = [str(short_runs / "unipool"), str(short_runs / "vanilla")]
    probe.main([*runs, "--tokens=256", "--draws=2", "--device=cpu", f"--results={tmp_path}"])
    assert "| UniPool | vanilla |" in capsys.readouterr().out
    results = json.loads((tmp_path / "probe.json").read_text())["results"]
    assert results["UniPool"]["tokens"] == 256 and results["vanilla"]["distinct_share"] == 1
    assert len(results["UniPool"]["unserved"]) == 2 == len(results["UniPool"]["sigma"])
    assert "matched" not in results["vanilla"]["probe"], "8 experts are all a vanilla layer has"
    assert is_picture(tmp_path / "probe_usage.png") and is_picture(tmp_path / "probe_routing.png")
    dense = short_runs / "dense"
    fails(capsys, probe.main, [dense, "--device=cpu"], dense, "dense", touching=tmp_path)
    fails(capsys, probe.main, [tmp_path / "none"], tmp_path / "none", touching=tmp_path)
    fails(capsys, probe.main, [*runs, "--draws=0"], "--draws: 0", touching=tmp_path)
    fails(capsys, probe.main, [*runs, "--data_dir=nowhere"], "--data_dir=nowhere", touching=tmp_path)


def test_loss_against_depth(text_data, tmp_path, capsys):
    layers = [flag for flag in TINY_LAYERS if "n_layer" not in flag]
    depth.main([*layers, f"--data_dir={text_data}", "--max_steps=1", "--depths", "1", "2", "--seeds=1",
                f"--runs={tmp_path / 'runs'}", f"--results={tmp_path}"])  # fmt: skip
    results = json.loads((tmp_path / "depth_tiny.json").read_text())["results"]
    assert len(results) == 4 and is_picture(tmp_path / "depth_tiny.png")
    for name, L in itertools.product(("vanilla", "unipool"), (1, 2)):
        run = tmp_path / "runs" / f"{name}-{L}-1"
        config = UniPoolConfig(**train.load_checkpoint(run / "ckpt.pt")["config"])
        assert (config.n_layer, config.n_expert) == (L, 32 if name == "unipool" else 8 * L)
        assert results[f"{name}-{L}"]["val_loss"] == {"1": read_metrics(run)[-1]["val_loss"]}
        assert results[f"{name}-{L}"]["parameters"] == UniPool(config).num_params()
    fails(capsys, depth.main, [*layers, "--n_layer=3"], "--n_layer=3", touching=tmp_path)


def test_study_of_the_balance_loss(text_data, tmp_path, capsys):
    """Two coefficients with two steps; f with phantom load counts every pair, also those that no expert serves."""
    gates, experts = torch.tensor([[0.5], [0.0], [0.0]]), torch.tensor([[1], [2], [2]])
    weights = [w.detach() for w in ExpertPool(4, 16, 24).weights()]
    _, f = study.with_phantom_load(torch.randn(3, 16), gates, experts, weights)
    torch.testing.assert_close(f, torch.tensor([0, 1, 2, 0]) / 3)
    flags = [f"--data_dir={text_data}", *TINY_RUN, "--n_expert=2", "--max_steps=2", "--coefs", "0", "0.1", "--seeds=1"]
    study.main([*flags, f"--runs={tmp_path / 'runs'}", f"--results={tmp_path}"])
    runs = tmp_path / "runs"
    assert {path.name for path in runs.iterdir()} == {"0-served-1", "0.1-served-1", "0.1-phantom-1"}
    assert read_metrics(runs / "0.1-phantom-1")[0]["unserved"] == 0 < read_metrics(runs / "0.1-served-1")[0]["unserved"]
    results = json.loads((tmp_path / "balance.json").read_text())["results"]
    assert len(results) == 4 and all(0 < np.mean(f["1"]["unserved"]) < 1 for f in results.values())
    assert is_picture(tmp_path / "balance.png")
    fails(capsys, study.main, ["--jobs=0"], "--jobs: 0")


@pytest.mark.parametrize("steps, seconds", [(5, 1e9), (40, 0)])
def test_what_bench_compares_takes_turns(steps, seconds, monkeypatch):
    """On a clock that only the functions move: medians, quartiles, and ratios within a round."""
    clock, turns, rounds = [0.0], [], iter([1, 2, 3, 4, 5, 6, 7])

    def slow_function():
        clock[0] += 2 * next(rounds)
        turns.append("slow")

    def fast_function():
        turns.append("fast")
        return len(turns) / 4  # it has timed itself: half the round's number

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    args = mock.Mock(steps=steps, seconds=seconds)
    found = bench.compare(dict(slow=slow_function, fast=fast_function), args, "test", 12, "tokens", ["slow"])
    assert turns == ["slow", "fast"] * 7, "two rounds before the five that count, also when --seconds are over"
    assert found["slow"]["seconds"] == [7, 10, 13] and found["fast"]["seconds"] == [1.75, 2.5, 3.25]
    assert found["fast"]["tokens per second"][1] == 12 / 2.5 and found["fast"]["times slow"] == [4, 4, 4]
    table = bench.table({"test": found})
    assert "| test | fast | 5 | 2.50 (1.75 to 3.25) |" in table


def test_results_are_written_before_they_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.print", mock.Mock(side_effect=OSError("the terminal is gone")))
    with pytest.raises(OSError):
        common.save(mock.Mock(results=tmp_path, name="a"), {}, "| table |", figures=[1])
    assert len(contents(tmp_path)) == 2


def test_bench_as_a_command(tmp_path, capsys):
    flags = ["--shapes", "tiny:256", "--steps=1", "--device=cpu", f"--results={tmp_path}"]
    bench.main(flags)
    results = json.loads((tmp_path / "bench_train_cpu.json").read_text())["results"]
    assert results["tiny:256"].keys() == set(bench.COLOURS)
    assert results["tiny:256"]["dense"]["times dense"] == [1, 1, 1] and is_picture(tmp_path / "bench_train_cpu.png")
    assert (tmp_path / "bench_generate_cpu.json").exists()
    for shape in ("tiny:200", "1b:256", "12x7:256", "0x0:256", "tiny"):
        fails(capsys, bench.main, ["--shapes", shape], f"--shapes={shape}", touching=tmp_path)
    (tmp_path / "file").touch()
    for flag in ("--seconds=nan", "--steps=0", "--name=a/b", f"--results={tmp_path}/file", "--results=/proc/results"):
        fails(capsys, bench.main, [flag], *flag.split("="), touching=tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Experiments: zero-shot tasks, export


@pytest.fixture
def adapter():
    pytest.importorskip("lm_eval", reason="an extra: pip install lm_eval==0.4.13")
    model = small_model(vocab_size=320, block_size=32).eval()
    return evaluate.Adapter(model, get_tokenizer("bytes"), batch_size=3)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@torch.no_grad()
def test_log_likelihoods_by_hand(name, adapter):
    """Texts of all lengths, in batches of three; also without context, and longer than the model's 32 tokens."""
    if name == "gpt2":
        adapter = evaluate.Adapter(small_model(vocab_size=51200, block_size=32).eval(), gpt2_or_skip(), batch_size=3)
    encode, model = adapter.tokens.encode, adapter.model
    requests = [("def f", "(x)"), ("", "abc"), ("a b c d e f", " g h" * 4), ("x", " y"), ("zy 0" * 30, " later"),
                ("q", " r" * 16), ("Naïve café, 你好", " 😀")]  # fmt: skip
    found = adapter.loglikelihood([mock.Mock(args=pair) for pair in requests], disable_tqdm=True)
    for (context, continuation), (log_p, greedy) in zip(requests, found):
        tokens = encode(context + continuation) if context else [adapter.tokens.eot_token, *encode(continuation)]
        kept = tokens[-33:]  # 32 tokens of input, and the last one
        predicted = min(len(encode(continuation)), len(kept) - 1)
        logits = model(torch.tensor([kept[:-1]])).logits[0].double()
        steps = F.log_softmax(logits, dim=-1)
        by_hand = [steps[i, token].item() for i, token in enumerate(kept[1:])]
        assert log_p == pytest.approx(sum(by_hand[-predicted:]), rel=1e-5), (context, continuation)
        assert greedy == (logits[-predicted:].argmax(-1).tolist() == kept[-predicted:])
    best = model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax().item()
    found = adapter._loglikelihood_tokens([(None, [1, 2, 3], [token]) for token in (best, (best + 1) % 256)])
    assert [greedy for _, greedy in found] == [True, False]


def test_endings_that_cannot_be_scored_are_refused_and_cut_texts_are_counted(adapter, capsys):
    """Without a token of its own an ending would score 0 and always win; of one beyond block_size only a part would."""
    for ending in ([], [1] * 33):
        with pytest.raises(BadInput, match=f"an ending of {len(ending)} tokens"):
            adapter._loglikelihood_tokens([(None, [1, 2], [3]), (None, [1, 2], ending)], disable_tqdm=True)
    adapter._loglikelihood_tokens([(None, [1] * n, [2]) for n in (31, 32, 33, 40)], disable_tqdm=True)
    assert "2 of 4 texts lost their beginning, to fit 32 tokens" in capsys.readouterr().err


def task_file(folder, kind, metric):
    """A task of the harness on folder/endings.jsonl; JSON is YAML too."""
    return json.dumps(dict(
        task="endings", dataset_path="json", dataset_kwargs=dict(data_files=f"{folder}/endings.jsonl"),
        test_split="train", output_type=kind, doc_to_text="{{text}}", doc_to_choice="{{endings}}",
        doc_to_target="{{right}}", metric_list=[dict(metric=metric, aggregation="mean", higher_is_better=True)],
        target_delimiter=""))  # fmt: skip


def test_a_local_task_through_the_harness(short_runs, tmp_path, capsys, monkeypatch):
    """Accuracy on a task of our own, against the likeliest endings by the log-likelihoods above; offline."""
    pytest.importorskip("lm_eval", reason="an extra: pip install lm_eval==0.4.13")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng, out, cpu = random.Random(0), short_runs / "unipool", torch.device("cpu")
    examples = [dict(text=f"def f{i}(self", endings=[rng.choice([")", "):", " x", "zz", "=1"]) + rng.choice("ab ")
                     for _ in range(3)], right=rng.randrange(3)) for i in range(12)]  # fmt: skip
    (tmp_path / "endings.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    (tmp_path / "tasks").mkdir()
    task = tmp_path / "tasks" / "endings.yaml"
    task.write_text(task_file(tmp_path, "multiple_choice", "acc"))
    flags = [out, "--tasks", "endings", f"--include_path={task.parent}", "--device=cpu", f"--results={tmp_path}"]
    evaluate.main([str(flag) for flag in flags])
    model = train.load_model(train.load_checkpoint(out / "ckpt.pt"), "", cpu).eval()
    adapter, rights = evaluate.Adapter(model, get_tokenizer("bytes"), batch_size=1), []
    for example in examples:
        requests = [mock.Mock(args=(example["text"], ending)) for ending in example["endings"]]
        found = adapter.loglikelihood(requests, disable_tqdm=True)
        rights.append(np.argmax([log_p for log_p, _ in found]) == example["right"])
    record = json.loads((tmp_path / "evaluate.json").read_text())
    assert record["results"]["endings"]["acc,none"] == pytest.approx(np.mean(rights))
    assert 0 < np.mean(rights) < 1, "the test needs right and wrong answers"
    fails(capsys, evaluate.main, [out, "--tasks=nothing", "--device=cpu"], "--tasks=nothing")
    task.write_text(task_file(tmp_path, "generate_until", "exact_match"))
    fails(capsys, evaluate.main, flags, "--tasks", "generated text")


def export_and_load(model, folder, *flags):
    folder.mkdir()
    rest = dict.fromkeys(("optimizer", "step", "position", "rng", "best", "validated", "skipped"))
    contents = rest | dict(config=asdict(model.config), model=model.state_dict(), tokenizer="bytes", settings={})
    torch.save(contents, folder / "ckpt.pt")
    export.main([str(folder), *flags])
    return export.load(folder / "export")


def trained_like(model):
    """Weights that are large enough to show any mistake, in eval mode."""
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    return model.eval()


def test_export_keeps_every_weight_and_each_pool_once(tmp_path, capsys):
    pytest.importorskip("safetensors", reason="an extra: pip install safetensors")
    model = trained_like(small_model(n_pool=2, router="sigmoid", balance="bias"))
    again = export_and_load(model, tmp_path / "run")
    assert again.config == model.config
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    size = (tmp_path / "run" / "export" / "model.safetensors").stat().st_size
    assert size < 4 * model.num_params() * 1.1 + 10_000, "each pool must be stored once"
    fails(capsys, export.main, [tmp_path / "run", "--format=transformers"], "--format=transformers", "sigmoid")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(BadInput, match="cannot be read"):
        export.load(tmp_path)


@pytest.mark.parametrize("fields", [
    dict(n_expert=0, balance="none"),
    dict(router="softmax", balance="layer", n_pool=4, top_k=2),
    dict(router="softmax", top_k=2),  # a shared pool: each layer gets a copy
])  # fmt: skip
def test_transformers_computes_the_same(fields, tmp_path):
    """Both ways: transformers loads what we write, and we what it saves."""
    model = trained_like(small_model(**fields))
    config, state = export.from_transformers(*export.to_transformers(model.config, model.state_dict()))
    again = UniPool.from_checkpoint(dict(config=asdict(config), model=state))
    idx = random_tokens(model.config)
    logits = model(idx).logits
    assert_close(again(idx).logits, logits, "there and back")
    pytest.importorskip("safetensors", reason="an extra: pip install safetensors")
    transformers = pytest.importorskip("transformers", reason="an extra: pip install transformers")
    assert_close(export_and_load(model, tmp_path / "run", "--format=transformers")(idx).logits, logits, "read back")
    load, folder = transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "run" / "export"
    theirs, report = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert_close(theirs.eval()(idx).logits, logits, type(theirs).__name__, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(export.load(tmp_path / "theirs")(idx).logits, logits, "what transformers has saved")


def test_a_locked_model_as_a_vanilla_one():
    """Each layer chooses the same experts; gates differ by the norm, which then runs over the layer's own logits."""
    model, owned = trained_like(small_model()), partition(4, 8)
    for unlocked in (model, small_model(n_expert=0)):
        with pytest.raises(BadInput, match="--lock"):
            export.to_vanilla(unlocked.config, unlocked.state_dict())
    model.lock(owned, 1)
    config, state = export.to_vanilla(model.config, model.state_dict())
    vanilla = UniPool.from_checkpoint(dict(config=asdict(config), model=state))
    assert (config.n_pool, vanilla.num_params()) == (4, model.num_params() - 4 * 6 * 32), "others' router rows are gone"
    x = torch.randn(50, 32)
    for theirs, ours, own in zip(vanilla.blocks, model.blocks, owned):
        gates, experts, _ = ours.router(x)
        their_gates, their_experts, _ = theirs.router(x)
        served = gates > 0
        assert torch.equal(own.nonzero()[:, 0][their_experts][served], experts[served])
        z = x @ ours.router.weight.T
        assert_close(their_gates, gates * (z.norm(dim=1) / z[:, own].norm(dim=1))[:, None], rtol=1e-4, atol=1e-6)
    for name, pool in (("gate_up", model.pools[0].gate_up), ("down", model.pools[0].down)):
        assert torch.equal(getattr(vanilla.pools[2], name), pool[owned[2]])


@pytest.mark.parametrize("module, extra", [(evaluate, "lm_eval"), (export, "safetensors")])
def test_an_extra_that_is_missing_is_named(module, extra, capsys, monkeypatch):
    monkeypatch.setattr(module, extra, None)
    fails(capsys, module.main, ["out"], f"pip install {extra}")


# ----------------------------------------------------------------------------------------------------------------------
# The commands themselves, and the README


def test_commands_from_text_to_text(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "mine.jsonl.zst")
    flags = ["--source", "mine.jsonl.zst", "--tokenizer=bytes", "--out_dir=data/mine"]
    assert b"data/mine: " in command("prepare_pile.py", *flags, cwd=tmp_path).stdout
    result = command("train.py", "--data_dir=data/mine", *TINY_RUN, "--max_steps=3", cwd=tmp_path)
    assert b"python sample.py" in result.stdout.splitlines()[-1] and b"tokens/s" in result.stderr
    result = command("train.py", "--resume", "--data_dir=data/mine", "--max_steps=4", cwd=tmp_path)
    assert b"step 4" in result.stdout
    flags = ["--num_samples=2", "--max_new_tokens=40", "--seed=3"]
    texts = [command("sample.py", *flags, f"--prompt={prompt}", cwd=tmp_path, input="Document é".encode()).stdout
             for prompt in ("Document é", "-")]  # fmt: skip
    assert texts[0] == texts[1], "the same prompt, by flag or standard input, and seed give the same text"
    assert texts[0].decode().count("-" * 80 + "\nDocument é") == 2
    command("sample.py", "--max_new_tokens=5", cwd=tmp_path, input=b"")  # begins at the start of a document
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")  # a terminal without UTF-8
    result = command("sample.py", "--max_new_tokens=5", "--num_samples=1", "--prompt=é 你", cwd=tmp_path)
    assert "é ?".encode("cp1252") in result.stdout
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.+?)```", (HERE / "README.md").read_text(), re.DOTALL)
    with mock.patch("matplotlib.pyplot.imshow") as imshow:
        exec(code, {})
    assert imshow.call_args.args[0].shape == (2, 15) and "def main(argv):" in capsys.readouterr().out


def test_a_sample_ends_with_its_document(trained, capsys, monkeypatch):
    """Here before the last character is whole."""
    tokens = [*"né".encode()[:2], 256, ord("x")]
    monkeypatch.setattr(UniPool, "stream", lambda *args: (torch.tensor([[token]]) for token in tokens))
    sample.main([f"--out_dir={trained}", "--device=cpu", "--num_samples=1", "--prompt=a"])
    assert capsys.readouterr().out == "-" * 80 + "\nan\ufffd\n"


@pytest.mark.parametrize("arguments", [["train.py", "--top_k=99"], ["sample.py"], ["prepare_pile.py", "--source=no"]])
def test_bad_input_as_a_command(arguments, tmp_path):
    result = command(*arguments, cwd=tmp_path, status=2)
    assert not result.stdout
    assert result.stderr.startswith(f"{arguments[0]}: error: ".encode()) and result.stderr.count(b"\n") == 1
    assert not list(tmp_path.iterdir())


EXPERIMENTS = [f"experiments.{path.stem}" for path in sorted((HERE / "experiments").glob("*.py"))
               if "def main(" in path.read_text()]  # fmt: skip


@pytest.mark.parametrize("module", ["train", "sample", "prepare_pile", *EXPERIMENTS])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main(["--help"])
    shown = capsys.readouterr()
    start = f"python -m {module}" if module in EXPERIMENTS else f"python {module}.py"
    assert stop.value.code == 0 and not shown.err and start in shown.out and "--" in shown.out


def test_recipes_of_the_readme():
    """Another loss, token ids, expert choice: the README's code, put where it says, trains a router."""
    text = " ".join((HERE / "README.md").read_text().split())
    own_loss, add_loss = re.search(r"Another loss\*: .+?, as `(.+?)`, and add `(.+?)` where", text).groups()
    hand_over = re.search(r"Token ids\*: `(.+?)` in `UniPool.trunk`", text)[1]
    scores = re.search(r"Expert choice\*: .+? tokens, `(.+?)`\.", text)[1]

    class Recipes(unipool.SoftmaxRouter):
        def score(self, z):
            exec(own_loss)
            assert torch.equal(self.idx, idx), "the tokens that the model was given"
            return eval(scores)

    class Model(UniPool):
        def trunk(self, idx, caches=None):
            exec(hand_over)
            return super().trunk(idx, caches)

    with mock.patch.dict(ROUTERS, recipes=Recipes):
        model = Model(small_config(router="recipes", top_k=8))
    idx = random_tokens(model.config)
    out = model(idx, idx)
    torch.testing.assert_close(out.usage, torch.full((4, 8), 1 / 64), msg="each expert takes N / M of the N * M pairs")
    alone, both = (torch.autograd.grad(loss, model.blocks[0].router.weight, retain_graph=True)[0]
                   for loss in (out.loss, out.loss + eval(add_loss)))  # fmt: skip
    assert alone.any() and not torch.equal(alone, both), "the loss reaches the router"


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
    readme = (HERE / "README.md").read_text()
    commands = re.findall(r"train\.py((?: +--(?!help)[\w-]+(?:=[^\s`]+)?)+)", readme)
    assert len(commands) > 8
    for flags in commands:
        given = train.parse_flags(flags.split())
        if not given.pop("resume", False):
            train.settle(given, None)

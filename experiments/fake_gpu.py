"""A GPU that is not there: the CUDA path on fake tensors, which have a shape, a dtype and a layout but no numbers.

Real are the operations, the memory they hold, and whether the host would wait for the GPU: reading a number of a fake
tensor raises. Not in it: fragments of the caching allocator, workspaces of cuBLAS, buffers of NCCL. Where torch finds
no GPU this leans on torch's insides, so it is for one version of torch, on Linux x86-64, in a process of its own.
"""

import collections
import contextlib
import ctypes
import math
import platform
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unipool import norm_router_scale

TORCH = "2.13"
FITS = torch.__version__.startswith(TORCH) and sys.platform == "linux" and platform.machine() == "x86_64"
WHY_NOT = None if torch.cuda.is_available() or FITS else f"a GPU needs torch {TORCH} on Linux x86-64 to be imitated"


def pretend_cuda():
    """Give autograd a device guard for CUDA, and CUDA's hooks a "yes, it is built" and a "yes, it has a context"."""
    if torch.cuda.is_available() or hasattr(pretend_cuda, "keep"):
        return
    CUDA, PRIVATE = 1, 20  # c10::DeviceType

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self):
            return torch._C._autograd.DeviceType.CUDA

    libs = Path(torch.__file__).parent / "lib"
    name = "_ZN3c104impl26device_guard_impl_registryE"
    registry = (ctypes.c_void_p * 22).in_dll(ctypes.CDLL(str(libs / "libc10.so")), name)
    guard = Guard()
    torch._C._acc.register_python_privateuseone_device_guard(guard)  # the one kind of device that Python may define ...
    registry[CUDA], registry[PRIVATE] = registry[PRIVATE], None  # ... moved to CUDA's place
    get_hooks = ctypes.CDLL(str(libs / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get_hooks())  # an object begins with the address of its virtual functions
    table = (ctypes.c_void_p * 82)(*(ctypes.c_void_p * 82).from_address(hooks.value - 16))  # which follow two words
    is_built = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda this: True)
    has_context = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda this, index: True)
    for place, function in ((2, is_built), (4, has_context)):
        table[2 + place] = ctypes.cast(function, ctypes.c_void_p).value
    hooks.value = ctypes.addressof(table) + 16
    pretend_cuda.keep = guard, is_built, has_context, table


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What a CUDA build chooses on an H100; a CPU build knows only "math". Raises where CUDA knows no other."""
    if not (q.dtype == k.dtype == v.dtype and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and attn_mask is None):
        raise AssertionError("this attention has no fused kernel")
    if q.dtype == torch.float32:
        if enable_gqa or q.size(1) != k.size(1):
            raise AssertionError("fp32 attention with grouped queries has no fused kernel")
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p, is_causal)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]


class FusedRMSNorm(torch.autograd.Function):
    """Keeps, reads and writes what a CUDA build's fused kernels do; a CPU build has none, and would do more."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        x.flatten().dot(grad.flatten())  # stands for the weight's gradient
        return x + grad, torch.empty_like(weight)


class FusedSiLU(torch.autograd.Function):
    """As FusedRMSNorm."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] + grad


class FakeStream:
    """Also stands for an event."""

    device, stream_id, device_index, device_type = torch.device("cuda", 0), 0, 0, 1

    def __init__(self, *_, **__): ...
    def record_event(self, event=None):
        return event or self

    wait_event = wait_stream = wait = synchronize = record = lambda *_: None


@contextlib.contextmanager
def fake_gpu(config, world_size=1, bf16=True):
    """Within it tensors are fake, and there is a "cuda". Yields the mesh of several processes, or None, and a Watch."""
    if config.n_expert and config.router == "norm":  # needs real numbers; functools.cache keeps it
        norm_router_scale(config.experts_per_pool, config.top_k)
    pretend_cuda()
    patch = mock.patch.object
    with contextlib.ExitStack() as stack:
        enter, mesh = stack.enter_context, None
        enter(patch(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16))
        enter(patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        enter(patch(F, "scaled_dot_product_attention", fused_attention))
        enter(patch(F, "rms_norm", lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight)))
        enter(patch(F, "silu", FusedSiLU.apply))
        if world_size > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            one = FakeStream()
            streams = dict(
                Stream=FakeStream, Event=FakeStream, stream=lambda _: contextlib.nullcontext(),
                current_stream=lambda device=None: one, default_stream=lambda device=None: one,
                current_device=lambda: 0, device_count=lambda: world_size, set_device=lambda _: None,
                is_initialized=lambda: True,
            )  # fmt: skip
            enter(mock.patch.multiple(torch.cuda, **streams))
            enter(patch(torch.Tensor, "record_stream", lambda self, stream: None))
            dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
            stack.callback(dist.destroy_process_group)
            mesh = dist.init_device_mesh("cuda", (world_size,))
        watch = Watch()
        for name in ("alloc_storage", "free_storage"):
            enter(patch(fsdp_param, name, watch.resizing(getattr(fsdp_param, name))))
        enter(FakeTensorMode())
        yield mesh, enter(watch)


def size_of(*tensors):
    """Bytes that they cover; what is expanded counts once."""
    return sum(math.prod(n for n, stride in zip(t.shape, t.stride()) if stride) * t.element_size() for t in tensors)


FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "record_stream", "device",
        "_unsafe_view", "_reshape_alias"}  # fmt: skip
FILLS = {"zeros", "zeros_like", "ones_like", "new_zeros", "new_ones", "full", "full_like", "fill_", "zero_", "arange"}
GATHERS = {"index", "index_select", "embedding", "gather"}
SCATTERS = {"index_put_", "index_copy_", "scatter_", "scatter_add_"}
SORTS = {"sort", "argsort"}


def cost(func, args, kwargs, out, pool_share):
    """(floating-point operations of products, bytes) of one operation: what it reads and writes, each once, as if
    nothing stayed in the GPU's caches. pool_share: of the experts' weights, those that a grouped product reads.
    """
    name, returns = func._schema.name.split("::")[1], func._schema.returns
    ins, outs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
    is_view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    moved = size_of(*ins, *outs, *(() if returns else ins[:1]))  # without a return value, the first is written
    if name in FREE or is_view:
        return 0, 0
    if name in FILLS:
        return 0, size_of(*outs)
    if name in GATHERS | SCATTERS:  # of rows that are looked up, only those count
        rows = ins[-1] if name in SCATTERS else outs[0]
        return 0, 2 * size_of(rows) + size_of(*(t for t in ins if not t.is_floating_point()))
    if name in ("mm", "_grouped_mm"):  # each row of a meets one matrix of b; of two groups of rows, each its own
        a, b = ins[:2]
        return 2 * a.numel() * b.size(-1), moved - (1 - pool_share) * size_of(b) * (b.dim() == 3)
    if name.startswith("_scaled_dot_product_flash_attention"):  # half of the pairs, for it is causal
        backward = name.endswith("backward")
        B, heads, T, D = ins[backward].shape
        return (5 if backward else 2) * B * heads * T * T * D, moved
    if name in SORTS:  # a radix sort in 8 passes, which read and write keys and indices
        return 0, 16 * size_of(*outs)
    if name == "_fused_adamw_":
        return 0, 28 * sum(p.numel() for p in args[0])
    return 0, moved


class Watch(TorchDispatchMode):
    """Counts the GPU's live bytes by storage, in blocks of 512 as the caching allocator, and what operations cost.

    phase: what the caller says it is at. held: {phase: bytes that were made in it and live}; peak: the same at the
    moment of the most, in peak_phase. costs: {(phase, operation): [cost() of each]}.
    """

    pool_share = 1.0

    def __init__(self):
        super().__init__()
        self.phase, self.live, self.held, self.costs = "", {}, collections.Counter(), collections.defaultdict(list)
        self.reset()

    def begin(self, phase):
        self.phase = phase

    def reset(self):
        self.peak, self.peak_phase = self.held.copy(), self.phase

    def resizing(self, function):
        """The function of FSDP, which gives or takes the memory of gathered weights, watched."""

        def resize(tensor):
            function(tensor)
            storage = tensor.untyped_storage()
            if storage._cdata in self.live:
                self.hold(storage._cdata, storage.nbytes())

        return resize

    def hold(self, key, size):
        """The storage of this key is of `size` bytes from now on."""
        before, made_in = self.live.get(key, (0, self.phase))
        self.live[key] = size, made_in
        self.held[made_in] += size - before
        if self.held.total() > self.peak.total():
            self.reset()

    def forget(self, key):
        self.hold(key, 0)
        del self.live[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # comes here again as operations on local tensors
        out = func(*args, **kwargs or {})
        name = func._schema.name.split("::")[1]
        self.costs[self.phase, name].append(cost(func, args, kwargs or {}, out, self.pool_share))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    weakref.finalize(storage, self.forget, storage._cdata)
                    self.hold(storage._cdata, -(-storage.nbytes() // 512) * 512)
        return out

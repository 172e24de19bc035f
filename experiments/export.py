"""A checkpoint as safetensors with config.json, and such a folder back as a model.

    pip install safetensors
    python -m experiments.export out                          # out/export: the model as it is, each pool stored once
    python -m experiments.export out --format transformers    # a dense one as Llama, one of softmax experts as Qwen2Moe
    python -m experiments.export out --format vanilla         # a locked one as a vanilla MoE of its layers' own experts

In Python, load("out/export") gives the UniPool back, from either form, and from a Llama or Qwen2Moe folder that
transformers has saved. Qwen2Moe has no shared pools: there each layer gets a copy of its pool. No class of transformers
has a NormRouter, so a model with one keeps its own form, which transformers does not load. The tokenizer stays outside.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from command import BadInput, Parser, run_command
from train import load_checkpoint
from unipool import UniPool, UniPoolConfig, norm_router_scale

try:
    import safetensors.torch
except ImportError:
    safetensors = None


def to_vanilla(config, state):
    """(UniPoolConfig, state_dict) of a locked model with private pools: each layer keeps the experts that it owns and
    their rows of its router. Raises BadInput.

    It chooses the same experts, but not exactly their gates: NormRouter's norm ran over the logits of all M experts,
    and those of others' experts are gone. So gates grow by ||z of all|| / ||z of the own||, token by token.
    """
    L, M, K = config.n_layer, config.experts_per_pool, config.n_expert // config.n_layer
    owned = [state[f"blocks.{l}.router.seen"].nonzero()[:, 0] for l in range(L if config.n_expert else 0)]
    if config.n_pool != 1 or not owned or any(len(own) != K for own in owned):
        raise BadInput("--format=vanilla: layers do not own their experts: train with --lock, to its end")
    ours = {name: tensor for name, tensor in state.items() if not name.startswith("pools.")}
    scale = norm_router_scale(M, config.top_k) / norm_router_scale(K, config.top_k)
    for l, own in enumerate(owned):
        for name in ("weight", "bias", "seen"):
            ours[f"blocks.{l}.router.{name}"] = state[f"blocks.{l}.router.{name}"][own]
        ours[f"blocks.{l}.router.sigma"] = state[f"blocks.{l}.router.sigma"] * scale  # c is that of M experts still
        for name in ("gate_up", "down"):
            ours[f"pools.{l}.{name}"] = state[f"pools.0.{name}"][own]
    return replace(config, n_pool=L), ours


def layout(config):
    """For each tensor of transformers' two models, or several of one kind that lie below each other in ours: (our name,
    the expert in it or None, their names, their numbers of rows). An expert's weights are the transposes of theirs.
    """
    C, H, kv = config.n_embd, config.n_hidden, config.n_kv_head * config.head_dim
    for ours, theirs in dict(embedding="model.embed_tokens", norm="model.norm", head="lm_head").items():
        yield f"{ours}.weight", None, [f"{theirs}.weight"], None
    for l in range(config.n_layer):
        ours, theirs, pool = f"blocks.{l}.", f"model.layers.{l}.", f"pools.{l * config.n_pool // config.n_layer}."
        qkv = [f"{theirs}self_attn.{name}_proj.weight" for name in "qkv"]
        yield f"{ours}attention.qkv.weight", None, qkv, [C, kv, kv]
        yield f"{ours}attention.out.weight", None, [f"{theirs}self_attn.o_proj.weight"], None
        yield f"{ours}attention_norm.weight", None, [f"{theirs}input_layernorm.weight"], None
        yield f"{ours}ffn_norm.weight", None, [f"{theirs}post_attention_layernorm.weight"], None
        if config.n_expert:
            yield f"{ours}router.weight", None, [f"{theirs}mlp.gate.weight"], None
        for i in range(config.experts_per_pool) if config.n_expert else [None]:
            mlp = f"{theirs}mlp." if i is None else f"{theirs}mlp.experts.{i}."
            gate_up, down = (f"{ours}ffn.{name}.weight" if i is None else pool + name for name in ("gate_up", "down"))
            yield gate_up, i, [f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"], [H, H]
            yield down, i, [f"{mlp}down_proj.weight"], None


def to_transformers(config, state):
    """(config.json's contents, state_dict) of a Llama or Qwen2Moe that computes the same. Raises BadInput."""
    if config.n_expert and (config.router != "softmax" or any(state[name].any() for name in state if "bias" in name)):
        fields = f"router={config.router}, balance={config.balance}"
        raise BadInput(f"--format=transformers: no class there has {fields}: leave --format out")
    theirs = dict(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden, hidden_act="silu",
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.block_size, rms_norm_eps=config.norm_eps, rope_theta=config.rope_base,
        tie_word_embeddings=False, initializer_range=config.init_std, torch_dtype="float32",
        model_type="llama", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    tensors = {}
    for name, expert, names, rows in layout(config):
        tensor = state[name] if expert is None else state[name][expert].t()
        tensors |= zip(names, tensor.split(rows or len(tensor)))
    if config.n_expert:
        theirs |= dict(
            model_type="qwen2_moe", architectures=["Qwen2MoeForCausalLM"], num_experts=config.experts_per_pool,
            num_experts_per_tok=config.top_k, moe_intermediate_size=config.n_hidden, norm_topk_prob=False,
            decoder_sparse_step=1, mlp_only_layers=[], shared_expert_intermediate_size=1, qkv_bias=False,
        )  # fmt: skip
        for l in range(config.n_layer):  # the shared expert that the class always has, of width 1: it gives 0
            mlp, zeros = f"model.layers.{l}.mlp.shared_expert", torch.zeros(1, config.n_embd)
            tensors |= {f"{mlp}_gate.weight": zeros, f"{mlp}.gate_proj.weight": zeros, f"{mlp}.up_proj.weight": zeros,
                        f"{mlp}.down_proj.weight": zeros.t()}  # fmt: skip
    return theirs, tensors


def from_transformers(theirs, tensors):
    """The opposite: (UniPoolConfig, state_dict). Raises KeyError or ValueError for a model that ours cannot express."""
    sparse, rope = theirs["model_type"] == "qwen2_moe", theirs.get("rope_parameters") or theirs
    plain = theirs["model_type"] in ("llama", "qwen2_moe") and theirs["hidden_act"] == "silu"
    scaled = theirs.get("rope_scaling") or rope.get("rope_type", "default") != "default"
    if not plain or scaled or theirs.get("norm_topk_prob") or theirs.get("mlp_only_layers"):
        raise ValueError("only llama and qwen2_moe can be read, with silu, plain RoPE, norm_topk_prob=false")
    n_layer = theirs["num_hidden_layers"]
    routing = dict(n_expert=theirs["num_experts"] * n_layer, n_pool=n_layer, top_k=theirs["num_experts_per_tok"],
                   router="softmax", balance="layer") if sparse else dict(n_expert=0, balance="none")  # fmt: skip
    config = UniPoolConfig(
        block_size=theirs["max_position_embeddings"], vocab_size=theirs["vocab_size"], n_layer=n_layer,
        n_head=theirs["num_attention_heads"], n_kv_head=theirs["num_key_value_heads"], n_embd=theirs["hidden_size"],
        n_hidden=theirs["moe_intermediate_size" if sparse else "intermediate_size"], norm_eps=theirs["rms_norm_eps"],
        rope_base=rope["rope_theta"], **routing,
    )  # fmt: skip
    if "lm_head.weight" not in tensors:  # tied
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    state, experts = {}, {}
    for name, expert, names, _ in layout(config):
        tensor = torch.cat([tensors.pop(part) for part in names])
        state[name] = tensor
        if expert is not None:
            experts.setdefault(name, []).append(tensor.t())
    left = [name for name, tensor in tensors.items() if tensor.any()]
    if left:
        raise ValueError(f"it has {left[0]}, for which a UniPool has no place")
    state |= {name: torch.stack(weights) for name, weights in experts.items()}
    for l in range(n_layer if sparse else 0):
        state[f"blocks.{l}.router.bias"] = torch.zeros(theirs["num_experts"])
        state[f"blocks.{l}.router.seen"] = torch.ones(theirs["num_experts"])
    return config, state


def load(folder):
    """The UniPool in a folder with config.json and *.safetensors, on the CPU. Raises BadInput."""
    folder, tensors = Path(folder), {}
    try:
        contents = json.loads((folder / "config.json").read_text())
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= safetensors.torch.load_file(path)
        if contents["model_type"] == "unipool":
            config = UniPoolConfig(**contents["config"])
        else:
            config, tensors = from_transformers(contents, tensors)
        return UniPool.from_checkpoint(dict(config=asdict(config), model=tensors))
    except Exception as error:  # what can be wrong with a folder from elsewhere has no end
        raise BadInput(f"{folder} cannot be read ({type(error).__name__}: {error}): give another folder") from None


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", default="out", help="folder of a run (%(default)s)")
    parser.add_argument("--ckpt", default="ckpt.pt", help="checkpoint in it: ckpt.pt, best.pt ... (%(default)s)")
    parser.add_argument("--format", choices=["unipool", "transformers", "vanilla"], default="unipool", help="(unipool)")
    parser.add_argument("--out", help="folder to write (RUN/export)")
    args = parser.parse_args(argv)
    if safetensors is None:
        raise BadInput("safetensors is missing: pip install safetensors")
    checkpoint = load_checkpoint(Path(args.run) / args.ckpt, mmap=True)
    config, state = UniPoolConfig(**checkpoint["config"]), checkpoint["model"]
    if args.format == "vanilla":
        config, state = to_vanilla(config, state)
    contents = dict(model_type="unipool", config=asdict(config))
    if args.format == "transformers":
        contents, state = to_transformers(config, state)
    out = Path(args.out or Path(args.run) / "export")
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, out / "model.safetensors", metadata=dict(format="pt"))
    (out / "config.json").write_text(json.dumps(contents | dict(tokenizer=checkpoint["tokenizer"]), indent=2) + "\n")
    print(f"{out}: model.safetensors and config.json")


if __name__ == "__main__":
    run_command(main)

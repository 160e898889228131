"""Adapter folders in MoE-PEFT's layout, and what their blocks compute.

MoE-PEFT and the mixlora package (Apache-2.0) are not on the package index in a form that runs here, so the files are
written from the documented layout (docs/files.md) and the outputs from the paper's formula, in plain torch:
    p = softmax(x G^T); S = the K largest; g = p_S / sum p_S
    y = sum_S g (W2 z + s B2 A2 z),  z = silu(W1 x + s B1 A1 x) * (W3 x + s B3 A3 x)

usage: make_mixlora.py [FOLDER]      torch 2.x, safetensors
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 8, 12, 3, 2, 2
PROJECTIONS = {"gate_proj": (HIDDEN, INTERMEDIATE), "up_proj": (HIDDEN, INTERMEDIATE), "down_proj": (INTERMEDIATE, HIDDEN)}
LEGACY = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapter_tensors(rank, attention_rank):
    tensors = {}
    for layer in range(LAYERS):
        path = f"mixlora.layers.{layer}"
        tensors[f"{path}.mlp.moe_gate.weight"] = torch.randn(EXPERTS, HIDDEN)
        for name in ATTENTION:
            tensors[f"{path}.self_attn.{name}.lora_A.weight"] = torch.randn(attention_rank, HIDDEN) * 0.3
            tensors[f"{path}.self_attn.{name}.lora_B.weight"] = torch.randn(HIDDEN, attention_rank) * 0.3
        for name, (size_in, size_out) in PROJECTIONS.items():
            for expert in range(EXPERTS):
                tensors[f"{path}.mlp.{name}.experts.{expert}.lora_A.weight"] = torch.randn(rank, size_in) * 0.3
                tensors[f"{path}.mlp.{name}.experts.{expert}.lora_B.weight"] = torch.randn(size_out, rank) * 0.3
    return tensors


def block_output(model, adapter, layer, x, scale):
    path = f"mixlora.layers.{layer}.mlp"

    def linear(name, expert, value):
        A, B = (adapter[f"{path}.{name}.experts.{expert}.lora_{f}.weight"].double() for f in "AB")
        return value @ model[f"layers.{layer}.{name}"].double().T + scale * value @ A.T @ B.T

    p = torch.softmax(x @ adapter[f"{path}.moe_gate.weight"].double().T, -1)
    weights, chosen = torch.topk(p, TOP_K)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], chosen[token].tolist()):
            one = x[token : token + 1]
            z = torch.nn.functional.silu(linear("gate_proj", expert, one)) * linear("up_proj", expert, one)
            y[token] += weight * linear("down_proj", expert, z)[0]
    return y


def legacy_key(key):
    key = key.replace(".mlp.moe_gate.", ".gate.")
    for name, old in LEGACY.items():
        if f".mlp.{name}.experts." in key:
            head, tail = key.split(f".mlp.{name}.experts.")
            expert, rest = tail.split(".", 1)
            return f"{head}.experts.{expert}.{old}.{rest}"
    return key


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.save(tensors, folder / "adapter_model.bin")


def main(out):
    torch.manual_seed(8)
    model = {
        f"layers.{layer}.{name}": torch.randn(size_out, size_in) * 0.4
        for layer in range(LAYERS)
        for name, (size_in, size_out) in PROJECTIONS.items()
    }
    x = torch.randn(7, HIDDEN)
    common = {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "num_experts": EXPERTS,
        "top_k": TOP_K,
    }
    # As MoE-PEFT exports: targets as a list, act_fn left out.
    plain = common | {"r": 3, "target_modules": ATTENTION + list(PROJECTIONS), "routing_strategy": "mixlora"}
    # expert_lora, a dict of targets, the names of before.
    legacy = common | {
        "r": 2,
        "expert_lora": {"r": 4, "lora_alpha": 10, "lora_dropout": 0.1},
        "target_modules": {name: True for name in ATTENTION + list(LEGACY.values())} | {"embed": False},
        "routing_strategy": "mixtral",
        "act_fn": "silu",
    }
    expected = {"x": x, **model}
    for name, config, rank, scale in (("moe_peft", plain, 3, 6 / 3), ("legacy", legacy, 4, 10 / 4)):
        tensors = adapter_tensors(rank, config["r"])
        for layer in range(LAYERS):
            expected[f"{name}.{layer}"] = block_output(model, tensors, layer, x.double(), scale).float()
        stored = {legacy_key(key): value for key, value in tensors.items()} if name == "legacy" else tensors
        write(out / name, config, stored)
    (out / "keys.txt").write_text("".join(f"{key}\n" for key in sorted(adapter_tensors(1, 1))))
    save_file(expected, str(out / "expected.safetensors"))
    torch.save({"step": 3, "model": {"weight": x}}, out / "not_an_adapter.bin")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "mixlora")

"""Writes rope/rope.json: rotary tables and one rotated tensor, computed by Hugging Face transformers.

Usage: make_rope.py OUTPUT_FOLDER      (needs torch and transformers)
"""

import json
import pathlib
import sys

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

CASES = [
    {"rope_type": "default", "theta": 10000.0, "head_dim": 64},
    {"rope_type": "default", "theta": 100000.0, "head_dim": 6},
    {"rope_type": "linear", "theta": 10000.0, "head_dim": 32, "factor": 4.0},
    {
        "rope_type": "llama3",
        "theta": 500000.0,
        "head_dim": 64,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]
POSITIONS = [[0, 1, 2, 3, 100], [5, 0, 1000, 8191, 131071]]


def embedding(case):
    parameters = {key: value for key, value in case.items() if key not in ("theta", "head_dim")}
    parameters["rope_theta"] = case["theta"]
    config = LlamaConfig(
        hidden_size=2 * case["head_dim"],
        num_attention_heads=2,
        head_dim=case["head_dim"],
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


def main():
    torch.manual_seed(7)
    positions = torch.tensor(POSITIONS)
    cases = []
    for case in CASES:
        half = case["head_dim"] // 2
        module = embedding(case)
        x = torch.randn(2, 5, 2, case["head_dim"])  # [batch, tokens, heads, d]
        cos, sin = module(x, positions)
        rotated, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
        cases.append(
            {
                "options": case,
                "inv_freq": module.inv_freq.tolist(),
                "cos": cos[..., :half].flatten().tolist(),
                "sin": sin[..., :half].flatten().tolist(),
                "x": x.flatten().tolist(),
                "rotated": rotated.flatten().tolist(),  # [batch, heads, tokens, d]
            }
        )
    folder = pathlib.Path(sys.argv[1]) / "rope"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rope.json").write_text(json.dumps({"positions": POSITIONS, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()

"""PEFT's LoRA layer on the shapes of tests/bench/cuda_layer.cpp, bf16: one JSON line a shape."""

import json
import statistics
import time

import torch
from peft.tuners.lora import Linear

SHAPES = [(4096, 4096, 4096, 16), (8192, 4096, 14336, 16), (8192, 14336, 4096, 16), (16384, 8192, 8192, 16)]


def microseconds(work, runs=9, calls=10):
    for _ in range(3):
        work()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def layer_time(tokens, inputs, outputs, rank, dropout):
    base = torch.nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    base.requires_grad_(False)
    layer = Linear(base, "default", r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    layer = layer.to(device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)

    def step():
        layer(x).backward(dy)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return microseconds(step)


for tokens, inputs, outputs, rank in SHAPES:
    print(json.dumps({
        "tokens": tokens, "in": inputs, "out": outputs, "rank": rank,
        "peft_us": layer_time(tokens, inputs, outputs, rank, 0.0),
        "peft_dropout_us": layer_time(tokens, inputs, outputs, rank, 0.1),
    }), flush=True)

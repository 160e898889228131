#!/usr/bin/env python3
"""Makes the AdaLoRA goldens with Hugging Face PEFT. Needs the packages torch, peft and safetensors.

Usage: make_adalora.py FOLDER     writes FOLDER/adalora/*

run.safetensors   base weights, data, start values, E after each step, and a forward pass with its gradients
run.json          loss, budget and kept triplets of each step
pruned/           the folder that PEFT saves afterwards: tensors cut down to the kept triplets
"""
import argparse
import json
import pathlib
import shutil
import types

import peft
import torch
from safetensors.torch import save_file

STEPS = 16


class Stack(torch.nn.Module):
    """c(tanh(b(tanh(a x)))), and its mean squared error where PEFT looks for a loss."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(6, 5)
        self.b = torch.nn.Linear(5, 7, bias=False)
        self.c = torch.nn.Linear(7, 4)

    def forward(self, x, target):
        y = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return types.SimpleNamespace(y=y, loss=(y - target).square().mean())


def short(name: str) -> str:
    return name.replace("base_model.model.", "").replace(".default", "").replace("base_layer.", "")


def adapters(model):
    return [(short(name), p) for name, p in model.named_parameters() if "lora_" in name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    out = parser.parse_args().folder / "adalora"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(4)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=2, total_step=STEPS, beta1=0.8, beta2=0.7,
        orth_reg_weight=0.1, lora_alpha=6, target_modules=["a", "b", "c"])
    model = peft.get_peft_model(Stack(), config).double()
    x, target = torch.randn(9, 6, dtype=torch.double), torch.randn(9, 4, dtype=torch.double)
    tensors = {"x": x, "target": target}
    with torch.no_grad():
        for name, p in adapters(model):
            if "lora_E" not in name:
                p.normal_(0, 0.4)
    for name, p in model.named_parameters():
        if "ranknum" not in name:
            tensors["start." + short(name)] = p.detach().clone()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.4)
    steps, values = [], []
    for step in range(STEPS):
        loss = model.base_model(x, target).loss  # AdaLoRA's own forward adds the penalty
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        values.append(torch.cat([p.detach().view(-1) for name, p in adapters(model) if "lora_E" in name]))
        budget, _ = model.base_model.rankallocator.budget_schedule(step)
        steps.append({"loss": loss.item(), "budget": budget, "kept": int((values[-1] != 0).sum())})
    tensors["E"] = torch.stack(values)

    # Without the penalty: the layers alone.
    y = model(x, target).y
    (y * torch.cos(torch.arange(y.numel(), dtype=torch.double) * 1.7 + 0.3).view_as(y)).sum().backward()
    tensors["y"] = y.detach()
    for name, p in adapters(model):
        tensors["end." + name] = p.detach().clone()
        tensors["gradient." + name] = p.grad.clone()
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "run.safetensors")
    (out / "run.json").write_text(json.dumps({"lr": 0.4, "steps": steps}, indent=1) + "\n")

    shutil.rmtree(out / "pruned", ignore_errors=True)
    model.save_pretrained(out / "pruned")
    (out / "pruned" / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()

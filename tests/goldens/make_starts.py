"""Writes starts/: PEFT's folders of adapters that start from a part of the base weight, and what they compute.

Usage: make_starts.py OUTPUT_FOLDER      (needs torch, peft, attrs and safetensors)

  model.safetensors     the layers' weights, an input x, and "y.NAME", the trained adapter's output for each NAME below
  NAME/                 the trained adapter as PEFT saves it: pissa, olora, pissa_niter_2, lora_ga, corda
  NAME_start/           the same before training, for those that cannot be found again from the weight
"""

import pathlib
import sys
import warnings

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from two_layers import TARGETS, Model, save_adapter, save_tensors

warnings.filterwarnings("ignore")
FOUND_AGAIN = ["pissa", "olora"]


def config(name):
    extra = {"lora_ga": {"lora_ga_config": LoraGAConfig()}, "corda": {"corda_config": CordaConfig()}}.get(name, {})
    return LoraConfig(r=2, lora_alpha=3, init_lora_weights=name, target_modules=TARGETS, **extra)


def prepare(model, name, options):
    torch.manual_seed(4)
    if name == "lora_ga":
        preprocess_loraga(model, options, lambda: model(torch.randn(20, 6)).square().sum().backward())
        model.zero_grad()
    if name == "corda":
        preprocess_corda(model, options, run_model=lambda: model(torch.randn(1, 20, 6)))


def main():
    output = pathlib.Path(sys.argv[1]) / "starts"
    torch.manual_seed(1)
    weights = Model().state_dict()
    x = torch.randn(4, 6)
    tensors = {name: value.clone() for name, value in weights.items()} | {"x": x}
    for name in [*FOUND_AGAIN, "pissa_niter_2", "lora_ga", "corda"]:
        model = Model()
        model.load_state_dict(weights)
        options = config(name)
        prepare(model, name, options)
        adapted = get_peft_model(model, options)
        if name not in FOUND_AGAIN:
            save_adapter(adapted, output / f"{name}_start")
        torch.manual_seed(2)
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.data += torch.randn_like(parameter) * 0.3
        save_adapter(adapted, output / name)
        tensors[f"y.{name}"] = adapted(x).detach()
    save_tensors(tensors, output / "model.safetensors")


if __name__ == "__main__":
    main()

"""Writes arrow/: a two-layer model under PEFT's Arrow over three adapters, and its output.

Usage: make_arrow.py OUTPUT_FOLDER      (needs torch, peft and safetensors)

  adapters/0 ... 2     plain LoRA adapters as PEFT saves them; each has one direction far ahead of the others, which
                       PEFT's 15 steps of power iteration find to rounding
  model.safetensors    the layers' weights, an input x, y under Arrow with top_k 2 and temperature 0.7, y_gks with the
                       adapter 2 subtracted from 0 and 1 (GenKnowSub), top_k 1, and the prototypes of the first layer
"""

import pathlib
import sys
import warnings

import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from two_layers import TARGETS, Model, save_adapter, save_tensors

warnings.filterwarnings("ignore")


def make_adapter(number, folder):
    torch.manual_seed(1)
    adapted = get_peft_model(Model(), LoraConfig(r=2, lora_alpha=3 + number, target_modules=TARGETS))
    torch.manual_seed(10 + number)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.data.normal_(0.0, 1.0)
            parameter.data[1] *= 0.01
        elif "lora_B" in name:
            parameter.data.normal_(0.0, 0.5)
    save_adapter(adapted, folder)


def run(task, general, top_k, x, folder):
    torch.manual_seed(1)
    paths = [str(folder / str(i)) for i in task]
    config = ArrowConfig(top_k=top_k, router_temperature=0.7, use_gks=bool(general), rng_seed=3)
    model = create_arrow_model(Model(), paths, config, [str(folder / str(i)) for i in general] or None)
    model.eval()
    with torch.no_grad():
        y = model(x)
    layer = model.base_model.model.first.lora_arrow["arrow_router"]
    return y, layer.prototypes


if __name__ == "__main__":
    output = pathlib.Path(sys.argv[1]) / "arrow"
    for number in range(3):
        make_adapter(number, output / "adapters" / str(number))
    torch.manual_seed(1)
    tensors = {name: value.detach().clone() for name, value in Model().named_parameters()}
    torch.manual_seed(2)
    x = torch.randn(2, 5, 6)
    y, prototypes = run([0, 1, 2], [], 2, x, output / "adapters")
    y_gks, _ = run([0, 1], [2], 1, x, output / "adapters")
    save_tensors(tensors | {"x": x, "y": y, "y_gks": y_gks, "prototypes": prototypes}, output / "model.safetensors")

"""Writes dora/: a DoRA adapter of Hugging Face PEFT on one Linear, Embedding and Conv2d, and what it computes.

usage: make_dora.py OUTPUT_FOLDER      (needs torch, peft and safetensors)

adapter_config.json and adapter_model.safetensors are PEFT's own files. expected.safetensors holds, for each of the
three layers, the base's weight and bias, an input, the output, a gradient of the output, and the gradients that follow
of A, B, the magnitude and, but for the Embedding, the input.
"""

import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

LAYERS = ("linear", "embed", "conv")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 10)
        self.embed = torch.nn.Embedding(14, 8)
        self.conv = torch.nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0))

    def forward(self, inputs):
        return {name: getattr(self, name)(inputs[name]) for name in LAYERS}


def main():
    torch.manual_seed(7)
    model = Model()
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=list(LAYERS))
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.normal_(0.0, 0.3)
    inputs = {
        "linear": torch.randn(2, 5, 12, requires_grad=True),
        "embed": torch.randint(0, 14, (3, 4)),
        "conv": torch.randn(2, 3, 5, 4, requires_grad=True),
    }
    outputs = wrapped(inputs)
    gradients = {name: torch.randn_like(outputs[name]) for name in LAYERS}
    sum((outputs[name] * gradients[name]).sum() for name in LAYERS).backward()

    tensors = {}
    for name in LAYERS:
        layer = getattr(model, name)
        kept = {"weight": layer.base_layer.weight, "x": inputs[name], "y": outputs[name], "dy": gradients[name]}
        if name != "embed":
            kept |= {"bias": layer.base_layer.bias, "grad_x": inputs[name].grad}
            kept |= {"grad_A": layer.lora_A["default"].weight.grad, "grad_B": layer.lora_B["default"].weight.grad}
        else:
            kept |= {"grad_A": layer.lora_embedding_A["default"].grad, "grad_B": layer.lora_embedding_B["default"].grad}
        kept["grad_m"] = layer.lora_magnitude_vector["default"].weight.grad
        tensors |= {f"{name}.{key}": value.detach().contiguous() for key, value in kept.items()}

    folder = pathlib.Path(sys.argv[1]) / "dora"
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    fields = json.loads(config_file.read_text())
    fields["target_modules"].sort()  # a set, in any order
    config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    main()

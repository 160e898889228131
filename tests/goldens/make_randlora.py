"""Writes randlora/: a two-layer model, its output and gradients under PEFT's RandLoRA, and the adapter's folders.

Usage: make_randlora.py OUTPUT_FOLDER      (needs torch, peft and safetensors)

  model.safetensors    the layers' weights, an input x, and for the adapted model y and the gradients of sum(y * c)
  with_projection/     the adapter as PEFT saves it
                       (the bases once for the model and once more for each layer)
  without_projection/  the same with save_projection off
  bases.safetensors    the bases of other kinds and seeds, and their sizes
"""

import json
import pathlib
import sys
import warnings

import torch
from peft import RandLoraConfig, get_peft_model
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
RANK, KEY, ALPHA = 3, 5, 4


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 10)
        self.second = torch.nn.Linear(10, 7, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def run(save_projection, folder):
    torch.manual_seed(1)
    model = Model()
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    config = RandLoraConfig(
        r=RANK,
        target_modules=["first", "second"],
        projection_prng_key=KEY,
        save_projection=save_projection,
        randlora_alpha=ALPHA,
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(2)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.normal_(0.0, 0.5)
    x = torch.randn(4, 6, requires_grad=True)
    y = adapted(x)
    c = torch.randn_like(y)
    (y * c).sum().backward()
    tensors |= {"x": x.detach().clone(), "y": y.detach(), "c": c, "grad.x": x.grad}
    for name, parameter in trained.items():
        short = name.removeprefix("base_model.model.").removesuffix(".default")
        tensors["grad." + short] = parameter.grad
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    fields = json.loads(config_file.read_text())
    fields["target_modules"].sort()  # a set, in any order
    config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    (folder / "adapter_model.safetensors").chmod(0o644)
    return tensors


def bases(key, **kinds):
    config = RandLoraConfig(r=RANK, target_modules=["first", "second"], projection_prng_key=key, **kinds)
    model = get_peft_model(Model(), config).base_model
    return model.randlora_A["default"], model.randlora_B["default"]


def main():
    output = pathlib.Path(sys.argv[1]) / "randlora"
    tensors = run(True, output / "with_projection")
    again = run(False, output / "without_projection")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    save_file(tensors, output / "model.safetensors")
    (output / "model.safetensors").chmod(0o644)
    found = {}
    for name, kinds in {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}.items():
        for key in (0, 11):
            found[f"{name}.{key}.A"], found[f"{name}.{key}.B"] = bases(key, **kinds)
    save_file(found, output / "bases.safetensors")
    (output / "bases.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()

"""Writes shira/: a two-layer model, its output and gradients under PEFT's SHiRA, and the adapter's folders.

Usage: make_shira.py OUTPUT_FOLDER      (needs torch, peft and safetensors)

  model.safetensors  the layers' weights, an input x, and for the adapted model y and the gradients of sum(y * c)
  seeded/            the adapter as PEFT saves it, its positions drawn with seed 5
  custom/            an adapter whose mask comes from a function of the user's
  seeds.safetensors  positions drawn for other sizes and seeds: "OUT.IN.R.SEED"
"""

import json
import pathlib
import sys
import warnings

import torch
from peft import ShiraConfig, get_peft_model
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
RANK, SEED = 2, 5


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 10)
        self.second = torch.nn.Linear(10, 7, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def save(adapted, folder):
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    fields = json.loads(config_file.read_text())
    fields["target_modules"].sort()  # a set, in any order
    config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    (folder / "adapter_model.safetensors").chmod(0o644)


def adapt(model, **options):
    config = ShiraConfig(r=RANK, target_modules=["first", "second"], **options)
    if "mask_type" in options:

        def leading(base_layer, r, **_):
            rows, columns = base_layer.weight.shape
            mask = torch.zeros(rows * columns)
            mask[: r * (rows + columns)] = 1
            return mask.view(rows, columns)

        config.mask_fn = leading
    return get_peft_model(model, config)


def positions(out, inputs, rank, seed):
    model = torch.nn.Sequential(torch.nn.Linear(inputs, out))
    adapted = get_peft_model(model, ShiraConfig(r=rank, target_modules=["0"], random_seed=seed))
    return adapted.base_model.model[0].shira_indices["default"].contiguous()


def main():
    output = pathlib.Path(sys.argv[1]) / "shira"
    torch.manual_seed(1)
    model = Model()
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapted = adapt(model, random_seed=SEED)
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
        tensors["grad." + name.removeprefix("base_model.model.").removesuffix(".default")] = parameter.grad
    save(adapted, output / "seeded")
    save_file(tensors, output / "model.safetensors")
    (output / "model.safetensors").chmod(0o644)

    torch.manual_seed(3)
    save(adapt(Model(), mask_type="leading", init_weights=False), output / "custom")
    found = {}
    for out, inputs, rank, seed in [(10, 6, 2, 0), (10, 6, 1, 42), (64, 48, 3, 7), (9, 4, 1, -3), (7, 7, 3, 2**40)]:
        found[f"{out}.{inputs}.{rank}.{seed}"] = positions(out, inputs, rank, seed)
    save_file(found, output / "seeds.safetensors")
    (output / "seeds.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()

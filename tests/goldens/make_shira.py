"""Writes shira/: a two-layer model, its output and gradients under PEFT's SHiRA, and the adapter's folders.

Usage: make_shira.py OUTPUT_FOLDER      (needs torch, peft and safetensors)

  model.safetensors  the layers' weights, an input x, and for the adapted model y and the gradients of sum(y * c)
  seeded/            the adapter as PEFT saves it, its positions drawn with seed 5
  custom/            an adapter whose mask comes from a function of the user's
  seeds.safetensors  positions drawn for other sizes and seeds: "OUT.IN.R.SEED"
"""

import pathlib
import sys
import warnings

import torch
from peft import ShiraConfig, get_peft_model
from two_layers import TARGETS, Model, run, save_adapter, save_tensors

warnings.filterwarnings("ignore")
RANK, SEED = 2, 5


def leading(base_layer, r, **_):
    rows, columns = base_layer.weight.shape
    mask = torch.zeros(rows * columns)
    mask[: r * (rows + columns)] = 1
    return mask.view(rows, columns)


def positions(out, inputs, rank, seed):
    model = torch.nn.Sequential(torch.nn.Linear(inputs, out))
    adapted = get_peft_model(model, ShiraConfig(r=rank, target_modules=["0"], random_seed=seed))
    return adapted.base_model.model[0].shira_indices["default"].contiguous()


def main():
    output = pathlib.Path(sys.argv[1]) / "shira"
    seeded = ShiraConfig(r=RANK, target_modules=TARGETS, random_seed=SEED)
    save_tensors(run(seeded, output / "seeded"), output / "model.safetensors")

    torch.manual_seed(3)
    custom = ShiraConfig(r=RANK, target_modules=TARGETS, mask_type="leading", init_weights=False)
    custom.mask_fn = leading
    save_adapter(get_peft_model(Model(), custom), output / "custom")
    found = {}
    for out, inputs, rank, seed in [(10, 6, 2, 0), (10, 6, 1, 42), (64, 48, 3, 7), (9, 4, 1, -3), (7, 7, 3, 2**40)]:
        found[f"{out}.{inputs}.{rank}.{seed}"] = positions(out, inputs, rank, seed)
    save_tensors(found, output / "seeds.safetensors")


if __name__ == "__main__":
    main()

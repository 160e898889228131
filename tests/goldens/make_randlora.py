"""Writes randlora/: a two-layer model, its output and gradients under PEFT's RandLoRA, and the adapter's folders.

Usage: make_randlora.py OUTPUT_FOLDER      (needs torch, peft and safetensors)

  model.safetensors    the layers' weights, an input x, and for the adapted model y and the gradients of sum(y * c)
  with_projection/     the adapter as PEFT saves it
                       (the bases once for the model and once more for each layer)
  without_projection/  the same with save_projection off
  bases.safetensors    the bases of other kinds and seeds, and their sizes
"""

import pathlib
import sys
import warnings

from peft import RandLoraConfig, get_peft_model
from two_layers import TARGETS, Model, run_both_ways, save_tensors

warnings.filterwarnings("ignore")
RANK, KEY, ALPHA = 3, 5, 4


def config(save_projection):
    return RandLoraConfig(
        r=RANK,
        target_modules=TARGETS,
        projection_prng_key=KEY,
        save_projection=save_projection,
        randlora_alpha=ALPHA,
    )


def bases(key, **kinds):
    config = RandLoraConfig(r=RANK, target_modules=TARGETS, projection_prng_key=key, **kinds)
    model = get_peft_model(Model(), config).base_model
    return model.randlora_A["default"], model.randlora_B["default"]


def main():
    output = pathlib.Path(sys.argv[1]) / "randlora"
    run_both_ways(config, output)
    found = {}
    for name, kinds in {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}.items():
        for key in (0, 11):
            found[f"{name}.{key}.A"], found[f"{name}.{key}.B"] = bases(key, **kinds)
    save_tensors(found, output / "bases.safetensors")


if __name__ == "__main__":
    main()

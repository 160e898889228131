"""Writes vera/: a two-layer model, its output and gradients under PEFT's VeRA, and the adapter's folders.

Usage: make_vera.py OUTPUT_FOLDER      (needs torch, peft and safetensors)

  model.safetensors    the layers' weights, an input x, and for the adapted model y and the gradients of sum(y * c)
  with_projection/     the adapter as PEFT saves it
  without_projection/  the same with save_projection off
"""

import pathlib
import sys
import warnings

from peft import VeraConfig
from two_layers import TARGETS, run_both_ways

warnings.filterwarnings("ignore")


def config(save_projection):
    return VeraConfig(
        r=5, target_modules=TARGETS, projection_prng_key=3, save_projection=save_projection, d_initial=0.2
    )


if __name__ == "__main__":
    run_both_ways(config, pathlib.Path(sys.argv[1]) / "vera")

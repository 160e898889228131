"""Writes init/peft.safetensors: what Hugging Face PEFT's data- and weight-based initialisers make of one layer.

Usage: make_init.py OUTPUT_FOLDER      (needs torch, peft, attrs and safetensors)

  W, G, C               the layer's weight [24, 18], its gradient and its inputs' covariance; r = 4, alpha = 8, so s = 2
  METHOD.A, .B, .base   the factors and the weight that PEFT leaves in the base; METHOD is pissa, olora, corda_ipm,
                        corda_kpm, or lora_ga_DIRECTION_SCALE
  pca.X0 .. pca.X2      batches of inputs; pca.0 .. pca.2 .components, .singular_values, .ratio: PEFT's incremental
                        principal components after each, K = 4
"""

import pathlib
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.torch import save_file

warnings.filterwarnings("ignore")

OUT, IN, RANK = 24, 18, 4


def decaying(rows, columns, decay):
    """Singular values that fall fast enough for PEFT's randomised decompositions to be exact."""
    left = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))[0]
    return ((left * decay ** torch.arange(columns)) @ right.T).float()


class Model(torch.nn.Module):
    def __init__(self, W):
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT, bias=False)
        self.layer.weight.data = W.clone()


def start(name, W, tensors, prepare=lambda model, config: None, **options):
    model = Model(W)
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["layer"], **options)
    prepare(model, config)
    layer = get_peft_model(model, config).base_model.model.layer
    tensors[f"{name}.A"] = layer.lora_A["default"].weight.detach().clone()
    tensors[f"{name}.B"] = layer.lora_B["default"].weight.detach().clone()
    tensors[f"{name}.base"] = layer.base_layer.weight.detach().clone()


def lora_ga(W, G, tensors):
    def prepare(model, config):
        model.layer._peft_loraga_grad = G.clone()

    choices = [(d, "stable") for d in ("ArB2r", "A2rBr", "ArBr")]
    choices += [("ArB2r", s) for s in ("weight_svd", "gd_scale", "unit")]
    for direction, scale in choices:
        start(f"lora_ga_{direction}_{scale}", W, tensors, prepare, init_lora_weights="lora_ga",
              lora_ga_config=LoraGAConfig(direction=direction, scale=scale))


def corda(W, C, tensors):
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/covariance"
        torch.save({"layer": C}, file)
        for mode in ("ipm", "kpm"):
            start(f"corda_{mode}", W, tensors, preprocess_corda, init_lora_weights="corda",
                  corda_config=CordaConfig(covariance_file=file, corda_method=mode))


def pca(tensors):
    components = IncrementalPCA(n_components=RANK)
    for i in range(3):
        X = decaying(40, IN, 0.7) + 0.3 * torch.randn(IN)
        tensors[f"pca.X{i}"] = X
        components.partial_fit(X)
        tensors[f"pca.{i}.components"] = components.components_.float().contiguous()
        tensors[f"pca.{i}.singular_values"] = components.singular_values_.float().contiguous()
        tensors[f"pca.{i}.ratio"] = components.explained_variance_ratio_.float().contiguous()


if __name__ == "__main__":
    torch.manual_seed(5)
    W, G, X = torch.randn(OUT, IN) / 5, decaying(OUT, IN, 0.6), decaying(60, IN, 0.8)
    C = X.T @ X / 60
    tensors = {"W": W, "G": G, "C": C}
    start("pissa", W, tensors, init_lora_weights="pissa")
    start("olora", W, tensors, init_lora_weights="olora")
    lora_ga(W, G, tensors)
    corda(W, C, tensors)
    pca(tensors)
    file = pathlib.Path(sys.argv[1]) / "init" / "peft.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    file.chmod(0o644)

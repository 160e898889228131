"""Writes xlora/: a two-layer model under PEFT's X-LoRA over three adapters: scalings, output, gradients.

Usage: make_xlora.py OUTPUT_FOLDER      (needs torch, peft and safetensors)

  adapters/0 ... 2       plain LoRA adapters of different ranks, as PEFT saves them
  plain/, deep/          X-LoRA folders: one linear layer and one c for all layers; three layers, a c for each layer,
                         top_k_lora 2. The folders of `adapters` are written relative to xlora/.
  <name>.safetensors     of each: the layers' weights, an input x, the last hidden states of the first pass, the
                         scalings, y, c, and the gradients of sum(y * c) in the classifier
"""

import json
import pathlib
import shutil
import sys
import types
import warnings

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from two_layers import TARGETS, Model, save_adapter, save_tensors

warnings.filterwarnings("ignore")


class Config(types.SimpleNamespace):
    def to_dict(self):
        return vars(self)


class WithHiddenStates(torch.nn.Module):
    """PEFT's X-LoRA wants Transformers' manners: a part called `model`, hidden states in the output."""

    config = Config(use_cache=False)

    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, inputs_embeds, output_hidden_states=False, return_dict=None):
        y = self.model(inputs_embeds)
        return types.SimpleNamespace(hidden_states=(inputs_embeds, y), y=y)


def make_adapter(number, folder):
    torch.manual_seed(1)
    adapted = get_peft_model(WithHiddenStates(), LoraConfig(r=1 + number, lora_alpha=3 + number, target_modules=TARGETS))
    torch.manual_seed(10 + number)
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.data.normal_(0.0, 0.5)
    save_adapter(adapted, folder)


def save(adapted, folder):
    """PEFT 0.21 saves the adapters "0", "1", ... again below the folder, and takes a classifier's `layers.0` for a part
    of the adapter "0": the main file then lacks it. It is written here as PEFT reads it."""
    adapted.save_pretrained(folder)
    for extra in folder.iterdir():
        if extra.is_dir():
            shutil.rmtree(extra)
    (folder / "README.md").unlink(missing_ok=True)
    classifier = adapted.base_model.internal_xlora_classifier.state_dict()
    prefix = "base_model.internal_xlora_classifier."
    save_tensors({prefix + key: value for key, value in classifier.items()}, folder / "adapter_model.safetensors")


def run(name, output, **options):
    torch.manual_seed(1)
    model = WithHiddenStates()
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapters = {str(i): str(output / "adapters" / str(i)) for i in range(3)}
    adapted = get_peft_model(model, XLoraConfig(hidden_size=7, adapters=adapters, **options))
    classifier = adapted.base_model.internal_xlora_classifier
    torch.manual_seed(5)
    for parameter in classifier.parameters():
        parameter.data.normal_(0.0, 0.5)
    torch.manual_seed(2)
    x = torch.randn(2, 5, 6)
    with torch.no_grad(), adapted.disable_adapter():
        hidden = adapted(inputs_embeds=x).y
    y = adapted(inputs_embeds=x).y
    c = torch.randn_like(y)
    (y * c).sum().backward()
    tensors |= {"x": x, "hidden": hidden, "y": y.detach(), "c": c}
    tensors["scalings"] = adapted.base_model.internal_xlora_scalings.detach().contiguous()
    for key, parameter in classifier.named_parameters():
        tensors["grad." + key] = parameter.grad
    save(adapted, output / name)
    again = PeftModel.from_pretrained(WithHiddenStates(), output / name, adapters=adapters)
    again.base_model.lora_model.load_state_dict(adapted.base_model.lora_model.state_dict())
    assert torch.equal(again(inputs_embeds=x).y, y)
    config = output / name / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["adapters"] = {key: f"adapters/{key}" for key in adapters}
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    save_tensors(tensors, output / f"{name}.safetensors")


if __name__ == "__main__":
    output = pathlib.Path(sys.argv[1]) / "xlora"
    for number in range(3):
        make_adapter(number, output / "adapters" / str(number))
    run("plain", output)
    run("deep", output, xlora_depth=3, xlora_size=4, layerwise_scalings=True, top_k_lora=2, softmax_temperature=0.8,
        global_scaling_weight=1.5, xlora_dropout_p=0.2)

"""What the goldens of whole adapted models share: a model of two layers, a run of it, and saving. No script of its own."""

import json

import torch
from peft import get_peft_model
from safetensors.torch import save_file

TARGETS = ["first", "second"]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 10)
        self.second = torch.nn.Linear(10, 7, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def save_tensors(tensors, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    path.chmod(0o644)


def save_adapter(adapted, folder):
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    fields = json.loads(config_file.read_text())
    fields["target_modules"].sort()  # a set, in any order
    config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    (folder / "adapter_model.safetensors").chmod(0o644)


def run(config, folder):
    """The model under that configuration with random trained values: its weights, x, y and the gradients of sum(y * c).
    The adapter goes into the folder."""
    torch.manual_seed(1)
    model = Model()
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
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
        tensors["grad." + name.removeprefix("base_model.model.").removesuffix(".default")] = parameter.grad
    save_adapter(adapted, folder)
    return tensors


def run_both_ways(make_config, output):
    """With and without the projection in the file; the numbers are the same."""
    tensors = run(make_config(True), output / "with_projection")
    again = run(make_config(False), output / "without_projection")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    save_tensors(tensors, output / "model.safetensors")

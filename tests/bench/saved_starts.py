"""What graft saves after a start that is part of the base, opened by PEFT on the untouched base: the largest difference of a
logit. A measurement, no test.

usage: PYTHON saved_starts.py --bin FOLDER_OF_PROGRAMS --model FOLDER --text FILE      (PYTHON with transformers and peft)
                              [--steps 3] [--rank 8] [--lr 1e-4] [--tokens 48]

Columns: graft against PEFT in fp32, then each against PEFT's model in fp64; the first line has the untouched model's.
"""
import argparse, logging, os, subprocess, tempfile, warnings

warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"
import peft, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("bin", "model", "text"):
    p.add_argument("--" + name, required=True)
for name, default in (("steps", 3), ("rank", 8), ("lr", 1e-4), ("tokens", 48)):
    p.add_argument("--" + name, type=type(default), default=default)
a = p.parse_args()
torch.set_grad_enabled(False)
logging.disable(logging.WARNING)
scratch = tempfile.TemporaryDirectory()
text = open(a.text, encoding="utf-8").read()
ids = AutoTokenizer.from_pretrained(a.model)(text[len(text) // 2 :][:4096])["input_ids"][: a.tokens]


def run(program, *options):
    subprocess.run([os.path.join(a.bin, program), "--model", a.model, *map(str, options)], check=True, stdout=subprocess.DEVNULL)


def graft(*options):
    file = os.path.join(scratch.name, "logits.safetensors")
    run("evaluate", *options, "--ids", ",".join(map(str, ids)), "--logits", file)
    return next(iter(load_file(file).values())).view(len(ids), -1).double()


def reference(type, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=type)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).to(type)
    return model(torch.tensor([ids])).logits[0].double()


def compare(name, ours, theirs, exact):
    figures = [(x - y).abs().max().item() for x, y in ((ours, theirs), (ours, exact), (theirs, exact))]
    print(f"{name:14}" + "".join(f"{figure:10.1e}" for figure in figures), flush=True)


print(f"{'':14}{'apart':>10}{'graft-64':>10}{'PEFT-64':>10}")
compare("untouched", graft(), reference(torch.float32), reference(torch.float64))
for start in ("pissa", "pissa_niter_4", "olora", "nystrom", "lora_ga", "corda"):
    folder = os.path.join(scratch.name, start)
    run("finetune", "--data", a.text, "--init", start, "--init-batches", 2, "--rank", a.rank, "--steps", a.steps, "--lr", a.lr,
        "--seq-len", 64, "--eval-fraction", 0, "--quiet", "--output", folder)
    compare(start, graft("--adapter", folder), reference(torch.float32, folder), reference(torch.float64, folder))

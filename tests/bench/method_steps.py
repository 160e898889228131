"""A training step of every method beside plain LoRA's and beside PEFT's same method: time and peak memory as ratios.
A benchmark, no test.

usage: method_steps.py --finetune BIN --model FOLDER --text FILE [--hf-python PYTHON --hf-train SCRIPT] [--steps 6]
                       [--batch 4] [--seq 256] [--rank 8] [--only dora,sora,...]

Before every method LoRA runs once more, so that both see the same machine; a run's time is its median step's.
"""
import argparse, json, os, statistics, subprocess, tempfile

# finetune's options, the same method in the PEFT loop (None: PEFT has none)
METHODS = {
    "lora": ([], ["--method", "lora", "--alpha", "16"]),
    "dora": (["--method", "dora"], ["--method", "dora", "--alpha", "16"]),
    "sora": (["--method", "sora"], None),
    "dylora": (["--method", "dylora"], None),
    "randlora": (["--method", "randlora", "--rank", "32"], ["--method", "randlora", "--r", "32"]),
    "vera": (["--method", "vera", "--rank", "64"], ["--method", "vera", "--r", "64"]),
    "adalora": (["--method", "adalora", "--set", "target_r=4", "--set", "tinit=1", "--set", "tfinal=1"],
                ["--method", "adalora", "--alpha", "16"]),
    "lora-fa": (["--method", "lora-fa"], None),
    "lora-xs": (["--method", "lora-xs"], None),
    "shira": (["--method", "shira"], ["--method", "shira"]),
    "paca": (["--method", "paca"], None),
    "pissa": (["--init", "pissa"], None),
}
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("finetune", "model", "text"):
    p.add_argument("--" + name, required=True)
for name in ("hf-python", "hf-train", "only"):
    p.add_argument("--" + name, default="")
for name, default in (("steps", 6), ("batch", 4), ("seq", 256), ("rank", 8), ("threads", os.cpu_count())):
    p.add_argument("--" + name, type=int, default=default)
a = p.parse_args()
env = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
env["OMP_NUM_THREADS"] = str(a.threads)


def run(command):
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def graft(options):
    rank = [] if "--rank" in options else ["--rank", str(a.rank)]
    with tempfile.TemporaryDirectory() as folder:
        out = run([a.finetune, "--model", a.model, "--data", a.text, "--steps", str(a.steps), "--batch-size", str(a.batch),
                   "--seq-len", str(a.seq), "--schedule", "constant", "--no-shuffle", "--eval-fraction", "0", "--threads",
                   str(a.threads), "--quiet", "--json", "--output", folder] + options + rank)
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            steps = [json.loads(line)["seconds"] for line in f]
    return statistics.median(steps[1:]), json.loads(out)["peak_rss_mib"]


def peft(options):
    rank = [] if "--r" in options else ["--r", str(a.rank)]
    out = run([a.hf_python, a.hf_train, "--base", a.model, "--text", a.text, "--steps", str(a.steps), "--batch", str(a.batch),
               "--seq", str(a.seq), "--threads", str(a.threads), "--no-eval"] + options + rank)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return statistics.median(s["seconds"] for s in lines[1:-1]), lines[-1]["peak_rss_mib"]


print("| method | step, times LoRA's | memory, times LoRA's | step, times PEFT's | memory, times PEFT's |")
print("| --- | --- | --- | --- | --- |")
for name in a.only.split(",") if a.only else METHODS:
    ours, theirs = METHODS[name]
    lora, own = graft([]), graft(ours)
    cells = [f"{own[0] / lora[0]:.2f}", f"{own[1] / lora[1]:.2f}"]
    if a.hf_python and theirs:
        other = peft(theirs)
        cells += [f"{own[0] / other[0]:.2f}", f"{own[1] / other[1]:.2f}"]
    else:
        cells += ["-", "-"]
    print("| " + " | ".join([name] + cells) + " |", flush=True)

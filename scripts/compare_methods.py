"""Every method on the same model, text and budget, beside Hugging Face PEFT where it is at hand; writes a table.

usage: compare_methods.py --finetune BIN --model PATH --text FILE --output docs/results.md --work FOLDER
                          [--methods lora,dora,...] [--lrs 5e-4,2e-3,8e-3] [--steps 30] [--batch 2] [--seq 128]
                          [--rank 8] [--hf-python PYTHON --hf-train SCRIPT --hf-model FOLDER]

Each method runs once for each learning rate of the grid and is judged by its best held-out loss. Step time (the median
step) and peak memory are ratios to graft's LoRA in the same table: absolute times mean nothing across machines. A run
that is already in the work folder is not repeated, so that the script can be stopped and started again.
SCRIPT is a PEFT training loop: one JSON object a step (with "seconds"), a last one with "peak_rss_mib" and
"eval_loss_after".
"""
import argparse, json, os, statistics, subprocess

# name in the table -> finetune's options, the same method in PEFT (its loop's options; None: PEFT has none)
METHODS = {
    "lora": ([], ["--method", "lora"]),
    "rslora": (["--method", "lora", "--rslora"], ["--method", "lora", "--extra", '{"use_rslora": true}']),
    "lora+": (["--method", "lora", "--set", "loraplus_lr_ratio=16"], None),
    "dora": (["--method", "dora"], ["--method", "dora"]),
    "sora": (["--method", "sora"], None),
    "dylora": (["--method", "dylora", "--set", "frozen=false"], None),
    "adalora": (["--method", "adalora", "--set", "target_r=4", "--set", "tinit=5", "--set", "tfinal=10"], ["--method", "adalora"]),
    "lora-fa": (["--method", "lora-fa"], None),
    "lora-xs": (["--method", "lora-xs"], None),
    "vera": (["--method", "vera", "--rank", "64"], ["--method", "vera", "--r", "64"]),
    "randlora": (["--method", "randlora", "--rank", "32"], ["--method", "randlora", "--r", "32", "--extra", '{"randlora_alpha": 640}']),
    "shira": (["--method", "shira"], ["--method", "shira"]),
    "paca": (["--method", "paca"], None),
}

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("finetune", "model", "text", "output", "work"):
    p.add_argument("--" + name, required=True)
p.add_argument("--methods", default=",".join(METHODS))
p.add_argument("--lrs", default="5e-4,2e-3,8e-3")
p.add_argument("--steps", type=int, default=30)
p.add_argument("--batch", type=int, default=2)
p.add_argument("--seq", type=int, default=128)
p.add_argument("--rank", type=int, default=8)
for name in ("hf-python", "hf-train", "hf-model"):
    p.add_argument("--" + name, default="")
a = p.parse_args()
lrs = [float(x) for x in a.lrs.split(",")]
methods = a.methods.split(",")
for m in methods:
    if m not in METHODS:
        raise SystemExit(f"error: unknown method {m}; known: {', '.join(METHODS)}")
os.makedirs(a.work, exist_ok=True)
# The last 5 % of the text are held out, the same bytes for both sides.
text = open(a.text, encoding="utf-8").read()
cut = text.rindex("\n", 0, int(len(text) * 0.95)) + 1
train, held_out = os.path.join(a.work, "train.txt"), os.path.join(a.work, "held_out.txt")
for path, part in ((train, text[:cut]), (held_out, text[cut:])):
    with open(path, "w", encoding="utf-8") as f:
        f.write(part)


def kept(path, run):
    """The result at that path, made by run() when it is not there yet."""
    if not os.path.exists(path):
        result = run()
        with open(path, "w") as f:
            json.dump(result, f)
    with open(path) as f:
        return json.load(f)


def failure(error):
    return {"error": (error.stderr or error.stdout).strip().splitlines()[-1]}


def graft(method, lr):
    folder = os.path.join(a.work, f"graft-{method}-{lr:g}")
    options = METHODS[method][0]
    command = [a.finetune, "--model", a.model, "--data", train, "--eval-data", held_out, "--lr", str(lr), "--steps",
               str(a.steps), "--batch-size", str(a.batch), "--seq-len", str(a.seq), "--schedule", "linear",
               "--warmup-steps", "3", "--no-shuffle", "--quiet", "--json", "--output", folder] + options
    if "--rank" not in options:
        command += ["--rank", str(a.rank)]

    def run():
        try:
            run_json = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        except subprocess.CalledProcessError as error:
            return failure(error)
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            seconds = [json.loads(line)["seconds"] for line in f]
        return {"loss": run_json["eval_loss_after"], "before": run_json["eval_loss_before"],
                "parameters": run_json["trainable_parameters"], "step": statistics.median(seconds[1:]),
                "memory": run_json["peak_rss_mib"]}

    return kept(folder + ".json", run)


def peft(method, lr):
    options = METHODS[method][1]
    command = [a.hf_python, a.hf_train, "--base", a.hf_model, "--text", train, "--eval-text", held_out, "--lr", str(lr),
               "--steps", str(a.steps), "--batch", str(a.batch), "--seq", str(a.seq), "--decay", "linear", "--warmup",
               "3", "--eval-chunks", "1000000"] + options
    if "--r" not in options:
        command += ["--r", str(a.rank)]
    if method not in ("vera", "randlora", "shira"):
        command += ["--alpha", "16"]

    def run():
        try:
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except subprocess.CalledProcessError as error:
            return failure(error)
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        last = lines[-1]
        return {"loss": last["eval_loss_after"], "step": statistics.median(s["seconds"] for s in lines[1:-1]),
                "memory": last["peak_rss_mib"]}

    return kept(os.path.join(a.work, f"peft-{method}-{lr:g}.json"), run)


def best(side, method):
    """The run with the lowest held-out loss, with its learning rate."""
    runs = [dict(side(method, lr), lr=lr) for lr in lrs]
    sound = [r for r in runs if "error" not in r]
    return min(sound, key=lambda r: r["loss"]) if sound else runs[0]


with_peft = bool(a.hf_python and a.hf_train and a.hf_model)
reference = best(graft, "lora")
rows = []
for method in methods:
    ours = best(graft, method)
    theirs = best(peft, method) if with_peft and METHODS[method][1] else None
    print(method, ours, theirs, flush=True)
    rows.append((method, ours, theirs))


def cells(run, count):
    if run is None:
        return ["-"] * count
    if "error" in run:
        return [run["error"]] + ["-"] * (count - 1)
    return [f"{run['loss']:.4f}", f"{run['lr']:g}", f"{run['step'] / reference['step']:.2f}",
            f"{run['memory'] / reference['memory']:.2f}"]


lines = ["# Results", "",
         f"Written by `scripts/compare_methods.sh`. SmolLM2-135M, The Devil's Dictionary, {a.steps} steps of {a.batch} x "
         f"{a.seq} tokens, AdamW, 3 steps of warm-up, linear decay, rank {a.rank} (VeRA 64, RandLoRA 32), all linear "
         f"layers. Learning rate: the best of {', '.join(f'{lr:g}' for lr in lrs)} for each side. Held-out loss before: "
         f"{reference['before']:.4f}. Step time and peak memory are multiples of graft's LoRA's in this table.", "",
         "| method | parameters | held-out loss | lr | step | memory | PEFT: loss | lr | step | memory |",
         "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
for method, ours, theirs in rows:
    lines.append("| " + " | ".join([method, str(ours.get("parameters", "-"))] + cells(ours, 4) + cells(theirs, 4)) + " |")
with open(a.output, "w") as f:
    f.write("\n".join(lines) + "\n")

"""Finding LoRA's start values in all layers of a model, beside PEFT on the same batches: seconds and peak memory. A
benchmark, no test.

usage: start_up.py --finetune BIN --model FOLDER --text FILE --hf-python PYTHON --hf-train SCRIPT
                   [--batch 4] [--seq 128] [--rank 8] [--rounds 1] [--only pissa,eva,...]

Ours are the seconds that finetune reports for the initialiser; PEFT's are its loading time beyond a plain LoRA's. Both
read the same batches in file order (2 for LoRA-GA, 8 for CorDA, at most 8 for EVA); the loop has no CorDA. The best of the rounds counts. Memory:
the peak at the end of the start-up over the peak of a training step of graft's LoRA.
"""
import argparse, json, os, subprocess, tempfile

# initialiser -> finetune's options, the method of the PEFT loop (None: it has none)
STARTS = {
    "pissa": (["--init", "pissa"], "pissa"),
    "pissa_niter_16": (["--init", "pissa_niter_16"], "pissa_niter"),
    "olora": (["--init", "olora"], "olora"),
    "lora_ga": (["--init", "lora_ga", "--init-batches", "2"], "loraga"),
    "corda": (["--init", "corda", "--init-batches", "8"], None),
    "eva": (["--init", "eva", "--init-batches", "8"], "eva"),
}
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("finetune", "model", "text", "hf-python", "hf-train"):
    p.add_argument("--" + name, required=True)
p.add_argument("--only", default="")
for name, default in (("batch", 4), ("seq", 128), ("rank", 8), ("rounds", 1), ("threads", os.cpu_count())):
    p.add_argument("--" + name, type=int, default=default)
a = p.parse_args()
env = dict(os.environ, OMP_NUM_THREADS=str(a.threads))


def run(command):
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def graft(options):
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(run([a.finetune, "--model", a.model, "--data", a.text, "--steps", "2", "--batch-size", str(a.batch),
                               "--seq-len", str(a.seq), "--rank", str(a.rank), "--no-shuffle", "--eval-fraction", "0", "--threads",
                               str(a.threads), "--quiet", "--json", "--output", folder] + options))


def peft(method):
    out = run([a.hf_python, a.hf_train, "--base", a.model, "--text", a.text, "--steps", "1", "--batch", str(a.batch), "--seq",
               str(a.seq), "--r", str(a.rank), "--alpha", "16", "--threads", str(a.threads), "--no-eval", "--method", method])
    return json.loads(out.splitlines()[-1])


step_memory = graft([])["peak_rss_mib"]
plain = min(peft("lora")["load_seconds"] for _ in range(a.rounds))
print("| start | graft: seconds | PEFT: seconds | ratio | graft: memory | PEFT: memory |")
print("| --- | --- | --- | --- | --- | --- |")
for name in a.only.split(",") if a.only else STARTS:
    options, method = STARTS[name]
    ours = [graft(options) for _ in range(a.rounds)]
    mine = min(r["init_seconds"] for r in ours)
    memory = max(r["init_peak_rss_mib"] for r in ours) / step_memory
    if method is None:
        print(f"| {name} | {mine:.1f} | - | - | {memory:.2f} | - |", flush=True)
        continue
    theirs = [peft(method) for _ in range(a.rounds)]
    other = min(r["load_seconds"] for r in theirs) - plain
    their_memory = max(r["peak_load_rss_mib"] for r in theirs) / step_memory
    print(f"| {name} | {mine:.1f} | {other:.1f} | {mine / other:.2f} | {memory:.2f} | {their_memory:.2f} |", flush=True)

"""finetune beside Hugging Face PEFT in one run: tokens per second and peak memory, as ratios. A benchmark, no test.

usage: compare_peft.py --finetune BIN --hf-python PYTHON --hf-train SCRIPT --model FOLDER --text FILE
                       [--steps 8] [--rounds 2] [--dropout 0.0 0.05] [--batch 4] [--seq 256] [--rank 8]

SCRIPT is a PEFT training loop that prints one JSON object a step (with "seconds") and a last one with
"peak_rss_mib". The two programs take turns, so that both see the same machine. A run's speed is its median step's.
"""
import argparse, json, os, statistics, subprocess, tempfile

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("finetune", "hf-python", "hf-train", "model", "text"):
    p.add_argument("--" + name, required=True)
p.add_argument("--steps", type=int, default=8)
p.add_argument("--rounds", type=int, default=2)
p.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
p.add_argument("--batch", type=int, default=4)
p.add_argument("--seq", type=int, default=256)
p.add_argument("--rank", type=int, default=8)
p.add_argument("--threads", type=int, default=os.cpu_count())
a = p.parse_args()

env = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
env["OMP_NUM_THREADS"] = str(a.threads)


def peft(dropout):
    out = subprocess.run([a.hf_python, a.hf_train, "--base", a.model, "--text", a.text, "--r", str(a.rank), "--alpha",
                          str(2 * a.rank), "--dropout", str(dropout), "--steps", str(a.steps), "--batch", str(a.batch),
                          "--seq", str(a.seq), "--threads", str(a.threads), "--no-eval"],
                         env=env, check=True, capture_output=True, text=True).stdout
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return [s["seconds"] for s in lines[1:-1]], lines[-1]["peak_rss_mib"]


def graft(dropout):
    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run([a.finetune, "--model", a.model, "--data", a.text, "--rank", str(a.rank), "--alpha",
                              str(2 * a.rank), "--dropout", str(dropout), "--steps", str(a.steps), "--batch-size",
                              str(a.batch), "--seq-len", str(a.seq), "--schedule", "constant", "--no-shuffle",
                              "--eval-fraction", "0", "--threads", str(a.threads), "--quiet", "--json", "--output",
                              folder], env=env, check=True, capture_output=True, text=True).stdout
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            steps = [json.loads(line)["seconds"] for line in f]
        return steps[1:], json.loads(out)["peak_rss_mib"]


tokens = a.batch * a.seq
for dropout in a.dropout:
    ours, theirs, memory = [], [], ([], [])
    for _ in range(a.rounds):
        steps, peak = graft(dropout)
        ours += steps
        memory[0].append(peak)
        steps, peak = peft(dropout)
        theirs += steps
        memory[1].append(peak)
    o, t = statistics.median(ours), statistics.median(theirs)
    print(f"dropout {dropout}: tokens/s {tokens / o:.0f} (PEFT {tokens / t:.0f}), {t / o:.2f} times PEFT; "
          f"peak memory {max(memory[0]):.0f} MiB (PEFT {max(memory[1]):.0f}), "
          f"{max(memory[0]) / max(memory[1]):.2f} times PEFT", flush=True)

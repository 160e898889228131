"""One DyLoRA at each of its ranks beside LoRAs trained at those ranks, and SoRA's loss against its sparsity; a table each.

usage: compare_ranks.py --finetune BIN --evaluate BIN --model PATH --text FILE --output docs/results.md --work FOLDER
                        [--lrs 2e-3] [--steps 60] [--batch 2] [--seq 128] [--rank 8]

The first of --lrs is used. SoRA runs with several strengths of sparse_lambda; the share of ranks that its threshold
switched off is counted in the pruned folder, whose loss is the trained adapter's.
"""
import json, os, subprocess, sys

import comparison

STRENGTHS = ["0", "2.5", "5", "10", "12.5", "20"]
i = sys.argv.index("--evaluate")
evaluate_program = sys.argv[i + 1]
del sys.argv[i : i + 2]
a = comparison.arguments(__doc__, "2e-3", steps=60, batch=2, seq=128, rank=8)


def train(name, options):
    return comparison.graft(a, name, ["--lr", str(a.lrs[0]), "--no-shuffle"] + options)


def evaluate(name, rank):
    """The held-out loss of a DyLoRA cut to that rank."""
    command = [evaluate_program, "--model", a.model, "--adapter", os.path.join(a.work, name), "--data", a.held_out, "--seq-len",
               str(a.seq), "--rank", str(rank)]
    run = lambda: json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return comparison.kept(os.path.join(a.work, f"{name}-at-{rank}.json"), run)["loss"]


def dylora():
    name = f"ranks-dylora-{a.steps}"
    train(name, ["--method", "dylora", "--rank", str(a.rank), "--set", "frozen=false"])
    lines = [f"Written by `scripts/compare_ranks.py`: one DyLoRA of rank {a.rank} (unfrozen, ranks drawn uniformly), {a.steps} "
             f"steps of {a.batch} x {a.seq} tokens at learning rate {a.lrs[0]:g}, cut to each rank, beside a LoRA trained at that "
             "rank with the same budget. Held-out loss.", "",
             "| rank | DyLoRA cut | LoRA trained | DyLoRA against LoRA |", "| --- | --- | --- | --- |"]
    for rank in range(1, a.rank + 1):
        cut = evaluate(name, rank)
        lora = train(f"ranks-lora-{a.steps}-{rank}", ["--rank", str(rank), "--alpha", str(2 * rank)])["loss"]
        lines.append(f"| {rank} | {cut:.4f} | {lora:.4f} | {100 * (cut / lora - 1):+.1f} % |")
        print(lines[-1], flush=True)
    comparison.write_section(a.output, "DyLoRA: every rank of one adapter", lines)


def active_share(name):
    """The share of SoRA's ranks that are still on at the end, from the last step's figure."""
    with open(os.path.join(a.work, name, "metrics.jsonl")) as f:
        last = json.loads(f.readlines()[-1])
    return last["active_rank"] / a.rank


def sora():
    lines = [f"Written by `scripts/compare_ranks.py`: SoRA of rank {a.rank}, the same budget, for several strengths of the sparsity "
             "term. Pruning leaves the output as it is, so the loss is that of the pruned adapter.", "",
             "| sparse_lambda | ranks left | held-out loss | against none pruned |", "| --- | --- | --- | --- |"]
    reference = None
    for strength in STRENGTHS:
        name = f"ranks-sora-{a.steps}-{strength}"
        loss = train(name, ["--method", "sora", "--rank", str(a.rank), "--set", f"sparse_lambda={strength}"])["loss"]
        reference = reference or loss
        lines.append(f"| {strength} | {100 * active_share(name):.0f} % | {loss:.4f} | {100 * (loss / reference - 1):+.2f} % |")
        print(lines[-1], flush=True)
    comparison.write_section(a.output, "SoRA: loss against sparsity", lines)


dylora()
sora()

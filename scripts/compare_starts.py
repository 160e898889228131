"""Every initialiser of LoRA on the same model, text and budget; writes a table.

usage: compare_starts.py --finetune BIN --model PATH --text FILE --output docs/results.md --work FOLDER
                         [--only kaiming,pissa,...] [--lrs 5e-4,1e-3,2e-3] [--seeds 2] [--steps 32] [--batch 2] [--seq 128]
                         [--rank 8]

Each initialiser runs for each learning rate and seed (of the order of the chunks and of random numbers) and is judged by
the learning rate whose mean final held-out loss is lowest. What the starts cost: tests/bench/start_up.py.
"""
import statistics

import comparison

# name in the table -> finetune's options
STARTS = {
    "kaiming": [],
    "orthogonal": ["--init", "orthogonal"],
    "pissa": ["--init", "pissa"],
    "pissa_niter_16": ["--init", "pissa_niter_16"],
    "olora": ["--init", "olora"],
    "nystrom": ["--init", "nystrom"],
    "lora_ga": ["--init", "lora_ga", "--init-batches", "2"],
    "corda": ["--init", "corda", "--init-batches", "8"],
    "eva": ["--init", "eva", "--init-batches", "8"],
}
a = comparison.arguments(__doc__, "5e-4,1e-3,2e-3", steps=32, batch=2, seq=128, rank=8, seeds=2)


def runs(start, lr):
    return [comparison.graft(a, f"start-{start}-{lr:g}-{seed}", ["--lr", str(lr), "--seed", str(seed), "--rank", str(a.rank),
                             "--eval-every", str(a.steps // 4)] + STARTS[start]) for seed in range(a.seeds)]


def mean(values):
    return statistics.mean(values)


def spread(values):
    return f"{mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def main():
    quarter, half = a.steps // 4, a.steps // 2
    lines = [f"Written by `scripts/compare_starts.sh`. LoRA of rank {a.rank} on all linear layers of SmolLM2-135M, The Devil's "
             f"Dictionary, {a.steps} steps of {a.batch} x {a.seq} tokens, AdamW, 3 steps of warm-up, linear decay. "
             f"Held-out loss after {quarter}, {half} and {a.steps} steps, mean of {a.seeds} seeds ± half their distance, at the "
             f"best of the learning rates {', '.join(f'{lr:g}' for lr in a.lrs)}. The data-driven ones read 2 batches (lora_ga) or "
             "8 (corda, and eva at most).", "",
             f"| start | lr | after {quarter} | after {half} | after {a.steps} |", "| --- | --- | --- | --- | --- |"]
    for start in comparison.chosen(a, STARTS):
        by_lr = {lr: runs(start, lr) for lr in a.lrs}
        by_lr = {lr: r for lr, r in by_lr.items() if not any("error" in x for x in r)}
        lr = min(by_lr, key=lambda lr: mean([r["loss"] for r in by_lr[lr]]))
        best = by_lr[lr]
        at = lambda steps: spread([dict(map(tuple, r["losses"]))[steps] for r in best])
        row = [start, f"{lr:g}", at(quarter), at(half), spread([r["loss"] for r in best])]
        print(row, flush=True)
        lines.append("| " + " | ".join(row) + " |")
    comparison.write_section(a.output, "Starts of LoRA", lines)


main()

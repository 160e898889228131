"""Every method on the same model, text and budget, beside Hugging Face PEFT where it is at hand; writes a table.

usage: compare_methods.py --finetune BIN --model PATH --text FILE --output docs/results.md --work FOLDER
                          [--only lora,dora,...] [--lrs 5e-4,2e-3,8e-3] [--steps 30] [--batch 2] [--seq 128]
                          [--rank 8] [--hf-python PYTHON --hf-train SCRIPT --hf-model FOLDER]

Each method runs once for each learning rate of the grid and is judged by its best held-out loss. Step time (the median
step) and peak memory are ratios to graft's LoRA in the same table: absolute times mean nothing across machines.
"""
import comparison

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

a = comparison.arguments(__doc__, "5e-4,2e-3,8e-3", steps=30, batch=2, seq=128, rank=8)


def graft(method, lr):
    options = METHODS[method][0]
    rank = [] if "--rank" in options else ["--rank", str(a.rank)]
    return comparison.graft(a, f"graft-{method}-{lr:g}", ["--lr", str(lr), "--no-shuffle"] + options + rank)


def peft(method, lr):
    options = METHODS[method][1]
    rank = [] if "--r" in options else ["--r", str(a.rank)]
    alpha = [] if method in ("vera", "randlora", "shira") else ["--alpha", "16"]
    return comparison.peft(a, f"peft-{method}-{lr:g}", ["--lr", str(lr)] + options + rank + alpha)


def best(side, method):
    """The run with the lowest held-out loss, with its learning rate."""
    runs = [dict(side(method, lr), lr=lr) for lr in a.lrs]
    sound = [r for r in runs if "error" not in r]
    return min(sound, key=lambda r: r["loss"]) if sound else runs[0]


def cells(run, reference):
    if run is None:
        return ["-"] * 4
    if "error" in run:
        return [run["error"]] + ["-"] * 3
    return [f"{run['loss']:.4f}", f"{run['lr']:g}", f"{run['step'] / reference['step']:.2f}",
            f"{run['memory'] / reference['memory']:.2f}"]


def main():
    reference = best(graft, "lora")
    lines = [f"Written by `scripts/compare_methods.sh`. SmolLM2-135M, The Devil's Dictionary, {a.steps} steps of {a.batch} x "
             f"{a.seq} tokens, AdamW, 3 steps of warm-up, linear decay, rank {a.rank} (VeRA 64, RandLoRA 32), all linear "
             f"layers. Learning rate: the best of {', '.join(f'{lr:g}' for lr in a.lrs)} for each side. Held-out loss "
             f"before: {reference['before']:.4f}. Step time and peak memory are multiples of graft's LoRA's in this table.",
             "", "| method | parameters | held-out loss | lr | step | memory | PEFT: loss | lr | step | memory |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for method in comparison.chosen(a, METHODS):
        ours = best(graft, method)
        theirs = best(peft, method) if a.with_peft and METHODS[method][1] else None
        print(method, ours, theirs, flush=True)
        row = [method, str(ours.get("parameters", "-"))] + cells(ours, reference) + cells(theirs, reference)
        lines.append("| " + " | ".join(row) + " |")
    comparison.write_section(a.output, "Methods", lines)


main()

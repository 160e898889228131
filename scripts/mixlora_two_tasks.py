"""One MixLoRA on two texts of different voice beside one LoRA of as many parameters; losses by text, experts by text.

usage: mixlora_two_tasks.py --finetune BIN --evaluate BIN --model PATH --text FILE --other FILE --output docs/results.md
                            --work FOLDER [--lrs 1e-3] [--steps 60] [--batch 4] [--seq 128] [--experts 4] [--rank 4]

--other: a file of the package fortunes, quotations with a line of % between them. Both texts are cut to one length; the
last 5 % of each are held out. The first of --lrs is used for both adapters.
"""
import json, os, subprocess, sys

import comparison


def taken(option):
    i = sys.argv.index(option)
    value = sys.argv[i + 1]
    del sys.argv[i : i + 2]
    return value


evaluate_program, other = taken("--evaluate"), taken("--other")
a = comparison.arguments(__doc__, "1e-3", steps=60, batch=4, seq=128, experts=4, rank=4)
budget = f"{a.steps}-{a.batch}x{a.seq}-{a.lrs[0]:g}"  # in the names of kept results: another budget is another run


def parts(path):
    """The text for training and the held-out one, each with whole lines."""
    with open(path, encoding="utf-8", errors="replace") as f:
        text = f.read().replace("\n%\n", "\n\n")[:230_000]
    cut = text.rindex("\n", 0, int(len(text) * 0.95)) + 1
    return text[:cut], text[cut:]


def prepare():
    """Both texts' training parts as one, and a held-out file of each, by its name."""
    train, held_out = "", {}
    for name, path in (("dictionary", a.text), ("verse", other)):
        first, last = parts(path)
        train += first
        held_out[name] = os.path.join(a.work, f"two-{name}.txt")
        with open(held_out[name], "w", encoding="utf-8") as f:
            f.write(last)
    a.train, a.held_out = os.path.join(a.work, "two-train.txt"), held_out["dictionary"]
    with open(a.train, "w", encoding="utf-8") as f:
        f.write(train)
    return held_out


def evaluate(name, path, task):
    adapter = ["--adapter", os.path.join(a.work, name)] if name else []
    command = [evaluate_program, "--model", a.model, "--data", path, "--seq-len", str(a.seq)] + adapter
    run = lambda: json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return succeeded(comparison.kept(os.path.join(a.work, f"{name or f'two-base-{a.seq}'}-on-{task}.json"), run))


def planned(options):
    """How many numbers an adapter with these options trains."""
    command = [a.finetune, "--model", a.model, "--data", a.train, "--output", a.work, "--dry-run", "--json", "--quiet"]
    return json.loads(subprocess.check_output(command + options))["trainable_parameters"]


def lora_rank(parameters):
    """The rank at which LoRA's count comes closest."""
    return max(1, round(parameters / planned(["--rank", "1"])))


def expert_table(uses):
    """The share of each expert in the first, the middle and the last block, by text."""
    layers = sorted(next(iter(uses.values())), key=lambda layer: int(layer.split(".")[2]))
    lines = ["| block | text | " + " | ".join(f"expert {e}" for e in range(a.experts)) + " |",
             "| --- | --- |" + " --- |" * a.experts]
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        for task, use in uses.items():
            total = sum(use[layer])
            shares = " | ".join(f"{100 * count / total:.0f} %" for count in use[layer])
            lines.append(f"| {layer.split('.')[2]} | {task} | {shares} |")
    return lines


def succeeded(result):
    if "error" in result:
        raise SystemExit(result["error"])
    return result


def main():
    held_out = prepare()
    mixture = ["--method", "mixlora", "--experts", str(a.experts), "--rank", str(a.rank), "--alpha", str(2 * a.rank)]
    rank = lora_rank(planned(mixture))
    rows = {f"MixLoRA, {a.experts} experts of rank {a.rank}, two a token":
                (f"two-mixlora-{a.experts}x{a.rank}-{budget}", mixture),
            f"LoRA, rank {rank}": (f"two-lora-{rank}-{budget}", ["--rank", str(rank), "--alpha", str(2 * rank)])}
    lines = [f"Written by `scripts/mixlora_two_tasks.sh`: SmolLM2-135M on The Devil's Dictionary and the verse of the package "
             f"fortunes, {a.steps} steps of {a.batch} x {a.seq} tokens of both, shuffled, AdamW at {a.lrs[0]:g}. Held-out loss by "
             "text; one run each, so small differences mean nothing.", "",
             "| adapter | parameters | " + " | ".join(held_out) + " |", "| --- | --- |" + " --- |" * len(held_out)]
    before = [f"{evaluate('', path, task)['loss']:.4f}" for task, path in held_out.items()]
    lines.append("| none | 0 | " + " | ".join(before) + " |")
    uses = {}
    for title, (name, options) in rows.items():
        parameters = succeeded(comparison.graft(a, name, ["--lr", str(a.lrs[0])] + options))["parameters"]
        results = {task: evaluate(name, path, task) for task, path in held_out.items()}
        lines.append(f"| {title} | {parameters} | " + " | ".join(f"{r['loss']:.4f}" for r in results.values()) + " |")
        uses = uses or {task: result["expert_use"] for task, result in results.items()}
        print(lines[-1], flush=True)
    lines += ["", "Where the mixture sends each text's tokens:", ""] + expert_table(uses)
    comparison.write_section(a.output, "MixLoRA: two texts, one adapter", lines)


main()

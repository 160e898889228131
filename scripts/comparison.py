"""What the comparison scripts share: runs of finetune and of a PEFT training loop, kept results, sections of a page.
No script of its own.

A run that is already in the work folder is not repeated, so that a comparison can be stopped and started again. The PEFT
loop prints one JSON object a step (with "seconds") and a last one with "peak_rss_mib", "load_seconds" and
"eval_loss_after".
"""
import argparse, json, os, statistics, subprocess


def arguments(description, lrs, **numbers):
    """The options that every comparison has; numbers: name=default of its own."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("finetune", "model", "text", "output", "work"):
        p.add_argument("--" + name, required=True)
    p.add_argument("--only", default="", help="comma-separated rows; default: all")
    p.add_argument("--lrs", default=lrs)
    for name, default in numbers.items():
        p.add_argument("--" + name, type=int, default=default)
    for name in ("hf-python", "hf-train", "hf-model"):
        p.add_argument("--" + name, default="")
    a = p.parse_args()
    a.lrs = [float(x) for x in a.lrs.split(",")]
    a.with_peft = bool(a.hf_python and a.hf_train and a.hf_model)
    os.makedirs(a.work, exist_ok=True)
    # The last 5 % of the text are held out, the same bytes for both sides.
    with open(a.text, encoding="utf-8") as f:
        text = f.read()
    cut = text.rindex("\n", 0, int(len(text) * 0.95)) + 1
    a.train, a.held_out = os.path.join(a.work, "train.txt"), os.path.join(a.work, "held_out.txt")
    for path, part in ((a.train, text[:cut]), (a.held_out, text[cut:])):
        with open(path, "w", encoding="utf-8") as f:
            f.write(part)
    return a


def chosen(a, rows):
    names = a.only.split(",") if a.only else list(rows)
    for name in names:
        if name not in rows:
            raise SystemExit(f"error: unknown row {name}; known: {', '.join(rows)}")
    return names


def kept(path, run):
    """The result at that path, made by run() when it is not there yet. A failure is told and tried again next time."""
    if not os.path.exists(path):
        try:
            result = run()
        except subprocess.CalledProcessError as error:
            return {"error": (error.stderr or error.stdout).strip().splitlines()[-1]}
        with open(path, "w") as f:
            json.dump(result, f)
    with open(path) as f:
        return json.load(f)


def graft(a, name, options):
    """A run of finetune with these options beside those of the comparison."""
    folder = os.path.join(a.work, name)
    command = [a.finetune, "--model", a.model, "--data", a.train, "--eval-data", a.held_out, "--steps", str(a.steps),
               "--batch-size", str(a.batch), "--seq-len", str(a.seq), "--schedule", "linear", "--warmup-steps",
               str(min(3, a.steps)), "--quiet", "--json", "--output", folder] + options

    def run():
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            seconds = [json.loads(line)["seconds"] for line in f]
        return {"loss": result["eval_loss_after"], "before": result["eval_loss_before"],
                "losses": result["eval_losses"], "parameters": result["trainable_parameters"],
                "step": statistics.median(seconds[1:]), "memory": result["peak_rss_mib"],
                "init": result["init_seconds"], "init_memory": result["init_peak_rss_mib"]}

    return kept(folder + ".json", run)


def peft(a, name, options):
    """A run of the PEFT loop with these options beside those of the comparison."""
    command = [a.hf_python, a.hf_train, "--base", a.hf_model, "--text", a.train, "--eval-text", a.held_out, "--steps",
               str(a.steps), "--batch", str(a.batch), "--seq", str(a.seq), "--decay", "linear", "--warmup", "3",
               "--eval-chunks", "1000000"] + options

    def run():
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        last = lines[-1]
        return {"loss": last["eval_loss_after"], "step": statistics.median(s["seconds"] for s in lines[1:-1]),
                "memory": last["peak_rss_mib"], "load": last["load_seconds"], "load_memory": last["peak_load_rss_mib"]}

    return kept(os.path.join(a.work, name + ".json"), run)


def write_section(path, title, lines):
    """Puts the section of that title into the page, in place of what it held before."""
    page = "# Results\n"
    if os.path.exists(path):
        with open(path) as f:
            page = f.read()
    before, _, rest = page.partition(f"\n## {title}\n")
    after = rest.partition("\n## ")[2]
    page = before.rstrip("\n") + f"\n\n## {title}\n\n" + "\n".join(lines) + "\n" + (f"\n## {after}" if after else "")
    with open(path, "w") as f:
        f.write(page)

#!/usr/bin/env python3
"""Prints what a run of `finetune` achieved, from its run.json.

usage: show_run.py run.json [--least-fall F]
Exits 1 with one line when the held-out loss fell by less than F, or when the sample stayed the same.
"""
import argparse
import json
import sys


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run")
    parser.add_argument("--least-fall", type=float, default=0.0)
    arguments = parser.parse_args()
    with open(arguments.run, encoding="utf-8") as stream:
        run = json.load(stream)
    before, after = run["eval_loss_before"], run["eval_loss_after"]
    print(f"\nheld-out loss  {before:.3f} -> {after:.3f}   "
          f"({run['tokens_per_second']:.0f} tokens/s, {run['train_seconds']:.0f} s, {run['peak_rss_mib']:.0f} MiB)")
    for when in ("before", "after"):
        print(f"\nsample {when} training:\n{run['sample_' + when].strip()}")
    if not before - after >= arguments.least_fall:
        sys.exit(f"error: [quickstart] the held-out loss must fall by at least {arguments.least_fall}; "
                 f"got {before:.3f} -> {after:.3f}")
    if run["sample_before"] == run["sample_after"]:
        sys.exit("error: [quickstart] training must change the sample; got the same text")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: [quickstart] run.json must be that of a finished run; got {error!r}")

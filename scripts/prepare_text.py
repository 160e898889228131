#!/usr/bin/env python3
"""Turns the dictionary of the Debian package dict-devil into running text for training.

usage: prepare_text.py devil.dict.dz devil.txt

The source wraps prose at a fixed width and indents its verse. Prose paragraphs become one line each, verse keeps its
lines with one indentation, the names under quotations (far to the right) are marked by a dash.
"""
import gzip
import os
import re
import sys

FIRST_ENTRY = "ABASEMENT, n."
VERSE = " " * 4
SIGNATURE = re.compile(r" {20,}")


def entries(path):
    """The text from the first entry on, without the alphabet that ends the file."""
    with gzip.open(path) as stream:
        text = stream.read().decode("utf-8", "replace").replace("\r\n", "\n")
    begin = text.find(FIRST_ENTRY)
    if begin < 0:
        raise SystemExit(f"error: [text] the dictionary must hold '{FIRST_ENTRY}'; got none ({path})")
    return re.sub(r"\n\s*abcdefghijklmnopqrstuvwxyz\s*$", "\n", text[begin:])


def append(prose, line):
    """Prose continued by a line; a hyphen after a small letter was a word's break."""
    if not prose:
        return line
    if re.search("[a-z]-$", prose):
        return prose[:-1] + line
    return prose + " " + line


def unwrapped(text):
    """The lines of the running text; an empty one follows each paragraph."""
    prose, empty = "", True
    for line in text.split("\n") + [""]:
        line = line.rstrip()
        if line and not line.startswith(VERSE):
            prose, empty = append(prose, line.strip()), False
            continue
        if prose:
            yield prose
            prose = ""
        if line:
            indent = SIGNATURE.match(line)
            yield "-- " + line[indent.end():] if indent else VERSE + line.strip()
            empty = False
        elif not empty:
            yield ""
            empty = True


def main(source, target):
    lines = (re.sub(r"(?<=\S) {2,}", " ", line) for line in unwrapped(entries(source)))
    partial = target + ".part"
    with open(partial, "w", encoding="utf-8", newline="\n") as stream:
        stream.write("\n".join(lines) + "\n")
    os.replace(partial, target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("error: [usage] prepare_text.py DICTIONARY TEXT", file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], sys.argv[2])

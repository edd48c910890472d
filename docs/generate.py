#!/usr/bin/env python3
"""Writes docs/configuration.md from what the program says of itself:

    docs/generate.py build/release/lorikeet
"""
import pathlib
import re
import subprocess
import sys

OUT = pathlib.Path(__file__).with_name("configuration.md")
HEAD = """# Settings of `lorikeet serve`
Made by `docs/generate.py`. A key is set in the YAML file that `--config` names; as a flag it is the
same word with `-` for `_`, and flags count more than the file. Lists and maps are repeated flags.
An unknown key is refused with the nearest one.

| key | meaning |
|---|---|
"""


def main():
    text = subprocess.run([sys.argv[1], "serve", "--help"], check=True, text=True,
                          capture_output=True).stdout
    rows = []
    for flag, meaning in re.findall(r"^  --(\S+)(?: \S+)? +(.*)$", text, re.M):
        if flag != "config":
            rows.append(f"| `{flag.replace('-', '_')}` | {meaning} |\n")
    OUT.write_text(HEAD + "".join(rows))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes docs/api.md from the protos, whose comments are the reference:

    docs/api.py            # --check: whether it is up to date

The protos are laid out as clang-format does it: a comment stands above what it is about, or behind it.
"""
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
PROTOS = [HERE.parent / f"proto/lorikeet/v1/{name}.proto" for name in ("generation", "adapters")]
HEAD = """# gRPC API
Made by `docs/api.py` from [proto/lorikeet/v1](../proto/lorikeet/v1), to which it adds nothing. What HTTP
serves is in [openapi.yaml](../proto/openapi.yaml).
"""
RPC = re.compile(r"rpc (\w+)\((.+)\) returns \((.+)\);")
FIELD = re.compile(r"((?:repeated |optional )?[\w.<>, ]+?) (\w+) = (\d+);(?:\s*// (.*))?$")
STATUS = re.compile(r"^([A-Z]+(?:_[A-Z]+)*):", re.M)
VALUE = re.compile(r"([A-Z_]+) = (\d+);(?:\s*// (.*))?$")


def cell(text):
    return text.replace("|", "\\|")


class Page:
    def __init__(self):
        self.out, self.comment, self.scopes, self.row = [HEAD], [], [], None

    def take_comment(self, separator):
        text = separator.join(self.comment)
        self.comment = []
        return text

    def add_row(self, name, kind, behind):
        above = self.take_comment(" ")
        meaning = " ".join(part for part in (above, behind) if part)
        scope = self.scopes[-1]
        one_of = f"one of `{scope[1]}`. " if scope[0] == "oneof" else ""
        self.out.append([name, kind, one_of + meaning])
        self.row = self.out[-1]

    def open(self, keyword, name):
        outer = [s[1] for s in self.scopes if s[0] == "message"]
        self.scopes.append((keyword, ".".join(outer + [name]) if keyword != "oneof" else name))
        if keyword == "oneof":
            self.comment = []
            return
        level = "##" if keyword == "service" else "###"
        self.out.append(f"\n{level} {self.scopes[-1][1]}\n{self.take_comment(chr(10))}".rstrip())
        if keyword == "message":
            self.out.append("\n| field | type | meaning |\n|---|---|---|")
        if keyword == "enum":
            self.out.append("\n| value | number | meaning |\n|---|---|---|")

    def read(self, line):
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if text.startswith("//"):
            if self.row is not None and indent > 2 * len(self.scopes):
                self.row[2] += " " + text[3:]  # goes on with what stood behind the line before
            else:
                self.comment.append(text[3:])
            return
        self.row = None
        if opened := re.match(r"(service|message|enum|oneof) (\w+) \{(\})?", text):
            self.open(opened[1], opened[2])
            if opened[3]:
                self.scopes.pop()
                self.out[-1] = "\nNo fields."
        elif text == "}":
            self.scopes.pop()
        elif rpc := RPC.match(text):
            self.out.append(f"\n### {rpc[1]}\n`{rpc[2]}` → `{rpc[3]}`\n\n"
                            + STATUS.sub(r"- `\1`:", self.take_comment("\n")))
        elif value := VALUE.match(text):
            self.add_row(f"`{value[1]}`", value[2], value[3])
        elif field := FIELD.match(text):
            self.add_row(f"`{field[2]}`", f"`{field[1]}`", field[4])
        elif text.startswith("syntax"):
            self.out.append("\n" + self.take_comment("\n"))
        elif text:
            self.comment = []  # of an import, or the package

    def text(self):
        lines = (line if isinstance(line, str) else "| " + " | ".join(map(cell, line)) + " |"
                 for line in self.out)
        return "\n".join(lines) + "\n"


def main():
    page = Page()
    for path in PROTOS:
        for line in path.read_text().splitlines():
            page.read(line)
    out = HERE / "api.md"
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if out.read_text() == page.text() else f"{out} is not what {sys.argv[0]} writes")
    out.write_text(page.text())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Holds lorikeet.json to the rules of Grafana's dashboard-linter, which is in no registry that serves
its program:  deploy/grafana/lint.py

What the queries mean is check_data.py's, which asks them of a Prometheus.
"""
import json
import pathlib
import re
import sys

NO_UNIT_NEEDED = {"row", "text"}


def templates(board):
    named = {t["name"]: t for t in board["templating"]["list"]}
    source = named.get("datasource", {})
    if (source.get("type"), source.get("query")) != ("datasource", "prometheus"):
        yield "no template 'datasource' of type prometheus"
    for name in ("job", "instance"):
        t = named.get(name, {})
        if t.get("type") != "query" or not t.get("label") or t.get("allValue") != ".+":
            yield f"template '{name}' is no labelled query with allValue .+"
        if not t.get("multi") or t.get("datasource", {}).get("uid") != "${datasource}":
            yield f"template '{name}' does not take several values of ${{datasource}}"
        if t.get("refresh") != 2:
            yield f"template '{name}' is not read again when the time range changes"


def target(expr):
    for name in ("job", "instance"):
        for selector in re.findall(r"\{([^}]*)\}", expr):
            if f'{name}=~"${name}"' not in selector:
                yield f"{{{selector}}} does not select by {name}"
    if re.search(r"\b(lorikeet_\w+|process_\w+|up)\b(?!\{)", expr):
        yield "a metric without a selector"
    for window in re.findall(r"\[([^\]]*)\]", expr):
        if window != "$__rate_interval":
            yield f"a window of [{window}], not [$__rate_interval]"
    bare = re.sub(r"(rate|increase)\([a-z_]+", "", expr)
    if re.search(r"[a-z_]+_total\{", bare):
        yield "a counter without rate or increase"


def panel(p):
    if not p.get("title") or not p.get("description"):
        yield "no title or no description"
    if not p.get("fieldConfig", {}).get("defaults", {}).get("unit"):
        yield "no unit"
    if p.get("datasource", {}).get("uid") != "${datasource}":
        yield "the data source is not ${datasource}"
    if not p.get("targets"):
        yield "no query"
    for t in p.get("targets", []):
        yield from (f"{t['refId']}: {fault}" for fault in target(t["expr"]))


def main():
    board = json.loads(pathlib.Path(__file__).with_name("lorikeet.json").read_text())
    faults = list(templates(board))
    if board.get("editable") is not False:
        faults.append("the dashboard can be edited where it is provisioned")
    for p in board["panels"]:
        if p["type"] not in NO_UNIT_NEEDED:
            faults += [f"{p.get('title')}: {fault}" for fault in panel(p)]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()

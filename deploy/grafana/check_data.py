#!/usr/bin/env python3
"""Whether every query of the dashboard has data while `lorikeet bench` runs: starts a server, a
Prometheus and a load, waits, and asks Prometheus for each.

    deploy/grafana/check_data.py build/release/lorikeet          # prometheus is the distribution's

--model and --adapters take the place of the small test model and its adapters.
"""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent.parent / "tests/golden"
GRPC, HTTP, PROMETHEUS = 18051, 18080, 18090


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        return reply.read().decode()


def wait_for(port, path):
    for _ in range(600):
        try:
            return get(port, path)
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    sys.exit(f"nothing answers at port {port}")


def series(query):
    for name in ("$job", "$instance"):
        query = query.replace(name, ".*")
    query = query.replace("$__rate_interval", "30s")
    text = get(PROMETHEUS, "/api/v1/query?query=" + urllib.parse.quote(query))
    result = json.loads(text)["data"]["result"]
    return [s for s in result if s["value"][1] != "NaN"]


def queries():
    for panel in json.loads((HERE / "lorikeet.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lorikeet")
    parser.add_argument("--model", default=GOLDEN / "models/llama")
    parser.add_argument("--adapters", default=GOLDEN / "adapters/llama", type=pathlib.Path)
    parser.add_argument("--seconds", type=int, default=40)
    args = parser.parse_args()
    names = sorted(f.name for f in args.adapters.iterdir() if (f / "adapter_config.json").exists())
    processes = []
    with tempfile.TemporaryDirectory(prefix="lorikeet_board_") as folder:
        scratch = pathlib.Path(folder)

        def start(name, *command):
            log = open(scratch / name, "w")
            processes.append(subprocess.Popen([str(c) for c in command], stdout=log, stderr=log))

        try:
            start("server", args.lorikeet, "serve", "--model", args.model, "--grpc-port", GRPC,
                  "--http-port", HTTP, "--kv-cache-mib", 64,
                  *(f"--adapter={n}={args.adapters / n}" for n in names))
            wait_for(HTTP, "/ready")
            (scratch / "prometheus.yml").write_text(json.dumps({
                "global": {"scrape_interval": "2s"},
                "rule_files": [str(HERE.parent / "prometheus/rules.yml")],
                "scrape_configs": [{"job_name": "lorikeet", "static_configs": [
                    {"targets": [f"127.0.0.1:{HTTP}"]}]}]}))
            start("prometheus", shutil.which("prometheus") or "prometheus",
                  f"--config.file={scratch}/prometheus.yml", f"--storage.tsdb.path={scratch}/data",
                  f"--web.listen-address=127.0.0.1:{PROMETHEUS}")
            wait_for(PROMETHEUS, "/-/ready")
            start("bench", args.lorikeet, "bench", "--server", f"127.0.0.1:{GRPC}", "--adapters",
                  ",".join(["base", *names]), "--concurrency", 4, "--requests", 10_000_000,
                  "--max-tokens", 16)
            time.sleep(args.seconds)
            empty, asked = [], 0
            for title, query in queries():
                asked += 1
                if not series(query):
                    empty.append(f"{title}: {query}")
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()
    print(f"{asked - len(empty)} of {asked} queries have data")
    if empty:
        sys.exit("\n".join(empty))


if __name__ == "__main__":
    main()

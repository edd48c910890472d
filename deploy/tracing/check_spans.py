#!/usr/bin/env python3
"""Whether traces arrive in an OpenTelemetry collector: sends one request to a server that exports to it,
and reads the spans that the collector prints. scripts/deploy_tools builds one; any with the OTLP
receiver and the debug exporter will do.

    deploy/tracing/check_spans.py build/release/lorikeet otelcol
"""
import datetime
import json
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent.parent / "tests/golden"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NAMES = {"generate", "queue", "prefill", "decode"}


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_for_port(port):
    for _ in range(600):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
    sys.exit(f"no collector at port {port}")


def nanoseconds(text):
    """Of '2026-11-30 07:44:14.136912345 +0000 UTC'."""
    whole, _, fraction = text.partition(" +")[0].partition(".")
    seconds = datetime.datetime.fromisoformat(whole + "+00:00").timestamp()
    return int(seconds) * 10**9 + int(fraction.ljust(9, "0"))


def attributes(text):
    return dict(re.findall(r"^ +-> ([\w.]+): \w+\((.*)\)$", text, re.M))


def spans_in(printed):
    """The resource's attributes, and by name what the debug exporter said of each span."""
    resource, spans = {}, {}
    for part in printed.split("ResourceSpans #")[1:]:
        about, *each = re.split(r"^Span #\d+$", part, flags=re.M)
        resource |= attributes(about)
        for text in each:
            span = {key: value.strip()
                    for key, value in re.findall(r"^    ([A-Z][\w ]*?) *: (.*)$", text, re.M)}
            spans[span["Name"]] = span | {"attributes": attributes(text)}
    return resource, spans


def ask(server):
    http = next(line for line in server.stdout if line.startswith("ready"))
    http = http.split("HTTP ")[1].split(",")[0]
    request = urllib.request.Request(
        f"http://{http}/v1/completions", method="POST",
        data=json.dumps({"model": "style", "prompt": "hello", "max_tokens": 4}).encode(),
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine",
                 "Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()


def collect(lorikeet, otelcol, scratch):
    port = free_port()
    (scratch / "collector.yaml").write_text(
        (HERE / "collector.yaml").read_text().replace(":4317", f":{port}"))
    processes = []
    try:
        with open(scratch / "collector.log", "w") as log:
            processes.append(subprocess.Popen(
                [otelcol, "--config", scratch / "collector.yaml"], stdout=log, stderr=log))
        wait_for_port(port)
        processes.append(subprocess.Popen(
            [lorikeet, "serve", "--model", GOLDEN / "models/llama", "--adapter",
             f"style={GOLDEN}/adapters/llama/lora", "--grpc-port", "0", "--http-port", "0",
             "--otlp-endpoint", f"http://127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True))
        ask(processes[1])
        for _ in range(300):
            resource, spans = spans_in((scratch / "collector.log").read_text())
            if NAMES <= spans.keys():
                break
            time.sleep(0.1)
        return resource, spans
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(prefix="lorikeet_spans_") as scratch:
        resource, spans = collect(*sys.argv[1:], pathlib.Path(scratch))
    assert NAMES <= spans.keys(), f"of {sorted(NAMES)} these came: {sorted(spans)}"
    assert resource["service.name"] == "lorikeet", resource
    whole = spans["generate"]
    assert whole["Trace ID"] == TRACE and whole["Parent ID"] == PARENT, whole
    said = whole["attributes"]
    assert said["lorikeet.request.id"] == "mine" and said["lorikeet.adapter"] == "style", said
    assert int(said["gen_ai.usage.output_tokens"]) > 0, said
    times = {name: (nanoseconds(span["Start time"]), nanoseconds(span["End time"]))
             for name, span in spans.items()}
    for name, (start, end) in sorted(times.items(), key=lambda item: item[1]):
        assert spans[name]["Trace ID"] == TRACE, name
        assert times["generate"][0] <= start <= end <= times["generate"][1], name
        assert name == "generate" or spans[name]["Parent ID"] == whole["ID"], name
        print(f"{name:12} {(end - start) / 1e6:8.2f} ms")
    print("attributes:", json.dumps(said))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Whether traces arrive as OpenTelemetry's own packages read them: a collector made of those gets the
spans of one request to a server.

    python3 -m venv V && V/bin/pip install grpcio opentelemetry-proto
    V/bin/python deploy/tracing/check_spans.py build/release/lorikeet
"""
import concurrent.futures
import json
import pathlib
import queue
import subprocess
import sys
import urllib.request

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service

GOLDEN = pathlib.Path(__file__).resolve().parent.parent.parent / "tests/golden"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(service.TraceServiceServicer):
    def __init__(self):
        self.spans = queue.Queue()
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        service.add_TraceServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def Export(self, request, context):
        for resource in request.resource_spans:
            about = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put((about, span))
        return messages.ExportTraceServiceResponse()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    collector = Collector()
    server = subprocess.Popen(
        [sys.argv[1], "serve", "--model", GOLDEN / "models/llama", "--adapter",
         f"style={GOLDEN}/adapters/llama/lora", "--grpc-port", "0", "--http-port", "0",
         "--otlp-endpoint", f"http://127.0.0.1:{collector.port}"], stdout=subprocess.PIPE, text=True)
    try:
        http = next(line for line in server.stdout if line.startswith("ready"))
        http = http.split("HTTP ")[1].split(",")[0]
        request = urllib.request.Request(
            f"http://{http}/v1/completions", method="POST",
            data=json.dumps({"model": "style", "prompt": "hello", "max_tokens": 4}).encode(),
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine",
                     "Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()
        spans = {}
        while not {"generate", "queue", "prefill", "decode"} <= spans.keys():
            about, span = collector.spans.get(timeout=30)
            spans[span.name] = span
    finally:
        server.terminate()
        server.wait()
    whole = spans["generate"]
    attributes = {a.key: a.value.string_value or a.value.int_value for a in whole.attributes}
    assert about["service.name"] == "lorikeet", about
    assert whole.trace_id.hex() == TRACE and whole.parent_span_id.hex() == PARENT
    assert attributes["lorikeet.request.id"] == "mine" and attributes["lorikeet.adapter"] == "style"
    assert attributes["gen_ai.usage.output_tokens"] > 0, attributes
    for name, span in spans.items():
        assert span.trace_id.hex() == TRACE, name
        assert whole.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= whole.end_time_unix_nano, name
        assert name == "generate" or span.parent_span_id == whole.span_id, name
    for name, span in sorted(spans.items(), key=lambda item: item[1].start_time_unix_nano):
        print(f"{name:12} {(span.end_time_unix_nano - span.start_time_unix_nano) / 1e6:8.2f} ms")
    print("attributes:", json.dumps(attributes))


if __name__ == "__main__":
    main()

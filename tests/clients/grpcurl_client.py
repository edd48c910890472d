"""grpcurl against a running server: GRPCURL HOST:PORT MODEL PROTO_FOLDER, with adapter `pirate`."""

import json
import subprocess
import sys

QUESTION = {"messages": [{"role": "user", "content": "What is the weather like in spring?"}]}
GREEDY = {"sampling": {"temperature": 0}, "stop": {"max_tokens": 12}}


def objects(text):
    """JSON objects, one after the other."""
    found, decoder = [], json.JSONDecoder()
    while text := text.strip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def main():
    program, server, model, protos = sys.argv[1:]

    def run(*arguments, request=None):
        flags = ["-d", json.dumps(request)] if request is not None else []
        return subprocess.run([program, "-plaintext", *flags, *arguments],
                              capture_output=True, text=True, timeout=60)

    def call(method, request=None, flags=()):
        done = run(*flags, server, method, request=request)
        assert done.returncode == 0, done.stderr
        return objects(done.stdout)

    # By reflection.
    services = run(server, "list").stdout.split()
    for service in ("lorikeet.v1.GenerationService", "lorikeet.v1.AdapterService",
                    "inference.GRPCInferenceService", "grpc.health.v1.Health"):
        assert service in services, services
    assert "rpc Embed" in run(server, "describe", "lorikeet.v1.GenerationService").stdout
    assert call("lorikeet.v1.GenerationService/GetModel")[0]["name"] == model
    assert call("grpc.health.v1.Health/Check")[0]["status"] == "SERVING"

    ask = {"chat": QUESTION, "adapter": "pirate", **GREEDY}
    pieces = call("lorikeet.v1.GenerationService/Generate", ask)
    text = "".join(piece.get("text", "") for piece in pieces)
    whole = call("lorikeet.v1.GenerationService/GenerateUnary", ask)[0]
    assert len(pieces) > 1 and whole["text"] == text and "Arr" in text, (text, whole)
    assert "finish" in pieces[-1] and whole["finish"]["usage"]["completion_tokens"] == 12
    vector = call("lorikeet.v1.GenerationService/Embed", {"text": "Hi", "dimensions": 3})[0]
    assert len(vector["values"]) == 3
    adapters = call("lorikeet.v1.AdapterService/ListAdapters")[0]["adapters"]
    assert [adapter["name"] for adapter in adapters] == ["pirate"], adapters

    # By the protos, without reflection.
    flags = ["-import-path", protos, "-proto", "lorikeet/v1/generation.proto"]
    again = call("lorikeet.v1.GenerationService/GenerateUnary", ask, flags)[0]
    assert again["text"] == text

    refused = run(server, "lorikeet.v1.GenerationService/Generate",
                  request={**ask, "adapter": "nobody"})
    assert refused.returncode != 0 and "NotFound" in refused.stderr and "nobody" in refused.stderr
    print("grpcurl: everything as it should be")


main()

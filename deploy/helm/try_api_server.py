#!/usr/bin/env python3
"""Installs the chart, in all its forms, on a real API server: kube-apiserver over etcd, on loopback, with
the definitions of InferencePool, HTTPRoute, ServiceMonitor and PrometheusRule.

    scripts/deploy_tools cluster && deploy/helm/try_api_server.py      # the tools' own Python will do

There is no node, so no pod runs. Shown is that the server takes every object and serves it again, that
pods pass the admission of Pod Security's level `restricted`, that an upgrade and an uninstall work, and
that what is wrong is refused.
"""
import json
import os
import pathlib
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

CHART = pathlib.Path(__file__).resolve().parent / "lorikeet"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
TOOLS = CACHE / "lorikeet/deploy-tools"
TOKEN = "operator"
FORMS = {
    "as it comes": [],
    "for a GPU": ["-f", CHART / "values-cuda.yaml"],
    "behind a gateway, with keys": [
        "--set", "gateway.enabled=true,autoscaling.enabled=true,keysSecret=keys",
        "--set", "gateway.picker.replicas=2,gateway.hostnames={models.example}"],
    "watched, with TLS": [
        "--set", "serviceMonitor.enabled=true,prometheusRule.enabled=true,tls.secret=tls",
        "--set", "keysSecret=keys,serviceMonitor.keySecret=scrape"],
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    def __init__(self, scratch):
        self.scratch, self.processes = scratch, []
        etcd, peer, self.port = free_port(), free_port(), free_port()
        self.start("etcd", "etcd", "--data-dir", scratch / "etcd",
                   "--listen-client-urls", f"http://127.0.0.1:{etcd}",
                   "--advertise-client-urls", f"http://127.0.0.1:{etcd}",
                   "--listen-peer-urls", f"http://127.0.0.1:{peer}",
                   "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
                   "--initial-cluster", f"default=http://127.0.0.1:{peer}")
        subprocess.run(["openssl", "genrsa", "-out", scratch / "accounts.key", "2048"], check=True,
                       stderr=subprocess.DEVNULL)
        (scratch / "tokens.csv").write_text(f"{TOKEN},operator,1,system:masters\n")
        self.start("apiserver", TOOLS / "bin/kube-apiserver",
                   f"--etcd-servers=http://127.0.0.1:{etcd}", "--bind-address=127.0.0.1",
                   f"--secure-port={self.port}", f"--cert-dir={scratch}/certificates",
                   "--service-account-issuer=https://localhost",
                   f"--service-account-key-file={scratch}/accounts.key",
                   f"--service-account-signing-key-file={scratch}/accounts.key",
                   "--service-cluster-ip-range=10.96.0.0/16",
                   f"--token-auth-file={scratch}/tokens.csv", "--authorization-mode=RBAC",
                   "--disable-admission-plugins=ServiceAccount")
        self.trust = ssl.create_default_context()
        self.trust.check_hostname, self.trust.verify_mode = False, ssl.CERT_NONE  # made just now
        self.wait_ready()
        (scratch / "config").write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": f"https://127.0.0.1:{self.port}",
                                                      "insecure-skip-tls-verify": True}}],
            "users": [{"name": "operator", "user": {"token": TOKEN}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "operator"}}]}))

    def start(self, name, *command):
        log = open(self.scratch / f"{name}.log", "w")
        self.processes.append(
            (name, subprocess.Popen([str(c) for c in command], stdout=log, stderr=log)))

    def stop(self):
        for _, process in reversed(self.processes):
            process.terminate()
            process.wait()

    def wait_ready(self):
        for _ in range(1200):
            for name, process in self.processes:
                if process.poll() is not None:
                    sys.exit(f"{name} ended:\n{(self.scratch / f'{name}.log').read_text()[-2000:]}")
            try:
                if self.call("GET", "/readyz")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        sys.exit("the API server does not become ready")

    def call(self, method, path, body=None, kind="application/json"):
        """The status, and the answer."""
        request = urllib.request.Request(
            f"https://127.0.0.1:{self.port}{path}", method=method,
            data=body.encode() if isinstance(body, str) else body and json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": kind})
        try:
            with urllib.request.urlopen(request, context=self.trust, timeout=30) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path):
        status, text = self.call("GET", path)
        require(status == 200, f"GET {path}: {status} {text}")
        return json.loads(text)

    def helm(self, *arguments):
        return subprocess.run([TOOLS / "bin/helm", "--kubeconfig", self.scratch / "config",
                               *[str(a) for a in arguments]], text=True, capture_output=True)

    def define_kinds(self):
        for path in sorted((TOOLS / "definitions").glob("*.yaml")):
            status, text = self.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
                                     path.read_text(), "application/yaml")
            require(status == 201, f"{path.name}: {status} {text}")
        for _ in range(300):
            items = self.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions")["items"]
            if all(("Established", "True") in {(c["type"], c["status"]) for c in
                                               item.get("status", {}).get("conditions") or []}
                   for item in items):
                break
            time.sleep(0.1)
        print(f"{len(items)} kinds defined")

    def namespace(self, name):
        status, text = self.call("POST", "/api/v1/namespaces", {"metadata": {
            "name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}})
        require(status == 201, text)


def require(holds, otherwise):
    if not holds:
        sys.exit(otherwise)


def try_form(cluster, number, what, values):
    namespace = f"form{number}"
    cluster.namespace(namespace)
    for verb in ("install", "upgrade"):
        done = cluster.helm(verb, "lorikeet", CHART, "-n", namespace, *values,
                            "--set", f"podAnnotations.verb={verb}")
        require(done.returncode == 0 and "STATUS: deployed" in done.stdout, done.stdout + done.stderr)
    kinds = cluster.helm("get", "manifest", "lorikeet", "-n", namespace).stdout.count("\nkind: ")
    workload = cluster.get(f"/apis/apps/v1/namespaces/{namespace}/statefulsets/lorikeet")
    template = workload["spec"]["template"]
    require(template["metadata"]["annotations"]["verb"] == "upgrade", "the upgrade changed nothing")
    pods = f"/api/v1/namespaces/{namespace}/pods?dryRun=All"
    spec = dict(template["spec"], volumes=template["spec"]["volumes"] + [
        {"name": "state", "emptyDir": {}}])  # a StatefulSet's controller adds the claim
    pod = {"metadata": {"name": "pod", "labels": template["metadata"]["labels"]}, "spec": spec}
    status, text = cluster.call("POST", pods, pod)
    require(status == 201, f"a pod is refused: {text}")
    spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    status, text = cluster.call("POST", pods, pod)
    require(status == 403 and "restricted" in text, f"Pod Security is not on: {status} {text}")
    if "gateway.enabled=true" in str(values):
        pool = (f"/apis/inference.networking.k8s.io/v1/namespaces/{namespace}/inferencepools")
        wrong = cluster.get(f"{pool}/lorikeet")
        wrong["metadata"] = {"name": "wrong"}
        wrong["spec"]["targetPorts"] = [{"number": 99999}]
        status, text = cluster.call("POST", pool, wrong)
        require(status == 422 and "65535" in text, f"a port of 99999 passes: {status} {text}")
    done = cluster.helm("uninstall", "lorikeet", "-n", namespace)
    require(done.returncode == 0, done.stderr)
    print(f"ok  {what}: {kinds} objects installed, upgraded, uninstalled; its pods are `restricted`")


def main():
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(prefix="lorikeet_api_server_") as folder:
        cluster = Cluster(pathlib.Path(folder))
        try:
            print("API server", json.loads(cluster.call("GET", "/version")[1])["gitVersion"])
            cluster.define_kinds()
            for number, (what, values) in enumerate(FORMS.items()):
                try_form(cluster, number, what, values)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()

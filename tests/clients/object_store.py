"""Adapters from an S3-compatible store that checks signatures (moto's).

usage: object_store.py LORIKEET MODEL ADAPTER_DIRECTORY
"""
import atexit
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

import boto3
from moto.server import ThreadedMotoServer

PREFIX = "team/a+b"  # a character that has to be encoded before it is signed


def start(store, key, secret, *args):
    lorikeet, model = args
    folder = tempfile.mkdtemp()
    environment = dict(os.environ, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret,
                       no_proxy="127.0.0.1", NO_PROXY="127.0.0.1")
    server = subprocess.Popen(
        [lorikeet, "serve", "--model", model, "--grpc-port", "0", "--http-port", "0", "--adapter-dir",
         folder, "--adapter-source", "s3://adapters", "--s3-endpoint", store],
        env=environment, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    for line in server.stdout:
        if line.startswith("ready"):
            return server, "http://" + line.split("HTTP ")[1].split(",")[0]
    raise SystemExit("the server did not start")


def load(url, path):
    body = json.dumps({"lora_name": "stored", "lora_path": path}).encode()
    request = urllib.request.Request(url + "/v1/load_lora_adapter", data=body,
                                     headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def main():
    lorikeet, model, adapter = sys.argv[1:]
    moto = ThreadedMotoServer(port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    store = f"http://127.0.0.1:{port}"
    options = dict(endpoint_url=store, region_name="us-east-1", aws_access_key_id="root",
                   aws_secret_access_key="root")
    s3, iam = boto3.client("s3", **options), boto3.client("iam", **options)
    s3.create_bucket(Bucket="adapters")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        s3.upload_file(f"{adapter}/{file}", "adapters", f"{PREFIX}/{file}")
    iam.create_user(UserName="reader")
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=json.dumps(
        {"Version": "2012-10-17",
         "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}))
    keys = iam.create_access_key(UserName="reader")["AccessKey"]
    # Signatures count from here on.
    urllib.request.urlopen(urllib.request.Request(
        store + "/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}))

    location = f"s3://adapters/{PREFIX}"
    server, url = start(store, keys["AccessKeyId"], keys["SecretAccessKey"], lorikeet, model)
    status, text = load(url, location)
    assert status == 200, text
    status, text = load(url, location + "/nothing")
    assert status == 404, (status, text)
    server.terminate()
    server.wait()
    server, url = start(store, keys["AccessKeyId"], "wrong", lorikeet, model)
    status, text = load(url, location)
    assert status == 403 and "wrong" not in text, (status, text)
    server.terminate()
    server.wait()
    moto.stop()
    print("an S3-compatible store: signed requests are taken, others refused")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes the JSON schemas that kubeconform reads: schemas.py FOLDER FILE...

Each FILE holds CustomResourceDefinitions. A version's schema becomes KIND-GROUP-VERSION.json, GROUP up
to its first dot, as kubeconform's {{.ResourceKind}}{{.KindSuffix}} names it. Like the API server with
strict field validation, it refuses fields that it does not know. Needs PyYAML.
"""
import json
import sys

import yaml


def strict(schema):
    """The same schema, with unknown fields refused where the definition lists those it knows."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: {name: strict(value) for name, value in item.items()} if key == "properties"
           else item if key in ("default", "enum", "example") else strict(item)
           for key, item in schema.items()}
    if out.get("type") == "object" and "properties" in out:
        if not out.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    if out.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    if out.pop("x-kubernetes-int-or-string", False):
        out["type"] = ["integer", "string"]
    return out


def main(folder, *paths):
    for path in paths:
        with open(path, encoding="utf-8") as file:
            definitions = [one for one in yaml.safe_load_all(file) if one]
        for definition in definitions:
            spec = definition["spec"]
            for version in spec["versions"]:
                parts = (spec["names"]["kind"], spec["group"].split(".")[0], version["name"])
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                name = "-".join(parts).lower() + ".json"
                with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
                    json.dump(schema, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

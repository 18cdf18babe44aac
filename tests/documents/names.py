"""The commands and names in the documents' text are those of the programs and the chart."""

import json
import os
import re
import shlex
import subprocess
from glob import glob

from blocks import spans_of

def commands(file, binaries):
    """The program takes the arguments as far as they are given."""
    count = 0
    for span in spans_of(file):
        words = span.split()
        if words[0] not in ("mayfly", "mayfly-dispatcher", "mayfly-engine") or len(words) < 2:
            continue
        if words[1].startswith("…"):
            continue
        arguments = ["1" if word == "N" else word for word in shlex.split(span)[1:]]
        # What comes after is not looked at by the program; a flag or a verb before it is.
        done = subprocess.run([f"{binaries}/{words[0]}", *arguments, "--help"], capture_output=True, text=True)
        # A flag may be named without its value.
        right = done.returncode == 0 or "a value is required for" in done.stderr
        assert right, f"{file}: `{span}`: {done.stderr}"
        count += 1
    return count


def metrics(file, sources):
    count = 0
    for name, labels in re.findall(r"\b(mayfly_(?:dispatcher|engine|proxy)_[a-z0-9_]+)(?:\{([^}]*)\})?", open(file).read()):
        assert f'"{name}"' in sources, f"{file}: no program has the metric {name}"
        for label in re.findall(r"(\w+)=", labels):
            assert f'"{label}"' in sources, f"{file}: no metric has the label {label}"
        count += 1
    return count


def settings(file, defaults):
    """Every MAYFLY__SECTION__KEY and section.some_key is a setting of a program."""
    names = set(re.findall(r"\bMAYFLY((?:__[A-Z0-9_]+?)+)(?![A-Z0-9_])", open(file).read())) - {"__SECTION__KEY"}
    sections = {path[0] for path in defaults if len(path) > 1}
    paths = {name: tuple(name.lower().strip("_").split("__")) for name in names}
    for span in spans_of(file):
        dotted = re.fullmatch(r"([a-z]+(?:\.[a-z0-9]+)*\.[a-z0-9]+_\w+)(?: = .*)?", span)
        if dotted and dotted[1].split(".")[0] in sections:
            paths[span] = tuple(dotted[1].split("."))
    for name, path in paths.items():
        assert path in defaults, f"{file}: no program has the setting {name}"
    return len(paths)


def defaults(root):
    """The paths of all settings, with those that are commented out."""
    found = set()
    for program in ("dispatcher", "engine"):
        section = ()
        for line in open(f"{root}/{program}/src/default.toml").read().split("\n"):
            if header := re.fullmatch(r"(?:# )?\[([\w.]+)\]", line):
                section = tuple(header[1].split("."))
            elif key := re.match(r"(?:# ?)?(\w+) = ", line):
                found.add((*section, key[1]))
    return found


def values(file, schema):
    """Every dotted name of a chart's value is in its schema."""

    def resolved(one):
        one = {**schema["definitions"].get(one.get("$ref", "").rpartition("/")[2], {}), **one}
        for part in one.get("allOf", []):
            one = {**resolved(part), **one}
        return one

    def step(one, key):
        one = resolved(one)
        if key in one.get("properties", {}):
            return one["properties"][key]
        for pattern, of_pattern in one.get("patternProperties", {}).items():
            if re.search(pattern, key):
                return of_pattern
        others = one.get("additionalProperties", True)
        return others if isinstance(others, dict) else {} if others else None

    count = 0
    for span in spans_of(file):
        # What has an underscore is a setting, or a file.
        found = re.fullmatch(r"([a-z][A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)(?:=.*)?", span)
        if not found or found[1].split(".")[0] not in schema["properties"] or found[1].endswith(".rs"):
            continue
        one = schema
        for key in found[1].replace("GROUP", "group").split("."):
            one = step(one, key)
            assert one is not None, f"{file}: the chart has no value {found[1]}"
        count += 1
    return count


def check(files, root):
    binaries = f"{root}/target/debug"
    sources = "".join(open(file).read() for top in ("protocol", "common", "dispatcher", "engine", "cli") for file in glob(f"{root}/{top}/src/**/*.rs", recursive=True))
    schema = json.load(open(f"{root}/helm/mayfly/values.schema.json"))
    known = defaults(root)
    counts = {"commands": 0, "metrics": 0, "settings": 0, "values": 0}
    for file in files:
        # The changelog has names of earlier versions.
        if file == "CHANGELOG.md":
            continue
        counts["commands"] += commands(file, binaries)
        counts["metrics"] += metrics(file, sources)
        counts["settings"] += settings(file, known)
        counts["values"] += values(file, schema)
    return ", ".join(f"{count} {what}" for what, count in counts.items())

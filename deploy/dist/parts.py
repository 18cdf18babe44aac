#!/usr/bin/env python3
"""What the programs are made of: parts.py VERSION TO NOTICES
Writes TO/PROGRAM-VERSION.cdx.json for each, an SBOM in CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/), and
NOTICES/THIRD-PARTY, the licences of all libraries, which go with the programs. Macros and build scripts are not in them."""

import datetime
import glob
import json
import os
import re
import subprocess
import sys
import tomllib
import uuid

VERSION, TO, NOTICES = sys.argv[1:]
PROGRAMS = {"mayfly-dispatcher": "mayfly-dispatcher", "mayfly-engine": "mayfly-engine", "mayfly-cli": "mayfly"}
MOMENT = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)


def said(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


RUSTC = dict(re.findall(r"^(host|release|commit-hash): (.*)$", said("rustc", "-vV"), re.M))
METADATA = json.loads(said("cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", RUSTC["host"]))
PACKAGES = {one["id"]: one for one in METADATA["packages"]}
NODES = {one["id"]: one for one in METADATA["resolve"]["nodes"]}
SUMS = {(one["name"], one["version"]): one.get("checksum") for one in tomllib.load(open("Cargo.lock", "rb"))["package"]}


def needs(id):
    """The libraries of a package that get into a program."""
    found = []
    for dependency in NODES[id]["deps"]:
        package = PACKAGES[dependency["pkg"]]
        macro = any("proc-macro" in target["kind"] for target in package["targets"])
        if not macro and any(kind["kind"] is None for kind in dependency["dep_kinds"]):
            found.append(dependency["pkg"])
    return sorted(set(found), key=reference)


def reference(id):
    package = PACKAGES[id]
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(id):
    package = PACKAGES[id]
    made = {"type": "library", "bom-ref": reference(id), "name": package["name"], "version": package["version"], "purl": reference(id)}
    if package["license"]:
        # The older form of `OR`.
        made["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if checksum := SUMS[package["name"], package["version"]]:
        made["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package["repository"]:
        made["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return made


def linked():
    """What is linked in besides crates."""
    glibc = said("getconf", "GNU_LIBC_VERSION").split()[1]
    return [
        {"type": "library", "bom-ref": "rust-std", "name": "rust-std", "version": RUSTC["release"], "licenses": [{"expression": "MIT OR Apache-2.0"}],
         "description": f"the standard library of rustc {RUSTC['release']}, commit {RUSTC['commit-hash']}"},
        {"type": "library", "bom-ref": "glibc", "name": "glibc", "version": glibc, "licenses": [{"expression": "LGPL-2.1-or-later"}]},
    ]


def closure(root):
    found, open_ = set(), [root]
    while open_:
        id = open_.pop()
        if id not in found:
            found.add(id)
            open_ += needs(id)
    return sorted(found, key=reference)


def main():
    everything = set()
    for id in sorted(METADATA["workspace_members"]):
        name = PROGRAMS.get(PACKAGES[id]["name"])
        if not name:
            continue
        ids = closure(id)
        everything |= set(ids)
        program = {**component(id), "type": "application", "name": name}
        bom = {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {"timestamp": MOMENT.strftime("%Y-%m-%dT%H:%M:%SZ"), "lifecycles": [{"phase": "build"}], "component": program},
            "components": [component(one) for one in ids if one != id] + linked(),
            "dependencies": [
                {"ref": reference(one), "dependsOn": [reference(other) for other in needs(one)] + (["glibc", "rust-std"] if one == id else [])}
                for one in ids
            ],
        }
        text = json.dumps(bom, sort_keys=True)
        # The same parts get the same number.
        bom["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, text)}"
        with open(f"{TO}/{name}-{VERSION}.cdx.json", "w") as file:
            json.dump(bom, file, indent=1, sort_keys=True)
            file.write("\n")

    os.makedirs(NOTICES, exist_ok=True)
    with open(f"{NOTICES}/THIRD-PARTY", "w") as file:
        file.write("Mayfly's programs contain these libraries, and the GNU C library (LGPL-2.1-or-later,\n"
                   "https://www.gnu.org/licenses/lgpl-2.1) and Rust's standard library (MIT OR Apache-2.0).\n")
        texts = {}
        for id in sorted(everything - set(METADATA["workspace_members"]), key=reference):
            package = PACKAGES[id]
            name = f"{package['name']} {package['version']}"
            file.write(f"\n{name}: {package['license'] or 'see below'}, {package['repository'] or 'https://crates.io/crates/' + package['name']}")
            for path in sorted(glob.glob(f"{os.path.dirname(package['manifest_path'])}/*")):
                if re.match(r"(licen[cs]e|copying|copyright|notice|unlicense)", os.path.basename(path), re.I) and os.path.isfile(path):
                    texts.setdefault(open(path, errors="replace").read().strip(), []).append(name)
        for text, names in texts.items():
            # Most packages have the same licence text.
            file.write(f"\n\n{'=' * 80}\n{', '.join(dict.fromkeys(names))}:\n\n{text}")
        file.write("\n")


main()

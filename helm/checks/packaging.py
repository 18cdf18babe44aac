"""The package: it lints, installs, names the next command, and its metadata and documents are complete."""

import base64
import json
import os
import re
import tarfile
import tempfile

import yaml

from checks.registry import Registry
from checks.tools import CHART, HELMS, OPERATORS, ROOT, TOOLS, VALUES, helm, must, objects, pods, run, template


def lints_packages_and_installs():
    for which, version in HELMS.items():
        told = must(helm(which, "version", "--short"), which)
        assert told.startswith(version), f"{which} is {told}"
        for values in VALUES:
            must(helm(which, "lint", "--strict", CHART, "-f", values), f"{which} lint {values}")
            objects(template(values, which=which))
            # Without a cluster Helm 4 does not know which operators exist.
            if "operator" not in values:
                done = helm(which, "install", "mf", CHART, "--dry-run=client", "--disable-openapi-validation", "-f", values)
                assert "NOTES:" in must(done, f"{which} install {values}"), values
        with tempfile.TemporaryDirectory() as directory:
            must(helm(which, "package", CHART, "-d", directory), f"{which} package")
            (package,) = os.listdir(directory)
            must(helm(which, "template", "mf", f"{directory}/{package}", "-f", VALUES[0]), package)


def notes_tell_the_next_command():
    def notes(name, *more):
        done = helm("helm3", "install", "mf", CHART, "--dry-run=client", "--disable-openapi-validation",
                    "-f", f"{CHART}/ci/{name}-values.yaml", *more)
        return must(done, name).split("NOTES:")[1]

    assert "mayfly pool create orders --secret" in notes("dispatcher-only")
    assert "helm -n default test mf" in notes("single")
    assert "mayfly engine list" in notes("engines-only")
    two = notes("single", "--set", "engines.zone-b.pool=orders", "--set", "engines.zone-b.existingSecret=mayfly-pool-orders")
    assert "Engines: orders (pool orders), zone-b (pool orders)\n" in two, two
    exposed = notes("single", "--set", "dispatcher.service.type=LoadBalancer")
    assert "LoadBalancer and speaks plain HTTP" in exposed and "plain HTTP" not in notes("single") + notes("full")
    encrypted = notes("full")
    login = "mayfly login --address https://localhost:8470 --ca-file mayfly-ca.crt\n"
    assert "is at https://mf-creds-dispatcher.default.svc:80\n" in encrypted and login in encrypted, encrypted
    assert 'index .data "authority.pem"' in encrypted and "--client-cert-file" in encrypted, encrypted
    public = notes("dispatcher-only", "--set", "dispatcher.tlsCaKey=")
    assert "mayfly login --address https://localhost:8470\n" in public and "ca.crt" not in public, public


CATEGORIES = {"ai-machine-learning", "database", "integration-delivery", "monitoring-logging", "networking", "security", "storage",
              "streaming-messaging", "skip-prediction"}


def metadata_is_whole():
    """What Artifact Hub shows of a chart, https://artifacthub.io/docs/topics/annotations/helm"""
    chart = yaml.safe_load(must(helm("helm3", "show", "chart", CHART), "show"))
    kind, _, picture = chart["icon"].partition(";base64,")
    assert kind == "data:image/svg+xml" and base64.b64decode(picture).startswith(b"<svg"), "the icon is not an SVG picture"
    assert chart["home"] and chart["sources"] and all(one["name"] for one in chart["maintainers"])
    assert all(url.startswith("https://") for url in (chart["home"], *chart["sources"]))
    annotations = {key.removeprefix("artifacthub.io/"): value for key, value in chart["annotations"].items()}
    assert annotations["license"] == "Apache-2.0" and annotations["category"] in CATEGORIES
    images = {one["image"] for one in yaml.safe_load(annotations["images"])}
    made = {spec["containers"][0]["image"] for _, spec in pods(objects(template(f"{CHART}/ci/single-values.yaml")))}
    assert images == made, f"artifacthub.io/images: {images}, but the chart has {made}"
    assert all(one["name"] and one["url"].startswith("https://") for one in yaml.safe_load(annotations["links"]))
    kinds = {"added", "changed", "deprecated", "removed", "fixed", "security"}
    assert all(one["kind"] in kinds and one["description"] for one in yaml.safe_load(annotations["changes"]))


def packed(which, directory):
    must(helm(which, "package", CHART, "-d", directory), f"{which} package")
    (package,) = [f"{directory}/{name}" for name in os.listdir(directory) if name.endswith(".tgz")]
    return package


def the_package_stands_alone():
    """It contains every file that its documents link to, and no useless file."""
    assert open(f"{CHART}/LICENSE").read() == open(f"{ROOT}/LICENSE").read()
    for which in HELMS:
        with tempfile.TemporaryDirectory() as directory, tarfile.open(packed(which, directory)) as package:
            names = {name.removeprefix("mayfly/") for name in package.getnames()}
        assert {"LICENSE", "README.md", "Chart.yaml", "values.yaml", "values.schema.json", "files/rules.yml"} <= names, names
        useless = [name for name in names if name.startswith("ci/") or "test" in name and not name.startswith("templates/")]
        assert not useless, f"{which} packs {useless}"
        for link in re.findall(r"\]\(([^)]+)\)", open(f"{CHART}/README.md").read()):
            assert link.startswith(("https://", "#")) or link in names, f"README.md links {link}, which is not in the package"


def installs_from_a_registry():
    values = f"{CHART}/ci/full-values.yaml"
    version = yaml.safe_load(open(f"{CHART}/Chart.yaml"))["version"]
    for which in HELMS:
        with Registry() as address, tempfile.TemporaryDirectory() as directory:
            must(helm(which, "push", packed(which, directory), f"oci://{address}/charts", "--plain-http"), f"{which} push")
            done = helm(which, "template", "mf", f"oci://{address}/charts/mayfly", "--version", version, "--plain-http",
                        "--namespace", "apps", "-f", values, *OPERATORS)
            assert objects(must(done, f"{which} from oci://")) == objects(template(values, which=which)), f"{which}: other objects"


def type_of(path):
    """The type of a value in the schema, in English."""
    schema = json.load(open(f"{CHART}/values.schema.json"))

    def resolved(one):
        one = {**schema["definitions"].get(one.get("$ref", "").rpartition("/")[2], {}), **one}
        for part in one.get("allOf", []):
            one = {**resolved(part), **one}
        return one

    one = schema
    for key in path.split("."):
        one = resolved(resolved(one)["properties"][key])

    def word(one):
        one = resolved(one)
        if "enum" in one:
            return "integer" if all(isinstance(value, int) for value in one["enum"]) else "string"
        if "const" in one:
            return "string"
        if "anyOf" in one:
            return " or ".join(dict.fromkeys(word(part) for part in one["anyOf"]))
        if one["type"] == "array":
            return f"array of {word(one['items'])}s"
        return one["type"]

    return word(one)


def typed(readme):
    """The readme's tables of values, with a column for the type."""
    lines = []
    for line in readme.split("\n"):
        cells = line.strip("|").split("|") if line.startswith("|") else []
        if len(cells) == 3 and lines and "## Parameters" in "\n".join(lines):
            name = cells[0].strip()
            width = 17
            if name == "Name":
                kind = "Type"
            elif name.startswith("-"):
                kind = "-" * width
            else:
                kind = type_of(name.strip("`"))
            line = f"|{cells[0]}| {kind:{width}} |{cells[1]}|{cells[2]}|"
        lines.append(line)
    return "\n".join(lines)


def readme_is_of_now():
    generator = os.path.join(TOOLS, "node_modules/@bitnami/readme-generator-for-helm/bin/index.js")
    readme = f"{CHART}/README.md"
    with tempfile.TemporaryDirectory() as directory:
        copied = f"{directory}/README.md"
        open(copied, "w").write(open(readme).read())
        done = run("node", generator, "--values", f"{CHART}/values.yaml", "--readme", copied)
        must(done, "values without or with wrong documentation")
        made = typed(open(copied).read())
    if os.environ.get("MAYFLY_WRITE"):
        open(readme, "w").write(made)
    assert made == open(readme).read(), "helm/mayfly/README.md is out of date; run MAYFLY_WRITE=1 make test-chart"

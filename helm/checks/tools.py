"""The tools of the chart's checks: Helm 3 and 4, a simulated cluster, the validators."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from glob import glob

import yaml

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(HERE)
CHART = os.path.join(HERE, "mayfly")
TOOLS = sys.argv[1]
# By the prefixes of their versions.
HELMS = {"helm3": "v3.17.", "helm4": "v4.3."}
OPERATORS = ["--api-versions", "rabbitmq.com/v1beta1"]
VALUES = sorted(glob(os.path.join(CHART, "ci", "*-values.yaml")))


class Cluster(BaseHTTPRequestHandler):
    """The answers that Helm needs from a cluster for a dry run: its version, its kinds, and Secrets."""

    # Secrets by name, in the namespace `apps`, and other objects by their path.
    secrets = {}
    things = {}
    asked = []
    KINDS = {
        "v1": ["ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"],
        "apps/v1": ["Deployment"],
        "autoscaling/v2": ["HorizontalPodAutoscaler"],
        "batch/v1": ["CronJob", "Job"],
        "gateway.networking.k8s.io/v1": ["HTTPRoute"],
        "keda.sh/v1alpha1": ["ScaledObject", "TriggerAuthentication"],
        "monitoring.coreos.com/v1": ["PodMonitor", "PrometheusRule"],
        "networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
        "policy/v1": ["PodDisruptionBudget"],
        "rabbitmq.com/v1beta1": ["RabbitmqCluster"],
    }

    def answer(self, path):
        if path == "/version":
            return {"major": "1", "minor": "31", "gitVersion": "v1.31.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = [
                {"name": one.split("/")[0], "versions": [version], "preferredVersion": version}
                for one in self.KINDS if "/" in one
                for version in [{"groupVersion": one, "version": one.split("/")[1]}]
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if path.startswith("/api/v1/namespaces/apps/secrets/"):
            data = self.secrets.get(path.rpartition("/")[2])
            return data and {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "any"}, "data": data}
        if path in self.things:
            return self.things[path]
        version = re.sub("^/apis?/", "", path)
        if version not in self.KINDS:
            return None
        resources = [
            {"name": kind.lower().removesuffix("y") + ("ies" if kind[-1] == "y" else "s"), "kind": kind, "namespaced": True,
             "singularName": kind.lower(), "verbs": ["get"]}
            for kind in self.KINDS[version]
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        answer = self.answer(path)
        self.send_response(200 if answer else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer or {"kind": "Status", "code": 404}).encode())

    def log_message(self, *_):
        pass


def with_cluster():
    """Starts a simulated cluster that Helm can find."""
    server = HTTPServer(("127.0.0.1", 0), Cluster)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["KUBECONFIG"] = written({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "users": [{"name": "test", "user": {}}],
    })


def run(*command, **options):
    return subprocess.run(command, text=True, capture_output=True, **options)


def helm(which, *arguments):
    return run(os.path.join(TOOLS, which), *arguments)


def must(done, what):
    assert done.returncode == 0, f"{what}: {done.stderr or done.stdout}"
    return done.stdout


def template(values, *more, which="helm3"):
    done = helm(which, "template", "mf", CHART, "--namespace", "apps", "-f", values, *OPERATORS, *more)
    return must(done, f"{which} template {os.path.basename(values)} {more}")


def objects(text):
    # The loader in C reads ten times as fast.
    return [one for one in yaml.load_all(text, yaml.CSafeLoader) if one]


PLACE = tempfile.TemporaryDirectory()


def written(values):
    """A file with these values, as YAML."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=PLACE.name, delete=False) as file:
        yaml.dump(values, file, yaml.CSafeDumper)
    return file.name


def layers(*values):
    """Helm's arguments for a file of ci/ by its name, with maps of values that override it."""
    files = [f"{CHART}/ci/{one}-values.yaml" if isinstance(one, str) else written(one) for one in values]
    return [argument for file in files for argument in ("-f", file)]


def rendered(*values, more=(), which="helm3"):
    """The objects of these layers of values."""
    done = helm(which, "template", "mf", CHART, "--namespace", "apps", *layers(*values), *OPERATORS, *more)
    return objects(must(done, f"{which} template {values} {more}"))


def refused(*values, more=(), which="helm3"):
    """The message with which these layers of values are refused. Fails if they are accepted."""
    done = helm(which, "template", "mf", CHART, "--namespace", "apps", *layers(*values), *OPERATORS, *more)
    assert done.returncode != 0, f"{which} takes {values} {more}"
    assert "nil pointer" not in done.stderr and "<nil>" not in done.stderr, done.stderr
    return done.stderr


def named(these, kind, name=None):
    """The only object of this kind whose name has this end."""
    found = [one for one in these if one["kind"] == kind and one["metadata"]["name"].endswith(name or "")]
    assert len(found) == 1, f"{kind} {name}: {[one['metadata']['name'] for one in found]}"
    return found[0]


def pod_of(these, name):
    """The specification of a Deployment's pods, by the end of its name."""
    return named(these, "Deployment", name)["spec"]["template"]["spec"]


def at_once(function, items):
    """Calls a function for each item, several at a time, because most of the time is spent in Helm."""
    with ThreadPoolExecutor(4) as executor:
        return list(executor.map(function, items))


def pods(rendered):
    for one in rendered:
        if one["kind"] == "Deployment":
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]
        elif one["kind"] == "Job":
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]
        elif one["kind"] == "CronJob":
            yield one["metadata"]["name"], one["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        elif one["kind"] == "Pod":
            yield one["metadata"]["name"], one["spec"]

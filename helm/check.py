#!/usr/bin/env python3
"""Tests of the chart, with real tools: check.py TOOLS, where TOOLS is what tools.sh prints."""

import base64
import copy
import glob
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import kubernetes_validate
import yaml

HERE = os.path.dirname(os.path.abspath(__file__))
CHART = os.path.join(HERE, "mayfly")
TOOLS = sys.argv[1]
# By the beginnings of their versions.
HELMS = {"helm3": "v3.17.", "helm4": "v4.3."}
VERSIONS = [f"1.{minor}" for minor in range(28, 38)]
OPERATORS = ["--api-versions", "rabbitmq.com/v1beta1"]
VALUES = sorted(glob.glob(os.path.join(CHART, "ci", "*-values.yaml")))


class Cluster(BaseHTTPRequestHandler):
    """What Helm asks a cluster for a dry run: which version it is, what kinds it has, and Secrets."""

    # By name, in the namespace `apps`.
    secrets = {}
    KINDS = {
        "v1": ["ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"],
        "apps/v1": ["Deployment"],
        "autoscaling/v2": ["HorizontalPodAutoscaler"],
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
        answer = self.answer(self.path.split("?")[0])
        self.send_response(200 if answer else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer or {"kind": "Status", "code": 404}).encode())

    def log_message(self, *_):
        pass


def with_cluster():
    """Lets Helm find a cluster."""
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
    return [one for one in yaml.safe_load_all(text) if one]


def written(values):
    file = tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False)
    yaml.safe_dump(values, file)
    file.close()
    return file.name


def pods(rendered):
    for one in rendered:
        if one["kind"] == "Deployment":
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]
        elif one["kind"] == "Pod":
            yield one["metadata"]["name"], one["spec"]


def lints_packages_and_installs():
    for which, version in HELMS.items():
        told = must(helm(which, "version", "--short"), which)
        assert told.startswith(version), f"{which} is {told}"
        for values in VALUES:
            must(helm(which, "lint", "--strict", CHART, "-f", values), f"{which} lint {values}")
            objects(template(values, which=which))
            # On the client's side Helm 4 does not ask which operators there are.
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
    assert "LoadBalancer and speaks plain HTTP" in notes("full") and "plain HTTP" not in notes("single")


def objects_are_valid():
    checked = 0
    for version in VERSIONS:
        for values in VALUES:
            for one in objects(template(values, "--kube-version", version)):
                try:
                    kubernetes_validate.validate(one, version, strict=True)
                    checked += 1
                except kubernetes_validate.SchemaNotFoundError:
                    assert one["apiVersion"].split("/")[0] in ("keda.sh", "monitoring.coreos.com", "rabbitmq.com"), one
    def by_place(rendered):
        return sorted(rendered, key=lambda one: (one["kind"], one["metadata"]["name"]))

    for values in VALUES:
        ours, theirs = (objects(template(values, "--kube-version", VERSIONS[-1], which=which)) for which in HELMS)
        assert by_place(ours) == by_place(theirs), f"{values}: Helm 3 and 4 make different objects"
    every = [one for values in VALUES for one in objects(template(values))]
    done = run("node", os.path.join(HERE, "crds.mjs"), cwd=TOOLS, input=json.dumps(every))
    of_crds = int(must(done, "crds"))
    assert of_crds >= 4, of_crds
    for one in every:
        if one["kind"] == "ScaledObject":
            wrong = copy.deepcopy(one)
            wrong["spec"]["minReplicaCount"] = "some"
            done = run("node", os.path.join(HERE, "crds.mjs"), cwd=TOOLS, input=json.dumps([wrong]))
            assert done.returncode != 0, "the validator takes anything"
        elif one["kind"] == "RabbitmqCluster":
            # There is no schema of it to be had; these are the fields its operator has.
            spec = one["spec"]
            assert set(spec) == {"replicas", "persistence", "resources", "rabbitmq", "override"}, spec
            assert spec["replicas"] in (1, 3) and set(spec["persistence"]) <= {"storage", "storageClassName"}, spec
            assert all(isinstance(value, str) for value in spec["persistence"].values()), spec
            assert all(isinstance(spec["rabbitmq"][key], str) for key in ("additionalConfig", "advancedConfig")), spec
            # Its users come from a Secret: with definitions to load RabbitMQ makes no administrator.
            pod = spec["override"]["statefulSet"]["spec"]["template"]["spec"]
            (container,), (volume,) = pod["containers"], pod["volumes"]
            (mount,) = container["volumeMounts"]
            (item,) = volume["secret"]["items"]
            assert container["name"] == "rabbitmq" and mount["name"] == volume["name"] and mount["readOnly"], pod
            assert f"load_definitions = {mount['mountPath']}/{item['path']}\n" in spec["rabbitmq"]["additionalConfig"], spec
    return f"{checked} against Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}, {of_crds} against CRDs"


def names_are_legal():
    label = re.compile(r"(?!.{64})([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")
    part = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    name = re.compile(rf"(?!.{{254}}){part}([.]{part})*$")

    def texts(value, key=None):
        """Labels and the labels something is selected by."""
        if isinstance(value, dict):
            for inner, one in value.items():
                if key in ("labels", "matchLabels"):
                    assert isinstance(inner, str) and isinstance(one, str) and label.match(one), f"{inner}: {one!r}"
                texts(one, inner)
        elif isinstance(value, list):
            for one in value:
                texts(one)

    for values in VALUES:
        for one in objects(template(values)):
            texts(one)
            called = one["metadata"]["name"]
            assert isinstance(called, str) and name.match(called), called
            if one["kind"] == "Service":
                assert re.match("(?!.{64})[a-z]([-a-z0-9]*[a-z0-9])?$", called), called
            if one["kind"] == "ScaledObject":
                assert len(called) <= 54, f"KEDA refuses {called}"
    for which in HELMS:
        done = helm(which, "template", "7", CHART, "-f", f"{CHART}/ci/single-values.yaml")
        assert "fullnameOverride: a Service cannot be called 7-mayfly-dispatcher" in done.stderr, done.stderr


def wrong_values_are_refused():
    base = f"{CHART}/ci/single-values.yaml"
    for setting, words in [
        ("dispatcher.replica=2", ["replica"]),
        ("dispatcher.replicas=2", ["dispatcher.replicas", "postgresql"]),
        ("dispatcher.replicas=0", ["dispatcher", "replicas"]),
        ("dispatcher.existingSecret=", ["dispatcher.existingSecret", "mayfly init"]),
        ("dispatcher.store.type=mysql", ["store", "sqlite"]),
        ("dispatcher.store.type=postgresql", ["dispatcher.store.existingSecret"]),
        ("dispatcher.ingress.enabled=true", ["tlsSecret"]),
        ("amqp.existingSecret=", ["amqp.existingSecret"]),
        ("amqp.password=secret", ["password"]),
        ("engines.orders.scaling.minReplicas=0", ["minReplicas"]),
        ("engines.orders.scaling.minReplicas=20", ["engines.orders.scaling"]),
        ("engines.orders.scaling.mode=keda", ["managementSecret"]),
        ("engines.orders.maxUnavailable=0", ["maxUnavailable"]),
        ("engines.orders.pool=", ["pool"]),
        ("engines.orders.scaling.scaleDownSeconds=59", ["scaleDownSeconds"]),
        ("engines.orders.podAnnotations.mayfly/pool=other", ["mayfly/pool"]),
        ("commonLabels.app\\.kubernetes\\.io/name=other", ["app.kubernetes.io/name"]),
        ("metrics.rules.labels.mayfly/group=other", ["mayfly/group"]),
        ("fullnameOverride=a-name-with-more-letters-than-forty-in-it", ["fullnameOverride"]),
        ("engines.orders.terminationGracePeriodSeconds=39", ["terminationGracePeriodSeconds"]),
        ("engines.billing.pool=billing", ["existingSecret"]),
        ("engines.Billing.pool=billing", ["Billing"]),
        ("log.level=loud", ["level"]),
        ("metrics.rules.on=true", ["on"]),
    ]:
        for which in HELMS:
            done = helm(which, "template", "mf", CHART, "-f", base, "--set", setting)
            assert done.returncode != 0, f"{setting} is taken"
            missing = [word for word in words if word not in done.stderr]
            assert not missing, f"{setting}: {missing} not in {done.stderr}"
    done = helm("helm3", "template", "mf", CHART, "-f", f"{CHART}/ci/operator-values.yaml")
    assert "Cluster Operator" in done.stderr, done.stderr


def no_part_is_rabbitmqs_administrator():
    base = f"{CHART}/ci/operator-values.yaml"
    admin = "mf-mayfly-rabbitmq-default-user"
    for setting, word in [
        ("rabbitmqCluster.definitionsSecret=", "rabbitmqCluster.definitionsSecret"),
        ("dispatcher.amqp.existingSecret=", "dispatcher.amqp.existingSecret"),
        ("engines.orders.amqp.existingSecret=", "engines.GROUP.amqp.existingSecret"),
        (f"dispatcher.amqp.existingSecret={admin}", "administrator"),
        (f"engines.orders.amqp.existingSecret={admin}", "administrator"),
    ]:
        for more in [(), ("--set", f"amqp.existingSecret={admin}"), ("--set", "amqp.existingSecret=of-all")]:
            done = helm("helm3", "template", "mf", CHART, "-f", base, *OPERATORS, "--set", setting, *more)
            assert done.returncode != 0 and word in done.stderr, f"{setting} {more}: {done.stderr}"
    for values in VALUES:
        assert "default-user" not in template(values), values


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return value + "9"
    if isinstance(value, list):
        return [*value, 7] if value and isinstance(value[0], int) else [{"zz": "zz"}]
    return {"zz": "zz"}


def leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in ("resources", "labels"):
            yield from leaves(value, (*path, key))
        elif path + (key,) != ("engines",):
            yield (*path, key), value


def differs(base, old, path, value):
    """Whether the rendering of `base` hangs on a value, or `base` is refused for it by its name."""
    refusal = rf"execution error at [^:]+:\d+:\d+\): .*{re.escape('.'.join(path))}"
    for key in reversed(path):
        value = {key: value}
    file = written(value)
    done = helm("helm3", "template", "mf", CHART, "--namespace", "apps", "-f", base, "-f", file, *OPERATORS,
                "--skip-schema-validation")
    os.unlink(file)
    return re.search(refusal, done.stderr) if done.returncode else done.stdout != old


def a_groups_values_win():
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    values = written({
        "engineDefaults": {
            "tolerations": [{"operator": "Exists"}], "nodeSelector": {"disk": "ssd"}, "affinity": affinity,
            "podAnnotations": {"mesh": "off"}, "priorityClassName": "high", "amqp": {"existingSecret": "of-all"},
            "scaling": {"mode": "hpa", "scaleDownSeconds": 600, "maxReplicas": 7},
        },
        "engines": {
            "orders": {
                "tolerations": [], "nodeSelector": {"zone": "a"}, "affinity": {}, "podAnnotations": {}, "priorityClassName": "",
                "amqp": {"existingSecret": ""}, "scaling": {"scaleDownSeconds": 120}, "resources": {"limits": {"memory": "1Gi"}},
            },
            "rest": {"pool": "rest", "existingSecret": "rest"},
        },
    })
    rendered = {
        (one["kind"], one["metadata"]["labels"].get("mayfly/group")): one["spec"]
        for one in objects(template(f"{CHART}/ci/single-values.yaml", "-f", values)) if "spec" in one
    }
    own, rest = (rendered["Deployment", group]["template"] for group in ("orders", "rest"))
    assert rest["spec"]["tolerations"] and rest["spec"]["nodeSelector"] == {"disk": "ssd"} and rest["spec"]["affinity"] == affinity
    assert rest["spec"]["priorityClassName"] == "high" and rest["metadata"]["annotations"]["mesh"] == "off"
    assert not {"tolerations", "priorityClassName"} & set(own["spec"]) and "mesh" not in own["metadata"]["annotations"]
    assert own["spec"]["nodeSelector"] == {"zone": "a"} and "podAntiAffinity" in own["spec"]["affinity"]
    for pod, secret in [(own, "mayfly-amqp"), (rest, "of-all")]:
        assert {"secretName": secret, "defaultMode": 0o440, "items": [{"key": "connection_string", "path": "url"}]} in [
            volume["secret"] for volume in pod["spec"]["volumes"]
        ], pod["spec"]["volumes"]
    resources = own["spec"]["containers"][0]["resources"]
    assert resources == {"limits": {"memory": "1Gi"}, "requests": rest["spec"]["containers"][0]["resources"]["requests"]}, resources
    for group, seconds in [("orders", 120), ("rest", 600)]:
        scaler = rendered["HorizontalPodAutoscaler", group]
        assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == seconds and scaler["maxReplicas"] == 7


def every_value_is_used():
    defaults = yaml.safe_load(open(f"{CHART}/values.yaml"))
    group = {"pool": "p", "existingSecret": "s"}
    everything = {
        "amqp": {"existingSecret": "a", "caSecret": "ca"},
        "traces": {"endpoint": "http://t:4318"},
        "metrics": {kind: {"enabled": True} for kind in ("podMonitor", "rules", "dashboards")},
        "dispatcher": {"existingSecret": "k", "ingress": {"enabled": True, "host": "h", "tlsSecret": "t"}},
        "engines": {
            "fixed": group,
            "hpa": {**group, "scaling": {"mode": "hpa"}},
            "keda": {**group, "scaling": {"mode": "keda"}},
        },
        "engineDefaults": {"scaling": {"managementSecret": "m"}},
    }
    postgresql = copy.deepcopy(everything)
    postgresql["dispatcher"].update(store={"type": "postgresql", "existingSecret": "s"}, amqp={"existingSecret": "o"})
    postgresql["tests"] = {"secretPath": "s", "tokenSecret": "t"}
    postgresql["engines"]["own"] = {**group, "amqp": {"existingSecret": "o"}}
    operator = copy.deepcopy(everything)
    operator["amqp"] = {}
    operator["rabbitmqCluster"] = {"create": True, "definitionsSecret": "d"}
    operator["dispatcher"]["amqp"] = {"existingSecret": "o"}
    operator["engineDefaults"]["amqp"] = {"existingSecret": "o"}
    bases = [written(values) for values in (everything, postgresql, operator)]
    before = [template(base) for base in bases]
    unused, count = [], 0
    for path, value in leaves(defaults):
        count += 1
        setting = changed(value)
        if path == ("dispatcher", "store", "type"):
            setting = "postgresql"
        elif path[-2:] == ("scaling", "mode"):
            setting = "hpa"
        # In a base it may have that value; then its default is another.
        if not any(differs(base, old, path, one) for base, old in zip(bases, before) for one in (setting, value)):
            unused.append(".".join(path))
    assert not unused, f"used by no template: {unused}"
    return f"{count} values"


def pods_are_restricted():
    for values in VALUES:
        for name, spec in pods(objects(template(values))):
            assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False, name
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 65532, name
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
            for container in spec["containers"]:
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"], name
                assert security["capabilities"] == {"drop": ["ALL"]}, name
                assert container["resources"]["requests"] and container["resources"]["limits"]["memory"], name
                for variable in container["env"]:
                    told = str(variable.get("value", "")).lower()
                    assert "secretKeyRef" not in str(variable) and "password" not in told, variable


def networks_are_closed():
    for values in VALUES:
        rendered = objects(template(values))
        policies = {one["metadata"]["name"]: one["spec"] for one in rendered if one["kind"] == "NetworkPolicy"}
        for one in rendered:
            if one["kind"] == "Deployment":
                policy = policies[one["metadata"]["name"]]
                assert policy["podSelector"] == one["spec"]["selector"] and policy["policyTypes"] == ["Ingress", "Egress"]
                assert all(rule.get("ports") for rule in policy["ingress"] + policy["egress"]), policy
    for endpoint, port, own in [("http://collector:4317/v1", 4317, 0), ("https://[2001:db8::1]", 443, 0), ("http://collector", 80, 0), ("http://collector", 4318, 4318)]:
        done = template(f"{CHART}/ci/single-values.yaml", "--set", f"traces.endpoint={endpoint}", "--set", f"networkPolicy.tracesPort={own}")
        for one in objects(done):
            if one["kind"] == "NetworkPolicy":
                assert {"ports": [{"port": port, "protocol": "TCP"}]} in one["spec"]["egress"], f"{endpoint}: {one}"


def scalers_leave_an_engine_and_its_tasks():
    longest_task_seconds, found = 25, set()
    for values in VALUES:
        for one in objects(template(values)):
            spec = one.get("spec")
            if one["kind"] == "ScaledObject":
                assert spec["minReplicaCount"] >= 1 and "idleReplicaCount" not in spec, one
                assert spec["cooldownPeriod"] > longest_task_seconds, one
                behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
                queues = {trigger["metadata"]["queueName"].rpartition(".")[2] for trigger in spec["triggers"]}
                assert queues == {"create", "revoke"}, queues
                for trigger in spec["triggers"]:
                    assert trigger["type"] == "rabbitmq" and trigger["metadata"]["protocol"] == "http", trigger
            elif one["kind"] == "HorizontalPodAutoscaler":
                assert spec["minReplicas"] >= 1, one
                behavior = spec["behavior"]
            else:
                continue
            found.add(one["kind"])
            assert behavior["scaleDown"]["stabilizationWindowSeconds"] > longest_task_seconds, one
    assert len(found) == 2


def pods_are_replaced_when_their_secrets_change():
    def held(text):
        return {"key": base64.b64encode(text.encode()).decode()}

    # The Secrets of each Deployment of ci/full-values.yaml; the first has the key.
    broker = ["mayfly-amqp", "broker-ca"]
    mounted = {
        "mf-creds-dispatcher": ["mayfly-keys", "mayfly-store", "store-ca", *broker],
        "mf-creds-engine-orders": ["mayfly-pool-orders", *broker],
        "mf-creds-engine-billing": ["mayfly-pool-billing", "mayfly-amqp-billing", "broker-ca"],
        "mf-creds-engine-legacy": ["mayfly-pool-legacy", *broker],
    }
    of_key = {name: "key" if "billing" in name else "master-key" if "keys" in name else "pool.key" for name, *_ in mounted.values()}
    everything = {name: held(name) for names in mounted.values() for name in names}
    for name, key in of_key.items():
        everything[name] = {key: everything[name]["key"]}
    for which in HELMS:
        def sums(secrets, *more):
            Cluster.secrets = secrets
            rendered = objects(template(f"{CHART}/ci/full-values.yaml", *(more or ["--dry-run=server", "--disable-openapi-validation"]), which=which))
            return {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["annotations"]["checksum/secrets"]
                    for one in rendered if one["kind"] == "Deployment"}

        before = sums(everything)
        assert set(before) == set(mounted) and len(set(before.values())) == len(mounted), before
        assert sums(everything) == before, "it changes by itself"
        for secret, data in everything.items():
            after = sums({**everything, secret: {**data, "more": held("other")["key"]}})
            changed = {name for name in mounted if after[name] != before[name]}
            assert changed == {name for name, secrets in mounted.items() if secret in secrets}, f"{which}: {secret}: {changed}"
        # Passwords alone are never summed up; and nothing at all where Helm only renders.
        nothing = set(sums(everything, "--namespace", "apps").values())
        assert len(nothing) == 1 and not nothing & set(before.values())
        assert set(sums({name: data for name, data in everything.items() if name not in of_key}).values()) == nothing
        assert set(sums({**everything, **{name: {"another": "eA=="} for name in of_key}}).values()) == nothing
    Cluster.secrets = {}


def selectors_are_those_of_before():
    """A Deployment's selector cannot be changed: an upgrade with another is refused. Only new ones are written."""
    golden, file = {}, os.path.join(HERE, "selectors.json")
    if os.path.exists(file):
        golden = json.load(open(file))
    for values in VALUES:
        rendered = objects(template(values))
        chosen = {one["metadata"]["name"]: one["spec"]["selector"]["matchLabels"] for one in rendered if one["kind"] == "Deployment"}
        for one in rendered:
            if one["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
                selector = one["spec"].get("selector", one["spec"].get("podSelector"))
                assert selector.get("matchLabels", selector) == chosen[one["metadata"]["name"]], one
        known = golden.setdefault(os.path.basename(values), {})
        if os.environ.get("MAYFLY_WRITE"):
            known.update({name: chosen[name] for name in sorted(set(chosen) - set(known))})
        assert chosen == known, f"{values}: {chosen} are not the selectors of helm/selectors.json: {known}"
    if os.environ.get("MAYFLY_WRITE"):
        open(file, "w").write(json.dumps(golden, indent=1) + "\n")


def helm_test_reaches_the_api():
    for name, token in [("single", None), ("full", ("mayfly-keys", "root-token")), ("names", ("123", "456"))]:
        rendered = objects(template(f"{CHART}/ci/{name}-values.yaml"))
        tests = {one["metadata"]["name"].rpartition("-")[2]: one for one in rendered if one["kind"] == "Pod"}
        # Only the root token may ask for the status.
        keys = yaml.safe_load(open(f"{CHART}/ci/{name}-values.yaml"))["dispatcher"]["existingSecret"]
        tokens = {"status": (keys, "root-token"), **({"issue": token} if token else {})}
        assert set(tests) == set(tokens), tests
        (policy,) = [one["spec"] for one in rendered if one["kind"] == "NetworkPolicy" and one["metadata"]["name"].endswith("-dispatcher")]
        peers = [rule.get("from") for rule in policy["ingress"] if rule["ports"][0]["port"] == "http"]
        for test, pod in tests.items():
            mounted = pod["spec"]["volumes"][0]["secret"]
            assert (mounted["secretName"], mounted["items"][0]["key"]) == tokens[test], test
            if name != "single":
                labels = pod["metadata"]["labels"].items()
                chosen = [peer["podSelector"].get("matchLabels", {}) for peer in peers[0]]
                assert any(selector and selector.items() <= labels for selector in chosen), f"{test} is not let in: {chosen}"
    (command,) = tests["issue"]["spec"]["containers"]
    assert command["args"] == ["exec", "true", "--", "/mayfly", "--version"], command


def drains_and_upgrades_go_on():
    for values in VALUES:
        rendered = objects(template(values))
        for one in rendered:
            if one["kind"] == "PodDisruptionBudget":
                assert one["spec"]["maxUnavailable"] >= 1 and "minAvailable" not in one["spec"], one
                assert one["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        later = objects(template(
            values, "--set", "commonLabels.new=label", "--set", "image.tag=9.9.9", "--set", "log.level=warn",
            "--set", "engineDefaults.podAnnotations.new=one",
        ))
        selectors = [
            {one["metadata"]["name"]: one["spec"]["selector"] for one in these if one["kind"] == "Deployment"}
            for these in (rendered, later)
        ]
        assert selectors[0] == selectors[1], "a selector changes in an upgrade"
        deployments = [one for one in rendered if one["kind"] == "Deployment"]
        for one in deployments:
            labels = one["spec"]["template"]["metadata"]["labels"]
            for label, value in one["spec"]["selector"]["matchLabels"].items():
                assert labels[label] == value, one["metadata"]["name"]
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(one["spec"]["selector"]["matchLabels"])
        scaled = {
            one["spec"]["scaleTargetRef"]["name"]
            for one in rendered
            if one["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
        }
        for one in deployments:
            name = one["metadata"]["name"]
            assert ("replicas" in one["spec"]) != (name in scaled), f"{name}: replicas and a scaler"
        # No two components select each other's pods.
        chosen = [json.dumps(one["spec"]["selector"]["matchLabels"], sort_keys=True) for one in deployments]
        assert len(set(chosen)) == len(chosen)


def rules_are_good():
    promtool = os.path.join(os.path.dirname(TOOLS), "prometheus", "promtool")
    rules = f"{CHART}/files/rules.yml"
    must(run(promtool, "check", "rules", "--lint=all", "--lint-fatal", rules), "promtool check rules")
    must(run(promtool, "test", "rules", f"{CHART}/files/rules_test.yml"), "promtool test rules")
    groups = yaml.safe_load(open(rules))["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    tested = open(f"{CHART}/files/rules_test.yml").read()
    root = os.path.dirname(HERE)
    runbook = open(f"{root}/docs/runbook.md").read()
    sources = "".join(open(file).read() for file in glob.glob(f"{root}/*/src/**/*.rs", recursive=True))
    for reason in re.findall(r'reason="(\w+)"', tested):
        assert f'"{reason}"' in sources, f"no program gives the reason {reason}"
    for alert in alerts:
        name = alert["alert"]
        assert re.search(rf"alertname: {name}\n\s+exp_alerts:\n\s+- exp_labels", tested), f"{name}: no case in which it fires"
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}", name
        assert f"\n## {name}\n" in runbook, f"{name}: no section in docs/runbook.md"
    for record in [rule["record"] for group in groups for rule in group["rules"] if "record" in rule]:
        assert f"expr: {record}" in tested or f"({record}" in tested, f"{record}: no test"
        others = [rule["expr"] for group in groups for rule in group["rules"] if rule.get("record") != record]
        assert any(record in expression for expression in others), f"{record}: nothing uses it"

    def shipped(name):
        rendered = objects(template(f"{CHART}/ci/{name}-values.yaml", "--set", "metrics.rules.enabled=true"))
        (rules,) = [one["spec"]["groups"] for one in rendered if one["kind"] == "PrometheusRule"]
        return rules

    text = json.dumps(groups).replace("docs/runbook.md", "https://wiki.example.com/mayfly/runbook")
    text = re.sub(r"absent\((\w+)\)", r'absent(\1{namespace=\\"apps\\"})', text)
    assert shipped("full") == json.loads(text), "the chart ships other rules"
    names = [[rule.get("alert") for group in shipped(name) for rule in group["rules"]] for name in ("single", "engines-only")]
    assert [name for name in names[0] if name not in names[1]] == ["MayflyNoDispatcher"], names
    # What there is in another namespace does not hide that here there is nothing.
    rules_of_chart = written({"groups": shipped("single")})
    gone = {"series": 'mayfly_dispatcher_broker_up{namespace="apps"}', "values": "1x4 stale"}
    there = {"series": 'mayfly_dispatcher_broker_up{namespace="other"}', "values": "1x40"}
    none = {"eval_time": "5m", "alertname": "MayflyNoDispatcher"}
    firing = {**none, "exp_alerts": [{"exp_labels": {"severity": "critical", "namespace": "apps"}, "exp_annotations": next(
        {**rule["annotations"], "summary": "No dispatcher of Mayfly (apps) is seen"}
        for group in groups for rule in group["rules"] if rule.get("alert") == "MayflyNoDispatcher"
    )}]}
    cases = [{"interval": "30s", "input_series": series, "alert_rule_test": [case]} for series, case in
             [([gone, there], firing), ([{**gone, "values": "1x40"}], none)]]
    must(run(promtool, "test", "rules", written({"rule_files": [rules_of_chart], "tests": cases})), "rules of the chart")
    return f"{len(alerts)} alerts"


def dashboards_are_good():
    def shipped(name, *more):
        rendered = objects(template(f"{CHART}/ci/{name}-values.yaml", "--set", "metrics.dashboards.enabled=true", *more))
        (boards,) = [one["data"] for one in rendered if one["kind"] == "ConfigMap" and "dashboards" in one["metadata"]["name"]]
        return {key: json.loads(text) for key, text in boards.items()}

    full = shipped("full")
    assert sorted(full) == ["apps.mf-creds" + name for name in ("-engines-billing.json", "-engines-legacy.json", "-engines-orders.json", ".json")]
    assert list(shipped("engines-only")) == ["apps.mf-mayfly-engines-site-7.json"]
    # Side by side in one Grafana.
    others = [shipped("full", "--namespace", "other"), shipped("full", "--set", "fullnameOverride=two"), shipped("names")]
    for what in (lambda key, board: key, lambda key, board: board["uid"], lambda key, board: board["title"]):
        said = [what(key, board) for boards in (full, *others) for key, board in boards.items()]
        assert len(set(said)) == len(said) and all(said), said

    pools = {"billing": "billing_eu", "legacy": "legacy", "orders": "orders"}
    selector = re.compile(r"\b((?:mayfly|process)_\w+)(\{.*?\})?")
    for key, board in full.items():
        assert len(board["uid"]) <= 40 and all(panel["targets"] for panel in board["panels"]), key
        assert "__" not in json.dumps(board).replace("__rate_interval", "").replace("__all", ""), key
        variables = {one["name"]: one for one in board["templating"]["list"]}
        assert variables["namespace"]["current"]["value"] == ["apps"] and variables["namespace"]["allValue"] == ".*"
        group = key.removeprefix("apps.mf-creds").removeprefix("-engines-").removesuffix(".json")
        for panel in board["panels"]:
            for target in panel["targets"]:
                asked = selector.findall(target["expr"].replace("mayfly_group=", "group="))
                assert asked, target
                for metric, labels in asked:
                    assert 'namespace=~"$namespace"' in labels, f"{key}: {panel['title']}: {metric} of all namespaces"
                    if group and metric.startswith("mayfly_dispatcher"):
                        assert "of the pool" in panel["title"] and f'pool="{pools[group]}"' in labels, f"{key}: {panel['title']}"
                    elif group:
                        assert "the pool" not in panel["title"] and f'group="{group}"' in labels, f"{key}: {panel['title']}"
    (monitor,) = [one["spec"] for one in objects(template(f"{CHART}/ci/full-values.yaml")) if one["kind"] == "PodMonitor"]
    assert monitor["podTargetLabels"] == ["mayfly/group"]


def documents_name_what_there_is():
    root, count = os.path.dirname(HERE), 0
    for document in [f"{root}/README.md", *glob.glob(f"{root}/docs/*.md")]:
        for noun, verb in re.findall(r"\bmayfly ([a-z]+) ([a-z-]+)\b", open(document).read()):
            source = f"{root}/cli/src/noun/{noun}.rs"
            verbs = open(source).read() if os.path.exists(source) else ""
            if "enum Verb" in verbs:
                count += 1
                variant = verb.title().replace("-", "")
                assert re.search(rf"^    {variant}\b", verbs, re.M), f"{document}: there is no `mayfly {noun} {verb}`"
    assert count > 10
    # What the document has installed is there under the names it goes on with.
    text = open(f"{root}/docs/kubernetes.md").read().replace("\\\n", " ")
    installs = re.findall("^helm -n mayfly install mayfly helm/mayfly (.*)", text, re.M)
    assert len(installs) == 2, installs
    names = set()
    for arguments in installs:
        done = helm("helm3", "template", "mayfly", CHART, *shlex.split(arguments), *OPERATORS)
        names |= {one["metadata"]["name"] for one in objects(must(done, arguments))}
    for name in re.findall(r"(?:svc/|deployment )(mayfly\S+)", text):
        assert name in names, f"docs/kubernetes.md: there is no {name}"
    return f"{count} commands"


def readme_is_of_now():
    generator = os.path.join(TOOLS, "node_modules/@bitnami/readme-generator-for-helm/bin/index.js")
    readme = f"{CHART}/README.md"
    with tempfile.TemporaryDirectory() as directory:
        copied = f"{directory}/README.md"
        open(copied, "w").write(open(readme).read())
        done = run("node", generator, "--values", f"{CHART}/values.yaml", "--readme", copied)
        must(done, "values without or with wrong documentation")
        made = open(copied).read()
    if os.environ.get("MAYFLY_WRITE"):
        open(readme, "w").write(made)
    assert made == open(readme).read(), "helm/mayfly/README.md is not of these values: MAYFLY_WRITE=1 make test-chart"


def main():
    with_cluster()
    for test in [
        lints_packages_and_installs,
        notes_tell_the_next_command,
        objects_are_valid,
        names_are_legal,
        wrong_values_are_refused,
        no_part_is_rabbitmqs_administrator,
        a_groups_values_win,
        every_value_is_used,
        pods_are_restricted,
        networks_are_closed,
        helm_test_reaches_the_api,
        scalers_leave_an_engine_and_its_tasks,
        pods_are_replaced_when_their_secrets_change,
        selectors_are_those_of_before,
        drains_and_upgrades_go_on,
        rules_are_good,
        dashboards_are_good,
        documents_name_what_there_is,
        readme_is_of_now,
    ]:
        told = test()
        print(f"chart: {test.__name__.replace('_', ' ')}: ok{f' ({told})' if told else ''}", flush=True)


main()

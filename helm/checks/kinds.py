"""The objects: valid for every Kubernetes, with legal names, restricted pods and closed networks."""

import copy
import json
import os
import re

import kubernetes_validate
import yaml

from checks.tools import CHART, HELMS, HERE, TOOLS, VALUES, helm, must, named, objects, pods, rendered, run, template

VERSIONS = [f"1.{minor}" for minor in range(28, 38)]


def objects_are_valid():
    checked = 0
    for version in VERSIONS:
        for values in VALUES:
            for one in objects(template(values, "--kube-version", version)):
                try:
                    kubernetes_validate.validate(one, version, strict=True)
                    checked += 1
                except kubernetes_validate.SchemaNotFoundError:
                    assert one["apiVersion"].split("/")[0] in ("keda.sh", "monitoring.coreos.com", "rabbitmq.com", "gateway.networking.k8s.io"), one
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
            assert done.returncode != 0, "the validator accepts everything"
        elif one["kind"] == "RabbitmqCluster":
            # RabbitmqCluster has no public schema. These are the fields that its operator knows.
            spec = one["spec"]
            assert set(spec) == {"replicas", "persistence", "resources", "service", "rabbitmq", "override"}, spec
            assert spec["replicas"] in (1, 3) and set(spec["persistence"]) <= {"storage", "storageClassName"}, spec
            assert all(isinstance(value, str) for value in spec["persistence"].values()), spec
            assert all(isinstance(spec["rabbitmq"][key], str) for key in ("additionalConfig", "advancedConfig")), spec
            # The users come from a Secret: with definitions RabbitMQ makes no administrator.
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
        """Labels, and the labels of selectors."""
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


def long_names_differ():
    """Two releases whose names have the same beginning, in one namespace."""
    long = "a-release-with-a-long-name-of-some-letters"
    releases = [f"{long}-{end}" for end in ("in-rome", "in-lima")] + ["short"]
    values = f"{CHART}/ci/full-values.yaml"
    made = {name: objects(must(helm("helm3", "template", name, CHART, "-f", values, "--set", "dispatcher.serviceAccount.name="), name)) for name in releases}
    called = [(one["kind"], one["metadata"]["name"]) for these in made.values() for one in these]
    assert len(set(called)) == len(called), sorted(one for one in set(called) if called.count(one) > 1)
    for these in made.values():
        for one in these:
            assert len(one["metadata"]["name"]) <= 63, one["metadata"]["name"]
    # A name that was not cut before stays the same.
    assert named(made["short"], "Service")["metadata"]["name"] == "short-creds-dispatcher"


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
                for variable in container.get("env", []):
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


def helm_test_reaches_the_api():
    # The test's pod may run on the same nodes as the dispatcher, and has a deadline for waiting for a node or an
    # image.
    for name, own, tolerations, selector in [
        ("full", {}, [{"key": "dedicated", "operator": "Exists"}], {"kubernetes.io/arch": "amd64"}),
        ("full", {"tolerations": [{"operator": "Exists"}], "nodeSelector": {"a": "b"}}, [{"operator": "Exists"}], {"a": "b"}),
        ("single", {}, None, None),
    ]:
        for pod in rendered(name, {"tests": {**own, "deadlineSeconds": 77}}):
            if pod["kind"] == "Pod":
                found = [pod["spec"].get(key) for key in ("tolerations", "nodeSelector", "activeDeadlineSeconds")]
                assert found == [tolerations, selector, 77], found
    for name, token in [("single", None), ("full", ("mayfly-keys", "root-token")), ("names", ("123", "456"))]:
        these = objects(template(f"{CHART}/ci/{name}-values.yaml"))
        tests = {one["metadata"]["name"].rpartition("-")[2]: one for one in these if one["kind"] == "Pod"}
        # Only the root token may read the status.
        keys = yaml.safe_load(open(f"{CHART}/ci/{name}-values.yaml"))["dispatcher"]["existingSecret"]
        tokens = {"status": (keys, "root-token"), **({"issue": token} if token else {})}
        assert set(tests) == set(tokens), tests
        (policy,) = [one["spec"] for one in these if one["kind"] == "NetworkPolicy" and one["metadata"]["name"].endswith("-dispatcher")]
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

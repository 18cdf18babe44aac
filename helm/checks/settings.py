"""The values: wrong ones are refused by name, each is used, a group's values win."""

import copy
import json
import os
import re

import yaml

from checks.tools import CHART, HELMS, OPERATORS, VALUES, at_once, helm, layers, objects, refused, rendered, template, written


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
        ("amqp.allowPlaintext=maybe", ["allowPlaintext"]),
        ("dispatcher.allowPlaintext=false", ["dispatcher.tlsSecret", "dispatcher.allowPlaintext"]),
        ("dispatcher.tlsSecret=A secret", ["tlsSecret"]),
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
        ("engines.Billing.existingSecret=b,engines.Billing.pool=b", ["engines.Billing", "the name of a group"]),
        ("engines.a-group-of-21-letters.existingSecret=b,engines.a-group-of-21-letters.pool=b", ["engines.a-group-of-21-letters"]),
        ("dispatcher.backup.enabled=true", ["dispatcher.backup.existingClaim", "dispatcher.backup.containers"]),
        ("dispatcher.backup.enabled=true,dispatcher.store.type=postgresql,dispatcher.store.existingSecret=s", ["dispatcher.backup.enabled", "PostgreSQL"]),
        ("dispatcher.backup.enabled=true,dispatcher.backup.existingClaim=c,dispatcher.persistence.accessModes={ReadWriteOncePod}", ["accessModes", "ReadWriteOncePod"]),
        ("dispatcher.backup.schedule=daily", ["schedule"]),
        ("commonLabels.team=a team", ["commonLabels", "team"]),
        ("commonLabels.team=-a", ["commonLabels", "team"]),
        ("commonLabels.a/b/c=d", ["commonLabels", "a/b/c"]),
        ("dispatcher.podLabels.mayfly/group=x", ["podLabels", "mayfly/group"]),
        ("dispatcher.nodeSelector.disk=a b", ["nodeSelector", "disk"]),
        ("dispatcher.podAnnotations.checksum/secrets=x", ["podAnnotations", "checksum/secrets"]),
        ("metrics.podMonitor.interval=soon", ["interval"]),
        ("dispatcher.resources.requests.cpu=much", ["resources", "cpu"]),
        ("dispatcher.service.ipFamilies={IPv5}", ["ipFamilies"]),
        ("dispatcher.service.loadBalancerSourceRanges={10.0.0.1}", ["loadBalancerSourceRanges"]),
        ("engineDefaults.pool=all", ["engineDefaults", "pool"]),
        ("dispatcher.enabled=false,engines.orders=null", ["engines", "dispatcher.enabled"]),
    ]:
        for which in HELMS:
            done = helm(which, "template", "mf", CHART, "-f", base, "--set", setting)
            assert done.returncode != 0, f"{setting} is taken"
            # The JSON schema's message has a path with slashes; a slash in a name is ~1.
            told = done.stderr + done.stderr.replace("~1", "/")
            missing = [word for word in words if word not in told]
            assert not missing, f"{setting}: {missing} not in {done.stderr}"
    done = helm("helm3", "template", "mf", CHART, "-f", f"{CHART}/ci/operator-values.yaml")
    assert "Cluster Operator" in done.stderr, done.stderr


def usual_values_are_taken():
    """Values that Kubernetes and Prometheus accept, and a null that removes a group."""
    for which in HELMS:
        these = rendered("full", {
            "dispatcher": {"resources": {"requests": {"cpu": 0.5, "memory": "1e8"}, "limits": {"cpu": 2}}},
            "metrics": {"podMonitor": {"interval": "1h", "scrapeTimeout": "1m30s"}},
            "engines": {"legacy": None},
            "commonLabels": {"example.com/Team": "A_b.c", "empty": ""},
        }, which=which)
        deployments = [one["metadata"]["name"] for one in these if one["kind"] == "Deployment"]
        assert deployments and not any("legacy" in one["metadata"]["name"] for one in these), f"{which}: {deployments}"
        assert "mf-creds-engine-orders" in deployments
    # Without the last group only a dispatcher is left.
    assert not [one for one in rendered("single", {"engines": {"orders": None}}) if "engine" in one["metadata"]["name"]]


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
            volume.get("secret") for volume in pod["spec"]["volumes"]
        ], pod["spec"]["volumes"]
    resources = own["spec"]["containers"][0]["resources"]
    assert resources == {"limits": {"memory": "1Gi"}, "requests": rest["spec"]["containers"][0]["resources"]["requests"]}, resources
    for group, seconds in [("orders", 120), ("rest", 600)]:
        scaler = rendered["HorizontalPodAutoscaler", group]
        assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == seconds and scaler["maxReplicas"] == 7


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
        if isinstance(value, dict) and value and key not in FREE:
            yield from leaves(value, (*path, key))
        elif path + (key,) != ("engines",):
            yield (*path, key), value


def sections(values, path=()):
    """Every value and every section, by its path."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from sections(value, (*path, key))


def nested(path, value):
    for key in reversed(path):
        value = {key: value}
    return value


# Maps of Kubernetes: a null removes a key.
FREE = {"podSecurityContext", "containerSecurityContext", "resources", "labels"}


def the_schema_needs_every_value():
    """The schema refuses a null by the value's name: Helm would drop such a value."""
    schema = json.load(open(f"{CHART}/values.schema.json"))

    def needed(one):
        one = {**schema["definitions"].get(one.get("$ref", "").rpartition("/")[2], {}), **one}
        found = set(one.get("required", []))
        for part in one.get("allOf", []):
            found |= needed(part)
        return found

    def properties(one):
        one = {**schema["definitions"].get(one.get("$ref", "").rpartition("/")[2], {}), **one}
        found = dict(one.get("properties", {}))
        for part in one.get("allOf", []):
            found |= properties(part)
        return found

    def walk(values, one, path):
        missing = set(values) - needed(one)
        assert not missing, f"values.schema.json: {'.'.join(path) or 'the whole'} does not need {missing}"
        for key, value in values.items():
            if isinstance(value, dict) and key not in FREE and properties(properties(one)[key]):
                walk(value, properties(one)[key], (*path, key))

    walk(yaml.safe_load(open(f"{CHART}/values.yaml")), schema, ())


def nulls_are_named():
    """A null instead of any value, section or value of a group is refused by name, or has no effect."""
    defaults = yaml.safe_load(open(f"{CHART}/values.yaml"))
    schema = json.load(open(f"{CHART}/values.schema.json"))
    base = {
        "metrics": {kind: {"enabled": True} for kind in ("podMonitor", "rules", "dashboards")},
        "dispatcher": {"ingress": {"enabled": True, "host": "h", "tlsSecret": "t"}},
        "engines": {name: {"pool": "p", "existingSecret": "s", "scaling": {"mode": name}} for name in ("fixed", "hpa", "keda")},
        "engineDefaults": {"scaling": {"managementSecret": "m"}},
        "tests": {"secretPath": "s", "tokenSecret": "t"},
    }

    def kept(these):
        """What a null must not remove without an error."""
        return sorted(
            (one["kind"], one["metadata"]["name"], one["spec"].get("replicas"), one["spec"] if one["kind"] == "NetworkPolicy" else None)
            if "spec" in one else (one["kind"], one["metadata"]["name"], None, None)
            for one in these
        )

    def tried(case):
        which, path = case
        done = helm(which, "template", "mf", CHART, "--namespace", "apps", *layers("single", base, nested(path, None)), *OPERATORS)
        if done.returncode == 0:
            return which, path, kept(objects(done.stdout)) == before, "objects, replicas or policies are gone"
        told = done.stderr.replace("/", ".")
        # A message about an absent default may name the group that needs it.
        parts = path[1:] if path[0] == "engineDefaults" and "engines." in told else path
        named = "nil pointer" not in told and all(part in told for part in parts)
        return which, path, named, done.stderr

    before = kept(rendered("single", base))
    of_groups = [("engines", "hpa", key) for key in schema["definitions"]["group"]["properties"]]
    of_groups += [("engines", "hpa", section, key) for section in ("scaling", "amqp", "serviceAccount", "networkPolicy")
                  for key in defaults["engineDefaults"][section]]
    paths = [*sections(defaults), *of_groups]
    wrong = [f"{which}: {'.'.join(path)}: {told}" for which, path, good, told in at_once(tried, [(which, path) for which in HELMS for path in paths]) if not good]
    assert not wrong, "\n".join(wrong)
    return f"{len(paths)} places"


def differs(base, old, path, value):
    """Whether a value changes the rendering of `base`, or `base` is refused because of it, by its name."""
    refusal = rf"execution error at [^:]+:\d+:\d+\): .*{re.escape('.'.join(path))}"
    file = written(nested(path, value))
    done = helm("helm3", "template", "mf", CHART, "--namespace", "apps", "-f", base, "-f", file, *OPERATORS,
                "--skip-schema-validation")
    os.unlink(file)
    return re.search(refusal, done.stderr) if done.returncode else done.stdout != old


# Values that accept only certain texts.
OTHERS = {"mode": "hpa", "adaptSecurityContext": "force", "listenAddress": "0.0.0.0", "extraEnv": [{"name": "ZZ"}],
          **dict.fromkeys(("extraVolumes", "sidecars", "initContainers", "containers"), [{"name": "zz"}])}


def every_value_is_used():
    defaults = yaml.safe_load(open(f"{CHART}/values.yaml"))
    group = {"pool": "p", "existingSecret": "s"}
    everything = {
        "amqp": {"existingSecret": "a", "caSecret": "ca", "allowPlaintext": True},
        "traces": {"endpoint": "http://t:4318"},
        "metrics": {kind: {"enabled": True} for kind in ("podMonitor", "rules", "dashboards")},
        "dispatcher": {
            "existingSecret": "k", "allowPlaintext": True, "ingress": {"enabled": True, "host": "h", "tlsSecret": "t"},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]}, "service": {"type": "LoadBalancer"},
        },
        "engines": {
            "fixed": group,
            "hpa": {**group, "scaling": {"mode": "hpa"}},
            "keda": {**group, "scaling": {"mode": "keda"}},
        },
        "engineDefaults": {"scaling": {"managementSecret": "m"}},
    }
    postgresql = copy.deepcopy(everything)
    postgresql["dispatcher"].update(store={"type": "postgresql", "existingSecret": "s"}, amqp={"existingSecret": "o"}, tlsSecret="t")
    postgresql["engineDefaults"]["tlsSecret"] = "t"
    postgresql["tests"] = {"secretPath": "s", "tokenSecret": "t"}
    postgresql["engines"]["own"] = {**group, "amqp": {"existingSecret": "o"}}
    operator = copy.deepcopy(everything)
    operator["amqp"] = {"allowPlaintext": True}
    operator["rabbitmqCluster"] = {"create": True, "definitionsSecret": "d", "tls": {"secretName": "t"}}
    operator["dispatcher"]["amqp"] = {"existingSecret": "o"}
    operator["engineDefaults"].update(amqp={"existingSecret": "o"}, serviceAccount={"create": False})
    operator["dispatcher"]["backup"] = {"enabled": True, "existingClaim": "c"}
    bases = [written(values) for values in (everything, postgresql, operator)]
    before = [template(base) for base in bases]
    paths = dict(leaves(defaults))
    # Nothing is looked up here; pods_are_replaced_when_their_secrets_change has a cluster.
    del paths["lookup", "enabled"]

    def used(path):
        value = paths[path]
        setting = OTHERS.get(path[-1], changed(value)) if path[-2:] != ("store", "type") else "postgresql"
        # A base may have this value already; then the default is another.
        return any(differs(base, old, path, one) for base, old in zip(bases, before) for one in (setting, value))

    unused = [".".join(path) for path, good in zip(paths, at_once(used, paths)) if not good]
    assert not unused, f"used by no template: {unused}"
    return f"{len(paths)} values"

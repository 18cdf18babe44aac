"""Upgrades: selectors stay, drains go on, pods are replaced when their Secrets change, scalers change hands."""

import base64
import json
import os

from checks.tools import CHART, HELMS, HERE, VALUES, Cluster, helm, must, named, objects, refused, rendered, template, written


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


ON_SERVER = ["--dry-run=server", "--disable-openapi-validation"]


def scaled(mode, **more):
    return {"engines": {"orders": {"scaling": {"mode": mode, "managementSecret": "management"}, **more}}}


def scalers_change_hands():
    """KEDA's webhook refuses a ScaledObject while there is an HPA of the same workload, and Helm makes the
    ScaledObject before it deletes the HPA. KEDA ignores an HPA with this annotation."""
    mark = "validations.keda.sh/hpa-ownership"
    hpa = named(rendered("single", scaled("hpa")), "HorizontalPodAutoscaler")
    assert hpa["metadata"]["annotations"][mark] == "false"
    name = hpa["metadata"]["name"]
    # KEDA's own HPA has another name, so that Helm can make the chart's HPA before KEDA's is gone.
    advanced = named(rendered("single", scaled("keda")), "ScaledObject")["spec"]["advanced"]
    assert "name" not in advanced["horizontalPodAutoscalerConfig"], advanced
    path = f"/apis/autoscaling/v2/namespaces/apps/horizontalpodautoscalers/{name}"
    try:
        for which in HELMS:
            # The HPA of an earlier chart has no such annotation.
            ours = {"meta.helm.sh/release-name": "mf", "meta.helm.sh/release-namespace": "apps"}
            metadata = {"name": name, "labels": {"app.kubernetes.io/managed-by": "Helm"}, "annotations": ours}
            Cluster.things = {path: {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata}}
            told = refused("single", scaled("keda"), more=ON_SERVER, which=which)
            assert "engines.orders.scaling.mode" in told and f"annotate hpa {name} {mark}=false" in told, told
            assert rendered("single", scaled("hpa"), more=ON_SERVER, which=which)
            assert rendered("single", scaled("keda"), {"lookup": {"enabled": False}}, more=ON_SERVER, which=which)
            Cluster.things[path]["metadata"]["annotations"][mark] = "false"
            assert rendered("single", scaled("keda"), more=ON_SERVER, which=which)
    finally:
        Cluster.things = {}


def a_scaler_has_something_to_count():
    """Without a CPU request an HPA never scales."""
    def container(*values):
        these = rendered("single", *values)
        (metric,) = named(these, "HorizontalPodAutoscaler")["spec"]["metrics"]
        # Of the engine's container only: a sidecar may have no CPU request.
        assert metric["type"] == "ContainerResource" and metric["containerResource"]["container"] == "engine", metric
        (found,) = [one for one in named(these, "Deployment", "-orders")["spec"]["template"]["spec"]["containers"] if one["name"] == "engine"]
        return found["resources"]

    assert container(scaled("hpa", resources={"requests": {"memory": "1Gi"}}))["requests"] == {"cpu": "50m", "memory": "1Gi"}
    without = scaled("hpa", resources={"requests": {"cpu": None}})
    assert "engines.orders.resources.requests.cpu" in refused("single", without)
    assert "engines.orders.resources.requests.cpu" in refused("single", scaled("hpa"), {"engineDefaults": {"resources": {"requests": None}}})
    # Without a request Kubernetes uses the limit.
    assert container(without, scaled("hpa", resources={"requests": {"cpu": None}, "limits": {"cpu": 1}}))["limits"]["cpu"] == 1


def names_of_before_are_kept():
    """Earlier charts cut long names without a hash. With a new name a release would get an empty store."""
    name = "a-release-with-a-long-name-of-46-letters-in-it"
    before = f"{name}-mayfly"[:40].rstrip("-")
    own = {"metadata": {"name": "any", "annotations": {"meta.helm.sh/release-name": name}}, "apiVersion": "apps/v1", "kind": "Deployment"}
    values = f"{CHART}/ci/single-values.yaml"

    def upgrade(which, *more):
        return helm(which, "template", name, CHART, "--namespace", "apps", "-f", values, "--is-upgrade", *ON_SERVER, *more)

    try:
        for which in HELMS:
            must(upgrade(which), "no such objects")
            Cluster.things = {f"/apis/apps/v1/namespaces/apps/deployments/{before}-dispatcher": own}
            done = upgrade(which)
            assert done.returncode and f"fullnameOverride={before}" in done.stderr, done.stderr
            these = objects(must(upgrade(which, "--set", f"fullnameOverride={before}"), "kept"))
            assert named(these, "PersistentVolumeClaim")["metadata"]["name"] == f"{before}-dispatcher"
            other = {**own, "metadata": {"name": "any", "annotations": {"meta.helm.sh/release-name": "other"}}}
            Cluster.things = {f"/apis/apps/v1/namespaces/apps/deployments/{before}-dispatcher": other}
            must(upgrade(which), "those of another release")
            Cluster.things = {}
    finally:
        Cluster.things = {}


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
        assert sums(everything) == before, "the hash changes without a change of the Secrets"
        for secret, data in everything.items():
            after = sums({**everything, secret: {**data, "more": held("other")["key"]}})
            changed = {name for name in mounted if after[name] != before[name]}
            assert changed == {name for name, secrets in mounted.items() if secret in secrets}, f"{which}: {secret}: {changed}"
        # Without a random key there is no hash of passwords, and none at all if Helm only renders.
        nothing = set(sums(everything, "--namespace", "apps").values())
        assert len(nothing) == 1 and not nothing & set(before.values())
        assert set(sums({name: data for name, data in everything.items() if name not in of_key}).values()) == nothing
        assert set(sums({**everything, **{name: {"another": "eA=="} for name in of_key}}).values()) == nothing
    # With lookup.enabled=false no Secret is read: the user who upgrades may not be allowed to.
    off = written({"lookup": {"enabled": False}})
    for which in HELMS:
        Cluster.secrets, Cluster.asked = everything, []
        made = template(f"{CHART}/ci/full-values.yaml", "-f", off, *ON_SERVER, which=which)
        assert not [path for path in Cluster.asked if "/secrets/" in path], Cluster.asked
        assert {one["spec"]["template"]["metadata"]["annotations"]["checksum/secrets"] for one in objects(made) if one["kind"] == "Deployment"} == nothing
    Cluster.secrets = {}


def selectors_are_those_of_before():
    """A Deployment's selector cannot be changed: Kubernetes refuses the upgrade. Only new selectors are written."""
    golden, file = {}, os.path.join(HERE, "selectors.json")
    if os.path.exists(file):
        golden = json.load(open(file))
    for values in VALUES:
        rendered = objects(template(values))
        chosen = {one["metadata"]["name"]: one["spec"]["selector"]["matchLabels"] for one in rendered if one["kind"] == "Deployment"}
        for one in rendered:
            # Pods of Jobs have no fixed selector.
            of_jobs = "matchExpressions" in one.get("spec", {}).get("podSelector", {})
            if one["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy") and not of_jobs:
                selector = one["spec"].get("selector", one["spec"].get("podSelector"))
                assert selector.get("matchLabels", selector) == chosen[one["metadata"]["name"]], one
        known = golden.setdefault(os.path.basename(values), {})
        if os.environ.get("MAYFLY_WRITE"):
            known.update({name: chosen[name] for name in sorted(set(chosen) - set(known))})
        assert chosen == known, f"{values}: {chosen} are not the selectors of helm/selectors.json: {known}"
    if os.environ.get("MAYFLY_WRITE"):
        open(file, "w").write(json.dumps(golden, indent=1) + "\n")


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
        # No component selects the pods of another.
        chosen = [json.dumps(one["spec"]["selector"]["matchLabels"], sort_keys=True) for one in deployments]
        assert len(set(chosen)) == len(chosen)

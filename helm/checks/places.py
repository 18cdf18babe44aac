"""Different clusters: OpenShift, IPv6, own images, additions to pods."""

from checks.tools import HELMS, VALUES, named, objects, pod_of, pods, refused, rendered, template

OPENSHIFT = ["--api-versions", "security.openshift.io/v1"]
USERS = {"runAsUser", "runAsGroup", "fsGroup"}
DIGEST = "sha256:" + "ab" * 32


def openshift_chooses_the_users():
    """OpenShift refuses a pod with a fixed user; elsewhere a pod without one would run as root or be refused."""
    def users(*values, more=()):
        return {name: USERS & set(spec["securityContext"]) for name, spec in pods(rendered(*values, more=more))}

    for which in HELMS:
        for values in VALUES:
            for name, spec in pods(objects(template(values, *OPENSHIFT, which=which))):
                assert not USERS & set(spec["securityContext"]), f"{which}: {name} has a fixed user on OpenShift"
                assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"], name
    assert not any(users("full", more=["--api-versions", "route.openshift.io/v1"]).values())
    assert not any(users("full", {"openshift": {"adaptSecurityContext": "force"}}).values())
    assert all(found == USERS for found in users("full", {"openshift": {"adaptSecurityContext": "disabled"}}, more=OPENSHIFT).values())
    # By value: for all pods, for the dispatcher, for a group.
    none = {key: None for key in USERS}
    assert not any(users("full", {"podSecurityContext": none}).values())
    found = users("full", {"dispatcher": {"podSecurityContext": none}, "engines": {"orders": {"podSecurityContext": {"fsGroup": None, "runAsUser": 7}}}})
    assert not found["mf-creds-dispatcher"] and found["mf-creds-engine-orders"] == {"runAsUser", "runAsGroup"}, found
    assert found["mf-creds-engine-billing"] == USERS, found
    (container,) = pod_of(rendered("single", {"engines": {"orders": {"containerSecurityContext": {"readOnlyRootFilesystem": False}}}}), "-orders")["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is False and container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert named(rendered("operator", more=OPENSHIFT), "RabbitmqCluster")["spec"]["override"]["statefulSet"]["spec"]["template"]["spec"]["securityContext"] == {}

    def dns(*values, more=()):
        (policy,) = [one for one in rendered(*values, more=more) if one["kind"] == "NetworkPolicy" and one["metadata"]["name"].endswith("-dispatcher")]
        return sorted({(port["port"], port["protocol"]) for port in policy["spec"]["egress"][0]["ports"]})

    def both(*ports):
        return sorted((port, protocol) for port in ports for protocol in ("TCP", "UDP"))

    assert dns("single") == both(53) and dns("single", more=OPENSHIFT) == both(53, 5353)
    assert dns("single", {"networkPolicy": {"dnsPorts": [5300]}}, more=OPENSHIFT) == both(5300)


def ipv6_is_served():
    """An IPv6-only pod does not have 0.0.0.0: its probes would always fail."""
    def listens(*values):
        these = rendered(*values)
        found = {
            variable["value"].rpartition(":")[0]
            for _, spec in pods(these) for container in spec["containers"] for variable in container.get("env", [])
            if variable["name"].endswith("__LISTEN")
        }
        assert len(found) == 1, found
        return found.pop()

    def service(**values):
        return {"dispatcher": {"service": values}}

    assert listens("single") == listens("full") == listens("engines-only") == "[::]"
    assert listens("single", service(ipFamilies=["IPv6"])) == listens("single", service(ipFamilies=["IPv4", "IPv6"])) == "[::]"
    assert listens("single", service(ipFamilies=["IPv4"])) == "0.0.0.0"
    assert listens("single", {"listenAddress": "0.0.0.0"}) == "0.0.0.0"
    assert listens("single", {"listenAddress": "fd00::1"}) == listens("single", {"listenAddress": "[fd00::1]"}) == "[fd00::1]"
    spec = named(rendered("single", service(ipFamilyPolicy="PreferDualStack", ipFamilies=["IPv6", "IPv4"])), "Service")["spec"]
    assert (spec["ipFamilyPolicy"], spec["ipFamilies"]) == ("PreferDualStack", ["IPv6", "IPv4"]), spec
    assert not {"ipFamilyPolicy", "ipFamilies"} & set(named(rendered("single"), "Service")["spec"])
    assert "listenAddress" in refused("single", {"listenAddress": "[::]:8470"})


def images_are_chosen_for_each_program():
    these = rendered("full", {
        "dispatcher": {"imageDigest": DIGEST},
        "engineDefaults": {"imageTag": "0.1.1"},
        "engines": {"billing": {"imageTag": "0.2.0-canary"}, "legacy": {"image": "own-engine", "imageDigest": DIGEST}},
        "tests": {"imageTag": "0.1.2"},
    })
    found = {name: spec["containers"][0]["image"].removeprefix("registry.example.com/mayfly/") for name, spec in pods(these)}
    assert found == {
        "mf-creds-dispatcher": f"mayfly-dispatcher@{DIGEST}",
        "mf-creds-engine-orders": "mayfly-engine:0.1.1",
        "mf-creds-engine-billing": "mayfly-engine:0.2.0-canary",
        "mf-creds-engine-legacy": f"own-engine@{DIGEST}",
        "mf-creds-test-status": "mayfly:0.1.2",
        "mf-creds-test-issue": "mayfly:0.1.2",
    }, found
    assert "imageDigest" in refused("full", {"dispatcher": {"imageDigest": "latest"}})
    assert "imageTag" in refused("full", {"engines": {"orders": {"imageTag": "a b"}}})


def own_variables_replace_the_charts():
    """Of two variables with one name, the API server refuses both or uses the last."""
    own = [
        {"name": "MAYFLY__LOG__LEVEL", "value": "trace"}, {"name": "MAYFLY__ADMIN__LISTEN", "value": "[::1]:1"},
        {"name": "A", "value": "1"}, {"name": "A", "value": "2"},
    ]
    these = rendered("full", {"dispatcher": {"extraEnv": own}, "engineDefaults": {"extraEnv": own}})
    for name, spec in pods(these):
        variables = [variable["name"] for variable in spec["containers"][0]["env"]]
        assert len(set(variables)) == len(variables), f"{name}: {variables}"
        if "-test-" not in name:
            values = {variable["name"]: variable.get("value") for variable in spec["containers"][0]["env"]}
            assert all(values[one["name"]] == one["value"] for one in [*own[:2], own[3]]), f"{name}: {values}"
            assert values["MAYFLY__LOG__FORMAT"] == "text" and "MAYFLY__AMQP__URL_FILE" in values, values


def pods_take_what_is_added():
    sidecar = {"name": "proxy", "image": "proxy:1"}
    added = {
        "podLabels": {"team": "x"}, "sidecars": [sidecar], "initContainers": [{**sidecar, "name": "first"}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}], "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["db"]}], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["10.0.0.2"]},
        "runtimeClassName": "gvisor",
    }
    these = rendered("single", {"dispatcher": added, "engines": {"orders": added}, "commonLabels": {"team": "of-all", "cost": "z"}})
    for name in ("-dispatcher", "-orders"):
        deployment = named(these, "Deployment", name)
        template_ = deployment["spec"]["template"]
        spec = template_["spec"]
        assert template_["metadata"]["labels"]["team"] == "x" and template_["metadata"]["labels"]["cost"] == "z", name
        assert deployment["metadata"]["labels"]["team"] == "of-all" and "team" not in deployment["spec"]["selector"]["matchLabels"], name
        assert spec["containers"][1] == sidecar and spec["initContainers"][0]["name"] == "first", name
        assert spec["volumes"][-1] == added["extraVolumes"][0] and spec["containers"][0]["volumeMounts"][-1] == added["extraVolumeMounts"][0]
        assert all(spec[key] == added[key] for key in ("hostAliases", "dnsPolicy", "dnsConfig", "runtimeClassName")), name
    # SQLite and others can write temporary files, although the root file system is read-only.
    these = rendered("single")
    for name in ("-dispatcher", "-orders"):
        spec = pod_of(these, name)
        (mount,) = [one for one in spec["containers"][0]["volumeMounts"] if one["mountPath"] == "/tmp"]
        assert {"name": mount["name"], "emptyDir": {}} in spec["volumes"], name
    # The API server refuses two with the same name.
    for key, called in [("extraVolumes", "amqp"), ("sidecars", "engine"), ("initContainers", "engine")]:
        told = refused("single", {"engines": {"orders": {key: [{"name": called, "image": "i"}]}}})
        assert "engines.orders." in told and key in told, told
    assert "dispatcher.extraVolumes" in refused("single", {"dispatcher": {"extraVolumes": [{"name": "data", "emptyDir": {}}]}})


def accounts_are_named_once():
    these = rendered("single", {"dispatcher": {"serviceAccount": {"name": "own"}}, "engines": {"orders": {"serviceAccount": {"create": False, "name": "theirs"}}}})
    assert [one["metadata"]["name"] for one in these if one["kind"] == "ServiceAccount"] == ["own"]
    assert pod_of(these, "-dispatcher")["serviceAccountName"] == "own" and pod_of(these, "-orders")["serviceAccountName"] == "theirs"
    # Two groups cannot both make the same ServiceAccount.
    assert "serviceAccount.create" in refused("full", {"engineDefaults": {"serviceAccount": {"name": "one"}}})
    assert rendered("full", {"engineDefaults": {"serviceAccount": {"name": "one", "create": False}}})


def other_objects_are_made():
    route = {"enabled": True, "parentRefs": [{"name": "gateway", "sectionName": "https"}], "hostnames": ["mayfly.example.com"], "annotations": {"a": "b"}}
    these = rendered("single", {
        "dispatcher": {
            "httpRoute": route, "persistence": {"accessModes": ["ReadWriteOncePod"]},
            "service": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.0.0.0/8"], "loadBalancerClass": "x.example/y"},
        },
        "commonAnnotations": {"owner": "platform", "a": "common"},
        "networkPolicy": {"extraEgress": [{"ports": [{"port": 8200}]}], "extraIngress": [{"ports": [{"port": 9000}]}]},
        "engines": {"orders": {"networkPolicy": {"extraEgress": [{"ports": [{"port": 88}]}]}}},
        "metrics": {
            "podMonitor": {"enabled": True, "scrapeTimeout": "5s", "relabelings": [{"action": "labeldrop", "regex": "x"}]},
            "rules": {"enabled": True, "extraRules": [{"alert": "Own", "expr": "up == 0"}]},
            "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Mayfly"}},
        },
        "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": '{{ include "mayfly.fullname" . }}-more'}}],
    })
    spec = named(these, "HTTPRoute")["spec"]
    service = named(these, "Service")
    assert spec["parentRefs"] == route["parentRefs"] and spec["hostnames"] == route["hostnames"]
    assert spec["rules"][0]["backendRefs"] == [{"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}]
    assert "parentRefs" in refused("single", {"dispatcher": {"httpRoute": {"enabled": True}}})
    assert service["spec"]["loadBalancerSourceRanges"] == ["10.0.0.0/8"] and service["spec"]["loadBalancerClass"] == "x.example/y"
    assert named(these, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert named(these, "PersistentVolumeClaim")["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for one in these:
        if one["metadata"]["name"] != "mf-mayfly-more":
            assert one["metadata"]["annotations"]["owner"] == "platform", one["metadata"]
    assert named(these, "HTTPRoute")["metadata"]["annotations"]["a"] == "b"
    egress = {name: named(these, "NetworkPolicy", name)["spec"]["egress"] for name in ("-dispatcher", "-orders")}
    assert all({"ports": [{"port": 8200}]} in rules for rules in egress.values())
    assert {"ports": [{"port": 88}]} in egress["-orders"] and {"ports": [{"port": 88}]} not in egress["-dispatcher"]
    # An empty rule would open every port.
    assert "extraEgress" in refused("single", {"networkPolicy": {"extraEgress": [{}]}})
    assert {"ports": [{"port": 9000}]} in named(these, "NetworkPolicy", "-orders")["spec"]["ingress"]
    (endpoint,) = named(these, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["scrapeTimeout"] == "5s" and endpoint["relabelings"], endpoint
    assert named(these, "PrometheusRule")["spec"]["groups"][-1] == {"name": "mayfly.extra", "rules": [{"alert": "Own", "expr": "up == 0"}]}
    assert named(these, "ConfigMap", "-dashboards")["metadata"]["annotations"]["grafana_folder"] == "Mayfly"
    assert named(these, "ConfigMap", "mf-mayfly-more")
    broker = named(rendered("operator", {"rabbitmqCluster": {
        "tls": {"secretName": "tls", "caSecretName": "ca", "disableNonTLSListeners": True},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}}, "affinity": {"nodeAffinity": {}}, "tolerations": [{"operator": "Exists"}],
    }}), "RabbitmqCluster")["spec"]
    assert broker["tls"] == {"secretName": "tls", "caSecretName": "ca", "disableNonTLSListeners": True}
    assert broker["service"] == {"type": "LoadBalancer", "annotations": {"a": "b"}} and broker["affinity"] and broker["tolerations"]
    assert "tls.secretName" in refused("operator", {"rabbitmqCluster": {"tls": {"disableNonTLSListeners": True}}})

"""TLS of the API, of health and metrics, and to RabbitMQ. Plain text needs a value that allows it."""

from checks.tools import named, refused, rendered

DISPATCHER, ORDERS, BILLING = (f"mf-creds-{part}" for part in ("dispatcher", "engine-orders", "engine-billing"))


def container(these, deployment):
    pod = named(these, "Deployment", deployment)["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def environment(these, deployment):
    return {variable["name"]: variable.get("value") for variable in container(these, deployment)[1]["env"]}


def held(these, deployment, path):
    """The Secret that a pod has mounted at a path, and the keys of it."""
    pod, program = container(these, deployment)
    mounts = [mount["name"] for mount in program["volumeMounts"] if mount["mountPath"] == path]
    if not mounts:
        return None
    (secret,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == mounts[0]]
    return secret["secretName"], [item["key"] for item in secret.get("items", [])]


def plaintext_is_asked_for_by_name():
    said = refused("single", {"dispatcher": {"allowPlaintext": False}})
    assert "dispatcher.tlsSecret" in said and "dispatcher.allowPlaintext=true" in said, said
    said = refused("single", {"dispatcher": {"clientCaSecret": "clients"}})
    assert "dispatcher.clientCaSecret" in said and "dispatcher.tlsSecret" in said, said
    said = refused("operator", {"amqp": {"allowPlaintext": False}})
    assert "rabbitmqCluster.tls.secretName" in said and "amqp.allowPlaintext=true" in said, said
    rendered("operator", {"amqp": {"allowPlaintext": False}, "rabbitmqCluster": {"tls": {"secretName": "nodes"}}})
    # A release of engines alone needs no value about the API.
    rendered("engines-only")
    for amqp in (False, True):
        these = rendered("single", {"amqp": {"allowPlaintext": amqp}})
        for deployment in ("mf-mayfly-dispatcher", "mf-mayfly-engine-orders"):
            allowed = {name for name in environment(these, deployment) if name.endswith("ALLOW_PLAINTEXT")}
            wanted = {"MAYFLY__ADMIN__ALLOW_PLAINTEXT"}
            wanted |= {"MAYFLY__AMQP__ALLOW_PLAINTEXT"} if amqp else set()
            wanted |= {"MAYFLY__HTTP__ALLOW_PLAINTEXT"} if "dispatcher" in deployment else set()
            assert allowed == wanted, f"{deployment}: {allowed}"


def certificates_reach_their_programs():
    these = rendered("full")
    pair = ["tls.crt", "tls.key"]
    assert held(these, DISPATCHER, "/etc/mayfly/tls") == ("mayfly-api-tls", pair)
    assert held(these, DISPATCHER, "/etc/mayfly/clients") == ("mayfly-clients", [])
    assert held(these, BILLING, "/etc/mayfly/tls") == ("mayfly-billing-tls", pair)
    assert held(these, ORDERS, "/etc/mayfly/tls") is None
    files = {"CERT_FILE": "/etc/mayfly/tls/tls.crt", "KEY_FILE": "/etc/mayfly/tls/tls.key"}
    for deployment, sections in [(DISPATCHER, ("HTTP", "ADMIN")), (BILLING, ("ADMIN",)), (ORDERS, ())]:
        found = environment(these, deployment)
        for section in ("HTTP", "ADMIN"):
            for key, file in files.items():
                wanted = file if section in sections else None
                assert found.get(f"MAYFLY__{section}__TLS__{key}") == wanted, f"{deployment}: {section} {key}"
        # With a certificate, plain text is not allowed.
        plain = found.get("MAYFLY__ADMIN__ALLOW_PLAINTEXT")
        assert (plain is None) == bool(sections) and "MAYFLY__HTTP__ALLOW_PLAINTEXT" not in found, deployment
        scheme = "HTTPS" if sections else "HTTP"
        probes = [container(these, deployment)[1][f"{probe}Probe"]["httpGet"]["scheme"] for probe in ("startup", "liveness", "readiness")]
        assert probes == [scheme] * 3, f"{deployment}: {probes}"
    assert environment(these, DISPATCHER)["MAYFLY__HTTP__TLS__CLIENT_CA_FILE"] == "/etc/mayfly/clients/ca.crt"
    # A probe cannot show a client certificate.
    assert "MAYFLY__ADMIN__TLS__CLIENT_CA_FILE" not in environment(these, DISPATCHER)
    assert named(these, "Service")["spec"]["ports"][0]["appProtocol"] == "https"
    assert "appProtocol" not in named(rendered("single"), "Service")["spec"]["ports"][0]

    tests = [one["spec"] for one in these if one["kind"] == "Pod"]
    assert len(tests) == 2
    for spec in tests:
        (program,) = spec["containers"]
        found = {variable["name"]: variable["value"] for variable in program["env"]}
        assert found["MAYFLY_ADDRESS"] == f"https://{DISPATCHER}.apps.svc:80", found
        assert found["MAYFLY_CA_FILE"] == "/etc/mayfly/ca/ca.crt" and "MAYFLY_ALLOW_PLAINTEXT" not in found, found
        assert found["MAYFLY_CLIENT_CERT_FILE"] == "/etc/mayfly/client/tls.crt", found
        secrets = {volume["name"]: (volume["secret"]["secretName"], [item["key"] for item in volume["secret"]["items"]]) for volume in spec["volumes"]}
        # The authority, without the key.
        assert secrets["ca"] == ("mayfly-api-tls", ["authority.pem"]), secrets
        assert secrets["client"] == ("mayfly-test-client", pair), secrets
        mounted = {mount["name"] for mount in program["volumeMounts"]}
        assert mounted == set(secrets), mounted
    # A certificate of a public authority.
    public = rendered("full", {"dispatcher": {"tlsCaKey": ""}})
    for spec in [one["spec"] for one in public if one["kind"] == "Pod"]:
        assert "MAYFLY_CA_FILE" not in str(spec) and "ca" not in {volume["name"] for volume in spec["volumes"]}, spec


def prometheus_knows_the_certificates():
    """Every pod is scraped by one monitor, with the scheme that it serves."""

    def scraped(these):
        found = {}
        monitors = [one for one in these if one["kind"] == "PodMonitor"]
        for deployment in [one for one in these if one["kind"] == "Deployment"]:
            labels = deployment["spec"]["template"]["metadata"]["labels"]
            for monitor in monitors:
                selector = monitor["spec"]["selector"]
                matches = selector["matchLabels"].items() <= labels.items()
                for one in selector["matchExpressions"]:
                    is_in = labels.get(one["key"]) in one["values"]
                    matches &= is_in if one["operator"] == "In" else not is_in
                if matches:
                    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
                    name = deployment["metadata"]["name"]
                    assert name not in found, f"{name} is scraped twice"
                    found[name] = (endpoint.get("scheme", "http"), endpoint.get("tlsConfig"))
        return found

    def config(deployment, secret, key="ca.crt"):
        return "https", {"serverName": f"{deployment}.apps.svc", "ca": {"secret": {"name": secret, "key": key}}}

    assert scraped(rendered("full")) == {
        DISPATCHER: config(DISPATCHER, "mayfly-api-tls", "authority.pem"), ORDERS: ("http", None),
        BILLING: config(BILLING, "mayfly-billing-tls"), "mf-creds-engine-legacy": ("http", None),
    }
    plain = {"metrics": {"podMonitor": {"enabled": True}}}
    these = rendered("single", plain)
    assert scraped(these) == {"mf-mayfly-dispatcher": ("http", None), "mf-mayfly-engine-orders": ("http", None)}
    assert named(these, "PodMonitor")["metadata"]["name"] == "mf-mayfly"
    every = rendered("single", plain, {"dispatcher": {"tlsSecret": "d"}, "engineDefaults": {"tlsSecret": "e", "tlsCaKey": ""}})
    assert scraped(every) == {
        "mf-mayfly-dispatcher": config("mf-mayfly-dispatcher", "d"),
        "mf-mayfly-engine-orders": ("https", {"serverName": "mf-mayfly-engine-orders.apps.svc"}),
    }


def rabbitmqs_authority_is_rabbitmqs_alone():
    """It is not trusted for databases, traces or others. Each part may have its own certificate for RabbitMQ."""
    these = rendered("full")
    for deployment, client in [(DISPATCHER, "broker-client"), (ORDERS, "broker-client"), (BILLING, "billing-client")]:
        found = environment(these, deployment)
        assert "SSL_CERT_FILE" not in found, f"{deployment}: {found}"
        assert found["MAYFLY__AMQP__CA_FILE"] == "/etc/mayfly/amqp-ca/ca.crt", found
        assert held(these, deployment, "/etc/mayfly/amqp-ca") == ("broker-ca", [])
        assert found["MAYFLY__AMQP__CLIENT_CERT_FILE"] == "/etc/mayfly/amqp-client/tls.crt", found
        assert found["MAYFLY__AMQP__CLIENT_KEY_FILE"] == "/etc/mayfly/amqp-client/tls.key", found
        assert held(these, deployment, "/etc/mayfly/amqp-client") == (client, ["tls.crt", "tls.key"]), deployment
    these = rendered("single", {"dispatcher": {"amqp": {"clientCertSecret": "own"}}})
    assert held(these, "mf-mayfly-dispatcher", "/etc/mayfly/amqp-client")[0] == "own"
    engine = environment(these, "mf-mayfly-engine-orders")
    assert not {"MAYFLY__AMQP__CA_FILE", "MAYFLY__AMQP__CLIENT_CERT_FILE", "SSL_CERT_FILE"} & set(engine), engine

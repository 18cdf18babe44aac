"""The store in the cluster: its copies, and the Jobs that run while there is no dispatcher."""

from checks.tools import named, rendered

PROXY = {"name": "away", "image": "away:1", "resources": {"requests": {"cpu": "10m"}, "limits": {"memory": "64Mi"}}}


def copies_are_made_beside_the_dispatcher():
    these = rendered("single", {"dispatcher": {"backup": {"enabled": True, "existingClaim": "copies", "keep": 3}}})
    job = named(these, "CronJob", "-backup")["spec"]
    assert job["concurrencyPolicy"] == "Forbid", job
    template = job["jobTemplate"]["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    (container,) = pod["containers"]
    assert container["args"] == ["--backup", "/backup", "--keep", "3"], container
    deployment = named(these, "Deployment", "-dispatcher")["spec"]
    dispatcher = deployment["template"]["spec"]
    assert container["image"] == dispatcher["containers"][0]["image"], container
    # The backup mounts the dispatcher's volume, so it must run on the dispatcher's node. No request may reach it.
    (term,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    selector = deployment["selector"]["matchLabels"]
    assert term["labelSelector"]["matchLabels"] == selector and term["topologyKey"] == "kubernetes.io/hostname", term
    assert any(labels.get(key) != value for key, value in selector.items()), labels
    volumes = {one["name"]: one for one in pod["volumes"]}
    theirs = {one["name"]: one for one in dispatcher["volumes"]}
    assert volumes["data"] == theirs["data"], volumes
    assert volumes["backup"]["persistentVolumeClaim"]["claimName"] == "copies", volumes
    assert "root-token" not in str(pod) and "amqp" not in str(pod), "it needs neither"
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert set(mounts) <= set(volumes) and mounts["backup"] == "/backup", mounts

    these = rendered("single", {"dispatcher": {"backup": {"enabled": True, "containers": [PROXY]}}})
    pod = named(these, "CronJob", "-backup")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["name"] == "backup" and pod["containers"] == [PROXY], pod


def the_store_is_handled_while_no_dispatcher_runs():
    args = ["--restore", "/backup/mayfly-20260101T000000Z.db"]
    over = {"dispatcher": {"backup": {"existingClaim": "copies"}, "maintenance": {"args": args}}}
    these = rendered("single", over)
    assert named(these, "Deployment", "-dispatcher")["spec"]["replicas"] == 0
    job = next(one for one in these if one["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {one["name"] for one in pod["volumes"]}
    assert container["args"] == args and {one["name"] for one in container["volumeMounts"]} <= volumes, pod
    assert {"data", "keys", "backup"} <= volumes, volumes
    # Other arguments need another Job: the template of a Job cannot be changed.
    over["dispatcher"]["maintenance"]["args"] = ["--restored"]
    other = next(one for one in rendered("single", over) if one["kind"] == "Job")
    assert other["metadata"]["name"] != job["metadata"]["name"]
    # A move to PostgreSQL has both stores.
    move = {"dispatcher": {"store": {"existingSecret": "s"}, "maintenance": {"args": ["--copy-store", "/etc/mayfly/store/url"]}}}
    job = next(one for one in rendered("single", move) if one["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    assert {"data", "store"} <= {one["name"] for one in pod["volumes"]}, pod
    assert {"name": "store", "mountPath": "/etc/mayfly/store", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert "MAYFLY__STORE__URL_FILE" not in str(pod), "the source must be the present store"
    assert not [one for one in rendered("single") if one["kind"] in ("Job", "CronJob")]

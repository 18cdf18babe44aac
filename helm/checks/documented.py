"""Pods in docs/: valid for every Kubernetes with native sidecars, and restricted."""

import copy
import re
from glob import glob

import kubernetes_validate
import yaml

from checks.tools import ROOT

# Native sidecars: https://kubernetes.io/docs/concepts/workloads/pods/sidecar-containers/
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]


def examples():
    """The blocks that are marked `yaml check`, with their files."""
    for file in sorted(glob(f"{ROOT}/docs/*.md")):
        for text in re.findall(r"^```yaml check\n(.*?)^```", open(file).read(), re.MULTILINE | re.DOTALL):
            for one in yaml.safe_load_all(text):
                yield file, one


def is_restricted(pod, container):
    """As the Pod Security Standard `restricted` wants it."""
    own, all_ = container["securityContext"], pod["securityContext"]
    return (own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
            and all_["runAsNonRoot"] is True and all_["seccompProfile"]["type"] == "RuntimeDefault")


def is_refused(one, version):
    try:
        kubernetes_validate.validate(one, version, strict=True)
    except kubernetes_validate.ValidationError:
        return True
    return False


def documented_pods_are_valid():
    count = 0
    for file, one in examples():
        for version in VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)
            wrong = copy.deepcopy(one)
            wrong["spec"]["initContainers"][0]["restartpolicy"] = "Always"
            assert is_refused(wrong, version), f"{file}: the validator accepts everything"
        pod = one["spec"]
        mounted = {mount["name"] for container in pod["initContainers"] + pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod["volumes"]}, f"{file}: volumes"
        for container in pod["initContainers"] + pod["containers"]:
            assert is_restricted(pod, container), f"{file}: {container['name']} is not restricted"
        for sidecar in pod["initContainers"]:
            # The next container starts when it is ready.
            assert sidecar["restartPolicy"] == "Always" and sidecar["startupProbe"], f"{file}: {sidecar['name']} is no sidecar"
            port = str(sidecar["startupProbe"]["httpGet"]["port"])
            assert any(argument.endswith(f":{port}") for argument in sidecar["args"]), f"{file}: nothing listens on {port}"
        count += 1
    assert count, "docs/ has no pod"
    return f"{count} against Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}"

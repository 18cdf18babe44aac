#!/usr/bin/env python3
"""kubectl, helm and skopeo for check.py, as far as the documents use them: a cluster is a directory
($CLUSTER), its Secrets are files in it, charts are rendered by Helm itself, and a pod is its program,
started with the environment and the files that the rendered chart gives it."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
import zlib
from glob import glob

import yaml

CLUSTER = os.environ["CLUSTER"]
TOOLS, BINARIES, ROOT = (os.environ[name] for name in ("TOOLS", "BINARIES", "ROOT"))
SECRETS, RELEASES, PODS, JOBS, IMAGES = (os.path.join(CLUSTER, name) for name in ("secrets", "releases", "pods", "jobs", "images"))


def die(message):
    sys.exit(f"error: {message}")


def loaded(path, otherwise):
    return json.load(open(path)) if os.path.exists(path) else otherwise


def saved(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    json.dump(value, open(path, "w"))


def run(*command, **options):
    return subprocess.run(command, text=True, check=True, **options)


def secret(name):
    """The entries of a Secret, in base64, or None."""
    return loaded(f"{SECRETS}/{name}", None)


def objects():
    return [one for file in sorted(glob(f"{RELEASES}/*")) for one in json.load(open(file))["objects"]]


def of_kind(kind, name=None):
    return [one for one in objects() if one["kind"] == kind and name in (None, one["metadata"]["name"])]


def hooks(one):
    return one["metadata"].get("annotations", {}).get("helm.sh/hook")


# A pod

def secrets_of(pod):
    return {volume["secret"]["secretName"]: volume["secret"] for volume in pod["volumes"] if "secret" in volume}


def program(name, pod, container=None):
    """A container's command and environment, with the pod's volumes laid out; what it mounts must be there."""
    container = container or pod["containers"][0]
    places = {}
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            directory = f"{CLUSTER}/volumes/{claim}"
            if not of_kind("PersistentVolumeClaim", claim) and not os.path.isdir(directory):
                die(f"{name}: there is no claim {claim}")
        else:
            directory = f"{PODS}/{name}/{volume['name']}"
            shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if "secret" in volume:
            held = secret(volume["secret"]["secretName"])
            items = volume["secret"].get("items") or [{"key": key, "path": key} for key in held]
            for item in items:
                if item["key"] not in held:
                    die(f"{name}: the Secret {volume['secret']['secretName']} has no {item['key']}")
                path = f"{directory}/{item['path']}"
                with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o400), "wb") as file:
                    file.write(base64.b64decode(held[item["key"]]))
        places.update({m["mountPath"]: directory for m in container["volumeMounts"] if m["name"] == volume["name"]})

    def here(text):
        for mount in sorted(places, key=len, reverse=True):
            if text == mount or text.startswith(f"{mount}/"):
                return places[mount] + text[len(mount):]
        return f"{BINARIES}{text}" if re.fullmatch("/mayfly[a-z-]*", text) else text

    # Public authorities know the certificates of *.example.com.
    environment = {"PATH": os.environ["PATH"], "SSL_CERT_FILE": os.environ["SSL_CERT_FILE"], "HOSTNAME": name}
    for variable in container.get("env", []):
        environment[variable["name"]] = here(variable.get("value", name))
    image = re.sub(r"[:@].*", "", container["image"].rpartition("/")[2])
    command = [here(one) for one in container.get("command", [f"/{image}"]) + container.get("args", [])]
    return command, environment


def pod_of(one):
    """The specification of an object's pods."""
    spec = one["spec"]
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return spec.get("template", one)["spec"]


def complete(name, job):
    """Runs a Job to its end."""
    pod = pod_of(job)
    with open(f"{PODS}/{name}.log", "w") as log:
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            command, environment = program(name, pod, container)
            done = subprocess.run(command, env=environment, cwd=CLUSTER, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=120)
            if done.returncode:
                break
    saved(f"{JOBS}/{name}", {"labels": job["metadata"].get("labels", {}), "status": done.returncode, "of": job})


def jobs(arguments):
    """The names of the Jobs that `job/NAME` or `-l LABEL=VALUE` names."""
    named = [one.partition("/")[2] for one in arguments if one.startswith("job/")]
    for label in [arguments[at + 1] for at, one in enumerate(arguments) if one == "-l"]:
        key, _, value = label.partition("=")
        named += [os.path.basename(file) for file in glob(f"{JOBS}/*") if json.load(open(file))["labels"].get(key) == value]
    if not named or not all(os.path.exists(f"{JOBS}/{name}") for name in named):
        die(f"there is no job of {' '.join(arguments)}")
    return named


def state_of(deployment):
    """Changes where the pods are to be replaced by an upgrade."""
    held = {name: secret(name) for name in secrets_of(pod_of(deployment))}
    return hashlib.sha256(json.dumps([pod_of(deployment), held], sort_keys=True).encode()).hexdigest()


def stop(name):
    pod = loaded(f"{PODS}/{name}.json", None)
    if pod:
        try:
            os.kill(pod["pid"], signal.SIGTERM)
            while open(f"/proc/{pod['pid']}/stat").read().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
        except (ProcessLookupError, FileNotFoundError):
            pass
        os.remove(f"{PODS}/{name}.json")


def start(replace=()):
    """Starts the pods whose Secrets are there; those that run stay, but for `replace`. One of each is enough here."""
    for cluster in of_kind("RabbitmqCluster"):
        for volume in cluster["spec"]["override"]["statefulSet"]["spec"]["template"]["spec"]["volumes"]:
            held, imported = secret(volume["secret"]["secretName"]), f"{CLUSTER}/imported"
            if held and not os.path.exists(imported):
                # Loaded once, when the node starts.
                text = base64.b64decode(held["definitions.json"]).decode()
                run("rabbitmqctl", "import_definitions", input=text, stdout=subprocess.DEVNULL)
                open(imported, "w").close()
    for deployment in of_kind("Deployment"):
        name, pod = deployment["metadata"]["name"], pod_of(deployment)
        if deployment["spec"].get("replicas") == 0:
            stop(name)
            continue
        running = loaded(f"{PODS}/{name}.json", None)
        if running and name not in replace or not all(secret(one) for one in secrets_of(pod)):
            continue
        stop(name)
        command, environment = program(name, pod)
        admin = 8471
        if "engine" in name:
            # All pods have one address here.
            admin = 8500 + zlib.crc32(name.encode()) % 1000
            environment["MAYFLY__ADMIN__LISTEN"] = f"127.0.0.1:{admin}"
        process = subprocess.Popen(command, env=environment, cwd=CLUSTER, stdin=subprocess.DEVNULL, start_new_session=True,
                                   stdout=open(f"{PODS}/{name}.log", "a"), stderr=subprocess.STDOUT)
        saved(f"{PODS}/{name}.json", {"pid": process.pid, "admin": admin, "state": state_of(deployment)})


    for job in of_kind("Job"):
        name = job["metadata"]["name"]
        if loaded(f"{JOBS}/{name}", {}).get("of") != job:
            complete(name, job)


# helm

def helm(arguments):
    namespace = "default"
    for flag in ("-n", "--namespace"):
        if flag in arguments:
            at = arguments.index(flag)
            namespace = arguments[at + 1]
            del arguments[at:at + 2]
    verb, *rest = arguments
    if verb in ("package", "lint", "show", "template"):
        for which in ("helm3", "helm4"):
            run(f"{TOOLS}/{which}", *arguments)
    elif verb == "push":
        if not os.path.exists(rest[0]):
            die(f"helm push: there is no {rest[0]}")
        saved(f"{CLUSTER}/charts/{rest[0]}", rest[1])
    elif verb in ("install", "upgrade"):
        install(verb, namespace, *rest)
    elif verb == "uninstall":
        (name,) = rest
        for deployment in of_kind("Deployment"):
            stop(deployment["metadata"]["name"])
        os.remove(f"{RELEASES}/{name}")
    elif verb == "test":
        for pod in of_kind("Pod"):
            if hooks(pod) == "test":
                name = pod["metadata"]["name"]
                command, environment = program(name, pod["spec"])
                # A person types slower than a dispatcher connects to RabbitMQ.
                tested = subprocess.run(command, env=environment, stdout=sys.stderr)
                until = time.monotonic() + 60
                while tested.returncode and time.monotonic() < until:
                    time.sleep(1)
                    tested = subprocess.run(command, env=environment, stdout=sys.stderr)
                tested.check_returncode()
    else:
        die(f"tests/documents/cluster.py does not know `helm {verb}`")


def install(verb, namespace, name, chart, *values):
    release, before = f"{RELEASES}/{name}", loaded(f"{RELEASES}/{name}", None)
    if (verb == "install") == bool(before):
        die(f"helm {verb}: the release {name} is {'there' if before else 'not there'}")
    values = list(values)
    if verb == "upgrade":
        told = run(f"{TOOLS}/helm3", "upgrade", "--help", stdout=subprocess.PIPE).stdout
        reuse = [value for value in values if "reuse-values" in value]
        for flag in reuse:
            if f"{flag} " not in told:
                die(f"helm upgrade has no {flag}")
        values = (before["values"] if reuse else []) + [value for value in values if value not in reuse]
        # Of one command's flags --set comes after --set-json; here the later command's comes after.
        for at, flag in reversed(list(enumerate(values))):
            if flag == "--set-json":
                key = values[at + 1].partition("=")[0]
                for earlier in reversed(range(at)):
                    if values[earlier] == "--set" and values[earlier + 1].startswith(f"{key}="):
                        del values[earlier:earlier + 2]
    shown = chart
    if chart.startswith("oci://"):
        at = values.index("--version")
        version = values[at + 1]
        published = {to.rstrip("/") + "/" + os.path.basename(file).rpartition("-")[0]
                     for file in glob(f"{CLUSTER}/charts/*-{version}.tgz") for to in [json.load(open(file))]}
        if chart not in published:
            die(f"no document has pushed {chart} {version}: {published}")
        del values[at:at + 2]
        shown = f"{ROOT}/helm/mayfly"
    made = []
    for which in ("helm3", "helm4"):
        done = run(f"{TOOLS}/{which}", "template", name, shown, "-n", namespace, "--api-versions", "rabbitmq.com/v1beta1",
                   *values, stdout=subprocess.PIPE)
        made.append([one for one in yaml.safe_load_all(done.stdout) if one])
    if made[0] != made[1]:
        die("Helm 3 and 4 make other objects")
    # What was pushed is what nodes pull.
    pushed = loaded(IMAGES, [])
    for one in made[0]:
        pod = pod_of(one) if one["kind"] in ("Deployment", "Job", "CronJob", "Pod") else {}
        for container in pod.get("containers", []):
            if pushed and container["image"] not in pushed:
                die(f"the image {container['image']} was not pushed: {pushed}")
    saved(release, {"values": values, "objects": made[0]})
    replace = [one["metadata"]["name"] for one in of_kind("Deployment")
               if loaded(f"{PODS}/{one['metadata']['name']}.json", {}).get("state") != state_of(one)]
    start(replace)
    if verb == "install":
        # The notes for an administrator, for check.py.
        done = run(f"{TOOLS}/helm3", "install", name, shown, "-n", namespace, "--dry-run=client", "--disable-openapi-validation",
                   *values, stdout=subprocess.PIPE)
        with open(f"{CLUSTER}/notes", "w") as notes:
            notes.write(done.stdout.partition("NOTES:\n")[2])


# kubectl

def kubectl(arguments):
    if arguments[0] in ("-n", "--namespace"):
        if not os.path.exists(f"{CLUSTER}/namespaces/{arguments[1]}"):
            die(f"there is no namespace {arguments[1]}")
        arguments = arguments[2:]
    verb, *rest = arguments
    if verb == "create" and rest[0] == "namespace":
        saved(f"{CLUSTER}/namespaces/{rest[1]}", {})
    elif verb == "create" and rest[:2] == ["secret", "generic"]:
        entries, printed = {}, "--dry-run=client" in rest
        for option in rest[3:]:
            if option.startswith("--from-file="):
                key, path = option.removeprefix("--from-file=").split("=") if option.count("=") == 2 else (None, option[12:])
                entries[key or os.path.basename(path)] = base64.b64encode(open(path, "rb").read()).decode()
            elif option.startswith("--from-literal="):
                key, value = option.removeprefix("--from-literal=").split("=", 1)
                entries[key] = base64.b64encode(value.encode()).decode()
            elif option not in ("--dry-run=client", "-o", "yaml", "json"):
                die(f"tests/documents/cluster.py does not know `{option}`")
        made = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": rest[2]}, "data": entries}
        if printed:
            print(json.dumps(made))
        else:
            keep(made, False)
    elif verb in ("create", "replace", "apply") and rest[0] == "-f":
        text = sys.stdin.read() if rest[1] == "-" else open(rest[1]).read()
        for one in yaml.safe_load_all(text):
            if one["kind"] == "PersistentVolumeClaim":
                os.makedirs(f"{CLUSTER}/volumes/{one['metadata']['name']}")
            elif one["kind"] == "Secret":
                keep(one, None if verb == "apply" else verb == "replace")
            else:
                die(f"tests/documents/cluster.py does not know a {one['kind']}")
    elif verb == "create" and rest[0] == "job":
        cron, (name,) = rest[1].removeprefix("--from=cronjob/"), rest[2:]
        if not of_kind("CronJob", cron):
            die(f"there is no CronJob {cron}")
        complete(name, of_kind("CronJob", cron)[0])
    elif verb == "wait":
        for name in jobs(rest):
            if loaded(f"{JOBS}/{name}", None)["status"]:
                die(f"the job {name} failed: {open(f'{PODS}/{name}.log').read()}")
    elif verb == "logs":
        for name in jobs(rest):
            sys.stdout.write(open(f"{PODS}/{name}.log").read())
    elif verb == "get" and rest[0] == "secret":
        held = secret(rest[1])
        if held is None:
            die(f"there is no Secret {rest[1]}")
        template = re.fullmatch(r"(?:-o )?go-template=\{\{index \.data \"(.+)\" \| base64decode\}\}", " ".join(rest[2:]))
        if not template:
            die(f"tests/documents/cluster.py does not know `{' '.join(rest[2:])}`")
        if template[1] not in held:
            die(f"the Secret {rest[1]} has no {template[1]}")
        sys.stdout.buffer.write(base64.b64decode(held[template[1]]))
    elif verb == "delete" and rest[0] == "secret":
        os.remove(f"{SECRETS}/{rest[1]}")
    elif verb == "rollout":
        deployments = of_kind("Deployment", rest[2] if len(rest) > 2 and not rest[2].startswith("-") else None)
        names = [one["metadata"]["name"] for one in deployments]
        if not names:
            die(f"there is no {' '.join(rest)}")
        if rest[0] == "restart":
            start(names)
        elif rest[0] == "status":
            for name in names:
                ready(name)
        else:
            die(f"kubectl rollout has no {rest[0]}")
    elif verb == "port-forward":
        name, _, ports = rest[0].partition("/")[2], None, rest[1]
        services = of_kind("Service", name)
        if not services or int(ports.rpartition(":")[2]) not in [one["port"] for one in services[0]["spec"]["ports"]]:
            die(f"there is no service {rest[0]} with port {ports}")
        # The pod is on loopback already.
    elif verb == "exec":
        at = rest.index("--")
        (name,) = [one for before, one in zip(["", *rest], rest[:at]) if not one.startswith("-") and before != "-c"]
        command = rest[at + 1:]
        if name in [f"{one['metadata']['name']}-server-0" for one in of_kind("RabbitmqCluster")]:
            run(*command)
        else:
            deployments = of_kind("Deployment", name.partition("/")[2])
            if not deployments:
                die(f"there is no pod of {name}")
            _, environment = program(f"{name.partition('/')[2]}-exec", pod_of(deployments[0]))
            run(f"{BINARIES}{command[0]}", *command[1:], env=environment)
    else:
        die(f"tests/documents/cluster.py does not know `kubectl {verb}`")


def keep(made, there):
    """Keeps a Secret; `there` says whether it must exist, or must not, or either."""
    name = made["metadata"]["name"]
    if there is not None and there != os.path.exists(f"{SECRETS}/{name}"):
        die(f"the Secret {name} is {'not there' if there else 'there already'}")
    saved(f"{SECRETS}/{name}", made["data"])
    start()


def ready(name):
    (container,) = [pod_of(one)["containers"][0] for one in of_kind("Deployment", name)]
    scheme = container["readinessProbe"]["httpGet"]["scheme"].lower()
    # A probe believes any certificate.
    believing = ssl._create_unverified_context()
    for _ in range(1200):
        pod = loaded(f"{PODS}/{name}.json", None)
        log = f"{PODS}/{name}.log"
        if pod and not os.path.exists(f"/proc/{pod['pid']}/cmdline"):
            die(f"{name} has ended: {open(log).read()[-2000:]}")
        try:
            if pod:
                def ask(path):
                    return urllib.request.urlopen(f"{scheme}://127.0.0.1:{pod['admin']}/{path}", timeout=5, context=believing).read().decode()

                ask("readyz")
                # A dispatcher is ready without RabbitMQ. Here a rollout is over before it has connected.
                if "mayfly_dispatcher_broker_up 0" not in ask("metrics"):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    die(f"{name} is not ready")


# Copies an image from an OCI layout that `make images` has made.
def skopeo(arguments):
    verb, source, to = arguments
    layout, _, tag = source.removeprefix("oci:").rpartition(":")
    version = yaml.safe_load(open(f"{ROOT}/helm/mayfly/Chart.yaml"))["appVersion"]
    name = os.path.basename(layout)
    if verb != "copy" or layout != f"target/images/oci/{name}" or f"AS {name}\n" not in open(f"{ROOT}/deploy/images/Dockerfile").read():
        die(f"`make images` makes no {source}")
    if tag != version or not to.endswith(f"/{name}:{version}"):
        die(f"the version is {version}, not that of {source} and {to}")
    saved(IMAGES, loaded(IMAGES, []) + [to.removeprefix("docker://")])


if __name__ == "__main__":
    tool = {"helm": helm, "kubectl": kubectl, "skopeo": skopeo}[os.path.basename(sys.argv[1])]
    try:
        tool(sys.argv[2:])
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.returncode)

"""Stands in for kubectl and a cluster, for the commands of docs/KUBERNETES.md and no others: what it does not know it refuses. Pods are run
by podman, as the kubelet would run them but for this:

- they have the machine's network: sshd gets another port and the loopback address, and 'port-forward' leads there;
- volumes, ConfigMaps and Secrets are directories of this machine;
- nothing enforces PodSecurity, the NetworkPolicy, seccompProfile and deadlines; the readiness probe is run by 'get'.

KUBECTL_STATE is a directory for all that a cluster would keep, KUBECTL_PODMAN the words of a podman command, as JSON, KUBECTL_IMAGE the
image that is run whatever a job names, KUBECTL_SSHD_CONFIG sshd's configuration."""

import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import threading

import yaml

sys.path.insert(0, os.environ["KUBECTL_RENDERER"])
from manifests import rendered  # noqa: E402

STATE = pathlib.Path(os.environ["KUBECTL_STATE"])


def podman(*words, **options):
    return subprocess.run([*json.loads(os.environ["KUBECTL_PODMAN"]), *words], text=True, **options)


def fail(text):
    sys.exit(f"error: {text}")


def place(kind, name):
    return STATE / kind / name


def create_object(kind, name, content):
    directory = place(kind, name)
    if directory.exists():
        fail(f'{kind} "{name}" already exists')
    directory.mkdir(parents=True)
    for key, text in content.items():
        (directory / key).write_text(text)
    print(f"{kind}/{name} created")


def content_of(options):
    content = {}
    for option in options:
        if match := re.fullmatch(r"--from-file=([\w.-]+)=(.+)", option):
            content[match[1]] = pathlib.Path(match[2]).read_text()
        elif (match := re.fullmatch(r"--from-file=(.+)", option)) and pathlib.Path(match[1]).is_dir():
            content |= {file.name: file.read_text() for file in pathlib.Path(match[1]).iterdir()}
        elif match := re.fullmatch(r"--from-env-file=(.+)", option):
            lines = pathlib.Path(match[1]).read_text().splitlines()
            content |= dict(line.split("=", 1) for line in lines)
        else:
            fail(f"unknown option {option}")
    return content


def create_job(job):
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job"), job
    name = job["metadata"]["generateName"] + "".join(random.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
    directory = place("jobs", name)
    directory.mkdir(parents=True)
    spec = job["spec"]["template"]["spec"]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = os.environ["KUBECTL_SSHD_CONFIG"].replace("Port 22\n", f"Port {port}\nListenAddress 127.0.0.1\n")
    (directory / "sshd_config").write_text(config)
    (directory / "port").write_text(str(port))
    spec["hostNetwork"] = True

    volumes = {}
    for volume in spec["volumes"]:
        volume_name = volume.pop("name")
        if "ephemeral" in volume:
            host = directory / "volume"
            host.mkdir()
        elif "persistentVolumeClaim" in volume:
            # The claim that a pod has made goes with it.
            host = place("jobs", volume["persistentVolumeClaim"]["claimName"].removesuffix("-image")) / "volume"
        elif "configMap" in volume:
            host = place("configmap", volume["configMap"]["name"])
        elif "secret" in volume:
            host = place("secret", volume["secret"]["secretName"])
        else:
            volumes[volume_name] = {"emptyDir": volume["emptyDir"]}
            continue
        assert host.is_dir(), f"{volume_name} is missing"
        volumes[volume_name] = {"hostPath": {"path": str(host), "type": "Directory"}}
    spec["volumes"] = [{"name": f"{name}-{volume}", **what} for volume, what in volumes.items()]
    spec["volumes"].append({"name": f"{name}-sshd", "hostPath": {"path": str(directory), "type": "Directory"}})

    for container in spec.get("initContainers", []) + spec["containers"]:
        assert "@sha256:" in container["image"], container["image"]
        container["image"] = os.environ["KUBECTL_IMAGE"]
        container["imagePullPolicy"] = "Never"
        for mount in container["volumeMounts"]:
            mount["name"] = f"{name}-{mount['name']}"
        for source in container.pop("envFrom", []):
            named = {variable["name"] for variable in container["env"]}
            for file in place("secret", source["secretRef"]["name"]).iterdir():
                if file.name in named:
                    continue
                container["env"].append({"name": file.name, "value": file.read_text()})
        for variable in container["env"]:
            if source := variable.pop("valueFrom", {}).get("secretKeyRef"):
                variable["value"] = (place("secret", source["name"]) / source["key"]).read_text()
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        expanded = lambda word: re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word)
        if "command" in container:
            container["command"] = [expanded(word) for word in container["command"]]
        container.pop("livenessProbe", None)
        container.pop("ports", None)
        if probe := container.pop("readinessProbe", None):
            (directory / "probe").write_text(json.dumps([container["name"], probe["exec"]["command"]]))
        if "sidecar" in container.get("command", []):
            container["command"] += ["--sshd-config", "/sshd/sshd_config"]
            container["volumeMounts"].append({"name": f"{name}-sshd", "mountPath": "/sshd", "readOnly": True})
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    (directory / "pod.json").write_text(json.dumps(pod))
    podman("play", "kube", "--quiet", str(directory / "pod.json"), check=True, stdout=subprocess.DEVNULL)
    print(f"job.batch/{name}")


def name_of(job):
    match = re.fullmatch(r"job\.batch/(.+)", job)
    if not match or not place("jobs", match[1]).is_dir():
        fail(f"{job} not found")
    return match[1]


def containers(name):
    spec = json.loads((place("jobs", name) / "pod.json").read_text())["spec"]
    return [container["name"] for container in spec["containers"]]


def state(job):
    """What the page asks of a job's status: how many pods are ready, and which conditions hold."""
    name = name_of(job)
    states = [json.loads(podman("inspect", "--format", "{{json .State}}", f"{name}-{container}",
                                check=True, capture_output=True).stdout) for container in containers(name)]
    if any(not state["Running"] and state["ExitCode"] for state in states):
        # Kubernetes waits for the other containers.
        return " FailureTarget" if any(state["Running"] for state in states) else " FailureTarget Failed"
    if not any(state["Running"] for state in states):
        return " SuccessCriteriaMet Complete"
    if not all(state["Running"] for state in states):
        return " "
    if not (probe := place("jobs", name) / "probe").exists():
        return "1 "
    container, command = json.loads(probe.read_text())
    return f"{int(podman('exec', f'{name}-{container}', *command, capture_output=True).returncode == 0)} "


def port_forward(job, here):
    there = int((place("jobs", name_of(job)) / "port").read_text())

    def copy(source, target):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", here)) as listener:
        print(f"Forwarding from 127.0.0.1:{here} -> 22", flush=True)
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", there))
            for pair in [(client, server), (server, client)]:
                threading.Thread(target=copy, args=pair, daemon=True).start()


def main(words):
    match words:
        case ["create", "namespace", name]:
            create_object("namespace", name, {})
        case ["label", "namespace", name, label] if place("namespace", name).is_dir() and "=" in label:
            print(f"namespace/{name} labeled")
        case ["config", "set-context", "--current", namespace] if namespace.startswith("--namespace="):
            print("Context modified.")
        case ["create", "configmap", name, *options]:
            create_object("configmap", name, content_of(options))
        case ["create", "secret", "generic", name, *options]:
            create_object("secret", name, content_of(options))
        case ["apply", "-f", file]:
            for one in yaml.safe_load_all(sys.stdin) if file == "-" else rendered(pathlib.Path(file)):
                print(f"{one['kind'].lower()}/{one['metadata']['name']} created")
        case ["kustomize", directory]:
            # As kustomize prints it: two blanks before what lies in 'metadata'.
            print(yaml.safe_dump_all(rendered(pathlib.Path(directory)), sort_keys=False))
        case ["create", "-f", "-", "-o", "name"]:
            for one in yaml.safe_load_all(sys.stdin):
                create_job(one)
        case ["get", job, "-o", "jsonpath={.status.ready} {.status.conditions[*].type}"]:
            print(state(job), end="")
        case ["get", "pods", selector, "-o", path] if selector.startswith("--selector=job-name=") and "waiting" in path:
            if not state("job.batch/" + selector.rsplit("=", 1)[1]).startswith("1"):
                print("containers with unready status: [sshd]")
        case ["get", "pods", selector, "-o", "name"] if selector.startswith("--selector=job-name="):
            print("pod/" + name_of("job.batch/" + selector.rsplit("=", 1)[1]))
        case ["exec", job, "-c", container, "--", *command]:
            sys.exit(podman("exec", f"{name_of(job)}-{container}", *command).returncode)
        case ["port-forward", job, ports] if ports.endswith(":22"):
            port_forward(job, int(ports.removesuffix(":22")))
        case ["logs", job, "-c", container]:
            sys.exit(podman("logs", f"{name_of(job)}-{container}", stderr=subprocess.STDOUT).returncode)
        case ["logs", job, "--all-containers", "--tail=20"]:
            for container in containers(name_of(job)):
                podman("logs", "--tail=20", f"{name_of(job)}-{container}", stderr=subprocess.STDOUT)
        case ["patch", job, "--type=merge", "-p", patch] if list(json.loads(patch)) == ["spec"]:
            print(f"job.batch/{name_of(job)} patched")
        case ["delete", "networkpolicy,service", name]:
            print(f'"{name}" deleted')
        case ["delete", job]:
            name = name_of(job)
            podman("pod", "rm", "--force", "--time=0", name, check=True, stdout=subprocess.DEVNULL)
            print(f'job.batch "{name.rsplit("/")[-1]}" deleted')
        case _:
            fail(f"unknown command {words}")


main(sys.argv[1:])

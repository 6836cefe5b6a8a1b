"""Prints what 'kubectl kustomize' would make of the folder that is named, as JSON, of what the manifests here use of kustomize:
resources, patches in JSON, and names of images. With --validate, checks it against the schemas of Kubernetes 1.31 and of the newest."""

import json
import pathlib
import sys

import yaml


def rendered(folder):
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "patches", "images"}
    assert set(kustomization) <= known, f"{folder}: {set(kustomization) - known} is not known here"
    objects = []
    for resource in kustomization["resources"]:
        path = folder / resource
        objects += rendered(path) if path.is_dir() else filter(None, yaml.safe_load_all(path.read_text()))
    # Anchors make one object of two.
    objects = json.loads(json.dumps(objects))
    for patch in kustomization.get("patches", []):
        target = patch["target"]
        found = [o for o in objects if o["kind"] == target["kind"] and o["metadata"]["name"] == target["name"]]
        assert len(found) == 1, f"{folder}: {target} is {len(found)} objects"
        for step in yaml.safe_load(patch["patch"]):
            apply(found[0], step)
    for image in kustomization.get("images", []):
        for container in containers(objects):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


def apply(target, step):
    *way, last = step["path"].strip("/").split("/")
    for name in way:
        target = target[int(name) if isinstance(target, list) else name]
    if isinstance(target, list):
        assert step["op"] == "replace", step
        target[int(last)] = step["value"]
    else:
        assert (last in target) == (step["op"] == "replace"), step
        target[last] = step["value"]


def containers(objects):
    for job in (o for o in objects if o["kind"] == "Job"):
        spec = job["spec"]["template"]["spec"]
        yield from spec.get("initContainers", []) + spec["containers"]


def main():
    *options, folder = sys.argv[1:]
    objects = rendered(pathlib.Path(folder))
    if "--validate" in options:
        import kubernetes_validate

        for version in ["1.31", kubernetes_validate.latest_version()]:
            for one in objects:
                kubernetes_validate.validate(one, version, strict=True)
    print(json.dumps(objects))


main()

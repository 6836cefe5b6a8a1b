"""Prints what 'kubectl kustomize' would make of the directory or file that is named, as JSON, of what the manifests here use of kustomize:
resources, components, strategic merge patches, the namespace, names of images, and ConfigMaps of files. With --validate=VERSION, which may come several times,
checks it against the schemas of that version of Kubernetes, or of the 'newest' one."""

import json
import pathlib
import sys

import yaml

# The field by which items of a list are told apart; other lists are replaced as a whole.
KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}


def rendered(place):
    if place.is_file():
        return json.loads(json.dumps([o for o in yaml.safe_load_all(place.read_text()) if o]))
    kustomization = yaml.safe_load((place / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "components", "patches", "images", "namespace"}
    known |= {"configMapGenerator", "generatorOptions"}
    assert set(kustomization) <= known, f"{place}: {set(kustomization) - known} is not known here"
    objects = [o for resource in kustomization["resources"] for o in rendered(place / resource)]
    objects += map(config_map(place, kustomization), kustomization.get("configMapGenerator", []))
    for component in kustomization.get("components", []):
        patch_objects(objects, place / component)
    patch_objects(objects, place)
    for image in kustomization.get("images", []):
        for container in containers(objects):
            if container["image"].split(":")[0].split("@")[0] == image["name"]:
                name = image.get("newName", image["name"])
                container["image"] = f"{name}@{image['digest']}" if "digest" in image else f"{name}:{image['newTag']}"
    if namespace := kustomization.get("namespace"):
        for one in objects:
            one["metadata"]["namespace"] = namespace
    return objects


def config_map(place, kustomization):
    """A function that makes a ConfigMap of the files in an entry of configMapGenerator."""

    def made(entry):
        # Other names would have a hash of the content.
        assert kustomization["generatorOptions"] == {"disableNameSuffixHash": True}, place
        files = [place / name for name in entry["files"]]
        metadata = {"name": entry["name"], "namespace": entry["namespace"]}
        data = {file.name: file.read_text() for file in files}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}

    return made


def patch_objects(objects, place):
    """Applies the patches of a kustomization, or of a component, which has nothing else."""
    named = lambda o: (o["kind"], o["metadata"]["name"])
    for patch in yaml.safe_load((place / "kustomization.yaml").read_text()).get("patches", []):
        target, patch = patch.get("target"), yaml.safe_load(patch["patch"])
        is_meant = lambda o: o["kind"] == target["kind"] if target else named(o) == named(patch)
        found = [o for o in objects if is_meant(o)]
        assert len(found) == 1, f"{place}: {named(patch)} is {len(found)} objects"
        if patch.get("$patch") == "delete":
            objects.remove(found[0])
        else:
            merge(found[0], patch | {"metadata": {}} if target else patch)


def merge(target, patch):
    for field, value in patch.items():
        if value is None:
            target.pop(field, None)
        elif isinstance(value, dict) and isinstance(target.get(field), dict):
            merge(target[field], value)
        elif field in KEYS and isinstance(target.get(field), list):
            target[field] = merged_lists(target[field], value, KEYS[field])
        else:
            target[field] = value


def merged_lists(items, patches, key):
    """The patches' items come first, as kustomize has them."""
    by_key = {item[key]: item for item in items}
    for patch in patches:
        merge(by_key.setdefault(patch[key], {}), patch)
    first = [patch[key] for patch in patches]
    return [by_key[k] for k in first] + [item for item in items if item[key] not in first]


def containers(objects):
    for job in (o for o in objects if o["kind"] in ("Job", "Deployment")):
        spec = job["spec"]["template"]["spec"]
        yield from spec.get("initContainers", []) + spec["containers"]


def main():
    *options, place = sys.argv[1:]
    objects = rendered(pathlib.Path(place))
    for option in options:
        import kubernetes_validate

        version = option.removeprefix("--validate=").replace("newest", kubernetes_validate.latest_version())
        for one in objects:
            kubernetes_validate.validate(one, version, strict=True)
    print(json.dumps(objects))


if __name__ == "__main__":
    main()

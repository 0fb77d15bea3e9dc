"""Plays gcloud, xpk and kubectl by the name it is called by, and notes every call.

What there is, is a file beside the folder of the commands: tests change it, and so do
the commands. `World` is the tests' side of it.
"""

import json
import os
import pathlib
import sys


class World:
    """Makes the commands in FOLDER/bin."""

    def __init__(self, folder, *programs, **things):
        self.folder = folder
        self.change(things)
        (folder / "bin").mkdir()
        for program in programs:
            path = folder / "bin" / program
            path.write_text(f"#!{sys.executable}\n{pathlib.Path(__file__).read_text()}")
            path.chmod(0o755)

    def read(self):
        return json.loads((self.folder / "world").read_text())

    def change(self, things=None, **some):
        things = {**self.read(), **some} if things is None else things
        (self.folder / "world").write_text(json.dumps(things))

    def calls(self):
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]


def gcloud(world, words, flags):
    assert words[:3] == ["compute", "tpus", "queued-resources"], words
    assert flags["project"] == "p" and flags["zone"] == "us-east5-b"
    slices, verb, name = world["slices"], words[3], words[4]
    if verb == "create":
        assert name not in slices and "--async" in words and flags["node-id"] == name
        script = pathlib.Path(flags["metadata-from-file"].partition("=")[2])
        labels = dict(pair.split("=") for pair in flags["labels"].split(","))
        slices[name] = {
            "name": f"projects/p/locations/us-east5-b/queuedResources/{name}",
            "state": {"state": "WAITING_FOR_RESOURCES"},
            "tpu": {"nodeSpec": [{"node": {"labels": labels}}]},
            "script": script.read_text(),
        }
    elif verb == "delete":
        assert {"--force", "--async", "--quiet"} <= set(words)
        if slices.get(name, {"state": {"state": "DELETING"}})["state"]["state"] == (
            "DELETING"
        ):
            sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: no such resource")
        del slices[name]
    elif verb == "list":
        assert flags["format"] == "json"
        assert flags["filter"] == "tpu.nodeSpec.node.labels.launcher=diffusionlab"
        print(json.dumps(list(slices.values())))
    else:
        sys.exit(f"unexpected: gcloud {words}")


def xpk(world, words, flags):
    name = flags["workload"]
    if words[:2] == ["workload", "create"]:
        assert name not in world["jobsets"], "it is there already"
        jobset = {"metadata": {"name": name}, "spec": {"suspend": True}}
        world["jobsets"][name] = jobset
    elif words[:2] == ["workload", "delete"]:
        if world["jobsets"].pop(name, None) is None:
            print("[XPK] Error: not found")
            sys.exit(1)
    else:
        sys.exit(f"unexpected: xpk {words}")


def kubectl(world, words, flags):
    if words == ["config", "get-contexts", "-o", "name"]:
        print("\n".join(["gke_p_us-west1_c1", *world["contexts"]]))
        return
    assert words[2] == "get" and words[-2:] == ["-o", "json"], words
    assert flags["context"] == "gke_p_us-east5_c1" and flags["namespace"] == "default"
    label, _, name = flags["selector"].partition("=")
    assert label == "xpk.google.com/workload"
    jobsets = world["jobsets"].values()
    items = world["pods"].get(name, []) if words[3] == "pods" else jobsets
    print(json.dumps({"items": list(items)}))


def play(path, words):
    folder = path.parent.parent
    with (folder / "calls").open("a") as file:
        file.write(json.dumps([path.name, *words]) + "\n")
    world = json.loads((folder / "world").read_text())
    if world["refuses"] and world["refuses"] in " ".join([path.name, *words]):
        sys.exit("ERROR: PERMISSION_DENIED: not allowed")
    flags = dict(word[2:].split("=", 1) for word in words if "=" in word)
    {"gcloud": gcloud, "xpk": xpk, "kubectl": kubectl}[path.name](world, words, flags)
    (folder / "world").write_text(json.dumps(world))


if __name__ == "__main__":
    play(pathlib.Path(os.path.abspath(sys.argv[0])), sys.argv[1:])

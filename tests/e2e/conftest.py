"""One demo cluster for the whole folder, and what must hold once everything in it has happened."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane import Binaries
from demo_cluster import DemoCluster, Options
from finetune_operator.api import crd
from tests.apiserver.conftest import binaries
from tests.e2e.world import World
from tests.trainer_jobs import save_tiny_model, write_dataset

__all__ = ["binaries", "no_secret_is_told", "world"]

HF_TOKEN = "hf_plantedTokenThatNobodyMaySee"
_JWT = re.compile(r"eyJ[\w-]{10,}\.[\w-]{10,}")


@pytest.fixture(scope="session")
def world(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The cluster; a tiny model is in a bucket, with a data set, and in the mirror of hub models."""
    folder = tmp_path_factory.mktemp("e2e")
    tiny = save_tiny_model(folder / "hub" / "acme" / "tiny")
    shutil.copytree(tiny, folder / "data" / "models" / "tiny")
    (folder / "data" / "data").mkdir()
    write_dataset(folder / "data" / "data" / "qa.jsonl", repeat=4)
    path = folder / crd.FILE_NAME
    path.write_text(crd.render())
    options = Options(crd=path, mirror=folder / "hub", data=folder / "data", gpus=2, cpu="16")
    with DemoCluster(options, binaries=binaries) as cluster:
        cluster.create_secret("hf", {"token": HF_TOKEN})
        found = World(cluster, folder)
        yield found
        assert cluster.failure() == ""
        no_secret_is_told(found)


def no_secret_is_told(world: World) -> None:
    """The planted secrets, and tokens of any kind, are in no log of the operator, no event and no status."""
    places = {"the operator's log": world.cluster.operator.logs()}
    for kind in ("events", "ftj", "pytorchjobs", "pods", "configmaps"):
        for one in world.get(kind, "-A")["items"]:
            if one["metadata"]["name"] != "kube-root-ca.crt":
                places[f"{kind} {one['metadata']['name']}"] = json.dumps(one)
    for path in Path(world.cluster.folder / "node" / "logs").glob("*.log"):
        places[path.name] = path.read_text()
    assert any(name.startswith("events ") for name in places), "there was nothing to look at"
    secrets = (HF_TOKEN, world.cluster.s3.credentials_env()["AWS_SECRET_ACCESS_KEY"])
    told = [name for name, text in places.items() if any(one in text for one in secrets) or _JWT.search(text)]
    assert told == []
    assert "Traceback" not in places["the operator's log"]

"""Which processes a node starts."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from finetune_trainer import topology as module
from finetune_trainer.topology import Topology, TopologyError, count_gpus


@pytest.fixture(autouse=True)
def no_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_one_node_with_nothing_set() -> None:
    topology = Topology.from_env({})
    assert (topology.nodes, topology.node_rank, topology.processes, topology.world_size) == (1, 0, 1, 1)
    assert topology.master_address == "127.0.0.1"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", topology.master_port))


def test_many_nodes() -> None:
    topology = Topology.from_env(
        {
            "PET_NNODES": "4:4",
            "PET_NPROC_PER_NODE": "8",
            "PET_NODE_RANK": "3",
            "RANK": "1",
            "PET_MASTER_ADDR": "job-master-0",
            "PET_MASTER_PORT": "23456",
        }
    )
    assert (topology.world_size, topology.rank(5)) == (32, 29)
    assert (topology.master_address, topology.master_port) == ("job-master-0", 23456)
    environment = topology.environment(5, {"RANK": "3", "WORLD_SIZE": "4", "KEPT": "yes", "OMP_NUM_THREADS": "7"})
    assert environment == {
        "KEPT": "yes",
        "OMP_NUM_THREADS": "7",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RANK": "29",
        "LOCAL_RANK": "5",
        "WORLD_SIZE": "32",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "3",
        "MASTER_ADDR": "job-master-0",
        "MASTER_PORT": "23456",
    }


def test_one_node_meets_on_the_loopback_interface_at_the_given_port() -> None:
    topology = Topology.from_env({"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"})
    assert (topology.master_address, topology.master_port) == ("127.0.0.1", 23456)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PET_NNODES": "1:4"}, "PET_NNODES='1:4'"),
        ({"PET_NNODES": "0"}, "PET_NNODES='0'"),
        ({"PET_NNODES": ""}, "PET_NNODES=''"),
        ({"PET_NPROC_PER_NODE": "-1"}, "PET_NPROC_PER_NODE='-1'"),
        ({"PET_NPROC_PER_NODE": "0"}, "auto, gpu, cpu"),
        ({"PET_NPROC_PER_NODE": "gpu"}, "no GPU is visible"),
        ({"PET_NODE_RANK": "1"}, "PET_NODE_RANK=1 does not fit PET_NNODES=1"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"PET_NNODES": "2", "MASTER_ADDR": "a"}, "MASTER_PORT"),
        ({"PET_NNODES": "2", "MASTER_PORT": "1"}, "MASTER_ADDR"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    ],
)
def test_what_does_not_fit_is_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Topology.from_env({"CUDA_VISIBLE_DEVICES": "", **environment})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "count"), [("0,1,2", 3), ("GPU-abc", 1), ("", 0), ("-1", 0), ("0,-1,2", 1), ("1, 0", 2)]
)
def test_visible_devices_are_counted_as_cuda_does(visible: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}, devices=tmp_path) == count


def test_device_files_are_counted(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-modeset", "null"):
        (tmp_path / name).touch()
    assert count_gpus({}, devices=tmp_path) == 2


@pytest.mark.parametrize(("script", "count"), [("echo 'GPU 0: x'; echo 'GPU 1: y'; echo '  MIG'", 2), ("exit 9", 0)])
def test_without_device_files_nvidia_smi_is_asked(
    script: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    assert count_gpus({}, devices=tmp_path / "empty") == count


@pytest.mark.parametrize(("visible", "nproc", "processes"), [("0,1", "auto", 2), ("", "auto", 1), ("0,1", "cpu", 1)])
def test_words_for_processes(visible: str, nproc: str, processes: int) -> None:
    environment = {"PET_NPROC_PER_NODE": nproc, "CUDA_VISIBLE_DEVICES": visible}
    assert Topology.from_env(environment).processes == processes


def test_threads_share_the_cores() -> None:
    cores = module.cores()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert Topology.from_env({"PET_NPROC_PER_NODE": "1"}).threads == cores
    assert Topology.from_env({"PET_NPROC_PER_NODE": "1000"}).threads == 1

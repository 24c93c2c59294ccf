"""Nothing that a stranger wrote is unpickled: weights, optimizer states, indices of shards, caches."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save

from finetune_trainer.contract import ModelLayout, TrainerConfig, select
from finetune_trainer.contract.vocabulary import Merge
from finetune_trainer.data.samples import SampleStore
from finetune_trainer.data.sources import resolve_sources
from finetune_trainer.datafiles import data_suffix
from finetune_trainer.distributed.deepspeed import ZeroSharding
from finetune_trainer.distributed.enumerations import member
from finetune_trainer.distributed.shard_files import load_shards
from finetune_trainer.errors import DataError, InputMissing, UsageError
from finetune_trainer.explain import explain
from finetune_trainer.layers import layout_of
from finetune_trainer.model import empty_model, load_model, read_config
from tests.trainer_jobs import fit, save_tiny_model, trainer_config, write_dataset


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the-pickle-ran"


def test_the_trap_works(marker: Path, tmp_path: Path) -> None:
    torch.save(Trap(marker), tmp_path / "trap.pt")
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert marker.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainerConfig]:
    """A folder with a model and a checkpoint of its training."""
    folder = tmp_path_factory.mktemp("trained")
    save_tiny_model(folder / "model")
    config = trainer_config(
        folder / "model",
        write_dataset(folder / "data.jsonl"),
        training={"max_steps": 2},
        checkpoints={"every": 1},
    )
    fit(folder / "model", config, folder / "whole")
    return folder, config


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_pickle_in_it_is_not_continued_from(
    trained: tuple[Path, TrainerConfig], name: str, marker: Path, tmp_path: Path
) -> None:
    folder, config = trained
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(folder / "whole" / "checkpoint-1", checkpoint)
    assert (checkpoint / name).exists(), "a file that is read"
    torch.save(Trap(marker), checkpoint / name)
    with pytest.raises(pickle.UnpicklingError):
        fit(folder / "model", config, tmp_path / "again", resume=checkpoint)
    assert not marker.exists()


@pytest.fixture
def group() -> Iterator[None]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_state_of_deepspeed_with_a_pickle_in_it_is_not_read(group: None, marker: Path, tmp_path: Path) -> None:
    torch.save({"loss_scaler": Trap(marker)}, tmp_path / "optimizer_0.pt")
    sharding = object.__new__(ZeroSharding)
    with pytest.raises(pickle.UnpicklingError):
        sharding.load_optimizer(cast(Any, SimpleNamespace()), tmp_path)
    assert not marker.exists()


class Asks:
    """Written as Python before 3.11.4 writes a member of an enumeration: `getattr(of, name)`."""

    def __init__(self, of: object, name: str) -> None:
        self.asked = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.asked


class OldPython(pickle.Pickler):
    """Writes all of them so."""

    def reducer_override(self, one: Any) -> Any:
        return (getattr, (type(one), one.name)) if isinstance(one, Enum) else NotImplemented


class Deepspeed:
    """Whatever state it is given to go on from."""

    def load_state_dict(self, states: list[Any], **_: Any) -> None:
        (self.state,) = states


def test_members_of_enumerations_are_read_from_any_python(group: None, tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"zero_stage": Asks(ZeroStageEnum, "gradients")}, tmp_path / "optimizer_0.pt")
    sharding: Any = object.__new__(ZeroSharding)
    sharding._engine = SimpleNamespace(optimizer=Deepspeed())
    sharding.load_optimizer(cast(Any, SimpleNamespace()), tmp_path)
    assert sharding._engine.optimizer.state == {"zero_stage": ZeroStageEnum.gradients}

    save({"a": torch.arange(2.0)}, checkpoint_id=tmp_path / "shards")
    index = tmp_path / "shards" / ".metadata"
    written = io.BytesIO()
    OldPython(written).dump(pickle.loads(index.read_bytes()))
    index.write_bytes(written.getvalue())
    assert b"getattr" in written.getvalue()
    found = {"a": torch.zeros(2)}
    load_shards(found, tmp_path / "shards")
    assert found["a"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("of", "name"),
    [(Path, "touch"), (Path.cwd(), "touch"), (Merge, "mro"), (Merge, "__members__"), (Merge, "nothing")],
    ids=["a method", "of an object", "a method of an enumeration", "its insides", "no member"],
)
def test_getattr_finds_members_of_enumerations_and_nothing_else(of: object, name: str) -> None:
    assert member(Merge, "NONE") is Merge.NONE
    with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
        member(of, name)


def test_shards_with_a_pickle_in_them_are_not_read(group: None, marker: Path, tmp_path: Path) -> None:
    state = {"exp_avg": torch.arange(3.0), "step": 7, "betas": (0.9, 0.99)}
    save(dict(state), checkpoint_id=tmp_path / "honest")
    found = {"exp_avg": torch.zeros(3), "step": 0, "betas": (0.0, 0.0)}
    load_shards(found, tmp_path / "honest")
    assert found["step"] == 7 and found["betas"] == (0.9, 0.99) and torch.equal(found["exp_avg"], torch.arange(3.0))

    save({**state, "step": Trap(marker)}, checkpoint_id=tmp_path / "value")
    with pytest.raises(pickle.UnpicklingError, match=r"Unsupported|Weights only"):
        load_shards({"exp_avg": torch.zeros(3), "step": 0, "betas": (0.0, 0.0)}, tmp_path / "value")

    (tmp_path / "honest" / ".metadata").write_bytes(pickle.dumps(Trap(marker)))
    with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
        load_shards({"exp_avg": torch.zeros(3)}, tmp_path / "honest")
    assert not marker.exists()


def test_an_index_of_shards_names_no_file_elsewhere(group: None, tmp_path: Path) -> None:
    save({"a": torch.zeros(2)}, checkpoint_id=tmp_path / "c")
    index = tmp_path / "c" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    (info,) = metadata.storage_data.values()
    info.relative_path = "../../secret"
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match="names the file"):
        load_shards({"a": torch.zeros(2)}, tmp_path / "c")


def test_who_finds_a_pickle_is_told_what_to_do() -> None:
    explained = explain(pickle.UnpicklingError("Weights only load failed"))
    assert isinstance(explained, UsageError) and explained.reason == "UnsafeCheckpoint"
    assert "checkpoints.resume: never" in explained.message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused(
    trained: tuple[Path, TrainerConfig], name: str, marker: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained[0] / "model", model)
    (model / "model.safetensors").unlink()
    torch.save(Trap(marker), model / name)
    with pytest.raises(InputMissing, match="pickled weights"):
        read_config(model)
    # Also where somebody looks away: use_safetensors holds at loading.
    layout: ModelLayout = layout_of(empty_model(read_config(trained[0] / "model")))
    with pytest.raises(InputMissing, match="cannot be read"):
        load_model(model, trained[1], layout, select(layout, trained[1].method, None), torch.device("cpu"))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["offsets.npy", "labels.npy"])
def test_prepared_data_are_never_unpickled(name: str, marker: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "offsets.npy", np.array([0, 1]))
    (tmp_path / "tokens.i32").write_bytes(b"\0" * 4)
    (tmp_path / "trained.u8").write_bytes(b"\0")
    np.save(tmp_path / name, np.array([Trap(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        SampleStore.open(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pt", "a.npy", "a.py", "a.arrow", "a.zip", "a.tar.gz", "a.h5"])
def test_data_sets_are_text_and_parquet(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(json.dumps({"text": "a"}).encode())
    assert data_suffix(name) == ""
    config = trainer_config(tmp_path, tmp_path / name).dataset
    with pytest.raises(DataError, match="holds no data file"):
        resolve_sources(config, lambda uri: [tmp_path / name])

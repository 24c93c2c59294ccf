"""One of several processes that carry out jobs one after the other: imports, which take longest, are paid once.

Its arguments are JOBS.json and OUT: JOBS holds a list of `{"name", "config", "stopAtLook", "compiler"}`; for each of
them `OUT/<name>-<rank>.json` says how it ended. A compiler is the backend that torch.compile has meanwhile.
`tests.local.pod` starts it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune_trainer import logs, train
from finetune_trainer.__main__ import _calm_libraries
from finetune_trainer.context import RunContext
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.explain import explain
from finetune_trainer.preemption import StopRequest
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.storage import ObjectStore
from finetune_trainer.workspace import Workspace
from tests.compiling import compile_by

SECONDS_PER_JOB = 150.0


class TerminatedAtLook(StopRequest):
    """Sends this process a real SIGTERM when somebody looks for the n-th time, which the handler notes."""

    def __init__(self, look: int | None) -> None:
        super().__init__()
        self.look = look
        signal.signal(signal.SIGTERM, self.handle)

    @property
    def requested(self) -> bool:
        if self.look is not None:
            self.look -= 1
            if self.look < 0:
                self.look = None
                signal.raise_signal(signal.SIGTERM)
        return super().requested


@contextmanager
def compiling_by(backend: str | None) -> Iterator[None]:
    """None: as ever."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        if backend is not None:
            torch._dynamo.reset()
            compile_by(patch, backend)
        # torch 2.13 says so of itself, when it traces a function with gradients of its own, and when it looks for those
        # of what a block is given.
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "<class 'torch.autograd.function.Function'> should", DeprecationWarning)
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


def carry_out(job: dict[str, Any], folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Run one job; what became of it. Only the last rank is asked to stop: all have to agree."""
    config = TrainerConfig.model_validate(job["config"])
    context = RunContext(
        workspace=Workspace.at(folder),
        store=ObjectStore(config.s3),
        progress=ProgressReporter(),
        stop=TerminatedAtLook(job.get("stopAtLook") if rank == world_size - 1 else None),
        rank=rank,
        local_rank=rank,
        world_size=world_size,
    )
    try:
        result = train.run(config, context)
    except Exception as error:
        failure = explain(error)
        return {
            "ok": False,
            "reason": failure.reason,
            "message": failure.message,
            "step": failure.step,
            "traceback": traceback.format_exc(),
        }
    finally:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
    return {"ok": True, "result": json.loads(result.to_json())}


def main(arguments: Sequence[str]) -> None:
    """Work through the jobs, in one group of processes: DeepSpeed remembers the first that it sees."""
    jobs, out = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    logs.configure(rank)
    _calm_libraries(world_size)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo")
    for job in jobs:
        # A collective that not all ranks enter waits for an hour: rather say where.
        faulthandler.dump_traceback_later(SECONDS_PER_JOB, exit=True)
        with compiling_by(job.get("compiler")):
            ended = carry_out(job, out / job["name"], rank, world_size)
        (out / f"{job['name']}-{rank}.json").write_text(json.dumps(ended))

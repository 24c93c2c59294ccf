"""What of this machine a run uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune_operator.local.options import RunOptions
from finetune_operator.local.process_plan import Machine
from finetune_operator.local.run_directory import RunDirectory

MIRROR_VARIABLE = "FINETUNE_MODEL_MIRROR"
# What a pod gets from its spec, or must not have from whoever started us.
_NOT_INHERITED = ("PET_", "KUBEFLOW_", "TORCHELASTIC_", "FINETUNE_", "LOCAL_", "GROUP_", "ROLE_")
_NOT_INHERITED_NAMES = frozenset({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"})


def this_machine(options: RunOptions, directory: RunDirectory, environ: Mapping[str, str]) -> Machine:
    """The machine as pods see it: this Python in place of an image's, and this user's environment.

    The user's cache of the model hub is used, so that a model is downloaded once and not for each attempt, and the
    user's own OMP_NUM_THREADS; without it the cores are shared out.
    """
    overrides = {
        "HF_HOME": environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface"),
        "FINETUNE_LOG_FORMAT": "text",
    }
    if options.model_mirror is not None:
        overrides[MIRROR_VARIABLE] = str(options.model_mirror.absolute())
    if "OMP_NUM_THREADS" in environ:
        overrides["OMP_NUM_THREADS"] = environ["OMP_NUM_THREADS"]
    return Machine(
        programs={"python": (sys.executable,), "python3": (sys.executable,)},
        inherited={
            name: value
            for name, value in environ.items()
            if name not in _NOT_INHERITED_NAMES and not name.startswith(_NOT_INHERITED)
        },
        claims=directory.claims,
        cores=cores(),
        overrides=overrides,
    )


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

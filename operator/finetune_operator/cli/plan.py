"""`finetune plan`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from finetune_operator.cli.console import stdout, write
from finetune_operator.cli.inputs import model_mirror, read_job
from finetune_operator.cli.plan_view import show_plan
from finetune_operator.cli.planned import plan_first_attempt
from finetune_operator.errors import FinetuneError
from finetune_operator.settings import Permissions, Settings
from finetune_operator.yaml_text import dump


def plan_command(manifest: str | None, output: str, gpu_memory: str | None, mirror: Path | None) -> int:
    """Plan a job and show it. The exit code; what does not fit raises PlanningError."""
    job = read_job(manifest)
    planned = plan_first_attempt(job, _settings(gpu_memory), model_mirror(mirror))
    plan = planned.attempt.plan
    if output == "table":
        show_plan(stdout(), planned)
    elif output == "yaml":
        write(dump({"plan": plan.to_wire()}))
    else:
        write(json.dumps({"plan": plan.to_wire()}, indent=2))
    return 0


def _settings(gpu_memory: str | None) -> Settings:
    """The operator's settings; on the user's own machine nothing is forbidden."""
    settings = Settings.from_env(os.environ)
    trainer = settings.trainer
    if gpu_memory is not None:
        try:
            trainer = type(trainer).model_validate({**trainer.to_wire(), "gpuMemory": gpu_memory, "gpuTypes": ()})
        except ValueError as error:
            raise FinetuneError(f"--gpu-memory {gpu_memory!r} is not a size; write it like 80Gi") from error
    permissions = Permissions(remote_code=True, privileged_pod_template=True, local_files=True)
    return settings.model_copy(update={"trainer": trainer, "permissions": permissions})

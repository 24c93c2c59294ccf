"""`finetune render`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from finetune_operator.cli.console import stderr, write
from finetune_operator.cli.inputs import model_mirror, read_job
from finetune_operator.cli.planned import PLACEHOLDER_UID, plan_first_attempt
from finetune_operator.render import config_map, pytorch_job
from finetune_operator.settings import Settings
from finetune_operator.yaml_text import dump_all

_UID_NOTE = f"uid {PLACEHOLDER_UID} stands for the one that the FineTuneJob gets in the cluster"


def render_command(manifest: str | None, output: str, mirror: Path | None) -> int:
    """Print the ConfigMap and the PyTorchJob of a job's first attempt, with the operator's settings of FINETUNE_*."""
    job = read_job(manifest)
    planned = plan_first_attempt(job, Settings.from_env(os.environ), model_mirror(mirror))
    objects = [config_map(planned.attempt), pytorch_job(planned.attempt)]
    notes = [_UID_NOTE, *([planned.note] if planned.note else [])]
    if output == "json":
        write(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2))
        for note in notes:
            stderr().print(f"note: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
    else:
        comments = "".join(f"# {line}\n" for note in notes for line in note.splitlines())
        write(comments + dump_all(objects))
    return 0

"""Command line: `PYTHONPATH=hack python -m chart {schema,kustomize}`, from the root of the tree."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from chart import kustomize, values
from controlplane import ControlPlaneError, find_helm

_CHARTS = Path("charts")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> int:
    """Write what is generated. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="chart", description=__doc__)
    parser.add_argument("what", choices=("schema", "kustomize"))
    if parser.parse_args().what == "schema":
        path, text = _CHARTS / "finetune-operator" / "values.schema.json", values.schema()
    else:
        path = _CHARTS / "kustomize" / "base" / "install.yaml"
        try:
            text = kustomize.base(find_helm(progress=_say), _CHARTS / "finetune-operator")
        except ControlPlaneError as error:
            _say(f"error: {error}")
            return 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

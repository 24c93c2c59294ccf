"""A program of `test_data_bounds`: reads data files and says, of each, what it found and how much memory that took.

Peak memory is that of a process: the kernel is asked to forget it between two files (proc(5), clear_refs).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from finetune_trainer.data.readers import read_rows
from finetune_trainer.errors import TrainerError

_STATUS = Path("/proc/self/status")


def peak() -> float:
    """MiB, since the last `forget`."""
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    # What reading any file at all costs is not counted.
    warm = Path(sys.argv[1])
    for path in (warm, *map(Path, sys.argv[2:])):
        forget()
        before, began, rows, errors, refused = peak(), time.process_time(), 0, [], ""
        try:
            for row in read_rows(path):
                rows += 1
                if row.error is not None and len(errors) < 3:
                    errors.append(str(row.error))
        except TrainerError as error:
            refused = error.message
        found = {"rows": rows, "errors": errors, "refused": refused}
        print(json.dumps({**found, "mebibytes": peak() - before, "seconds": time.process_time() - began}))  # noqa: T201


if __name__ == "__main__":
    main()

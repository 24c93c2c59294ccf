"""`python -m bench.scaling.launch MODULE FILE`: the trainer's own launcher, for processes of the bench."""

from __future__ import annotations

import sys

from finetune_trainer.launch import main

if __name__ == "__main__":
    module, *rest = sys.argv[1:]
    sys.exit(main(rest, program=[sys.executable, "-m", f"bench.scaling.{module}"]))

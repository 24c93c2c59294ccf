"""`make fuzz`: every target, and a table of what came of it.

`PYTHONPATH=hack:. python -m fuzz [--inputs N] [--seed N] [TARGET ...]`. Ends with 1 where an input was answered with
anything but a documented error, or not in time.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import traceback

from fuzz import TARGETS, Outcome, run

INPUTS = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Read what no honest sender would send.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(one.name for one in TARGETS)}")
    parser.add_argument("--inputs", type=int, default=INPUTS, help="in all, over all targets")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    chosen = [one for one in TARGETS if one.name in options.targets or not options.targets]
    if unknown := set(options.targets) - {one.name for one in TARGETS}:
        parser.error(f"no target is called {', '.join(sorted(unknown))}")
    logging.disable(logging.CRITICAL)
    _say(f"seed {options.seed}\n\n{'target':22}{'inputs':>9}{'seconds':>10}{'slowest':>10}  documented errors")
    outcomes: list[Outcome] = []
    failed = 0
    for target in chosen:
        try:
            outcome = run(target, math.ceil(options.inputs / len(chosen)), begin=options.seed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever it was, the other targets are worth their turn
            failed += 1
            _say(f"{target.name:22}  FAILED\n{''.join(traceback.format_exception(error))}")
            continue
        outcomes.append(outcome)
        errors = ", ".join(f"{name} {count}" for name, count in outcome.errors.most_common())
        _say(f"{outcome.target:22}{outcome.inputs:9,}{outcome.seconds:10.1f}{outcome.slowest:9.3f}s  {errors}")
    inputs, seconds = sum(one.inputs for one in outcomes), sum(one.seconds for one in outcomes)
    slowest = max((one.slowest for one in outcomes), default=0.0)
    kinds = len({name for one in outcomes for name in one.errors})
    _say(f"{'all':22}{inputs:9,}{seconds:10.1f}{slowest:9.3f}s  {kinds} kinds; {failed} targets failed")
    return int(failed > 0)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""`finetune`, also installed as `kubectl-finetune`. The package itself imports next to nothing: help is quick."""

from __future__ import annotations

import sys
import traceback

_DEBUG = "--debug"
_INTERNAL = 70


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 invalid input, 3 does not fit, 130 stopped by the user."""
    from finetune_operator.cli.app import app
    from finetune_operator.errors import FinetuneError

    debug = _DEBUG in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG]
    try:
        app(args=arguments, prog_name="finetune")
    except FinetuneError as error:
        from finetune_operator.cli.failure import exit_code, show

        if debug:
            traceback.print_exc()
        show(str(error))
        sys.exit(exit_code(error))
    except Exception as error:
        from finetune_operator.cli.failure import FAILED, refusal, show

        if debug:
            traceback.print_exc()
        refused = refusal(error)
        if refused is not None:
            show(refused)
            sys.exit(FAILED)
        show(f"internal error: {type(error).__name__}: {error}\nThis is a defect. Run again with --debug to see where.")
        sys.exit(_INTERNAL)

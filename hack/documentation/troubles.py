"""What can go wrong: conditions, reasons, exit codes, and every message."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

import finetune_operator
import finetune_trainer
from documentation.markdown import code, inline, page, table
from documentation.source import Raised, documented, errors_made, reasons_given, retries
from finetune_operator import constants, errors, failures
from finetune_operator.failures import Retry
from finetune_trainer.contract import ExitCode, outcome
from finetune_trainer.errors import TrainerError

TRAINER = Path(str(finetune_trainer.__file__)).parent
OPERATOR = Path(str(finetune_operator.__file__)).parent
FOLLOWS = {
    Retry.NEVER: "no: the job ends",
    Retry.SMALLER: "yes, with half the micro-batch, as long as there is one",
    Retry.FREE: "yes, and it does not count",
    Retry.COUNTED: "yes; it counts towards `runPolicy.retries`",
}
_OF_STATES = frozenset({"FINISHED", "IN_PROGRESS", "NOT_SUSPENDED", "STOPPING", "SUSPENDED"})
"""Reasons of conditions that do not hold, and need not."""
CODES = {
    ExitCode.UNAVAILABLE: Retry.COUNTED,
    ExitCode.INTERNAL: Retry.COUNTED,
    ExitCode.GPU_MEMORY: Retry.SMALLER,
    ExitCode.DISK_FULL: Retry.COUNTED,
    ExitCode.PREEMPTED: Retry.FREE,
}
"""What follows an exit code that is no user error; a test asks `failures.classify`."""


def _class_texts(name: str) -> list[tuple[str, str, str]]:
    """Name in the code, value, and what it means."""
    owner = getattr(constants, name)
    found = documented(constants, name)
    return [(key, getattr(owner, key), text) for key, text in found.items() if isinstance(getattr(owner, key), str)]


def reasons() -> list[tuple[str, str, str, str]]:
    """Each reason: its name in the code, the word, what it means and what to do, whether there is another attempt."""
    known = {key: FOLLOWS[Retry[next(iter(found))]] for key, found in _retried().items()}
    ends = reasons_given(OPERATOR, "give_up") | (reasons_given(OPERATOR, "Fact", first="False") - _OF_STATES)
    known |= dict.fromkeys(ends, FOLLOWS[Retry.NEVER])
    known |= dict.fromkeys(reasons_given(OPERATOR, "held_up"), "the job waits, and goes on by itself")
    return [(key, word, text, known.get(key, "")) for key, word, text in _class_texts("Reason")]


def _retried() -> dict[str, set[str]]:
    return retries(Path(str(failures.__file__)).parent)


def trainer_errors() -> list[type[TrainerError]]:
    """Every kind of error of the trainer."""
    found: list[type[TrainerError]] = [TrainerError]
    for one in found:
        found += [sub for sub in one.__subclasses__() if sub not in found]
    return [one for one in found[1:] if one.__module__.startswith("finetune_trainer.")]


def _follows(number: ExitCode) -> str:
    if number is ExitCode.OK:
        return "the job succeeded"
    return FOLLOWS[Retry.NEVER if number.is_user_error else CODES[number]]


def errors_page() -> str:
    """Conditions, phases, reasons and exit codes."""
    codes = documented(outcome, "ExitCode")
    rows = reasons()
    return page(
        "Errors and what to do",
        "`kubectl describe finetunejob NAME` shows the conditions and events; each message says what was wrong, where, "
        "and what to do. All messages are on [a page of their own](messages.md), so that a search finds them.",
        "## Reasons",
        "Of conditions and events. *Another attempt* goes on from the "
        "newest complete checkpoint, after 10 seconds that double with each counted retry, up to 10 minutes.",
        table(
            ("Reason", "What it means, and what to do", "Another attempt"),
            [(f'<a id="{word.lower()}"></a>{code(word)}', text, follows) for _, word, text, follows in rows],
        ),
        "## Conditions",
        table(("Condition", "True means"), [(code(word), text) for _, word, text in _class_texts("Condition")]),
        "## Phases",
        table(("Phase", "Meaning"), [(code(word), text) for _, word, text in _class_texts("Phase")]),
        "## Exit codes of the trainer",
        "`.status.attempts.last.exitCode`. Numbers are those of sysexits.h where it has one that fits.",
        table(
            ("Code", "Name", "What it means", "Another attempt"),
            [(str(int(one)), code(one.name), codes[one.name] or "Done.", _follows(one)) for one in ExitCode],
        ),
        "Exit codes that are not the trainer's: 126 and 127 mean that the image cannot run it (no other attempt); 137 "
        "with `OOMKilled` is too little memory of the pod (no other attempt); any other is an infrastructure failure.",
    )


def _messages(found: Iterable[Raised], default: str = "") -> str:
    rows = sorted({(one.reason or default, one.message) for one in found})
    if default:
        return table(("Reason", "Message"), [(code(reason), inline(text)) for reason, text in rows])
    return table(("Message",), [(inline(text),) for _, text in rows])


def messages_page() -> str:
    """Every message that the trainer and the operator give, by what follows from it."""
    kinds = trainer_errors()
    made = errors_made(TRAINER, {one.__name__: 0 for one in kinds})
    parts = []
    for kind in sorted(kinds, key=lambda one: (one.exit_code, one.__name__)):
        own = [one for one in made if one.error == kind.__name__]
        if own:
            parts += [f"## {kind.__name__}: exit {int(kind.exit_code)}", _messages(own, kind.default_reason)]
    selection = errors_made(TRAINER / "contract", {"SelectionError": 1})
    refused = {name: 0 for name, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, Exception)}
    del refused["InvalidManifest"]
    ours = errors_made(OPERATOR, refused)
    return page(
        "Messages",
        "Taken from the code. Three dots stand for what is known when it happens: a name, a number, an address. "
        "[Errors and what to do](errors.md) says what follows; rules between fields are on [their page](fields.md).",
        "## Choice of layers",
        _messages(selection),
        *parts,
        "## Operator and command line",
        _messages(ours),
    )

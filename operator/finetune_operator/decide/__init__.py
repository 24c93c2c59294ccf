"""What to do about a job: pure functions of what is observed and the time, which is passed in.

`decide` asks a chain of small checks; the first that has an answer gives it. `view` is what they look at, `decision`
what they answer; `finished`, `ending`, `leaving`, `stopping`, `starting` and `following` are the checks, `retries` what
follows a failure.
"""

from finetune_operator.decide.chain import decide, held_up
from finetune_operator.decide.decision import Action, CreateAttempt, Decision, DeleteAttempt, Need
from finetune_operator.decide.retries import give_up
from finetune_operator.decide.view import View

__all__ = ["Action", "CreateAttempt", "Decision", "DeleteAttempt", "Need", "View", "decide", "give_up", "held_up"]

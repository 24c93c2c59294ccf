"""Learning from judged answers: `losses` what each objective asks for, `logprobs` how likely answers are, `rows` and
`reference` what goes in, `trainer` the training, `scores` the evaluation, `task` all of it for one job."""

"""Ways to compute the same training faster, each beside a slow twin that it has to agree with.

`choice` decides which of them a job takes, and says why. `attention` computes attention over samples that lie one after
the other, laid out so by `rows`; `compilation` compiles decoder blocks; `cross_entropy` takes the loss of a plain head;
`adapters` spares PEFT's layers needless copies.
"""

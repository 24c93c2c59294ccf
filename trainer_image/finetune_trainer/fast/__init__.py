"""Ways to compute the same training faster, each beside a slow twin that it has to agree with.

`choice` decides which of them a job takes, and says why. `attention` computes attention over samples that lie one after
the other, laid out so by `rows`; `compilation` compiles decoder blocks; `cross_entropy` takes the loss of a plain head;
`adapters` spares PEFT's layers needless copies. `offload` keeps the inputs of recomputed blocks in host memory, which
`pinned` pins.

`adapter_groups` finds adapted layers that are computed together, `adapter_bases` knows how, by how their weights are
held, `adapter_products` multiplies those in 16 bits, and `stand_ins` has layers take their output from there.
`swiglu_groups` finds MLPs among them: `swiglu` has what lies between their products, `swiglu_kernels` the same in
Triton, `swiglu_fp8` and `swiglu_packed` the whole.

`prefix_choice` decides whether what enters the lowest trained block is kept from one epoch for the next;
`prefix_blocks` leaves out the blocks below, `prefix_cache` knows which rows are there, `prefix_traffic` carries them to
and from `prefix_store`, which has them in host memory and on disk.
"""

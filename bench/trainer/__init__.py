"""Speed and memory of the trainer, through its own configuration, beside its peers. See README.md."""

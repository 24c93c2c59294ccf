"""Stand-alone models: an adapter or a delta merged into its base, beside a run or afterwards (`finetune merge`)."""

"""One machine that learns: GRPO's formulas, batches, and the update of the weights."""

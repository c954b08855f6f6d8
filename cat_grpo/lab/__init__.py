"""The lab: a tiny task, corpus and base model that ship with cat_grpo, so the whole loop runs anywhere."""

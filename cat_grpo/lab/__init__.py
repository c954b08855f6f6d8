"""The lab: a tiny task, corpus and base model that ship with the product, so that the whole loop runs anywhere."""

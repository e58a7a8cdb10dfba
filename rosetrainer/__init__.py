"""A small GPT trainer in which every parallel layout computes what one process does."""

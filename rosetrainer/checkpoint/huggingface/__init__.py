"""Checkpoints of Hugging Face's library: theirs into ours and back, by files alone.

folder reads what lies on the disk and refuses what is no such checkpoint; source says of which of
their tensors one of ours is made; gpt2, llama, bert and t5 are the families, config and names each
way, and families finds the one of a config; load fills a model, each rank its own slices; write
makes a folder that the library reads, and run_from a run folder of ours.
"""

"""Of what all ranks of dp would hold alike, each holds a slice ("ZeRO: Memory Optimizations Toward
Training Trillion Parameter Models", Rajbhandari et al.).

Read cut (which slice), unit (parameters that travel together), sharded_model (when), then
short_rows (what is gathered in bf16), frozen (what is not trained), in_stages (level 1 in a
pipeline) and groups: slices that several groups of ranks hold, or one rank whole.
"""

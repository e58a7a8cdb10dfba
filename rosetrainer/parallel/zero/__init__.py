"""Of what all ranks of dp would hold alike, each holds a slice ("ZeRO: Memory Optimizations Toward
Training Trillion Parameter Models", Rajbhandari et al.).

Read cut (which slice), unit (parameters that travel together), sharded_model (when), then groups:
slices that several groups of ranks hold, or one rank whole.
"""

"""The commands: flags in, lines out, nothing else; `python -m rosetrainer NAME` runs NAME.py.

train, parity, plan, generate, checkpoint, convert, prepare, tour; they share flags and presets.
"""

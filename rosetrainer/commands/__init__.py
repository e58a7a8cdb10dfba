"""The commands: flags in, lines out, nothing else; `python -m rosetrainer NAME` runs NAME.py.

train, parity, plan, generate, checkpoint, convert, prepare, tour; they share flags (flag_fields:
which there are; field_docs: what is told of them) and presets.
"""

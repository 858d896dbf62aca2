"""Checkpoints of other trainers as steps and versions: verl, prime-rl, torchtune.

Pickles of theirs are read by an unpickler that makes inert records of a fixed list of names and
refuses every other by name; nothing that a file names is ever imported or run.
"""

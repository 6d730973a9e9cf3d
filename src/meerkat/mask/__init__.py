"""Which parameters may move: `file.py` has a mask and its file, `making.py` how it is found.

`file.py` loads no torch, so that a server reads it.
"""

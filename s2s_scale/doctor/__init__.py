"""``s2s-scale doctor``: whether this machine can run a profile.

``checks`` examines the machine, ``parity`` trains under the profile and compares with one process,
and ``report`` prints the tables.
"""

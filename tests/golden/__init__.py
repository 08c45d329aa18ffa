"""What the package computed at a known state, and what it must go on computing.

Everything goes through the command line and the public names, so that no rearrangement inside the
package touches these files. ``python -m tests.golden.record`` renews the golden files,
``python -m tests.golden --all`` compares with all of them.

- ``models/``: the six families as they start, saved to disk with their tokenizers
- ``trajectories.json``: loss, gradient norm and learning rate of 20 steps, per family and profile
- ``weights/``: what each family's run under ``cpu`` ends with
- ``plans.json``: which rows, padded to which widths, make each micro-batch, per batching mode
- ``texts/``: a model that has learnt a little, 300 source rows, and its texts with 1 and 4 beams
- ``checkpoints/``: step 10 of one family's runs, as each kind of backend writes it
"""

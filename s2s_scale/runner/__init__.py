"""The composition root: each command's function builds what the command needs and runs it."""

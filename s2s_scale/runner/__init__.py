"""The composition root: one function per command builds what the command needs and runs it."""

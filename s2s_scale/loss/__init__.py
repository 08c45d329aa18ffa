"""The loss of a step, and the projection onto the vocabulary that it begins with."""

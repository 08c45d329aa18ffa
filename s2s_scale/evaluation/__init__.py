"""Text metrics, evaluation of generated rows and generation from plain text."""

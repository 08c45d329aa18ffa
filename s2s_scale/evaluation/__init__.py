"""Text metrics, and evaluation of generated text as it is produced."""

"""Text from a model: streams of rows, beam search in fixed shapes, other engines."""

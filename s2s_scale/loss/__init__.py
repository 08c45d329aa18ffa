"""Losses of encoder-decoder models, from logits or from hidden states."""

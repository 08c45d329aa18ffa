"""From files to tensors: pairs, tokenised examples, the batch plan, samplers and the collator.

``sources``   files or hub data sets -> pairs of text
``examples``  pairs -> token ids and lengths, cached by content
``batching``  lengths -> which rows make each optimizer step (numpy only)
``samplers``  the plan as samplers for ``torch.utils.data.DataLoader``
``collate``   rows -> padded tensors
"""

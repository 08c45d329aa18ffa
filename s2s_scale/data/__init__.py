"""From files to tensors: text pairs, tokenised examples, the batch plan, samplers and collators.

``sources``, ``readers``, ``columns``   what the user named: files or data sets -> text pairs
``tokenize``, ``cache``   text pairs -> token ids and lengths, cached by content
``streaming``             files too large to load: read, tokenised and shuffled block by block
``batch_plan``            lengths -> which rows make each optimizer step
``buckets``, ``packing``  steps by number of tokens: rows of like length, packed rows
``load_balancing``        buckets -> ranks and micro-batches
``samplers``              the plan as samplers for ``torch.utils.data.DataLoader``
``collators``             rows -> padded tensors
``prefetch``              rows and batches ahead of their use
``plan_summary``          what a plan looks like, before training
"""

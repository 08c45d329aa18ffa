"""torch's FSDP2, ``torch.distributed.fsdp.fully_shard``."""

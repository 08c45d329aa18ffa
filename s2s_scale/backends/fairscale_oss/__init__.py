"""FairScale OSS."""

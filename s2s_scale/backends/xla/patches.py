"""What this backend uses of the private parts of torch-xla, torch and transformers."""

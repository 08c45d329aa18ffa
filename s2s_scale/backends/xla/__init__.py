"""torch-xla: TPU devices, and virtual devices on a CPU."""

"""Train and sample with PyTorch, in one process on one device."""

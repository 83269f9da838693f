"""A tenant's network as a product: made ahead of the start, read back from the kernel, repaired, removed."""

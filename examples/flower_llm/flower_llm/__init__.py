"""A federated LoRA app as one would write it for Flower, with nothing of AlignFed in its clients."""

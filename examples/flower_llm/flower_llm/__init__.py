"""A federated LoRA app for Flower; its clients know nothing of AlignFed."""

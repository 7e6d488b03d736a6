"""What a recipe becomes on real machines: servers, devices, and the processes that hold them."""

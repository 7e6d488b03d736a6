"""Real machines: keys, registry, processes and commands of a deployment behind Flower."""

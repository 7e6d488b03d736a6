"""Flower as the way to real devices: the words on the wire, and both ends of it."""

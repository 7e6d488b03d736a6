"""Virtual time, unequal devices, and the engine that drives the coordinator through both."""

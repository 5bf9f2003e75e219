"""Devices as one machine: the mesh, who holds which part, processes that start and stop together."""

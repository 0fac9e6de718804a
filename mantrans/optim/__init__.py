"""Optimizers over the flat buffers."""

"""The networks: a trunk of blocks, composed from a config."""

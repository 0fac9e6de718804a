"""A run as a page: curves, samples, the configuration."""

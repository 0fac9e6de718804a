"""A run's page: curves, samples, the configuration."""

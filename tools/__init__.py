"""Tools for the developers of this project; they are not installed."""

"""Checkpoint files that survive crashes, full disks and malicious content; knows no model."""

"""Files that survive crashes, full disks and strangers: floor 1, knows no model and no run."""

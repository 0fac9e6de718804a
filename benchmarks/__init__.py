"""Every speed and memory figure of the project comes from the modules in this folder."""

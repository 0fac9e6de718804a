"""What a run promises when machines, disks, people and strangers do their worst.

`make test` runs a short form of all of it, `make test-reliability` the long one.
"""

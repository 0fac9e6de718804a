"""The gate: the project's code launches its kernels for a GPU that is not there.

    make gate                          for all architectures; the first time an hour of CPU
    python -m tools.gate --arch 90     for one of them
    python -m tools.gate --small       one small step for sm_90, as `make test` does

Triton lets its driver be replaced (`driver`), so that an ordinary launch on CPU tensors is compiled
for the driver's GPU, and its grid, arguments and machine code are handed to us. The
self-check, the cases of the GPU tests and a training step of each shipped config run that way
(`programs`), and each launch is held to the GPU's rules (`rules`).

What is not executed: no kernel runs, and no operation of PyTorch but those that make views; all
others, products included, return memory of the right shape with nothing in it (`ShapesOnly`).
Nothing here tests a result: that is for tests/kernels, and on a GPU for tests/gpu and the
self-check.
"""

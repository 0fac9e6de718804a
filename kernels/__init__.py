"""Tensors in, tensors out: every operation of the model and its hand-written backward.

Floor 0 of the house. `reference` is the mathematics, `native` the same through PyTorch's own
fused primitives, `fused` the same as Triton kernels; `backend` chooses among them.
"""

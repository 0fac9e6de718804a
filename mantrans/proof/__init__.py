"""The proof that a gradient is right: autograd and finite differences, in float64.

exact         a network in float64, as a function of each of its weights and results
plain         its forwards in PyTorch's own functions, which `mantrans_oracle` differentiates
differences   slopes of the loss, from the loss
check         all of them beside the model's own: `check_gradients`
"""

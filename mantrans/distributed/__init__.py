"""Several processes that train one model: how they meet, exchange tensors, and end together."""

"""Optimizers: plain ``torch.optim.Optimizer``s, with or without Lightning."""

"""Layers and model parts: plain ``torch.nn.Module``."""

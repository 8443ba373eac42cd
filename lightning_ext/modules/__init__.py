"""LightningModules to subclass or to run."""

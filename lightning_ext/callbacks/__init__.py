"""Callbacks to attach to a Trainer."""

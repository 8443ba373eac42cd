"""Metrics with state: ``torchmetrics.Metric`` subclasses."""

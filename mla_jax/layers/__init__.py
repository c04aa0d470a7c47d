"""Layers that plug into a model: attention, the gated MLP, and mixtures of experts."""

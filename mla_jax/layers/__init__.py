"""Layers that plug into a model: attention, the gated MLP, and mixtures of experts.

`attention` is the one to read first. Its parameters and what they make of single tokens are in
`maps`, a cache of one layer alone is made by `mixer`, what a call appends is a `step`; `indexer` is
sparse attention, `relay` what one layer hands to later ones, `memory` cross-attention.
"""

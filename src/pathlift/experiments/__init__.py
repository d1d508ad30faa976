"""Experiments: data, architectures, vectorised training, and the pages that show them."""

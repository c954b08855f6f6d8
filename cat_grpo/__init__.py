"""Compute as Teacher (arXiv:2509.14234): a language model trains itself without labels."""

__version__ = "0.1.0"

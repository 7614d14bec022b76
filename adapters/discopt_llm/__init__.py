"""Compressing causal language models with discopt: dropping attention and MLP sub-blocks."""

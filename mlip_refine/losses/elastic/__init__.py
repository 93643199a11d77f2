"""Losses on elastic constants: static, from fluctuations and from strained cells."""

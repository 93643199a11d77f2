"""The sections of a config file."""

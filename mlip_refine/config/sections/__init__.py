"""The sections of a config file, one module per section."""

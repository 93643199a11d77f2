"""YAML with the line of every value: reading, and messages that name the line."""

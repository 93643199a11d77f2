"""Reading and writing YAML: source positions, overrides, diagnostics and dumps."""

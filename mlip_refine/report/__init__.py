"""Style of tables and figures that all verbs share."""

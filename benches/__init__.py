"""Measurements: each writes a JSON record, and every figure in a document is rendered from one."""

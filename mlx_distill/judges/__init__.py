"""Judges, one a file, and the step that lets one score a comparison."""

"""The ways that experiments compare, and their reports."""

"""Commented YAML for every verb; `harness train quickstart` finds an embedded one by its name."""

"""The built-in plugins, one package each, registered as a third party's are (pyproject.toml, entry points)."""

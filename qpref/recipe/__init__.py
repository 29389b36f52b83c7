"""A recipe's TOML -> Plan: every name resolved, every mistake reported at once."""

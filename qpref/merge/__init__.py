"""Adapter + base -> one plain safetensors model that is held to the policy that was trained."""

"""The command that plans a run: python -m dtcp.plan."""

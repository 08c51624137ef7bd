"""Environments: what answers the agent. A shell in a sandbox, an OpenEnv server, tools over a database."""

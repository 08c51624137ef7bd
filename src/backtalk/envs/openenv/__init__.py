"""An environment on any OpenEnv server; documented in docs/openenv.md."""

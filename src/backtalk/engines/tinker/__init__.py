"""The engine over the Tinker API: hosted Tinker, SkyRL's server, or any service that speaks it."""

"""Run commands in one shell of a sandbox: the programs inside, and the pipes to them."""

"""Turn messages into tokens and tokens into actions, with who made each token."""

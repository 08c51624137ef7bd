"""What the engines share whose model is on a service that trains on rows of tokens: Tinker, Foundry."""

"""Read Dockerfiles and images: build root file systems, or derive how a task starts over this machine's programs."""

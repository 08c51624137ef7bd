"""Build root file systems: from a folder, a tar file or a Dockerfile."""

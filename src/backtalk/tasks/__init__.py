"""Tasks: an instruction, the files to start from, a verifier. Read from folders and rows, or generated."""

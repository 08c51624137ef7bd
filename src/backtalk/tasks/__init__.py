"""Tasks (an instruction, files to start from, tests): read from folders and rows, or generated."""

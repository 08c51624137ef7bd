"""Write the reports of runs and studies: their curves as PNG, and the page of `backtalk view` as one file."""

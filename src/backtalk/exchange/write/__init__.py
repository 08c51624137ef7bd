"""Write our trajectories as the records of other libraries: plain dicts, none of them is needed here."""
